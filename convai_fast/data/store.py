"""The dialogues as token ids: a folder of memory-mapped arrays.

One arena holds each distinct utterance once; everything else is a small table of integers that
points into it, so memory grows with tokens and never with examples x candidates x length:

    tokens             uint16 or int32   all utterances, one after another
    utterance_offsets  int64             where each utterance begins in tokens
    and for each split:
    persona_ids        int32             utterances of all personas, one after another
    persona_offsets    int64             where the persona of each dialogue begins in persona_ids
    history_ids        int32             utterances of all conversations, one after another
    dialogue           int32             the dialogue of each example
    history_first      int64             where the history of each example begins in history_ids
    history_count      int32             how many turns it has
    candidate_ids      int32             utterances of all candidates; the true reply is the last
    candidate_offsets  int64             where the candidates of each example begin

The history of a turn is usually that of the turn before and two utterances more, so that the
examples of a dialogue share one run of `history_ids`:

    history_ids  a b c d e      example 0: a | example 1: a b c | example 2: a b c d e
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from convai_fast.dialogue.dialogue import Dialogue
from convai_fast.dialogue.encoding import encode, tokenizer_fingerprint
from convai_fast.dialogue.format import SpecialIds
from convai_fast.dialogue.tokenizer import special_ids
from convai_fast.errors import UserError

FORMAT_VERSION = 1
_ENCODE_CHUNK = 20_000  # texts tokenised at once: bounds the memory that ids take as Python lists


@dataclass(frozen=True, slots=True)
class SplitTables:
    """The tables of one split; see the top of this file."""

    persona_ids: Tensor
    persona_offsets: Tensor
    history_ids: Tensor
    dialogue: Tensor
    history_first: Tensor
    history_count: Tensor
    candidate_ids: Tensor
    candidate_offsets: Tensor

    @property
    def num_dialogues(self) -> int:
        """How many dialogues (one speaker's side each) the split has."""
        return len(self.persona_offsets) - 1

    @property
    def num_examples(self) -> int:
        """How many turns to be answered the split has."""
        return len(self.dialogue)


_INT64_TABLES = ("persona_offsets", "history_first", "candidate_offsets")
_TABLES = tuple(field.name for field in fields(SplitTables))


class DialogueStore:
    """Tokenised dialogues on disk, opened without reading them. See the top of this file.

    `tokens`, `utterance_offsets` and the tables in `splits["train"]`, `splits["valid"]` are
    memory-mapped tensors on the CPU; `meta` is what `meta.json` says.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open the store in `folder`.

        Raises UserError when the folder holds no store, one of another format version, or one whose
        arrays are not of the size or the content that `meta.json` promises.
        """
        self.folder = Path(folder)
        meta = _read_meta(self.folder)
        if meta is None:
            raise UserError(
                f"{self.folder} holds no dialogue store (its meta.json is missing or is not a "
                f"store's): make one with `convai-fast prepare`"
            )
        self.meta, version = meta, meta["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"the store in {self.folder} has format version {version}, and this version of "
                f"convai_fast reads {FORMAT_VERSION}: make it anew with `convai-fast prepare`"
            )
        try:
            self.special_ids = SpecialIds(*self.meta["special_ids"])
            self.tokens = self._map("tokens", getattr(torch, self.meta["token_dtype"]))
            self.utterance_offsets = self._map("utterance_offsets", torch.int64)
            self.splits = {split: self._map_split(split) for split in self.meta["splits"]}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.folder / 'meta.json'} is damaged: make the store anew with "
                f"`convai-fast prepare`"
            ) from error
        self._check()

    @property
    def num_bytes(self) -> int:
        """Size on disk, in bytes."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def utterance(self, index: int) -> list[int]:
        """Token ids of one utterance."""
        begin, end = self.utterance_offsets[index : index + 2].tolist()
        return self.tokens[begin:end].tolist()

    def _map_split(self, split: str) -> SplitTables:
        tables = {
            name: self._map(
                f"{split}.{name}", torch.int64 if name in _INT64_TABLES else torch.int32
            )
            for name in _TABLES
        }
        return SplitTables(**tables)

    def _map(self, name: str, dtype: torch.dtype) -> Tensor:
        path, size = self.folder / f"{name}.bin", self.meta["sizes"][name]
        if not path.is_file() or path.stat().st_size != size * dtype.itemsize:
            raise UserError(
                f"{path} is missing or was cut short: make the store anew with "
                f"`convai-fast prepare`"
            )
        if size == 0:
            return torch.empty(0, dtype=dtype)
        return torch.from_file(str(path), shared=False, size=size, dtype=dtype)

    def _check(self) -> None:
        """Everything points inside: a wrong index would make the kernels read foreign memory."""
        num_utterances = len(self.utterance_offsets) - 1
        sound = _is_partition(self.utterance_offsets, len(self.tokens))
        for tables in self.splits.values():
            ids = (tables.persona_ids, tables.history_ids, tables.candidate_ids)
            sound = (
                sound
                and all(_is_within(t, num_utterances) for t in ids)
                and _is_within(tables.dialogue, tables.num_dialogues)
                and _is_partition(tables.persona_offsets, len(tables.persona_ids))
                and _is_partition(tables.candidate_offsets, len(tables.candidate_ids))
                and len(tables.candidate_offsets) == tables.num_examples + 1
                and len(tables.history_first) == len(tables.history_count) == tables.num_examples
                and _is_within(tables.history_count, len(tables.history_ids) + 1)
                and _is_within(
                    tables.history_first + tables.history_count, len(tables.history_ids) + 1
                )
                and _is_within(tables.history_first, len(tables.history_ids) + 1)
            )
        if not sound:
            raise UserError(
                f"the arrays in {self.folder} contradict one another: make the store anew with "
                f"`convai-fast prepare`"
            )


def _read_meta(folder: Path) -> dict | None:
    """What a store's meta.json says; None where there is none, or one of something else."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) and {"format_version", "sizes"} <= meta.keys() else None


