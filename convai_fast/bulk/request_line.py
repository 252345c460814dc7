"""A line of a file of requests as a `Request`: its own fields, and those of other engines.

A line is one of these, with an id and any field of `SamplingParams` beside it::

    {"persona": ["i like tea ."], "history": ["hello !"]}
    {"messages": [{"role": "system", "content": "i like tea ."}, {"role": "user", …}]}
    {"prompt": "hello !"}
    {"custom_id": "a7", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": …}}
"""

import difflib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn, get_type_hints

from convai_fast.data.readers.fields import is_blank
from convai_fast.errors import UserError, shown
from convai_fast.generation.identified import Id
from convai_fast.generation.messages import quoted, read_messages, sentences
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Request

_OTHER_NAMES = {
    "personality": "persona",
    "system": "persona",
    "system_prompt": "persona",
    "conversations": "messages",
    "conversation": "messages",
    "max_tokens": "max_length",
    "max_completion_tokens": "max_length",
    "max_new_tokens": "max_length",
    "min_tokens": "min_length",
    "min_new_tokens": "min_length",
    "do_sample": "no_sample",  # which is its contrary
    "num_return_sequences": "n",
    "stop_strings": "stop",
    "stop_sequences": "stop",
}
# What other engines take that makes no difference here.
_UNUSED = (
    *("model", "user", "metadata", "store", "stream_options", "service_tier", "safety_identifier"),
    *("stream", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
)
# What makes none as long as it has one of these values, and is not there otherwise.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "num_beams": (1,),
    "length_penalty": (1,),
}
_ENVELOPE = ("custom_id", "method", "url", "body")  # of a line for OpenAI's batch interface


def read_object(line: bytes) -> dict[str, Any]:
    """The JSON object that a line holds; UserError says why it is none."""
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        if b"\\u" in line:  # then it may hold half a character
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"the byte 0x{line[error.start]:02x} is not UTF-8: if the file is Windows-1252 or "
            "Latin-1, save it as UTF-8"
        ) from error
    except UnicodeEncodeError as error:
        raise UserError("an escape is half of a surrogate pair, which is no character") from error
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON that can be read: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{quoted(record)} is not a JSON object")
    return record


def read_id(record: Mapping[str, Any]) -> Id | None:
    """The id of a line's object, None where it has none; UserError if it is not one."""
    names = [name for name in ("id", "custom_id") if name in record]
    if len(names) == 2:
        raise UserError("id and custom_id are names of the same: give one")
    for name in names:
        id = record[name]
        if not (_is_text(id) or _is_number(id)):
            raise UserError(f"{name} is {quoted(id)}, but must be a text or a number")
        return id
    return None


def to_request(
    record: Mapping[str, Any], params: SamplingParams, seed: int
) -> tuple[Request, list[str]]:
    """The request in a line's object, and the names of its fields that change no reply.

    It is drawn with `params` and `seed`, but for the fields that it overrides.

    Raises UserError naming the field that does not exist or holds the wrong thing.
    """
    return request_of(_body(record), params, seed)


def to_ranking(record: Mapping[str, Any]) -> tuple[Request, Sequence[Any], list[str]]:
    """The request in a line's object, the candidates beside it, and its fields that change nothing.

    Candidates are texts or lists of token ids. Raises UserError as `to_request`.
    """
    body = dict(_body(record))
    candidates = body.pop("candidates", None)
    if not _are_texts_or_ids(candidates):
        found = "are missing" if candidates is None else f"is {quoted(candidates)}"
        raise UserError(
            f"candidates {found}: give a list of texts, or a list of lists of token ids"
        )
    drawing = [name for name in body if _OTHER_NAMES.get(name, name) in _PARAM_TYPES]
    request, unused = request_of(body, SamplingParams(), seed=0)
    return request, candidates, [*unused, *drawing]


def request_of(
    body: Mapping[str, Any], params: SamplingParams, seed: int, names: Sequence[str] = ()
) -> tuple[Request, list[str]]:
    """As `to_request`, of an object that has no id and is no line for a batch interface.

    `names` are what a sentence about an unknown field says that there is, by default in a line.
    """
    fields, unused = _own_fields(body, names or ["id", *_KINDS])
    asks = [name for name in ("history", "messages", "prompt", "input_ids") if name in fields]
    if len(asks) > 1:
        raise UserError(f"{' and '.join(asks)} both say what is answered: give only one")
    if "prompt" in fields:
        if is_blank(fields["prompt"]):
            raise UserError("prompt is blank: give it text")
        fields["history"] = [fields.pop("prompt").strip()]  # as in training data
    if "messages" in fields:
        persona, fields["history"], unused_too = read_messages(fields.pop("messages"))
        if persona and "persona" in fields:
            raise UserError("messages have a system turn, and there is persona too: give only one")
        fields.setdefault("persona", persona)
        unused += unused_too
    overrides = {name: fields.pop(name) for name in _PARAM_TYPES if name in fields}
    with named_as_in(body):
        params = replace(params, **{"seed": seed, **overrides})
    return Request(**fields, params=params), unused


