"""The layout of a model that has learnt to chat, read off its tokenizer's chat template.

A template is a program that writes a conversation. Here it writes a few whose texts are known, and
what stands between the texts becomes the layout: a persona is the system message, a sentence a
line, speaker2's turns are the user's, speaker1's the assistant's.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import product, takewhile
from typing import NamedTuple
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerFast

from convai_fast.dialogue.dialogue import Dialogue
from convai_fast.dialogue.encoding import encode_in
from convai_fast.dialogue.format import SPEAKERS
from convai_fast.dialogue.layout import (
    Ids,
    Layout,
    PersonaTurn,
    Place,
    Surroundings,
    build_sequence,
    sentence_place,
)
from convai_fast.errors import UserError, reason_of

# Words that no template writes of its own accord.
_SENTENCES = ("quokka", "wombat", "numbat")
_TURNS = ("axolotl", "tapir", "okapi", "fossa", "kakapo")
_REPLY = "pangolin"
_WORD = "narwhal"

# Beginnings and ends that tokenizers join with what stands around a text.
_PROBES = (_WORD, "Tea.", "tea?", "1", "...", "é", "'s", '"tea"', "(1)")

# A template that asks for the date gets the one that Llama 3's has where there is no clock, so that
# a model reads tomorrow what it was trained with. The line break belongs to the block.
_CALENDAR = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"

_WAY_OUT = (
    "write one that has a system message, turns that alternate and a special token after each "
    "reply, as chat_template.jinja in the tokenizer's folder, use another chat model, or take the "
    "template out, for the model to learn special tokens instead"
)


class _Chat(NamedTuple):
    persona: Sequence[str]
    turns: Sequence[str]  # oldest first, the partner's last one at the end
    reply: str = _REPLY


# A layout for each tokenizer, made anew when its template or its tokens have changed since.
_layouts: WeakKeyDictionary[PreTrainedTokenizerFast, tuple[str, int, Layout]] = WeakKeyDictionary()


def layout_of(tokenizer: PreTrainedTokenizerFast) -> Layout:
    """The layout that a tokenizer's chat template implies, with the special tokens of its files.

    Before a reply comes what the template writes before the last one of a conversation, even if it
    begins one that is yet to be written in another way: a model then reads in use what it was
    trained with.

    Raises UserError when there is no template, or none that can be read as a layout.
    """
    state = str(tokenizer.chat_template), len(tokenizer)
    if _layouts.get(tokenizer, ("", 0))[:2] != state:
        _layouts[tokenizer] = *state, _read(tokenizer)
    return _layouts[tokenizer][2]


def _read(tokenizer: PreTrainedTokenizerFast) -> Layout:
    surroundings = tuple(_surroundings(tokenizer, place) for place in Place)
    around = _around(tokenizer, surroundings, "none", _Chat([], _TURNS))
    opening, to_speaker1, to_speaker2, *_, to_reply, end = around
    if end[: len(to_reply)] == to_reply:  # another reply is begun, asked for or not
        end = end[:1]

    speaker1_begins = _Chat([], _TURNS[:2])
    partner_begins = not all(_writes(tokenizer, each) for each in (_Chat([], []), speaker1_begins))
    opening1 = to_speaker1  # which any division of it suits
    if not partner_begins:
        opening1 = _around(tokenizer, surroundings, "none", speaker1_begins)[0]
    close2, open1 = _divided(to_speaker1, _prefix(end, to_reply), opening1)
    close1, open2 = _divided(to_speaker2, end, opening)
    begin = opening[: len(opening) - len(open2)]
    reply_open = to_reply[len(close2) :]
    if not reply_open:
        raise UserError(f"the chat template writes nothing that begins a reply: {_WAY_OUT}")

    persona_turn, persona_open, persona_close = _persona(tokenizer, surroundings, close1, open2)
    no_persona: Ids = ()
    if persona_turn == "none":
        begin, bare = _prefix(begin, persona_open), begin
        no_persona = bare[len(begin) :]
    if persona_turn != "last":
        persona_open = persona_open[len(begin) :]

    eos = end[0]
    pads = (tokenizer.pad_token_id, tokenizer.unk_token_id, eos)
    pad = next(id for id in pads if id is not None)
    vocabulary = tokenizer.get_vocab()
    speakers = [vocabulary.get(token, pad) for token in SPEAKERS]
    layout = Layout(
        begin=begin,
        persona_open=persona_open,
        persona_close=persona_close,
        persona_turn=persona_turn,
        no_persona=no_persona,
        turn_open=(open1, open2),
        turn_close=(close1, close2),
        partner_begins=partner_begins or persona_turn != "none",
        reply_open=reply_open,
        eos=eos,
        ends=_ends(tokenizer, eos, [*around, persona_open]),
        pad=pad,
        speaker1=speakers[0],
        speaker2=speakers[1],
        surroundings=surroundings,
    )
    for num_sentences, num_turns in product(range(4), range(1, 6)):
        chat = _Chat(_SENTENCES[:num_sentences], _TURNS[:num_turns])
        is_whole = not _completed(layout, chat)[1]
        if is_whole and not _matches(tokenizer, layout, chat):
            raise UserError(
                "the chat template writes turns or a persona in more ways than a layout has: "
                f"{_WAY_OUT}"
            )
    return layout


def verify(
    tokenizer: PreTrainedTokenizerFast, layout: Layout, dialogues: Iterable[Dialogue]
) -> tuple[int, int]:
    """How many dialogues there are, and how many have exactly the template's tokens.

    The whole conversation up to the end of the last true reply is compared. They differ where a
    text says something that the template or its tokenizer takes for its own, as `<|im_end|>`.
    """
    matches = []
    for dialogue in dialogues:
        last = dialogue.utterances[-1]
        chat = _Chat(dialogue.personality, last.history, last.candidates[-1])
        matches.append(_matches(tokenizer, layout, chat))
    return len(matches), sum(matches)


def encode_dialogue(
    tokenizer: PreTrainedTokenizerFast,
    layout: Layout,
    persona: Sequence[str],
    history: Sequence[str],
    reply: str,
) -> list[int]:
    """Token ids of a whole dialogue, up to the end of the reply."""
    chat, lacks_a_turn = _completed(layout, _Chat(persona, history, reply))
    encoded: dict[bool, list[list[int]]] = {True: [], False: []}
    for place, text in _texts(chat, layout.persona_turn):
        encoded[place < Place.SPEAKER1] += encode_in(tokenizer, [text], layout.surroundings[place])
    *turns, answer = encoded[False]
    ids, *_ = build_sequence(encoded[True], turns[lacks_a_turn:], answer, layout)
    return ids


def _matches(tokenizer: PreTrainedTokenizerFast, layout: Layout, chat: _Chat) -> bool:
    ids = encode_dialogue(tokenizer, layout, *chat)
    try:
        return _ids(tokenizer, _written(tokenizer, _completed(layout, chat)[0]))[: len(ids)] == ids
    except UserError:  # a template may refuse what a text says
        return False


def _completed(layout: Layout, chat: _Chat) -> tuple[_Chat, bool]:
    """A chat that the partner begins if the layout asks for it, and whether a turn was missing."""
    missing = layout.partner_begins and len(chat.turns) % 2 == 0
    return (chat._replace(turns=["", *chat.turns]) if missing else chat), missing


def _divided(between: Ids, end: Ids, opening: Ids) -> tuple[Ids, Ids]:
    """What closes a turn and what opens the next, of the tokens between them.

    A turn is closed at the end of a conversation too, and opened at its beginning, which some
    tokenizers write with other tokens than the same text elsewhere: those open nothing.
    """
    opened = _suffix(opening, between[len(_prefix(end, between)) :])
    return between[: len(between) - len(opened)], opened


def _persona(
    tokenizer: PreTrainedTokenizerFast,
    surroundings: Sequence[Surroundings],
    close1: Ids,
    open2: Ids,
) -> tuple[PersonaTurn, Ids, Ids]:
    """Where a persona stands, and what stands before and after it."""
    chat = _Chat(_SENTENCES[:1], _TURNS[:3])
    text = _written(tokenizer, chat)
    if text.find(chat.persona[0]) > text.find(chat.turns[0]):
        before, after = _around(tokenizer, surroundings, "last", chat)[2:4]
        return "last", before[len(close1) :], after
    before, after = _around(tokenizer, surroundings, "first", chat)[:2]
    if after[len(after) - len(open2) :] == open2:
        return "none", before, after[: len(after) - len(open2)]
    return "first", before, after


def _surroundings(tokenizer: PreTrainedTokenizerFast, place: Place) -> Surroundings:
    """What a text is encoded with in its place, so that nothing joins with what stands around."""

    def written(text: str) -> str:
        return _written(tokenizer, _example(place, text))

    before, found, after = written(_WORD).partition(_WORD)
    if not found or _WORD in after:
        drops_persona = place < Place.SPEAKER1 and written(_WORD) == written(_REPLY)
        what = "a system message, which the persona is" if drops_persona else "each text once"
        raise UserError(f"the chat template does not write {what}: {_WAY_OUT}")
    special = "|".join(map(re.escape, tokenizer.get_added_vocab())) or "(?!)"
    if place == Place.REPLY and not re.search(special, after):
        raise UserError(f"the chat template ends a reply without a special token: {_WAY_OUT}")
    before, after = re.split(special, before)[-1], re.split(special, after)[0]
    stem = before.rstrip(" ")
    leading = before[len(stem) :]
    if place in (Place.FIRST_SENTENCE, Place.MIDDLE_SENTENCE):
        trailings = ["\n"]
    elif place in (Place.SPEAKER1, Place.REPLY):
        trailings = [after]
    else:
        trailings = ["", after[: len(after) - len(after.lstrip("\n"))]]
    trims = place < Place.SPEAKER1 or written(f"{_WORD} ") == written(_WORD)
    ids = [_ids(tokenizer, written(text)) for text in _PROBES]
    # After a line break no tokenizer takes a text for the beginning of everything.
    for start, trailing in product(("", (stem or "\n")[-1]), trailings):
        surroundings = Surroundings(start, leading, trailing, trims)
        own = encode_in(tokenizer, list(_PROBES), surroundings)
        at = _find(own[0], ids[0])
        if at is None:
            continue
        head, tail = ids[0][:at], ids[0][at + len(own[0]) :]
        if all(head + each + tail == all_ids for each, all_ids in zip(own, ids, strict=True)):
            return surroundings
    raise UserError(
        "the tokenizer joins texts with what the chat template writes around them: use a chat "
        "model whose template has special tokens or line breaks there"
    )


def _example(place: Place, text: str) -> _Chat:
    """A chat with a text in its place."""
    sentence, other = _SENTENCES[:2]
    turn, later = _TURNS[:2]
    examples = {
        Place.ONLY_SENTENCE: _Chat([text], [turn]),
        Place.FIRST_SENTENCE: _Chat([text, sentence], [turn]),
        Place.LAST_SENTENCE: _Chat([sentence, text], [turn]),
        Place.MIDDLE_SENTENCE: _Chat([sentence, text, other], [turn]),
        Place.SPEAKER1: _Chat([], [turn, text, later]),
        Place.SPEAKER2: _Chat([], [text]),
        Place.PERSONA_TURN: _Chat([sentence], [text]),
        Place.REPLY: _Chat([], [turn], text),
    }
    return examples[place]


def _around(
    tokenizer: PreTrainedTokenizerFast,
    surroundings: Sequence[Surroundings],
    persona_turn: PersonaTurn,
    chat: _Chat,
) -> list[Ids]:
    """Token ids before, between and after the texts of a chat."""
    rest = _ids(tokenizer, _written(tokenizer, chat))
    around = []
    for place, text in _texts(chat, persona_turn):
        [own] = encode_in(tokenizer, [text], surroundings[place])
        at = _find(own, rest)
        if at is None:
            raise UserError(f"the chat template does not keep texts in their order: {_WAY_OUT}")
        around.append(tuple(rest[:at]))
        rest = rest[at + len(own) :]
    return [*around, tuple(rest)]


def _texts(chat: _Chat, persona_turn: PersonaTurn) -> list[tuple[Place, str]]:
    """A chat's texts in the order in which they are written."""
    num_sentences, num_turns = len(chat.persona), len(chat.turns)
    persona = [(sentence_place(i, num_sentences), text) for i, text in enumerate(chat.persona)]
    turns = [
        (Place.SPEAKER2 if (num_turns - i) % 2 else Place.SPEAKER1, text)
        for i, text in enumerate(chat.turns)
    ]
    at = num_turns - 1 if persona_turn == "last" else 0
    if persona and persona_turn != "none":
        turns[at] = Place.PERSONA_TURN, turns[at][1]
    return [*turns[:at], *persona, *turns[at:], (Place.REPLY, chat.reply)]