def is_store(folder: str | Path) -> bool:
    """Whether `folder` holds a store, and nothing but a store."""
    folder = Path(folder)
    return _read_meta(folder) is not None and all(
        path.name == "meta.json" or path.suffix == ".bin" for path in folder.iterdir()
    )


def _is_within(indices: Tensor, size: int) -> bool:
    return len(indices) == 0 or (indices.min().item() >= 0 and indices.max().item() < size)


def _is_partition(offsets: Tensor, size: int) -> bool:
    return (
        len(offsets) > 0
        and offsets[0].item() == 0
        and offsets[-1].item() == size
        and bool((offsets[1:] >= offsets[:-1]).all())
    )


class _SplitBuilder:
    """Turns the dialogues of one split into tables of utterance ids."""

    def __init__(self, utterance_ids: dict[str, int]) -> None:
        self.utterance_ids = utterance_ids  # shared between splits: text -> id, in order of arrival
        self.tables: dict[str, list[int]] = {name: [] for name in _TABLES}
        self.tables["persona_offsets"].append(0)
        self.tables["candidate_offsets"].append(0)

    def intern(self, texts: list[str]) -> list[int]:
        ids = self.utterance_ids
        return [ids.setdefault(text, len(ids)) for text in texts]

    def add(self, dialogue: Dialogue) -> None:
        tables = self.tables
        tables["persona_ids"] += self.intern(dialogue.personality)
        index = len(tables["persona_offsets"]) - 1
        tables["persona_offsets"].append(len(tables["persona_ids"]))
        previous: list[int] = []
        first = len(tables["history_ids"])
        for utterance in dialogue.utterances:
            history = self.intern(utterance.history)
            if history[: len(previous)] == previous:
                tables["history_ids"] += history[len(previous) :]
            else:
                first = len(tables["history_ids"])
                tables["history_ids"] += history
            previous = history
            tables["dialogue"].append(index)
            tables["history_first"].append(first)
            tables["history_count"].append(len(history))
            tables["candidate_ids"] += self.intern(utterance.candidates)
            tables["candidate_offsets"].append(len(tables["candidate_ids"]))

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            name: np.array(values, np.int64 if name in _INT64_TABLES else np.int32)
            for name, values in self.tables.items()
        }


