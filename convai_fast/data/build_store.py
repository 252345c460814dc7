"""Writes a store: dialogues completed, equal texts under one number, each tokenised once."""

import errno
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, compress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from transformers import PreTrainedTokenizerFast

from convai_fast.data.complete import Numbering, SplitArrays, split_conversations
from convai_fast.data.spool import Spool
from convai_fast.data.store import (
    FORMAT_VERSION,
    INT64_TABLES,
    DialogueStore,
    Origin,
    checksum,
    is_store,
    own_files,
)
from convai_fast.dialogue.dialogue import Dialogue
from convai_fast.dialogue.encoding import encode_in, tokenizer_fingerprint
from convai_fast.dialogue.layout import Layout, Place, classic
from convai_fast.dialogue.tokenizer import special_ids
from convai_fast.errors import UserError, shown
from convai_fast.files import (
    fill,
    fingerprint,
    flush,
    is_empty,
    locked_folder,
    move_whole,
    scratch_folder,
)
from convai_fast.ops.plan import class_of_places, classes_of, pieces_of

_ENCODE_CHUNK = 2_000  # texts tokenised at once: bounds the memory that ids take as Python lists
_COPY = 1 << 18  # numbers renumbered at a time
_PLACES_OF_SENTENCES = tuple(place for place in Place if place < Place.SPEAKER1)


def build_store(
    dialogues: dict[str, list[Dialogue]],
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    layout: Layout | None = None,
) -> DialogueStore:
    """Tokenise `dialogues`, by split and as they are, into a store in `folder` and open it.

    `layout` is that of the model that shall read them (`layout_for`); by default it is that of
    GPT and GPT-2 models.

    A folder that is not there appears complete or not at all: it is written beside its place and
    renamed. An empty one is filled, and a store that is already there is replaced file by file; any
    other folder with files in it is refused (UserError).
    """
    dialogues = {"train": [], "valid": [], **dialogues}
    with Spool() as spool:
        for split, members in dialogues.items():
            for dialogue in members:
                spool.add(split, [dialogue])
        split_of = spool["conversation_split"]
        chosen = {
            split: np.flatnonzero(split_of == spool.splits.index(split))
            if split in spool.splits
            else np.zeros(0, np.int64)
            for split in dialogues
        }
        origins = [[Origin(own, False, 0.0, 0)] for own in spool.fingerprints]
        layout = layout or classic(special_ids(tokenizer))
        return write_store(
            spool, chosen, origins, tokenizer, layout, folder, num_candidates=1, seed=0
        )


def complete_and_write_store(
    spool: Spool,
    tokenizer: PreTrainedTokenizerFast,
    layout: Layout,
    folder: str | Path,
    *,
    num_candidates: int,
    valid_fraction: float,
    seed: int,
    report: Callable[[str], None],
) -> DialogueStore:
    """Split and complete what was read as `load_dialogues` does, into a store in `folder`.

    Raises UserError as `build_store`.
    """
    chosen, origins, notes = split_conversations(spool, valid_fraction, seed)
    for note in notes:
        spool.tell(note, report)
    return write_store(
        spool,
        chosen,
        origins,
        tokenizer,
        layout,
        folder,
        num_candidates=num_candidates,
        seed=seed,
    )


def write_store(
    spool: Spool,
    conversations: dict[str, np.ndarray],
    origins: list[list[Origin]],
    tokenizer: PreTrainedTokenizerFast,
    layout: Layout,
    folder: str | Path,
    *,
    num_candidates: int,
    seed: int,
) -> DialogueStore:
    """Write the chosen conversations of each split; see `complete_and_write_store`."""
    folder = Path(folder)
    try:
        place = folder.resolve()
        is_there = place.exists()
        if is_there:
            _check_place(folder, place)
        place.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(place if is_there else place.parent, ".writing-") as scratch:
            new = scratch / "store"
            new.mkdir()
            writer = _Writer(spool, tokenizer, layout, new)
            writer.write(conversations, origins, num_candidates, seed)
            if is_there or not _became(new, place):
                with locked_folder(place):
                    _check_place(folder, place)  # which others may have filled meanwhile
                    fill(new, place, own_files(place))
                    return DialogueStore(folder)
    except OSError as error:
        raise UserError(f"cannot write a store to {folder}: {error.strerror}") from error
    return DialogueStore(folder)


def _check_place(folder: Path, place: Path) -> None:
    """Raise UserError unless a folder that is there is empty or an older store."""
    if is_store(place) or is_empty(place):
        return
    names = sorted(path.name for path in place.iterdir() if not path.name.startswith("."))
    name = next((name for name in names if name not in own_files(place)), names[0])
    raise UserError(f"{folder} holds {name}, which is no store's: choose another folder for it")


def _became(new: Path, place: Path) -> bool:
    """Rename `new` to `place`; False where another process that has built it was faster."""
    try:
        move_whole(new, place)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return False
    return True


