"""Dialogues as they are read, kept in temporary files: memory is that of one conversation.

texts            uint8  the UTF-8 of all texts, one after another; one entry a conversation and
                        text, so that equal texts of different conversations are there twice
text_ends        int64  where each text ends
text_keys        [., 2] a 128-bit hash of each text, by which `number_texts` finds equal ones

conversation_*   for each conversation: its split, its source, its last dialogue
link_*           what joins conversations that are one: see `groups`
persona_*, history_*, candidate_*, example_*     as the tables of a store (see `store`), over
                        all conversations in the order of reading
"""

import hashlib
import tempfile
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Self

import numpy as np

from convai_fast.data.groups import first_equal, groups, is_telling, link_of_id, links_of
from convai_fast.data.store import Origin
from convai_fast.dialogue.dialogue import Conversation, Dialogue, History
from convai_fast.errors import UserError

VALID_NAMES = ("valid", "validation", "val", "dev", "test")
"""What a validation split may be called, the preferred name first."""

_FLUSH = 1 << 17  # numbers of a column that are kept in memory
_MAX_KNOWN_BYTES = 1 << 24  # of texts met lately, which are not written again
_BYTES_OF_ANY = 300  # that a known text takes, whatever its length


class _Column:
    """Numbers that grow at their end, on disk."""

    def __init__(self, folder: Path, name: str, dtype: type) -> None:
        self.dtype = np.dtype(dtype)
        self.path = folder / name
        self.file = open(self.path, "wb")  # noqa: SIM115
        self.values = array({"int32": "i", "int64": "q", "uint8": "B"}[self.dtype.name])
        self.count = 0

    def append(self, value: int) -> None:
        self.values.append(value)
        self.count += 1
        if len(self.values) >= _FLUSH:
            self.flush()

    def extend(self, values: Sequence[int] | bytes) -> None:
        self.count += len(values)
        if isinstance(values, bytes):
            self.values.frombytes(values)
        else:
            self.values.extend(values)
        if len(self.values) >= _FLUSH:
            self.flush()

    def flush(self) -> None:
        """Write what is kept in memory; UserError where there is no room."""
        try:
            self.values.tofile(self.file)
            self.file.flush()
        except OSError as error:
            raise UserError(
                f"cannot keep the dialogues in {self.path.parent} meanwhile: {error.strerror}; "
                "make room there"
            ) from error
        del self.values[:]

    def mapped(self) -> np.ndarray:
        """All numbers so far, on disk."""
        self.flush()
        if self.count == 0:
            return np.zeros(0, self.dtype)
        return np.memmap(self.path, self.dtype, "r")


_COLUMNS = {
    "texts": np.uint8,
    "text_ends": np.int64,
    "text_keys": np.uint8,
    "conversation_split": np.int32,
    "conversation_source": np.int32,
    "conversation_dialogue_end": np.int64,
    "conversation_history_end": np.int64,
    "persona_ids": np.int32,
    "persona_ends": np.int64,
    "history_ids": np.int32,
    "example_dialogue": np.int32,
    "example_history_first": np.int64,
    "example_history_count": np.int32,
    "candidate_ids": np.int32,
    "candidate_ends": np.int64,
    "link_keys": np.uint8,  # links of conversations: see `groups`
    "link_kinds": np.uint8,
    "link_conversation": np.int32,
    "reply_keys": np.uint8,  # of the true reply but for case and white space
}


