"""What a reply follows: persona and history, cut to fit and laid out as the model reads them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from convai_fast.dialogue.fit import fit
from convai_fast.dialogue.layout import Layout, Place, build_sequence, sentence_place


class Prompt(NamedTuple):
    """Token and segment ids of what a reply follows, the layout's `reply_open` included."""

    input_ids: list[int]
    token_type_ids: list[int]


def fit_prompt(
    persona: Sequence[Sequence[int]],
    history: Sequence[Sequence[int]],
    layout: Layout,
    room: int,
    elsewhere: Mapping[Place, Sequence[Sequence[int]]] = {},
) -> Prompt:
    """The prompt of a dialogue, of at most `room` tokens; see `fit` for what is cut.

    Args:
        persona: token ids of each sentence.
        history: token ids of each turn, oldest first, the one that is answered last.
        room: where it is less than `layout.empty_prompt`, the prompt has that many tokens.
        elsewhere: the token ids of all sentences, or turns, in places where they differ from those;
            see `fit`.

    Example:
        >>> fit_prompt([[7]], [[8], [9, 10]], classic(special_ids), room=6)
        Prompt([bos, 7, speaker2, 9, 10, speaker1], [speaker1] * 2 + [speaker2] * 3 + [speaker1])
    """
    others = {place: [*map(len, texts)] for place, texts in elsewhere.items()}
    # Beside the prompt's last token.
    kept = fit([*map(len, persona)], [*map(len, history)], layout, room - 1, others)
    count = kept.num_sentences
    places = [sentence_place(i, count) for i in range(count)]
    sentences = [elsewhere.get(place, persona)[i] for i, place in enumerate(places)]
    skipped = len(history) - kept.num_turns
    turns = [
        elsewhere.get(place, history)[skipped + i]
        for i, place in enumerate(layout.places_of_turns(kept.num_turns, bool(sentences)))
    ]
    turns[:1] = [turn[kept.num_skipped_tokens :] for turn in turns[:1]]
    input_ids, token_type_ids, _ = build_sequence(sentences, turns, [], layout, with_eos=False)
    return Prompt(input_ids, token_type_ids)


def shortest_prompt(layout: Layout) -> int:
    """Tokens of a prompt that has one of the turn that is answered."""
    return len(build_sequence([], [[0]], [], layout, with_eos=False)[0])
