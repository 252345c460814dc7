"""The text of a reply as a terminal shows it, piece by piece."""

from collections.abc import Iterable, Iterator

from transformers import PreTrainedTokenizerFast

from convai_fast.generation.detokenizer import Detokenizer, TextPieces

# What a byte-level vocabulary can write but should not do to a terminal: move its cursor, ring.
_CONTROL_CHARACTERS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)], "�")
del _CONTROL_CHARACTERS[ord("\n")], _CONTROL_CHARACTERS[ord("\t")]


def stream_text(
    tokenizer: PreTrainedTokenizerFast, token_ids: Iterable[int], seen: list[int]
) -> Iterator[str]:
    """Yield the text of `token_ids` piece by piece, without spaces in front of the first word.

    Each id is appended to `seen`. The bytes of an unfinished character wait for its end, and are
    dropped when it does not come.
    """
    pieces, has_begun = TextPieces(Detokenizer(tokenizer)), False
    for token in token_ids:
        seen.append(token)
        piece = pieces.add([token])
        piece = piece if has_begun else piece.lstrip()
        if piece:
            has_begun = True
            yield piece.translate(_CONTROL_CHARACTERS)
