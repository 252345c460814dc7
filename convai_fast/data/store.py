"""The dialogues as token ids: a folder of memory-mapped arrays.

One arena holds each distinct text once for each kind of places that it stands in (see
`ops/plan.py`); everything else is a small table of integers that points into it, so memory grows
with tokens and never with examples x candidates x length:

    tokens             uint16 or int32   all utterances, one after another
    utterance_offsets  int64             where each utterance begins in tokens
    texts              uint8             the UTF-8 of all texts, one after another
    text_offsets       int64             where each text begins in texts
    and for each split:
    persona_ids        int32             texts of all personas, one after another
    persona_offsets    int64             where the persona of each dialogue begins in persona_ids
    history_ids        int32             texts of all conversations, one after another
    dialogue           int32             the dialogue of each example
    history_first      int64             where the history of each example begins in history_ids
    history_count      int32             how many turns it has
    candidate_ids      int32             texts of all candidates; the true reply is the last
    candidate_offsets  int64             where the candidates of each example begin

The history of a turn is usually that of the turn before and two texts more, so that the
examples of a dialogue share one run of `history_ids`:

    history_ids  a b c d e      example 0: a | example 1: a b c | example 2: a b c d e
"""

import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from convai_fast.dialogue.dialogue import Dialogue, History, Utterance
from convai_fast.dialogue.layout import Layout
from convai_fast.errors import UserError, reason_of
from convai_fast.files import read_json
from convai_fast.ops.plan import classes_of, layout_numbers, pieces_of

FORMAT_VERSION = 4
_CHUNK_BYTES = 1 << 22  # read at a time for a checksum


class Origin(NamedTuple):
    """A set of dialogues as it was read.

    Attributes:
        dialogues: a hash of all of them, with their splits.
        is_cut: whether its validation split was cut off from it, and not its own.
        valid_fraction, data_seed: how it would be cut off.
    """

    dialogues: str
    is_cut: bool
    valid_fraction: float
    data_seed: int


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


INT64_TABLES = ("persona_offsets", "history_first", "candidate_offsets")
TABLES = tuple(field.name for field in fields(SplitTables))
_ARRAY_FILE = re.compile(
    rf"(tokens|texts|(utterance|text)_offsets|[a-z]+\.({'|'.join(TABLES)}))\.bin"
)