class Spool:
    """What was read so far, in a folder of its own within `folder`; see the top of this file.

    A context manager, with whose end the folder goes.

    Attributes:
        folder: its own.
        splits: names of the splits, in the order of `conversation_split`.
        fingerprints: of each source, by number, a hash of all its dialogues.
        notes: what reading told: what was left out or not used.
        made_before: where a source, by number, is a store: what that was made of. Its splits stay.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._scratch = tempfile.TemporaryDirectory(
            prefix="convai-fast-", dir=folder, ignore_cleanup_errors=True
        )
        self.folder = Path(self._scratch.name)
        self.columns = {name: _Column(self.folder, name, dtype) for name, dtype in _COLUMNS.items()}
        self.splits: list[str] = []
        self.notes: list[str] = []
        self.made_before: dict[int, list[Origin]] = {}
        self._hashes: list = []
        self._known: dict[str, int] = {}
        self._keys: dict[int, bytes] = {}  # of the known texts
        self._known_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for column in self.columns.values():
            with suppress(OSError):  # what could not be written is tried once more
                column.file.close()
        self._scratch.cleanup()

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name].mapped()

    @property
    def num_texts(self) -> int:
        """Texts so far, those that are there more than once counted each time."""
        return self.columns["text_ends"].count

    @property
    def fingerprints(self) -> list[str]:
        """A hash of the dialogues of each source, in their order and with their splits."""
        return [digest.hexdigest()[:16] for digest in self._hashes]

    def text_of(self) -> Callable[[int], str]:
        """A function from the number of a text, of those read so far, to the text."""
        data, ends = np.asarray(self["texts"]), np.asarray(self["text_ends"])

        def text(number: int) -> str:
            begin = int(ends[number - 1]) if number else 0
            return data[begin : int(ends[number])].tobytes().decode()

        return text

    def tell(self, note: str, report: Callable[[str], None]) -> None:
        """Report something of the dialogues, and keep it among `notes`."""
        self.notes.append(note)
        report(note)

    def add(self, split: str, conversation: Conversation, source: int = 0) -> None:
        """Take in one conversation, all of whose sides land in the same split."""
        while len(self._hashes) <= source:
            self._hashes.append(hashlib.sha256())
        if split not in self.splits:
            self.splits.append(split)
        if self._known_bytes > _MAX_KNOWN_BYTES:
            self._known.clear()
            self._keys.clear()
            self._known_bytes = 0
        self._hashes[source].update(f"{split} {len(conversation)}".encode())
        columns, runs = self.columns, _HistoryRuns(self)
        for dialogue in conversation:
            self._add_dialogue(dialogue, runs, self._hashes[source])
        columns["conversation_split"].append(self.splits.index(split))
        columns["conversation_source"].append(source)
        self._add_links(conversation, source)
        columns["conversation_dialogue_end"].append(columns["persona_ends"].count)
        columns["conversation_history_end"].append(columns["history_ids"].count)

    def _add_dialogue(
        self, dialogue: Dialogue, runs: "_HistoryRuns", digest: "hashlib._Hash"
    ) -> None:
        columns = self.columns
        number = columns["persona_ends"].count
        persona = self._intern(dialogue.personality)
        columns["persona_ids"].extend(persona)
        columns["persona_ends"].append(columns["persona_ids"].count)
        digest.update(b"persona %d" % len(persona))
        digest.update(b"".join(map(self._keys.__getitem__, persona)))
        for utterance in dialogue.utterances:
            if not utterance.candidates:
                raise UserError("an utterance has no candidates; the last is the true reply")
            first, count, new = runs.add(utterance.history)
            candidates = self._intern(utterance.candidates)
            columns["example_dialogue"].append(number)
            columns["example_history_first"].append(first)
            columns["example_history_count"].append(count)
            columns["candidate_ids"].extend(candidates)
            columns["candidate_ends"].append(columns["candidate_ids"].count)
            columns["reply_keys"].extend(_key(" ".join(utterance.candidates[-1].lower().split())))
            digest.update(b"turn %d %d %d" % (count, len(new), len(candidates)))
            digest.update(b"".join(map(self._keys.__getitem__, (*new, *candidates))))

    def _intern(self, texts: Sequence[str]) -> list[int]:
        known = self._known
        return [known[text] if text in known else self._write(text) for text in texts]

    def _write(self, text: str) -> int:
        columns, number = self.columns, self.num_texts
        data = text.encode()
        columns["texts"].extend(data)
        columns["text_ends"].append(columns["texts"].count)
        key = hashlib.blake2b(data, digest_size=16).digest()
        columns["text_keys"].extend(key)
        self._known[text] = number
        self._keys[number] = key
        self._known_bytes += len(data) + _BYTES_OF_ANY
        return number

    def _add_links(self, conversation: Conversation, source: int) -> None:
        runs = _runs_of(conversation)
        if len(runs) > 1:
            # A lone turn that others have, too, makes no conversation of theirs.
            runs = [*filter(is_telling, runs), [turn for run in runs for turn in run]]
        # Where a conversation comes in parts, rows of a table, the data may name it.
        name = getattr(conversation[0], "conversation_id", None) if conversation else None
        links = [] if name is None else [link_of_id(f"{source} {name}")]
        for run in runs:
            # A text's number is its own only within this file: texts may be there twice.
            keys = [self._keys[number] for number in self._intern(run)]
            links += links_of(keys, list(map(len, run)))
        number = self.columns["conversation_split"].count - 1
        for kind, key in links:
            self.columns["link_kinds"].append(kind)
            self.columns["link_keys"].extend(key)
            self.columns["link_conversation"].append(number)

    @cached_property
    def group_of(self) -> np.ndarray:
        """The group of each conversation, once all are read: see `groups`."""
        return self._groups(first_equal(self["link_keys"]))

    @cached_property
    def group_in_source(self) -> np.ndarray:
        """The same where conversations of different sources are never one."""
        if len(self._hashes) == 1:
            return self.group_of
        first = first_equal(self["link_keys"]).astype(np.int64)
        sources = self["conversation_source"][self["link_conversation"]]
        _, places, own = np.unique(
            first * len(self._hashes) + sources, return_index=True, return_inverse=True
        )
        return self._groups(places[own])

    def _groups(self, first: np.ndarray) -> np.ndarray:
        count = self.columns["conversation_split"].count
        return groups(first, self["link_kinds"], self["link_conversation"], count)


class _HistoryRuns:
    """Histories of one conversation, which share one run of `history_ids` where one goes on from
    the other."""

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.table = spool.columns["history_ids"]
        self.first = self.table.count
        self.run: list[int] = []
        self.turns: list[str] | None = None  # of the history met last, if it was a view

    def add(self, history: Sequence[str]) -> tuple[int, int, list[int]]:
        """Where the history begins, its number of turns, and the numbers of those that are new."""
        is_known = isinstance(history, History) and history.turns is self.turns
        self.turns = history.turns if isinstance(history, History) else None
        start = len(self.run) if is_known else 0
        if is_known and len(history) <= start:
            return self.first, len(history), []
        numbers = self.spool._intern(history[start:])
        if not is_known:
            shared = min(len(self.run), len(numbers))
            if self.run[:shared] == numbers[:shared]:
                numbers = numbers[shared:]
            else:
                self.first, self.run = self.table.count, []
        self.run += numbers
        self.table.extend(numbers)
        return self.first, len(history), numbers


def _goes_on(history: Sequence[str], following: Sequence[str]) -> bool:
    """Whether a longer history begins with this one."""
    if isinstance(history, History) and isinstance(following, History):
        return history.turns is following.turns and len(history) < len(following)
    return len(history) < len(following) and list(following[: len(history)]) == list(history)


def _runs_of(conversation: Conversation) -> list[list[str]]:
    """What is said in a conversation: one list of turns, or several where the histories of its
    turns do not go on from one another."""
    utterances = [u for dialogue in conversation for u in dialogue.utterances]
    runs: list[list[str]] = []
    for utterance, following in zip_longest(utterances, utterances[1:]):
        if following is not None and _goes_on(utterance.history, following.history):
            continue
        run = [*utterance.history, utterance.candidates[-1]]
        if runs and runs[-1] == run[: len(runs[-1])]:  # the other side, with a turn more
            runs[-1] = run
        elif not runs or runs[-1][: len(run)] != run:
            runs.append(run)
    return runs


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def fingerprint(dialogues: Mapping[str, Sequence[Dialogue]]) -> str:
    """A hash of the dialogues of all splits, with their candidates."""
    with Spool() as spool:
        for split, members in dialogues.items():
            for dialogue in members:
                spool.add(split, [dialogue])
        return "".join(spool.fingerprints)
