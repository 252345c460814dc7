r"""ParlAI's text formats.

Numbered lines, `N text<TAB>reply<TAB>reward<TAB>candidate|candidate`, of which text and reply are
required; a number that does not go up begins a new dialogue::

    1 your persona: i like tea .
    2 hello !<TAB>hi , some tea ?<TAB><TAB>no .|hi , some tea ?

Lines of `name:value` fields, an episode up to `episode_done:True`::

    text:your persona: i like tea .\nhello !<TAB>labels:hi , some tea ?<TAB>episode_done:True

And `dialog` of JSON lines, a list of exchanges of two speakers. A line break inside a text is
written as the two characters \n. A `__SILENCE__` is never a turn, a reply or a candidate.
"""

import re
from collections.abc import Iterable, Iterator

from convai_fast.data.readers.fields import SILENCE, Texts, Turns, as_list, fields_of, get
from convai_fast.data.readers.log import ReadingLog
from convai_fast.dialogue.dialogue import Conversation
from convai_fast.errors import UserError

NUMBERED = re.compile(r"[0-9]{1,9} ")
FIELDS = re.compile(r"(text|labels|eval_labels|label_candidates|id|episode_done):")

_PERSONA, _PARTNERS_PERSONA = "your persona:", "partner's persona:"
_LINE = re.compile(r"([0-9]{1,9}) (.*)", re.DOTALL)
_TEXT_FIELDS = ("text", "labels", "eval_labels", "label_candidates", "episode_done", "reward", "id")


def read_numbered(
    lines: Iterable[tuple[int, str]], name: str, texts: Texts, log: ReadingLog
) -> Iterator[Conversation]:
    """Read numbered lines. An episode with a bad line is a bad record."""
    episodes = log.conversations(_episodes(lines, name), _Numbered(name, texts, log).read)
    yield from episodes


def read_fields(
    lines: Iterable[tuple[int, str]], name: str, texts: Texts, log: ReadingLog
) -> Iterator[Conversation]:
    """Read lines of `name:value` fields, an episode at a time."""
    yield from log.conversations(_field_episodes(lines, name), _Fields(name, texts, log).read)


def read_dialog(record: object, where: str, texts: Texts, log: ReadingLog) -> Conversation:
    """ParlAI's conversations: exchanges of two speakers, of whom the second is learnt."""
    turns, speakers = Turns(texts), []
    exchanges = as_list(get(fields_of(record, where), "dialog", where), f"{where}dialog")
    for i, exchange in enumerate(exchanges):
        for j, item in enumerate(as_list(exchange, f"{where}dialog[{i}]")):
            place = f"{where}dialog[{i}][{j}]."
            turn = fields_of(item, place)
            speaker = texts.check(get(turn, "id", place), f"{place}id")
            text = texts.check(get(turn, "text", place), f"{place}text").strip()
            if speaker not in speakers:
                speakers.append(speaker)
            if text != SILENCE:
                turns.add(speaker, text)
    if len(speakers) > 2:
        raise UserError(f"{where}dialog has {len(speakers)} speakers; it must have two")
    return [turns.side([], speakers[-1] if speakers else "")]


class _Episode:
    """One dialogue as it grows: persona, turns, and the distractors of each reply."""

    def __init__(self, texts: Texts) -> None:
        self.texts = texts
        self.persona: list[str] = []
        self.turns = Turns(texts)
        self.distractors: dict[int, list[str]] = {}  # of the turn with that number

    def hear(self, text: str, where: str) -> bool:
        """Take in the text of a line: persona sentences, and what the partner says.

        Returns whether the partner says anything.
        """
        said = []
        for part in text.split("\n"):
            if part.startswith(_PERSONA):
                sentence = part.removeprefix(_PERSONA).strip()
                self.persona += self.texts.check_all(
                    [sentence], f"{where}: your persona", drop_blank=True
                )
            elif not part.startswith(_PARTNERS_PERSONA):
                said.append(part)
        words = "\n".join(said).strip()
        if not said or words == SILENCE:
            return False
        self.turns.add("partner", self.texts.check(words, f"{where}: the text"))
        return True

    def answer(self, reply: str, others: list[str], where: str) -> None:
        """Add the reply, unless it is silence, and its distractors."""
        if reply == SILENCE:
            return
        self.turns.add("speaker", reply)
        others = [other for other in others if other != SILENCE]
        others = self.texts.check_all(others, f"{where}: candidates", drop_blank=True)
        self.distractors.setdefault(len(self.turns) - 1, []).extend(others)

    def conversation(self) -> Conversation:
        """The speaker's side; a first turn of the speaker's own is learnt as well."""
        side = self.turns.side(self.persona, "speaker", begin=0)
        for utterance in side.utterances:
            utterance.candidates[:0] = self.distractors[len(utterance.history)]
        return [side]


Lines = list[tuple[int, str]]