class _Writer:
    """Writes the files of one store into a folder of its own."""

    def __init__(
        self, spool: Spool, tokenizer: PreTrainedTokenizerFast, layout: Layout, folder: Path
    ) -> None:
        self.spool, self.tokenizer, self.layout, self.folder = spool, tokenizer, layout, folder
        self.numbering = Numbering.of(spool)
        self.sizes: dict[str, int] = {}
        self.num_examples: dict[str, list[int]] = {}  # of each split, by source
        self.class_of = class_of_places(layout)
        self.places_of_turns = [Place.SPEAKER1, Place.SPEAKER2]
        if layout.persona_turn != "none":  # of speaker2's
            self.places_of_turns.append(Place.PERSONA_TURN)
        self.is_used = np.zeros(spool.num_texts, bool)
        self.is_read = np.zeros((len(classes_of(layout)), spool.num_texts), bool)  # by class

    def write(
        self,
        conversations: dict[str, np.ndarray],
        origins: list[list[Origin]],
        num_candidates: int,
        seed: int,
    ) -> None:
        for split, chosen in conversations.items():
            self._write_split(split, chosen, num_candidates, seed)
        del self.numbering  # whose memory is needed
        self._renumber(conversations)
        num_unknown = self._write_texts()
        for split in conversations:
            self._check_replies(split)

        files = sorted(self.folder.glob("*.bin"))
        for file in files:
            flush(file)
        checksums = {file.stem: checksum(file) for file in files}
        layout = self.layout.to_json()
        content = {
            "format_version": FORMAT_VERSION,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "splits": list(conversations),
            "token_dtype": self._token_dtype.name,
            "vocab_size": len(self.tokenizer),
            "layout": layout,
            "num_unknown_tokens": num_unknown,
            "origins": [[origin._asdict() for origin in own] for own in origins],
            "num_examples": self.num_examples,
            "num_candidates": num_candidates,
            "notes": self.spool.notes,
            "sizes": self.sizes,
            "checksums": checksums,
            "fingerprint": fingerprint(repr((checksums, layout)).encode()),
        }
        # Last, since its presence is what makes the folder a store.
        path = self.folder / "meta.json"
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        flush(path)
        flush(self.folder)

    @property
    def _token_dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if len(self.tokenizer) <= 2**16 else np.int32)

    def _write_split(self, split: str, chosen: np.ndarray, num_candidates: int, seed: int) -> None:
        arrays = SplitArrays(self.spool, self.numbering, chosen)
        turns_differ = len({self.class_of[place] for place in self.places_of_turns}) > 1
        for name, table in arrays.tables():
            self._append(f"{split}.{name}", [table])
            if name == "persona_ids":  # what is cut, or rotated, takes each to any place
                self._use(table, *_PLACES_OF_SENTENCES)
            elif name == "history_ids" and not turns_differ:
                self._use(table, Place.SPEAKER1)
        if turns_differ:
            self._use_turns(split)
        self.num_examples[split] = arrays.num_examples_by_source()
        sizes = np.zeros(sum(self.num_examples[split]), np.int32)

        def ids() -> Iterator[np.ndarray]:
            done = 0
            for candidates, counts in arrays.candidates(num_candidates, split, seed):
                self._use(candidates, Place.REPLY)
                sizes[done : done + len(counts)] = counts
                done += len(counts)
                yield candidates

        self._append(f"{split}.candidate_ids", ids())
        self._append(f"{split}.candidate_offsets", _offsets(sizes))

    def _use(self, texts: np.ndarray, *places: Place) -> None:
        self.is_used[texts] = True
        for number in {self.class_of[place] for place in places}:
            self.is_read[number, texts] = True

    def _use_turns(self, split: str) -> None:
        """Note whose turns the texts of histories are: the partner's at odd distances from a reply,
        counted backwards."""
        history, first, count = (
            np.fromfile(self.folder / f"{split}.{name}.bin", dtype)
            for name, dtype in (
                ("history_ids", np.int32),
                ("history_first", np.int64),
                ("history_count", np.int32),
            )
        )
        self.is_used[history] = True  # whether an example reads it or not
        ends = first + count.astype(np.int64)
        for parity in (0, 1):
            own = ends % 2 == parity
            bounds = (np.bincount(at[own], minlength=len(history) + 1) for at in (first, ends))
            begun, ended = bounds
            is_read = (begun - ended).cumsum() > 0
            for distance, places in enumerate((self.places_of_turns[:1], self.places_of_turns[1:])):
                turns = slice((parity + distance) % 2, len(history), 2)
                self._use(history[turns][is_read[turns]], *places)

    def _append(self, name: str, parts: Iterable[np.ndarray]) -> None:
        dtype = np.int64 if name.split(".")[-1] in INT64_TABLES else np.int32
        size = 0
        with open(self.folder / f"{name}.bin", "wb") as file:
            for part in parts:
                _write(file, part.astype(dtype, copy=False))
                size += len(part)
        self.sizes[name] = size

    def _renumber(self, splits: Iterable[str]) -> None:
        """Number the texts that are used from 0 on, in all tables."""
        numbers = self.is_used.cumsum(dtype=np.int32)
        numbers -= 1
        for split in splits:
            for name in ("persona_ids", "history_ids", "candidate_ids"):
                path = self.folder / f"{split}.{name}.bin"
                if path.stat().st_size == 0:
                    continue
                ids = np.memmap(path, np.int32, "r+")
                for start in range(0, len(ids), _COPY):
                    ids[start : start + _COPY] = numbers[ids[start : start + _COPY]]
                ids.flush()

    def _write_texts(self) -> int:
        """Write the texts that are used and their tokens; returns how many tokens are unknown."""
        data, ends = (np.asarray(self.spool[name]) for name in ("texts", "text_ends"))
        unknown, num_unknown = _unknown_id(self.tokenizer), 0
        names = {"utterance": "tokens", "text": "texts"}
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(open(self.folder / f"{name}.bin", "wb"))
                for name in (*names.values(), *(f"{kind}_offsets" for kind in names))
            }
            sizes = dict.fromkeys(files, 0)

            def write(name: str, values: np.ndarray) -> None:
                _write(files[name], values)
                sizes[name] += len(values)

            def write_all(kind: str, values: np.ndarray, lengths: np.ndarray) -> None:
                write(f"{kind}_offsets", sizes[names[kind]] + lengths.cumsum())
                write(names[kind], values)

            write("utterance_offsets", np.zeros(1, np.int64))
            write("text_offsets", np.zeros(1, np.int64))
            for number, surroundings in enumerate(classes_of(self.layout)):
                for start in range(0, len(self.is_used), _ENCODE_CHUNK):
                    own = start + np.flatnonzero(self.is_used[start : start + _ENCODE_CHUNK])
                    begins = np.where(own > 0, ends[np.maximum(own, 1) - 1], 0)
                    bounds = zip(begins.tolist(), ends[own].tolist(), strict=True)
                    raw = [data[begin:end].tobytes() for begin, end in bounds]
                    is_read = self.is_read[number, own]
                    texts = [text.decode() for text in compress(raw, is_read)]
                    encoded = encode_in(self.tokenizer, texts, surroundings)
                    ids = np.fromiter(chain.from_iterable(encoded), self._token_dtype)
                    num_unknown += int((ids == unknown).sum()) if unknown is not None else 0
                    lengths = np.zeros(len(own), np.int64)
                    lengths[is_read] = [*map(len, encoded)]
                    write_all("utterance", ids, lengths)
                    if number == 0:
                        lengths = np.fromiter(map(len, raw), np.int64)
                        write_all("text", np.frombuffer(b"".join(raw), np.uint8), lengths)
            pieces = pieces_of(self.layout)
            ids = np.fromiter(chain.from_iterable(pieces), self._token_dtype)
            write_all("utterance", ids, np.fromiter(map(len, pieces), np.int64))
        self.sizes |= sizes
        return num_unknown

    def _check_replies(self, split: str) -> None:
        """Raise UserError for a true reply without a token: only its end could be learnt."""
        if not self.sizes[f"{split}.candidate_ids"]:
            return
        ids = np.memmap(self.folder / f"{split}.candidate_ids.bin", np.int32, "r")
        ends = np.memmap(self.folder / f"{split}.candidate_offsets.bin", np.int64, "r")[1:]
        first = self.class_of[Place.REPLY] * int(self.is_used.sum())
        offsets = np.memmap(self.folder / "utterance_offsets.bin", np.int64, "r")[first:]
        for start in range(0, len(ends), _COPY):
            replies = ids[ends[start : start + _COPY] - 1]
            empty = replies[offsets[replies] == offsets[replies + 1]]
            if len(empty):
                number = np.flatnonzero(self.is_used)[empty[0]]
                text = self.spool.text_of()(int(number))
                raise UserError(
                    f"the reply {shown(text)} has no token in this tokenizer, so that nothing of "
                    "it can be learnt: delete it, or mend its text"
                )


def _write(file: BinaryIO, values: np.ndarray) -> None:
    # Not tofile, which does not notice a full disk.
    file.write(np.ascontiguousarray(values).data)


def _offsets(counts: np.ndarray) -> Iterator[np.ndarray]:
    """Where each of runs of these lengths begins, and the last ends: int64, in parts."""
    total = np.zeros(1, np.int64)
    yield total
    for start in range(0, len(counts), _COPY):
        part = total[-1] + counts[start : start + _COPY].cumsum(dtype=np.int64)
        yield part
        total = part


def _unknown_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id of texts that the vocabulary cannot spell; None where there are none such."""
    token = getattr(tokenizer.backend_tokenizer.model, "unk_token", None)
    return tokenizer.backend_tokenizer.token_to_id(token) if token else None
