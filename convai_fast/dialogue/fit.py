"""The one rule of what is cut from a dialogue that is too long, told on lengths alone.

Training, evaluation, ranking and generation all ask it; `csrc/host/index.h` is its C++ twin.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Fit(NamedTuple):
    """What is kept of a persona and a history.

    Attributes:
        num_sentences: how many persona sentences, the first ones.
        num_turns: how many turns of history, the last ones.
        num_skipped_tokens: how many tokens are left out at the beginning of the first kept turn.
        num_tokens: of what is kept, with `<bos>` and each turn's speaker token.
    """

    num_sentences: int
    num_turns: int
    num_skipped_tokens: int
    num_tokens: int


def fit(sentence_lengths: Sequence[int], turn_lengths: Sequence[int], room: int) -> Fit:
    """Cut a persona and a history to the `room` tokens that a reply leaves them.

    The oldest turns go first, down to the one that is answered, then persona sentences from the
    end, then the beginning of the turn that is answered, which goes altogether, with its speaker
    token, where not one token of it fits. `<bos>` always stays.

    Args:
        sentence_lengths: tokens of each persona sentence.
        turn_lengths: tokens of each turn, oldest first, without its speaker token.
        room: positions for `<bos>`, persona and history.

    Example:
        >>> fit([2, 1], [2, 1, 3], room=13)  # <bos>, 3 of persona, 3 + 2 + 4 of history: all
        Fit(num_sentences=2, num_turns=3, num_skipped_tokens=0, num_tokens=13)
        >>> fit([2, 1], [2, 1, 3], room=7)  # <bos>, a sentence and the last turn
        Fit(num_sentences=1, num_turns=1, num_skipped_tokens=0, num_tokens=7)
        >>> fit([2, 1], [2, 1, 3], room=4)  # <bos>, a speaker and the turn's last two tokens
        Fit(num_sentences=0, num_turns=1, num_skipped_tokens=1, num_tokens=4)
    """
    num_sentences, num_turns = len(sentence_lengths), len(turn_lengths)
    total = 1 + sum(sentence_lengths) + sum(turn_lengths) + num_turns
    while total > room and num_turns > 1:
        total -= 1 + turn_lengths[-num_turns]
        num_turns -= 1
    while total > room and num_sentences > 0:
        num_sentences -= 1
        total -= sentence_lengths[num_sentences]
    if total <= room or num_turns == 0:
        return Fit(num_sentences, num_turns, 0, total)
    # Only the turn that is answered is left.
    excess = total - room
    return Fit(0, 1, excess, room) if excess < turn_lengths[-1] else Fit(0, 0, 0, 1)