def _written(tokenizer: PreTrainedTokenizerFast, chat: _Chat) -> str:
    """What the template makes of a chat."""
    turns = [
        {"role": "user" if (len(chat.turns) - i) % 2 else "assistant", "content": text}
        for i, text in enumerate(chat.turns)
    ]
    reply = {"role": "assistant", "content": chat.reply}
    bare = _rendered(tokenizer, [*turns, reply])
    if not chat.persona:
        return bare
    persona = "\n".join(sentence.strip() for sentence in chat.persona)
    prompt = [{"role": "system", "content": persona}, *turns]
    text = _rendered(tokenizer, [*prompt, reply])
    if text == bare and turns:
        # Some write it into the last turn of a prompt only, as Mistral's do.
        text = _rendered(tokenizer, prompt, prompt=True)
        text += bare.removeprefix(_rendered(tokenizer, turns, prompt=True))
    return text


def _rendered(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], prompt: bool = False
) -> str:
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer has no chat template: {_WAY_OUT}")
    try:
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=_CALENDAR + tokenizer.get_chat_template(),
            add_generation_prompt=prompt,
            tokenize=False,
            enable_thinking=False,
        )
    except Exception as error:  # whatever a program may raise
        has_persona = messages[0]["role"] == "system"
        what = "a system message, which the persona is" if has_persona else "a conversation"
        raise UserError(
            f"the chat template refuses {what} ({reason_of(error)}): {_WAY_OUT}"
        ) from error
    return str(text)


