"""The five special tokens of the predecessor's format; `layout.py` tells where they stand."""

from typing import NamedTuple

SPECIAL_TOKENS = ("<bos>", "<eos>", "<speaker1>", "<speaker2>", "<pad>")

SPEAKERS = SPECIAL_TOKENS[2:4]

IGNORED = -100  # the label of a token that has none, as in transformers


class SpecialIds(NamedTuple):
    """Ids of the special tokens; they differ between checkpoints, so never assume them."""

    bos: int
    eos: int
    speaker1: int
    speaker2: int
    pad: int
