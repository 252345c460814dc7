"""Tokenizers as the old libraries saved them.

vocab.json, merges.txt    the byte-pair encoding
special_tokens.txt        pytorch-pretrained-bert: one token a line, with ids from the first after
                          vocab.json's on
added_tokens.json         pytorch-transformers: {token: id}
"""

from pathlib import Path
from typing import Any

from transformers import GPT2Tokenizer, OpenAIGPTTokenizer, PreTrainedTokenizerFast

from convai_fast.errors import UserError, shown
from convai_fast.files import read_json

SPECIAL_TOKENS_FILES = ("special_tokens.txt", "added_tokens.json")


def is_old(folder: Path) -> bool:
    """Whether `folder` has a vocabulary, and nothing that tells transformers how to read it."""
    config = folder / "tokenizer_config.json"
    return (
        (folder / "vocab.json").is_file()
        and (folder / "merges.txt").is_file()
        and not (folder / "tokenizer.json").is_file()
        and not (config.is_file() and "tokenizer_class" in read_json(config))
    )


def read(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer, each of whose special tokens has the id that the folder's own file tells.

    Raises UserError when the vocabulary is damaged, or does not fit the special tokens.
    """
    vocabulary = _read_ids(folder / "vocab.json")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise UserError(
            f"{folder / 'vocab.json'} does not number its tokens 0, 1, 2, … without a gap: get the "
            "file that belongs to the model"
        )
    # OpenAI GPT marks the end of a word with `</w>`, GPT-2 its beginning with `Ġ`.
    ends_words = any(token.endswith("</w>") for token in vocabulary)
    tokenizer_class, unknown = (
        (OpenAIGPTTokenizer, "<unk>") if ends_words else (GPT2Tokenizer, "<|endoftext|>")
    )
    special = _special_tokens(folder, vocabulary)
    if unknown not in vocabulary and special:
        raise UserError(
            f"{folder / 'vocab.json'} lacks {unknown}, which the vocabulary of every GPT or "
            "GPT-2 has: get the file that belongs to the model"
        )
    merges: Any = _read_merges(folder, vocabulary)  # the annotation there knows no pairs
    tokenizer = tokenizer_class(vocab=vocabulary, merges=merges)
    by_id = sorted(special, key=special.__getitem__)
    tokenizer.add_tokens(by_id, special_tokens=True)
    # Where a vocabulary that was trained by itself lacks it, the class adds its unknown token.
    expected = vocabulary | (special or {unknown: vocabulary.get(unknown, len(vocabulary))})
    if tokenizer.get_vocab() != expected:
        raise UserError(
            f"{folder}: the tokenizer that its files make has other ids than they say: restore "
            f"vocab.json and {' or '.join(SPECIAL_TOKENS_FILES)}"
        )
    return tokenizer


def _special_tokens(folder: Path, vocabulary: dict[str, int]) -> dict[str, int]:
    """The tokens beside the vocabulary and their ids, checked to continue it without a gap."""
    files = [folder / name for name in SPECIAL_TOKENS_FILES if (folder / name).is_file()]
    if not files:
        return {}
    if len(files) > 1:
        raise UserError(
            f"{folder} holds both {' and '.join(SPECIAL_TOKENS_FILES)}: remove the one that does "
            "not belong to the model"
        )
    (file,) = files
    if file.suffix == ".json":
        special = _read_ids(file)
    else:
        tokens = _read_text(file).splitlines()
        special = {token: len(vocabulary) + i for i, token in enumerate(tokens)}
        if len(special) < len(tokens):
            raise UserError(f"{file} names a token twice: remove one of the lines")
    clash = [t for t, i in special.items() if t in vocabulary and vocabulary[t] != i]
    if clash:
        raise UserError(
            f"{file} gives {shown(clash[0])} the id {special[clash[0]]}, but vocab.json "
            f"{vocabulary[clash[0]]}: get the files that belong to the model"
        )
    ids = sorted(i for token, i in special.items() if token not in vocabulary)
    if ids != list(range(len(vocabulary), len(vocabulary) + len(ids))):
        raise UserError(
            f"{file} must number its tokens from {len(vocabulary)} on, the first id after those "
            "of vocab.json, without a gap: get the files that belong to the model"
        )
    return special


def _read_merges(folder: Path, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    path = folder / "merges.txt"
    merges = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if (number == 1 and line.startswith("#version")) or not line.strip():
            continue
        pair = line.split()
        if len(pair) != 2:
            raise UserError(f"{path}, line {number}: two pieces must stand there, not {len(pair)}")
        # Where it is not, the tokenizers library can panic instead of raising an error.
        if not {*pair, "".join(pair)} <= vocabulary.keys():
            raise UserError(
                f"{path}, line {number}: {' and '.join(map(shown, pair))} and what they make must "
                "be in vocab.json: get the files that belong to the model"
            )
        merges.append((pair[0], pair[1]))
    return merges


def _read_ids(path: Path) -> dict[str, int]:
    content = read_json(path)
    for token, id in content.items():
        if type(id) is not int:
            raise UserError(
                f"{path}: the id of {shown(token)} must be a whole number, not {shown(id)}"
            )
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not text in UTF-8: {error}") from error
