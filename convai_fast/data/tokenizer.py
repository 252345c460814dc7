"""Tokenizers and the five special tokens of the persona-dialogue format."""

import json
from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer, GPT2Tokenizer, OpenAIGPTTokenizer, PreTrainedTokenizerFast

from convai_fast.errors import UserError

SPECIAL_TOKENS = ("<bos>", "<eos>", "<speaker1>", "<speaker2>", "<pad>")

# Any of these lets AutoTokenizer find out by itself which class to use.
_SELF_DESCRIBING_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")


class SpecialIds(NamedTuple):
    """Ids of the special tokens; they differ between checkpoints, so never assume them."""

    bos: int
    eos: int
    speaker1: int
    speaker2: int
    pad: int


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load a GPT or GPT-2 tokenizer and add those of the five special tokens that it lacks.

    `path` is a folder with `tokenizer.json`, a folder with only `vocab.json` and `merges.txt` (as
    the old libraries wrote them), or a Hub id. Adding tokens changes `len(tokenizer)`: the caller
    compares that with the model's embedding.

    Raises UserError when the folder holds no tokenizer, or one whose special tokens clash.
    """
    folder = Path(path)
    try:
        if not folder.is_dir() and (folder.is_absolute() or str(path).startswith(".")):
            raise UserError(f"there is no folder {path} to load a tokenizer from")
        if not folder.is_dir():
            tokenizer = AutoTokenizer.from_pretrained(str(path))
        elif any((folder / name).is_file() for name in _SELF_DESCRIBING_FILES):
            tokenizer = _load_self_describing(folder)
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            tokenizer = _class_from_vocabulary(folder).from_pretrained(str(folder))
        else:
            raise UserError(
                f"{folder} holds no tokenizer: it needs tokenizer.json, or vocab.json and "
                "merges.txt"
            )
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception for damaged files
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"cannot load a tokenizer from {path}: {reason} (give a folder with tokenizer.json or "
            f"vocab.json and merges.txt, or the id of a model on the Hub)"
        ) from error
    add_special_tokens(tokenizer)
    return tokenizer


def _load_self_describing(folder: Path) -> PreTrainedTokenizerFast:
    # A config.json without model_type (old libraries) leaves AutoTokenizer clueless, although the
    # vocabulary itself tells GPT from GPT-2.
    if (folder / "tokenizer.json").is_file() or not (folder / "vocab.json").is_file():
        return AutoTokenizer.from_pretrained(str(folder))
    return _class_from_vocabulary(folder).from_pretrained(str(folder))


def _class_from_vocabulary(folder: Path) -> type[PreTrainedTokenizerFast]:
    """OpenAI GPT marks the end of a word with `</w>`, GPT-2 its beginning with `Ġ`."""
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    ends_words = any(token.endswith("</w>") for token in vocabulary)
    return OpenAIGPTTokenizer if ends_words else GPT2Tokenizer


def add_special_tokens(tokenizer: PreTrainedTokenizerFast) -> int:
    """Add the special tokens that `tokenizer` lacks, and return how many that were."""
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    # Together and first, so that new ids come in the predecessor's order.
    tokenizer.add_tokens(missing, special_tokens=True)
    bos, eos, speaker1, speaker2, pad = SPECIAL_TOKENS
    tokenizer.add_special_tokens(
        {
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad,
            "extra_special_tokens": [speaker1, speaker2],
        }
    )
    return len(missing)


def special_ids(tokenizer: PreTrainedTokenizerFast) -> SpecialIds:
    """Look up the ids of the five special tokens by name.

    Raises UserError naming the first token that is missing.
    """
    ids = [tokenizer.backend_tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
    if None in ids:
        missing = SPECIAL_TOKENS[ids.index(None)]
        raise UserError(f"the tokenizer has no token {missing}: load it with load_tokenizer()")
    return SpecialIds(*ids)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens.

    A literal `<eos>` or `<speaker1>` in a text is spelled out in ordinary pieces, so that nobody's
    words can end a reply or change the speaker.
    """
    if not texts:
        return []
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before