def _writes(tokenizer: PreTrainedTokenizerFast, chat: _Chat) -> bool:
    try:
        text = _written(tokenizer, chat)
    except UserError:
        return False
    return all(each in text for each in (*chat.persona, *chat.turns, chat.reply))


def _ends(tokenizer: PreTrainedTokenizerFast, eos: int, around: Sequence[Ids]) -> Ids:
    """The special tokens that the template writes, the end of a text, and segments."""
    written = {id for ids in around for id in ids}
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    vocabulary = tokenizer.get_vocab()
    speakers = {vocabulary.get(token) for token in SPEAKERS}  # which nobody says
    ends = written & special | speakers | {tokenizer.eos_token_id, eos}
    return tuple(sorted(id for id in ends if isinstance(id, int)))


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    # Not verbose: it would warn of more tokens than the model has positions.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _find(part: Sequence[int], whole: Sequence[int]) -> int | None:
    """Where `part` first stands in `whole`."""
    n = len(part)
    return next((i for i in range(len(whole) - n + 1) if whole[i : i + n] == part), None)


def _prefix(*ids: Ids) -> Ids:
    """What all begin with."""
    equal = takewhile(lambda each: len(set(each)) == 1, zip(*ids, strict=False))
    return tuple(id for id, *_ in equal)


def _suffix(*ids: Ids) -> Ids:
    """What all end with."""
    return _prefix(*(each[::-1] for each in ids))[::-1]
