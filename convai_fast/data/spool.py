"""Dialogues as they are read, kept in temporary files: memory is that of one conversation.

texts            uint8  the UTF-8 of all texts, one after another; one entry a conversation and
                        text, so that equal texts of different conversations are there twice
text_ends        int64  where each text ends
text_keys        [., 2] a 128-bit hash of each text, by which `number_texts` finds equal ones

conversation_*   for each conversation: its split, its source, its group, its last dialogue
persona_*, history_*, candidate_*, example_*     as the tables of a store (see `store`), over
                        all conversations in the order of reading
"""

import hashlib
import tempfile
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from convai_fast.data.store import Origin
from convai_fast.dialogue.dialogue import Conversation, Dialogue, History

VALID_NAMES = ("valid", "validation", "val", "dev", "test")
"""What a validation split may be called, the preferred name first."""

_FLUSH = 1 << 17  # numbers of a column that are kept in memory
_MAX_KNOWN_BYTES = 1 << 24  # of texts met lately, which are not written again
_BYTES_OF_ANY = 300  # that a known text takes, whatever its length
_PART = 1 << 17  # keys that are sorted at a time
# A conversation that is held twice, from either side, may lack its first or last turn once. A part
# of so many turns is no coincidence.
_SHORTEST_PART = 3


class _Column:
    """Numbers that grow at their end, on disk."""

    def __init__(self, folder: Path, name: str, dtype: type) -> None:
        self.dtype = np.dtype(dtype)
        self.path = folder / name
        self.file = open(self.path, "wb")  # noqa: SIM115
        self.values = array({"int32": "i", "int64": "q", "uint8": "B"}[self.dtype.name])
        self.count = 0

    def append(self, value: int) -> None:
        self.values.append(value)
        self.count += 1
        if len(self.values) >= _FLUSH:
            self.flush()

    def extend(self, values: Sequence[int] | bytes) -> None:
        self.count += len(values)
        if isinstance(values, bytes):
            self.values.frombytes(values)
        else:
            self.values.extend(values)
        if len(self.values) >= _FLUSH:
            self.flush()

    def flush(self) -> None:
        self.values.tofile(self.file)
        del self.values[:]

    def mapped(self) -> np.ndarray:
        """All numbers so far, on disk."""
        self.flush()
        self.file.flush()
        if self.count == 0:
            return np.zeros(0, self.dtype)
        return np.memmap(self.path, self.dtype, "r")


_COLUMNS = {
    "texts": np.uint8,
    "text_ends": np.int64,
    "text_keys": np.uint8,
    "conversation_split": np.int32,
    "conversation_source": np.int32,
    "conversation_keys": np.uint8,  # of its turns and of parts of them: four, of 16 bytes each
    "conversation_dialogue_end": np.int64,
    "conversation_history_end": np.int64,
    "persona_ids": np.int32,
    "persona_ends": np.int64,
    "history_ids": np.int32,
    "example_dialogue": np.int32,
    "example_history_first": np.int64,
    "example_history_count": np.int32,
    "candidate_ids": np.int32,
    "candidate_ends": np.int64,
    "reply_keys": np.uint8,  # of the true reply but for case and white space
}


