"""Tokenizers and the five special tokens of the persona-dialogue format."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from convai_fast.archive import unpacked
from convai_fast.dialogue import old_tokenizer
from convai_fast.dialogue.format import SPECIAL_TOKENS, SpecialIds
from convai_fast.errors import UserError, reason_of
from convai_fast.hub import download

# Any of these lets AutoTokenizer find out by itself which class to use.
_SELF_DESCRIBING_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")
_HUB_FILES = ("*.json", "merges.txt", "chat_template.jinja")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer and add those of the five special tokens that it lacks.

    `path` is a folder or a tar archive of one, or a Hub id. A folder has `tokenizer.json`, or, as
    the old libraries wrote them, `vocab.json`, `merges.txt` and a file that tells the special
    tokens' ids. Adding tokens changes `len(tokenizer)`: the caller compares that with the model's
    embedding.

    Raises UserError when there is no tokenizer, or one whose files contradict each other.
    """
    tokenizer = read_tokenizer(path)
    add_special_tokens(tokenizer)
    return tokenizer


def read_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer as `load_tokenizer` does, with only the tokens that its files hold."""
    with unpacked(path) as source:
        folder = Path(source.path).expanduser()
        try:
            if folder.is_dir():
                return _read_folder(folder)
            if folder.is_absolute() or str(path).startswith((".", "~")):
                raise UserError(f"there is no folder {path} to load a tokenizer from")
            return _read_folder(download(str(path), _HUB_FILES, "tokenizer"))
        except UserError:
            raise
        except BaseException as error:
            # For damaged files the tokenizers library raises plain Exception, or panics.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(
                f"cannot load a tokenizer from {source.path}: {reason_of(error)} (give a folder "
                "with tokenizer.json or vocab.json and merges.txt, or the id of a model on the Hub)"
            ) from error


def _read_folder(folder: Path) -> PreTrainedTokenizerFast:
    present = {file.name for file in folder.iterdir()}
    if old_tokenizer.is_old(folder):
        tokenizer = old_tokenizer.read(folder)
        found = [token for token in SPECIAL_TOKENS if token in tokenizer.get_vocab()]
        if found and len(found) < len(SPECIAL_TOKENS):
            missing = ", ".join(token for token in SPECIAL_TOKENS if token not in found)
            raise UserError(
                f"{folder} names the ids of {', '.join(found)} but not of {missing}: restore its "
                f"{' or '.join(old_tokenizer.SPECIAL_TOKENS_FILES)}"
            )
        return tokenizer
    if not present & set(_SELF_DESCRIBING_FILES):
        raise UserError(
            f"{folder} holds no tokenizer: it needs tokenizer.json, or vocab.json and merges.txt"
        )
    return _from_transformers(str(folder))


def _from_transformers(path: str) -> PreTrainedTokenizerFast:
    # A tokenizer's folder may name code of its own, which must not run, nor ask to.
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{path} has a tokenizer of the class {type(tokenizer).__name__}, of which there is no "
            "fast version (tokenizer.json): give one that has it"
        )
    if not set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()):
        raise UserError(
            f"{path} says which tokenizer the model has, but lacks its vocabulary: restore "
            "tokenizer.json, or vocab.json and merges.txt, or name another with `tokenizer`"
        )
    # Kept in the file by whoever encoded a padded batch before saving it.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


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
    ids = []
    for token in SPECIAL_TOKENS:
        id = tokenizer.backend_tokenizer.token_to_id(token)
        if id is None:
            raise UserError(f"the tokenizer has no token {token}: load it with load_tokenizer()")
        ids.append(id)
    return SpecialIds(*ids)
