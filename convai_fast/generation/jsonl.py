r"""Requests and replies as JSON lines.

A request is an object with the fields of `Request`, all of them optional, an `id`, and any field of
`SamplingParams`, which then overrides what the other lines are drawn with::

    {"id": "a7", "persona": ["i like tea ."], "history": ["hello !"], "temperature": 0.5}

Its replies are an object with the same id::

    {"id": "a7", "replies": [{"text": "hi , some tea ?", "finish_reason": "eos"}]}
"""

import codecs
import difflib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from convai_fast.errors import UserError
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Reply, Request

Id = str | int | float


@dataclass(frozen=True, slots=True)
class IdentifiedRequest:
    """A request whose replies will be found again by its id.

    Attributes:
        line: its number in the file it comes from, if it comes from one.
        expected: the true reply, where it is known.
    """

    id: Id
    request: Request
    line: int | None = None
    expected: str | None = None


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no request, and why; the id is None where not even that can be read."""

    line: int | None
    id: Id | None
    reason: str


class RequestFile:
    """The requests of a JSON lines file, read anew each time they are iterated over.

    Iterating yields an `IdentifiedRequest` or a `BadLine` for each line but blank ones. The id of a
    line without one is its number, and an id belongs to the first line that has it. `params` says
    how replies are drawn where the line does not.

    Attributes:
        num_requests: how many lines are not blank.
        settings: what the requests depend on, by name: a hash of the file.

    Raises:
        UserError: the file cannot be read, or holds nothing.
    """

    def __init__(self, path: Path, params: SamplingParams) -> None:
        self.path, self.params = path, params
        self.num_requests = 0
        digest = hashlib.sha256()
        for _, line in self._lines():
            digest.update(line)
            self.num_requests += bool(line.strip())
        if not self.num_requests:
            raise UserError(f"{path} is empty: write one JSON object with a request a line")
        self.settings = {"input": digest.hexdigest()[:16]}

    def __iter__(self) -> Iterator[IdentifiedRequest | BadLine]:
        lines: dict[str, int] = {}  # id -> the first line that has it
        for number, line in self._lines():
            if not line.strip():
                continue
            id = None
            try:
                record = _read_object(line)
                id = _read_id(record, number)
                first = lines.setdefault(id_key(id), number)
                if first != number:
                    raise UserError(f"line {first} has the same id, {_shown(id)}")
                item = IdentifiedRequest(id, to_request(record, id, self.params), line=number)
            except UserError as error:
                item = BadLine(number, id, str(error))
            yield item

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        try:
            # It is read more than once, which a pipe cannot be.
            if self.path.exists() and not self.path.is_file():
                raise UserError(f"{self.path} is not a regular file: name a file of requests")
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        except OSError as error:
            raise UserError(f"cannot read the requests {self.path}: {error.strerror}") from error


def id_key(id: Id) -> str:
    """What tells ids apart: 1, 1.0 and "1" are three."""
    return json.dumps(id)


def seed_of(seed: int, id: Id) -> int:
    """The seed of the request `id` in a run with `seed`, whatever else the run holds."""
    digest = hashlib.sha256(f"{seed} {id_key(id)}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1  # a seed has 63 bits


def to_request(record: Mapping[str, Any], id: Id, params: SamplingParams) -> Request:
    """The request in `record`, drawn with `params` but for the fields that it overrides.

    Raises UserError naming the field that does not exist or holds the wrong thing.
    """
    for name, value in record.items():
        if name not in _KINDS:
            near = difflib.get_close_matches(name, _KINDS, n=1, cutoff=0.8)
            hint = f"do you mean {near[0]}?" if near else f"there are id, {', '.join(_KINDS)}"
            raise UserError(f"there is no field {name!r}: {hint}")
        fits, kind = _KINDS[name]
        if not fits(value):
            raise UserError(f"{name} is {_shown(value)}, but must be {kind}")
    overrides = {name: value for name, value in record.items() if name in _PARAM_TYPES}
    overrides.setdefault("seed", seed_of(params.seed, id))
    if "stop" in overrides:
        overrides["stop"] = tuple(overrides["stop"])
    prompt = {name: record[name] for name in _PROMPT_KINDS if name in record}
    return Request(**prompt, params=replace(params, **overrides))


def reply_record(
    item: IdentifiedRequest, replies: Sequence[Reply], *, with_token_ids: bool = False
) -> dict[str, Any]:
    """What is written for the replies to `item`; log-probabilities where a reply has them."""
    records = []
    for reply in replies:
        record: dict[str, Any] = {"text": reply.text, "finish_reason": reply.finish_reason}
        if with_token_ids:
            record["token_ids"] = reply.token_ids
        if reply.logprobs is not None:
            record["logprobs"] = [round(logprob, 6) for logprob in reply.logprobs]
        records.append(record)
    expected = {} if item.expected is None else {"expected": item.expected}
    return {"id": item.id, "replies": records, **expected}


# ---- a line ------------------------------------------------------------------------------------


def _read_object(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        if b"\\u" in line:  # then it may hold half a character
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the byte 0x{line[error.start]:02x} is not UTF-8") from error
    except UnicodeEncodeError as error:
        raise UserError("an escape is half of a surrogate pair, which is no character") from error
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON that can be read: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{_shown(record)} is not a JSON object")
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _read_id(record: dict[str, Any], line: int) -> Id:
    id = record.pop("id", line)
    if not (_is_text(id) or _is_number(id)):
        raise UserError(f"id is {_shown(id)}, but must be a text or a number")
    return id


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _is_text(value: object) -> bool:
    return type(value) is str


def _is_flag(value: object) -> bool:
    return type(value) is bool


def _is_integer(value: object) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _list_of(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: type(value) is list and all(map(fits, value))


_are_texts, _are_ids = _list_of(_is_text), _list_of(_is_integer)
_are_lists_of_ids = _list_of(_are_ids)


def _are_texts_or_ids(value: object) -> bool:
    return _are_texts(value) or _are_lists_of_ids(value)


_TYPE_KINDS = {
    bool: (_is_flag, "true or false"),
    int: (_is_integer, "a whole number"),
    float: (_is_number, "a number"),
    tuple[str, ...]: (_are_texts, "a list of texts"),
}
_PROMPT_KINDS = {
    "persona": (_are_texts_or_ids, "a list of texts, or a list of lists of token ids"),
    "history": (_are_texts_or_ids, "a list of texts, or a list of lists of token ids"),
    "input_ids": (_are_ids, "a list of token ids"),
    "token_type_ids": (_are_ids, "a list of token ids"),
}
_PARAM_TYPES = get_type_hints(SamplingParams)
_KINDS = _PROMPT_KINDS | {name: _TYPE_KINDS[type] for name, type in _PARAM_TYPES.items()}