@contextmanager
def named_as_in(body: Mapping[str, Any]) -> Iterator[None]:
    """Has a UserError about fields call them by the names that they have in `body`."""
    try:
        yield
    except UserError as error:
        sentence = str(error)
        for name, value in _with_extra(body).items():
            if value is not None and (own := _OTHER_NAMES.get(name)):
                sentence = re.sub(rf"\b{own}\b", name, sentence)
        raise UserError(sentence) from None


def _body(record: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked: in a line for a batch interface the body, else all but the id."""
    fields = {name: value for name, value in record.items() if name not in ("id", "custom_id")}
    if not fields.keys() & {"body", "method", "url"}:
        return fields
    for name in fields:
        if name not in _ENVELOPE:
            raise _unknown(name, _ENVELOPE)
    if not isinstance(fields.get("body"), dict):
        raise UserError(f"body is {quoted(fields.get('body'))}, but must be an object")
    if fields.get("method", "POST") != "POST":
        raise UserError(f"method is {quoted(fields['method'])}, but must be POST")
    if not str(fields.get("url", "/completions")).endswith("/completions"):
        raise UserError(
            f"url is {quoted(fields['url'])}, but must be /v1/chat/completions or /v1/completions"
        )
    return fields["body"]


def _own_fields(body: Mapping[str, Any], names: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What stands in `body`, under our names and checked; and what stands there for nothing."""
    fields: dict[str, Any] = {}
    given: dict[str, str] = {}
    unused = []
    for name, value in _with_extra(body).items():
        own = _OTHER_NAMES.get(name, name)
        if name in _UNUSED:
            unused.append(name)
        elif name in _WITHOUT_EFFECT:
            if value is not None and value not in _WITHOUT_EFFECT[name]:
                raise UserError(f"{name} is {quoted(value)}, which is not known here: leave it out")
        elif own not in _KINDS:
            raise _unknown(name, names, [*_KINDS, *_OTHER_NAMES, *_UNUSED, *_WITHOUT_EFFECT])
        elif value is not None:
            fits, kind = _KINDS[own]
            if not fits(value):
                raise UserError(f"{name} is {quoted(value)}, but must be {kind}")
            if own in given:
                raise UserError(f"{given[own]} and {name} are names of the same: give one")
            fields[own], given[own] = value, name
    if given.get("no_sample") == "do_sample":
        fields["no_sample"] = not fields["no_sample"]
    if "stop" in fields:
        stop = fields["stop"]
        fields["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if isinstance(persona := fields.get("persona"), str):
        fields["persona"] = sentences(persona)
    elif persona and isinstance(persona[0], str):
        fields["persona"] = [sentence for sentence in persona if not is_blank(sentence)]
    return fields, unused


def _with_extra(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """`body` as a client would send it, which takes the fields of `extra_body` among the others."""
    if not isinstance(extra := body.get("extra_body"), dict):
        return body
    return {name: value for name, value in body.items() if name != "extra_body"} | extra


def _unknown(name: str, names: Sequence[str], known: Sequence[str] = ()) -> UserError:
    """Names the field that is most like `name` in `names` or `known`, or else all `names`."""
    near = difflib.get_close_matches(name, [*names, *known], n=1, cutoff=0.8)
    hint = f"do you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    return UserError(f"there is no field {shown(name)}: {hint}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _is_text(value: object) -> bool:
    return type(value) is str


def _is_flag(value: object) -> bool:
    return type(value) is bool


def _is_integer(value: object) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_number(value: object) -> bool:
    return (type(value) is int or type(value) is float) and abs(value) <= sys.float_info.max


def _is_list(value: object) -> bool:
    return type(value) is list


def _list_of(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: type(value) is list and all(map(fits, value))


_are_texts, _are_ids = _list_of(_is_text), _list_of(_is_integer)
_are_lists_of_ids = _list_of(_are_ids)


def _are_texts_or_ids(value: object) -> bool:
    return _are_texts(value) or _are_lists_of_ids(value)


def _is_a_persona(value: object) -> bool:
    return _is_text(value) or _are_texts_or_ids(value)


def _are_a_text_or_texts(value: object) -> bool:
    return _is_text(value) or _are_texts(value)


_TYPE_KINDS = {
    bool: (_is_flag, "true or false"),
    int: (_is_integer, "a whole number"),
    float: (_is_number, "a number"),
    tuple[str, ...]: (_are_a_text_or_texts, "a text, or a list of texts"),
}
_PROMPT_KINDS = {
    "persona": (_is_a_persona, "a text, a list of texts, or a list of lists of token ids"),
    "history": (_are_texts_or_ids, "a list of texts, or a list of lists of token ids"),
    "messages": (_is_list, "a list of messages"),
    "prompt": (_is_text, "a text"),
    "input_ids": (_are_ids, "a list of token ids"),
    "token_type_ids": (_are_ids, "a list of token ids"),
}
_PARAM_TYPES = get_type_hints(SamplingParams)
_KINDS = _PROMPT_KINDS | {name: _TYPE_KINDS[type] for name, type in _PARAM_TYPES.items()}
