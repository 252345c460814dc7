"""Text into token ids: always whole, and nobody's words ever a special token."""

from collections.abc import Sequence
from dataclasses import astuple
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from convai_fast.dialogue.format import SPECIAL_TOKENS
from convai_fast.dialogue.layout import Layout, Place, Surroundings
from convai_fast.errors import UserError, reason_of
from convai_fast.files import fingerprint

_State = tuple[int, str]

# A copy for each tokenizer, remade when tokens were added since, or the chat template changed.
_encoders: WeakKeyDictionary[PreTrainedTokenizerFast, tuple[_State, Tokenizer]]
_encoders = WeakKeyDictionary()


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens.

    A literal `<eos>` or `<speaker1>` in a text is spelled out in ordinary pieces, so that nobody's
    words can end a reply or change the speaker. Truncation, padding and dropout, which a tokenizer
    keeps from an earlier use and saves in its file, do not apply. Threads may share a tokenizer.

    Raises UserError when a text holds half of a surrogate pair, or when the tokenizer's own files
    contradict each other.
    """
    if not texts:
        return []
    encoder = _encoder(tokenizer)
    try:
        return [e.ids for e in encoder.encode_batch_fast(texts, add_special_tokens=False)]
    except Exception as error:  # the tokenizers library raises plain Exception
        for text in texts:
            if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                raise UserError(
                    f"the text {text!r} holds half of a surrogate pair, which is no character: "
                    "delete it, or decode the text again as UTF-8"
                ) from error
        raise UserError(
            f"the tokenizer cannot read text ({reason_of(error)}): its files are damaged, get them "
            "again"
        ) from error


def encode_in(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], surroundings: Surroundings
) -> list[list[int]]:
    """Token ids of each text where it stands, otherwise as `encode`.

    A text that its tokenizer joins with what stands before it is encoded without that.
    """
    if surroundings == Surroundings():
        return encode(tokenizer, texts)
    before, leading, trailing, trims = astuple(surroundings)
    own = [f"{leading}{text.strip() if trims else text}{trailing}" for text in texts]
    if not before:
        return encode(tokenizer, own)
    prefix, *joined = encode(tokenizer, [before, *(before + text for text in own)])
    return [
        ids[len(prefix) :] if ids[: len(prefix)] == prefix else encode(tokenizer, [text])[0]
        for text, ids in zip(own, joined, strict=True)
    ]


def encode_at(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], places: Sequence[Place], layout: Layout
) -> list[list[int]]:
    """Token ids of each text in its place; see `encode_in`."""
    surroundings = [layout.surroundings[place] for place in places]
    encoded: list[list[int]] = [[] for _ in texts]
    for each in set(surroundings):
        own = [i for i, around in enumerate(surroundings) if around == each]
        for i, ids in zip(own, encode_in(tokenizer, [texts[i] for i in own], each), strict=True):
            encoded[i] = ids
    return encoded


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of how `encode` turns text into ids, and of the special tokens' ids."""
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in SPECIAL_TOKENS]
    return fingerprint(_encoder(tokenizer).to_str().encode(), repr(ids).encode())


def _encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A private copy of the tokenizer, whose settings nobody else changes."""
    backend, template = tokenizer.backend_tokenizer, str(tokenizer.chat_template or "")
    state = backend.get_vocab_size(), template
    known = _encoders.get(tokenizer)
    if known is not None and known[0] == state:
        return known[1]
    encoder = Tokenizer.from_str(backend.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    # Some files do not call special what their chat template writes around turns. Words stay words.
    marks = [t for t in tokenizer.get_added_vocab() if not (t.isalnum() or t.isspace())]
    encoder.add_special_tokens([mark for mark in marks if mark in template])
    encoder.encode_special_tokens = True
    if getattr(encoder.model, "dropout", None):
        encoder.model.dropout = None
    _encoders[tokenizer] = state, encoder
    return encoder