class DialogueStore:
    """Tokenised dialogues on disk, opened without reading them. See the top of this file.

    `tokens`, `utterance_offsets`, `texts`, `text_offsets` and the tables in `splits["train"]`,
    `splits["valid"]` are memory-mapped tensors on the CPU; `origins` are, for each source that it
    was made of, the sets of dialogues in it; `meta` is what `meta.json` says; `layout` is that of
    the sequences, and `layout_numbers` is how `collate` reads it.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open the store in `folder`.

        Raises UserError when the folder holds no store, one of another format version, or one whose
        arrays are not of the size or the content (by checksum) that `meta.json` promises.
        """
        self.folder = Path(folder)
        meta = _read_meta(self.folder)
        if meta is None:
            raise UserError(
                f"{self.folder} holds no whole store (its meta.json is missing or is not a "
                f"store's): make it anew with `convai-fast prepare`"
            )
        self.meta, version = meta, meta["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"the store in {self.folder} has format version {version}, and this version of "
                f"convai_fast reads {FORMAT_VERSION}: make it anew with `convai-fast prepare`"
            )
        try:
            self.layout = Layout.from_json(self.meta["layout"])
            self.origins = [[Origin(**each) for each in own] for own in self.meta["origins"]]
            self.tokens = self._map("tokens", getattr(torch, self.meta["token_dtype"]))
            self.utterance_offsets = self._map("utterance_offsets", torch.int64)
            self.texts = self._map("texts", torch.uint8)
            self.text_offsets = self._map("text_offsets", torch.int64)
            self.splits = {split: self._map_split(split) for split in self.meta["splits"]}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{self.folder / 'meta.json'} is damaged: make the store anew with "
                f"`convai-fast prepare`"
            ) from error
        self._check()
        self.layout_numbers = layout_numbers(self.layout, len(self.text_offsets) - 1)

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts, without what stands around them."""
        return int(self.utterance_offsets[-1 - len(pieces_of(self.layout))])

    @property
    def num_bytes(self) -> int:
        """Size on disk, in bytes."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def utterance(self, index: int) -> list[int]:
        """Token ids of one utterance."""
        begin, end = self.utterance_offsets[index : index + 2].tolist()
        return self.tokens[begin:end].tolist()

    def text(self, index: int) -> str:
        """One text."""
        begin, end = self.text_offsets[index : index + 2].tolist()
        return self.texts[begin:end].numpy().tobytes().decode()

    def dialogues(self, split: str) -> Iterator[Dialogue]:
        """The dialogues of a split as text, one after another, with the candidates drawn."""
        tables = {name: getattr(self.splits[split], name).numpy() for name in TABLES}
        return dialogues_of(tables, self.text)

    def _map_split(self, split: str) -> SplitTables:
        tables = {
            name: self._map(f"{split}.{name}", torch.int64 if name in INT64_TABLES else torch.int32)
            for name in TABLES
        }
        return SplitTables(**tables)

    def _map(self, name: str, dtype: torch.dtype) -> Tensor:
        path, size = self.folder / f"{name}.bin", self.meta["sizes"][name]
        if not path.is_file() or path.stat().st_size != size * dtype.itemsize:
            raise UserError(
                f"{path} is missing or was cut short: make the store anew with "
                f"`convai-fast prepare`"
            )
        try:
            if checksum(path) != self.meta["checksums"][name]:
                raise UserError(
                    f"{path} is not what was written (its checksum is another): make the store "
                    "anew with `convai-fast prepare`"
                )
            if size == 0:
                return torch.empty(0, dtype=dtype)
            return torch.from_file(str(path), shared=False, size=size, dtype=dtype)
        except (OSError, RuntimeError) as error:  # the second is torch's
            raise UserError(
                f"{path} cannot be read ({reason_of(error)}): see that its disk works and that you "
                "may read it"
            ) from error

    def _check(self) -> None:
        """Everything points inside: a wrong index would make the kernels read foreign memory."""
        num_texts, num_utterances = len(self.text_offsets) - 1, len(self.utterance_offsets) - 1
        own_utterances = len(classes_of(self.layout)) * num_texts + len(pieces_of(self.layout))
        sound = _is_partition(self.utterance_offsets, len(self.tokens)) and (
            _is_partition(self.text_offsets, len(self.texts)) and num_utterances == own_utterances
        )
        for tables in self.splits.values():
            ids = (tables.persona_ids, tables.history_ids, tables.candidate_ids)
            sound = (
                sound
                and all(_is_within(t, num_texts) for t in ids)
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
        meta = read_json(folder / "meta.json")
    except UserError:
        return None
    return meta if "format_version" in meta and type(meta.get("sizes")) is dict else None


def own_files(folder: Path) -> set[str]:
    """The names of a store's own files in a folder; others beside them are its user's."""
    names = {path.name for path in folder.iterdir()}
    return {name for name in names if name == "meta.json" or _ARRAY_FILE.fullmatch(name)}


def is_store(folder: str | Path) -> bool:
    """Whether `folder` holds a store, perhaps a damaged one, beside binary and hidden files."""
    folder = Path(folder)
    if _read_meta(folder) is None and not (folder / "tokens.bin").is_file():
        return False
    return all(
        # File managers and network file systems leave files of their own, such as .DS_Store.
        path.name == "meta.json" or path.suffix == ".bin" or path.name.startswith(".")
        for path in folder.iterdir()
    )


def dialogues_of(
    tables: dict[str, np.ndarray], text_of: Callable[[int], str]
) -> Iterator[Dialogue]:
    """Yield the dialogues of a split, from its tables and the text of each number.

    The turns of a dialogue share one list; see `History`.
    """
    ids, offsets = tables["persona_ids"], tables["persona_offsets"]
    ends = np.searchsorted(tables["dialogue"], np.arange(len(offsets) - 1), "right").tolist()
    example = 0
    for number, end in enumerate(ends):
        persona = [text_of(i) for i in ids[offsets[number] : offsets[number + 1]].tolist()]
        dialogue = Dialogue(persona, [])
        while example < end:
            # The examples whose histories begin at one place share its turns.
            first = int(tables["history_first"][example])
            stop = example
            while stop < end and tables["history_first"][stop] == first:
                stop += 1
            counts = tables["history_count"][example:stop].tolist()
            turns = [
                text_of(i) for i in tables["history_ids"][first : first + max(counts)].tolist()
            ]
            for row, count in zip(range(example, stop), counts, strict=True):
                begin, last = tables["candidate_offsets"][row : row + 2].tolist()
                candidates = [text_of(i) for i in tables["candidate_ids"][begin:last].tolist()]
                dialogue.utterances.append(Utterance(History(turns, count), candidates))
            example = stop
        yield dialogue


def checksum(path: Path) -> int:
    """The CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return value


def _is_within(indices: Tensor, size: int) -> bool:
    return len(indices) == 0 or (indices.min().item() >= 0 and indices.max().item() < size)


def _is_partition(offsets: Tensor, size: int) -> bool:
    return (
        len(offsets) > 0
        and offsets[0].item() == 0
        and offsets[-1].item() == size
        and bool((offsets[1:] >= offsets[:-1]).all())
    )
