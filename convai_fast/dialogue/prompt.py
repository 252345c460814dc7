"""What a reply follows: persona and history, cut to fit and laid out as the model reads them."""

from collections.abc import Sequence
from typing import NamedTuple

from convai_fast.dialogue.fit import fit
from convai_fast.dialogue.format import SpecialIds, build_sequence

# <bos>, one turn of a speaker token and one token, and the reply's <speaker1>.
SHORTEST_PROMPT = 4


class Prompt(NamedTuple):
    """Token and segment ids of what a reply follows, its `<speaker1>` included."""

    input_ids: list[int]
    token_type_ids: list[int]


def fit_prompt(
    persona: Sequence[Sequence[int]],
    history: Sequence[Sequence[int]],
    special_ids: SpecialIds,
    room: int,
) -> Prompt:
    """The prompt of a dialogue, of at most `room` tokens; see `fit` for what is cut.

    Args:
        persona: token ids of each sentence.
        history: token ids of each turn, oldest first, the one that is answered last.
        room: at least 2, for `<bos>` and the reply's `<speaker1>`.

    Example:
        >>> fit_prompt([[7]], [[8], [9, 10]], special_ids, room=6)
        Prompt([bos, 7, speaker2, 9, 10, speaker1], [speaker1] * 2 + [speaker2] * 3 + [speaker1])
    """
    kept = fit([*map(len, persona)], [*map(len, history)], room - 1)  # beside <speaker1>
    turns = list(history[len(history) - kept.num_turns :])
    turns[:1] = [turn[kept.num_skipped_tokens :] for turn in turns[:1]]
    input_ids, token_type_ids, _ = build_sequence(
        persona[: kept.num_sentences], turns, [], special_ids, with_eos=False
    )
    return Prompt(input_ids, token_type_ids)