def build_store(
    dialogues: dict[str, list[Dialogue]],
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
) -> DialogueStore:
    """Tokenise `dialogues` into a store in `folder` and open it.

    The folder appears complete or not at all: it is written beside its place and renamed. A store
    that is already there is replaced; any other folder with files in it is refused (UserError).
    """
    folder = Path(folder)
    try:
        if folder.exists() and not is_store(folder) and any(folder.iterdir()):
            raise UserError(
                f"{folder} is not empty and holds no store: choose another folder for it"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Everything happens in one folder beside the target, which goes at the end.
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            new, old = Path(scratch) / "new", Path(scratch) / "old"
            new.mkdir()
            _write_store(dialogues, tokenizer, new)
            if folder.exists():
                os.rename(folder, old)
            os.rename(new, folder)
    except OSError as error:
        raise UserError(f"cannot write a store to {folder}: {error.strerror}") from error
    return DialogueStore(folder)


def _write_store(
    dialogues: dict[str, list[Dialogue]], tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    utterance_ids: dict[str, int] = {}
    sizes = {}

    def write(name: str, array: np.ndarray) -> None:
        array.tofile(folder / f"{name}.bin")
        sizes[name] = len(array)

    for split, members in dialogues.items():
        builder = _SplitBuilder(utterance_ids)
        for dialogue in members:
            builder.add(dialogue)
        for name, array in builder.arrays().items():
            write(f"{split}.{name}", array)

    ids = special_ids(tokenizer)
    token_dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.int32)
    lengths = np.zeros(len(utterance_ids), np.int64)
    done = 0
    with open(folder / "tokens.bin", "wb") as file:
        for texts in _chunks(list(utterance_ids)):
            encoded = encode(tokenizer, texts)
            lengths[done : done + len(texts)] = [len(tokens) for tokens in encoded]
            done += len(texts)
            np.fromiter(chain.from_iterable(encoded), token_dtype).tofile(file)
    sizes["tokens"] = int(lengths.sum())
    write("utterance_offsets", np.concatenate([np.zeros(1, np.int64), lengths.cumsum()]))

    meta = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint(dialogues, tokenizer),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "splits": list(dialogues),
        "token_dtype": token_dtype.name,
        "vocab_size": len(tokenizer),
        "special_ids": list(ids),
        "sizes": sizes,
    }
    # Last, since its presence is what makes the folder a store.
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _chunks(texts: list[str]) -> Iterable[list[str]]:
    for start in range(0, len(texts), _ENCODE_CHUNK):
        yield texts[start : start + _ENCODE_CHUNK]


def fingerprint(dialogues: dict[str, list[Dialogue]], tokenizer: PreTrainedTokenizerFast) -> str:
    """The cache key of a store: a hash of the dialogues, the tokenizer and the format version."""
    digest = hashlib.sha256(f"{FORMAT_VERSION} {tokenizer_fingerprint(tokenizer)}".encode())
    for split, members in dialogues.items():
        digest.update(f"\0split {split}".encode())
        for dialogue in members:
            parts = [dialogue.personality]
            for utterance in dialogue.utterances:
                parts += (utterance.history, utterance.candidates)
            # \1 ends a text and \2 a list, so that no two different dialogues read alike.
            text = "\2".join("\1".join(part) for part in parts)
            digest.update(text.encode("utf-8", "surrogatepass") + b"\3")
    return digest.hexdigest()[:16]