def _episodes(lines: Iterable[tuple[int, str]], name: str) -> Iterator[tuple[str, Lines]]:
    episode: Lines = []
    last_number = -1
    for line_number, line in lines:
        if not line.strip():
            continue
        match = _LINE.match(line)
        number = int(match[1]) if match else last_number + 1
        if number <= last_number and episode:
            yield name, episode
            episode = []
        episode.append((line_number, line))
        last_number = number
    if episode:
        yield name, episode


class _Numbered:
    """Reads an episode of numbered lines."""

    def __init__(self, name: str, texts: Texts, log: ReadingLog) -> None:
        self.name, self.texts, self.log = name, texts, log

    def read(self, lines: Lines, where: str) -> Conversation:
        episode = _Episode(self.texts)
        for i, (line_number, line) in enumerate(lines):
            self._read_line(
                episode, line, f"{self.name}, line {line_number}", is_last=i + 1 == len(lines)
            )
        return episode.conversation()

    def _read_line(self, episode: _Episode, line: str, where: str, is_last: bool) -> None:
        match = _LINE.fullmatch(line.replace("\\n", "\n"))
        if match is None:
            raise UserError(
                f"{where}: a ParlAI line begins with its number in the dialogue and a space; "
                "number the lines from 1"
            )
        fields = match[2].split("\t")
        if len(fields) > 4:
            raise UserError(
                f"{where}: {len(fields)} fields where ParlAI has at most four (text, reply, "
                "reward, candidates); delete the tabs inside the texts"
            )
        if len(fields) > 1 and _is_persona(fields[0]):
            raise UserError(
                f"{where}: a tab stands inside or behind a persona sentence, so that what follows "
                "would be a reply; write a space instead"
            )
        heard = episode.hear(fields[0], where)
        if len(fields) == 1:
            if heard and not is_last:
                raise UserError(
                    f"{where}: there is no tab, so there is no reply; write 'N text<TAB>reply' or "
                    "'N your persona: ...'"
                )
            if heard:
                self.log.note("last texts that nobody answers are left out")
            return
        reply = self.texts.check(fields[1].strip(), f"{where}: the reply")
        others = fields[3] if len(fields) == 4 else ""
        episode.answer(reply, _without(_split(others), _split(reply)), where)


def _field_episodes(lines: Iterable[tuple[int, str]], name: str) -> Iterator[tuple[str, Lines]]:
    episode: Lines = []
    for line_number, line in lines:
        if not line.strip():
            continue
        episode.append((line_number, line))
        if re.search(r"(^|\t)episode_done:\s*true\s*(\t|$)", line, re.IGNORECASE):
            yield name, episode
            episode = []
    if episode:
        yield name, episode


class _Fields:
    """Reads an episode of `name:value` lines."""

    def __init__(self, name: str, texts: Texts, log: ReadingLog) -> None:
        self.name, self.texts, self.log = name, texts, log

    def read(self, lines: Lines, where: str) -> Conversation:
        episode = _Episode(self.texts)
        for i, (line_number, line) in enumerate(lines):
            place = f"{self.name}, line {line_number}"
            fields = self._fields(line, place)
            heard = episode.hear(fields.get("text", ""), place)
            labels = fields.get("labels", fields.get("eval_labels"))
            if labels is None:
                if heard and i + 1 < len(lines):
                    raise UserError(
                        f"{place}: there are no labels, so there is no reply; write labels:reply"
                    )
                self.log.note("last texts that nobody answers are left out")
                continue
            # Any of several labels is right: the first is learnt, and none is a distractor.
            right = [part.strip() for part in labels.split("|")]
            label, *more = [part for part in right if part != SILENCE] or [SILENCE]
            if more:
                self.log.note("of several labels of a turn, the first is learnt")
            others = [
                other for other in _split(fields.get("label_candidates", "")) if other not in right
            ]
            episode.answer(self.texts.check(label, f"{place}: labels"), others, place)
        return episode.conversation()

    def _fields(self, line: str, place: str) -> dict[str, str]:
        fields = {}
        for part in line.split("\t"):
            field, colon, value = part.partition(":")
            if not colon:
                raise UserError(
                    f"{place}: {part[:40]!r} is no field; a line of ParlAI text is fields such as "
                    "text:… and labels:…, with a tab between them"
                )
            if field not in _TEXT_FIELDS:
                self.log.note(f"the field {field!r} is not understood and not used")
            fields[field] = value.replace("\\n", "\n").strip()
        return fields


def _is_persona(text: str) -> bool:
    last = text.split("\n")[-1]
    return last.startswith((_PERSONA, _PARTNERS_PERSONA))


def _split(texts: str) -> list[str]:
    return [part.strip() for part in texts.split("|")] if texts else []


def _without(candidates: list[str], reply: list[str]) -> list[str]:
    """`candidates` without the pieces in a row that `reply` was split into at its own `|`."""
    size, kept, i = len(reply), [], 0
    while i < len(candidates):
        if candidates[i : i + size] == reply:
            i += size
        else:
            kept.append(candidates[i])
            i += 1
    return kept
