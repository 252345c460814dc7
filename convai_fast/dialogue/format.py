"""The format that the model reads: a dialogue laid out between five special tokens.

[bos] persona…  [speaker] history[0] …  [speaker] history[-1]  [speaker1] reply [eos]
"""

from collections.abc import Sequence
from typing import NamedTuple

SPECIAL_TOKENS = ("<bos>", "<eos>", "<speaker1>", "<speaker2>", "<pad>")

IGNORED = -100  # the label of a token that has none, as in transformers


class SpecialIds(NamedTuple):
    """Ids of the special tokens; they differ between checkpoints, so never assume them."""

    bos: int
    eos: int
    speaker1: int
    speaker2: int
    pad: int


def build_sequence(
    persona: Sequence[Sequence[int]],
    history: Sequence[Sequence[int]],
    reply: Sequence[int],
    special_ids: Sequence[int],
    with_eos: bool = True,
) -> tuple[list[int], list[int], list[int]]:
    """Input ids, segment ids and labels of one candidate; `special_ids` as in `collate`.

    With persona [[7]], history [[8], [9]] and reply [5, 6]:

        input_ids       bos 7   s1 8    s2 9    s1 5 6 eos
        token_type_ids  s1  s1  s1 s1   s2 s2   s1 s1 s1 s1
        labels           .  .    .  .    .  .    . 5 6 eos
    """
    bos, eos, speaker1, speaker2, _ = special_ids
    parts = [(speaker1, [bos, *(token for sentence in persona for token in sentence)])]
    for i, turn in enumerate(history):
        turns_until_reply = len(history) - i
        speaker = speaker2 if turns_until_reply % 2 else speaker1
        parts.append((speaker, [speaker, *turn]))
    answer = [*reply, eos] if with_eos else list(reply)
    parts.append((speaker1, [speaker1, *answer]))

    input_ids = [token for _, part in parts for token in part]
    token_type_ids = [speaker for speaker, part in parts for _ in part]
    labels = [IGNORED] * (len(input_ids) - len(answer)) + answer
    return input_ids, token_type_ids, labels
