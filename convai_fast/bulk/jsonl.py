r"""Requests and replies as JSON lines.

A line is an object with a request, as `request_line` says, and an id::

    {"id": "a7", "persona": ["i like tea ."], "history": ["hello !"], "temperature": 0.5}

Its replies are an object with the same id::

    {"id": "a7", "replies": [{"text": "hi , some tea ?", "finish_reason": "eos"}]}

Where it has candidates to be ranked, it is::

    {"id": "a7", "ranking": [{"index": 1, "text": "tea .", "probability": 0.9, "score": 4.2}, …]}
"""

import codecs
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from convai_fast.bulk.request_line import read_id, read_object, to_ranking, to_request
from convai_fast.bulk.scratch import room_for_scratch, scratch_database
from convai_fast.bulk.shard import ALL, Shard
from convai_fast.data.readers.fields import is_blank
from convai_fast.data.readers.text_file import TextFile
from convai_fast.errors import UserError
from convai_fast.files import is_parquet, open_bytes, parquet_rows
from convai_fast.generation.identified import Id, IdentifiedRequest, id_key, seed_of
from convai_fast.generation.messages import quoted
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.ranking import RankedCandidate
from convai_fast.generation.request import Reply

_PARAMS = SamplingParams()
_TABLES = """
CREATE TABLE lines (number INTEGER PRIMARY KEY, hash INTEGER, key TEXT);
CREATE TABLE repeated (number INTEGER PRIMARY KEY, first INTEGER);
"""
# Both sort on disk; to look up each key in turn would read the disk in no order.
_FIND_REPEATED = """
CREATE INDEX keys ON lines (key) WHERE key IS NOT NULL;
INSERT INTO repeated SELECT number, first FROM (
    SELECT number, min(number) OVER (PARTITION BY key) AS first FROM lines WHERE key IS NOT NULL
) WHERE number > first;
"""
_ALL_LINES = """
SELECT number, hash, first FROM lines LEFT JOIN repeated USING (number) ORDER BY number
"""


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that cannot be answered, and why; the id is None where not even that can be read."""

    number: int
    id: Id | None
    reason: str


class RequestFile:
    """The requests of a JSON lines file, or of a Parquet file's rows, read at each iteration.

    Iterating yields an `IdentifiedRequest` or a `BadLine` for each line of `shard` but blank ones.
    An id belongs to the first line of the file that has it. The id of a line without one is its
    number, or, where that is the id of some line, "line 2" for 2.

    Args:
        params: how replies are drawn where the line does not say.
        with_candidates: the lines have candidates, to be ranked.

    Attributes:
        num_requests: how many lines of `shard` are not blank.
        settings: what the requests depend on, by name: a hash of the file, and the shard.

    Raises:
        UserError: the file cannot be read, or not one line of it is an object; while iterating,
            that it has changed since.
    """

    @room_for_scratch()
    def __init__(
        self,
        path: Path,
        params: SamplingParams = _PARAMS,
        shard: Shard = ALL,
        *,
        with_candidates: bool = False,
    ) -> None:
        self.path, self.params, self.with_candidates = path, params, with_candidates
        self.shard = shard
        self._scratch = scratch_database(self, _TABLES)
        digest = hashlib.sha256()
        num_lines, num_objects, first_bad = 0, 0, ""

        def rows() -> Iterator[tuple[int, int, str | None]]:
            nonlocal num_lines, num_objects, first_bad
            for number, line in self._lines():
                digest.update(line)
                key = None
                if line.strip():
                    num_lines += 1
                    try:
                        record = read_object(line)
                        num_objects += 1
                        if (id := read_id(record)) is not None:
                            key = id_key(id)
                    except UserError as error:
                        first_bad = first_bad or f"line {number}: {error}"
                yield number, hash(line), key

        self._scratch.executemany("INSERT INTO lines VALUES (?, ?, ?)", rows())
        if not num_lines:
            raise UserError(f"{path} is empty: write one JSON object with a request a line")
        if not num_objects:
            raise UserError(
                f"{path} holds no requests, since not one line is a JSON object ({first_bad}): "
                "write one a line; dialogues are answered with `dataset_path`"
            )
        self._scratch.executescript(_FIND_REPEATED)
        self.positions = shard.positions(num_lines)
        self.num_requests = len(self.positions)
        self.settings = {"input": digest.hexdigest()[:16], **shard.settings}

    def __iter__(self) -> Iterator[IdentifiedRequest | BadLine]:
        position = -1
        known = self._scratch.execute(_ALL_LINES)
        for found, row in zip_longest(self._lines(), known):
            if found is None or row is None or hash(found[1]) != row[1]:
                raise self._changed((found or row)[0])
            number, line = found
            if line.strip():
                position += 1
                if position in self.positions:
                    yield self._read(number, line, first=row[2])

    def _read(self, number: int, line: bytes, first: int | None) -> IdentifiedRequest | BadLine:
        id = None
        try:
            record = read_object(line)
            id = read_id(record)
            if id is None:
                id = self._free_id(number)
            elif first is not None:
                raise UserError(f"line {first} has the same id, {quoted(id)}")
            if self.with_candidates:
                request, candidates, unused = to_ranking(record)
                return IdentifiedRequest(id, request, number, unused=unused, candidates=candidates)
            seed = seed_of(self.params.seed, id)
            request, unused = to_request(record, self.params, seed)
            return IdentifiedRequest(id, request, number, unused=unused)
        except UserError as error:
            return BadLine(number, id, str(error))

    def _free_id(self, number: int) -> Id:
        """The id of a line without one, which is none that stands in the file."""
        id: Id = number
        while self._scratch.execute("SELECT 1 FROM lines WHERE key = ?", [id_key(id)]).fetchone():
            id = f"line {id}"
        return id

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        try:
            # It is read more than once, which a pipe cannot be.
            if self.path.exists() and not self.path.is_file():
                raise UserError(f"{self.path} is not a regular file: name a file of requests")
            if is_parquet(self.path):
                for number, row in enumerate(parquet_rows(self.path)[1], start=1):
                    yield number, row_line(row)
                return
            with open_bytes(self.path) as file:
                TextFile(self.path)  # which names what is no text
                for number, line in enumerate(file, start=1):
                    # Files that were joined may have a mark in the middle, too.
                    yield number, line.removeprefix(codecs.BOM_UTF8)
        except OSError as error:
            raise UserError(f"cannot read the requests {self.path}: {error.strerror}") from error

    def _changed(self, number: int) -> UserError:
        return UserError(
            f"{self.path} is not what it was when this run began (line {number}): put it back for "
            "the same command to continue, or choose another `output`"
        )


def row_line(row: Mapping[str, Any]) -> bytes:
    """A row of a table as a line; what it has no value for is not there."""
    given = {name: value for name, value in row.items() if value is not None}
    return json.dumps(given, default=str).encode() + b"\n"


def reply_record(
    item: IdentifiedRequest, replies: Sequence[Reply], *, with_token_ids: bool = False
) -> dict[str, Any]:
    """What is written for the replies to `item`; log-probabilities and scores where they are."""
    records = []
    for reply in replies:
        record: dict[str, Any] = {"text": reply.text, "finish_reason": reply.finish_reason}
        if with_token_ids:
            record["token_ids"] = reply.token_ids
        if reply.logprobs is not None:
            record["logprobs"] = [round(logprob, 6) for logprob in reply.logprobs]
        if reply.score is not None:
            record["score"] = round(reply.score, 6)
        records.append(record)
    expected = {} if item.expected is None else {"expected": item.expected}
    return {"id": item.id, "replies": records, **expected}


def ranking_record(item: IdentifiedRequest, ranking: Sequence[RankedCandidate]) -> dict[str, Any]:
    """What is written for the candidates of `item`, best first."""
    records = [
        {
            "index": candidate.index,
            "text": candidate.text,
            "probability": round(candidate.probability, 6),
            "score": round(candidate.score, 6),
        }
        for candidate in ranking
    ]
    expected = {} if item.expected is None else {"expected": item.expected}
    return {"id": item.id, "ranking": records, **expected}


def candidates_record(item: IdentifiedRequest, replies: Sequence[Reply]) -> dict[str, Any]:
    """A turn as `train` reads it: the replies as candidates, and last the true reply.

    So a model learns to tell its own drafts from what was said, which is what ranking them takes.
    Drafts that say nothing, or what another one or the true reply says, are left out, and those
    with a NUL, which no reader takes.
    """
    request, true = item.request, item.expected
    drafts = dict.fromkeys(reply.text.strip() for reply in replies)
    drafts.pop(str(true).strip(), None)
    candidates = [draft for draft in drafts if not is_blank(draft) and "\0" not in draft]
    turn = {"history": list(request.history), "candidates": [*candidates, true]}
    return {"id": item.id, "personality": list(request.persona), "utterances": [turn]}