class Spool:
    """What was read so far, in a folder of its own within `folder`; see the top of this file.

    A context manager, with whose end the folder goes.

    Attributes:
        folder: its own.
        splits: names of the splits, in the order of `conversation_split`.
        fingerprints: of each source, by number, a hash of all its dialogues.
        made_before: where a source, by number, is a store: what that was made of. Its splits stay.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="convai-fast-", dir=folder)
        self.folder = Path(self._scratch.name)
        self.columns = {name: _Column(self.folder, name, dtype) for name, dtype in _COLUMNS.items()}
        self.splits: list[str] = []
        self.made_before: dict[int, list[Origin]] = {}
        self._hashes: list = []
        self._known: dict[str, int] = {}
        self._keys: dict[int, bytes] = {}  # of the known texts
        self._known_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for column in self.columns.values():
            column.file.close()
        self._scratch.cleanup()

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name].mapped()

    @property
    def num_texts(self) -> int:
        """Texts so far, those that are there more than once counted each time."""
        return self.columns["text_ends"].count

    @property
    def fingerprints(self) -> list[str]:
        """A hash of the dialogues of each source, in their order and with their splits."""
        return [digest.hexdigest()[:16] for digest in self._hashes]

    def text_of(self) -> Callable[[int], str]:
        """A function from the number of a text, of those read so far, to the text."""
        data, ends = np.asarray(self["texts"]), np.asarray(self["text_ends"])

        def text(number: int) -> str:
            begin = int(ends[number - 1]) if number else 0
            return data[begin : int(ends[number])].tobytes().decode()

        return text

    def add(self, split: str, conversation: Conversation, source: int = 0) -> None:
        """Take in one conversation, all of whose sides land in the same split."""
        while len(self._hashes) <= source:
            self._hashes.append(hashlib.sha256())
        if split not in self.splits:
            self.splits.append(split)
        if self._known_bytes > _MAX_KNOWN_BYTES:
            self._known.clear()
            self._keys.clear()
            self._known_bytes = 0
        self._hashes[source].update(f"{split} {len(conversation)}".encode())
        columns, runs = self.columns, _HistoryRuns(self)
        for dialogue in conversation:
            self._add_dialogue(dialogue, runs, self._hashes[source])
        columns["conversation_split"].append(self.splits.index(split))
        columns["conversation_source"].append(source)
        columns["conversation_keys"].extend(self._keys_of(conversation))
        columns["conversation_dialogue_end"].append(columns["persona_ends"].count)
        columns["conversation_history_end"].append(columns["history_ids"].count)

    def _add_dialogue(
        self, dialogue: Dialogue, runs: "_HistoryRuns", digest: "hashlib._Hash"
    ) -> None:
        columns = self.columns
        number = columns["persona_ends"].count
        persona = self._intern(dialogue.personality)
        columns["persona_ids"].extend(persona)
        columns["persona_ends"].append(columns["persona_ids"].count)
        digest.update(b"persona %d" % len(persona))
        digest.update(b"".join(map(self._keys.__getitem__, persona)))
        for utterance in dialogue.utterances:
            first, count, new = runs.add(utterance.history)
            candidates = self._intern(utterance.candidates)
            columns["example_dialogue"].append(number)
            columns["example_history_first"].append(first)
            columns["example_history_count"].append(count)
            columns["candidate_ids"].extend(candidates)
            columns["candidate_ends"].append(columns["candidate_ids"].count)
            columns["reply_keys"].extend(_key(" ".join(utterance.candidates[-1].lower().split())))
            digest.update(b"turn %d %d %d" % (count, len(new), len(candidates)))
            digest.update(b"".join(map(self._keys.__getitem__, (*new, *candidates))))

    def _intern(self, texts: Sequence[str]) -> list[int]:
        known = self._known
        return [known[text] if text in known else self._write(text) for text in texts]

    def _write(self, text: str) -> int:
        columns, number = self.columns, self.num_texts
        data = text.encode()
        columns["texts"].extend(data)
        columns["text_ends"].append(columns["texts"].count)
        key = hashlib.blake2b(data, digest_size=16).digest()
        columns["text_keys"].extend(key)
        self._known[text] = number
        self._keys[number] = key
        self._known_bytes += len(data) + _BYTES_OF_ANY
        return number

    def _keys_of(self, conversation: Conversation) -> bytes:
        """Keys of the whole conversation, and of it without its first, its last, or either turn."""
        turns: Sequence[str] = []
        for dialogue in conversation:
            if dialogue.utterances:
                last = dialogue.utterances[-1]
                if len(last.history) + 1 > len(turns):
                    turns = [*last.history, last.candidates[-1]]
        # A turn's hash is the number of its text only within this file: texts may be there twice.
        keys = [self._keys[number] for number in self._intern(turns)]
        parts = [keys, keys[1:], keys[:-1], keys[1:-1]]
        whole = b"".join(keys)
        return b"".join(
            hashlib.blake2b(
                b"".join(part) if i == 0 or len(part) >= _SHORTEST_PART else whole, digest_size=16
            ).digest()
            for i, part in enumerate(parts)
        )


class _HistoryRuns:
    """Histories of one conversation, which share one run of `history_ids` where one goes on from
    the other."""

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.table = spool.columns["history_ids"]
        self.first = self.table.count
        self.run: list[int] = []
        self.turns: list[str] | None = None  # of the history met last, if it was a view

    def add(self, history: Sequence[str]) -> tuple[int, int, list[int]]:
        """Where the history begins, its number of turns, and the numbers of those that are new."""
        is_known = isinstance(history, History) and history.turns is self.turns
        self.turns = history.turns if isinstance(history, History) else None
        start = len(self.run) if is_known else 0
        if is_known and len(history) <= start:
            return self.first, len(history), []
        numbers = self.spool._intern(history[start:])
        if not is_known:
            shared = min(len(self.run), len(numbers))
            if self.run[:shared] == numbers[:shared]:
                numbers = numbers[shared:]
            else:
                self.first, self.run = self.table.count, []
        self.run += numbers
        self.table.extend(numbers)
        return self.first, len(history), numbers


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def first_equal(keys: np.ndarray) -> np.ndarray:
    """For each 16-byte key (uint8 [16 * n]) the place of the first that equals it, int32 [n].

    Part by part of the keys' values, so that memory is a few bytes a key.
    """
    pairs = keys.view(np.uint64).reshape(-1, 2)
    count = len(pairs)
    first = np.empty(count, np.int32)
    num_parts = 1 + count // _PART
    parts = np.empty(count, np.uint16)
    for start in range(0, count, _PART):
        parts[start : start + _PART] = pairs[start : start + _PART, 0] % np.uint64(num_parts)
    for part in range(num_parts):
        places = np.flatnonzero(parts == part)
        own = np.asarray(pairs[places])
        order = np.lexsort((own[:, 1], own[:, 0]))  # stable: equal ones stay in order
        own, places = own[order], places[order]
        is_new = np.ones(len(places), bool)
        is_new[1:] = (own[1:] != own[:-1]).any(1)
        starts = np.flatnonzero(is_new)
        first[places] = np.repeat(places[starts], np.diff([*starts, len(places)]))
    return first


def groups(conversation_keys: np.ndarray) -> np.ndarray:
    """A number for each conversation, int64 [n]: equal for those that are the same conversation,
    perhaps seen from its other side, with a turn more or less at its beginning or end."""
    count = len(conversation_keys) // 64
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    equal = first_equal(conversation_keys) >> 2  # four keys a conversation
    for i in np.flatnonzero(equal.reshape(-1, 4).min(1) < np.arange(count)).tolist():
        for other in equal[4 * i : 4 * i + 4].tolist():
            a, b = sorted((root(i), root(other)))
            parent[b] = a
    return np.fromiter((root(i) for i in range(count)), np.int64, count)


def fingerprint(dialogues: dict[str, list[Dialogue]]) -> str:
    """A hash of the dialogues of all splits, with their candidates."""
    with Spool() as spool:
        for split, members in dialogues.items():
            for dialogue in members:
                spool.add(split, [dialogue])
        return "".join(spool.fingerprints)
