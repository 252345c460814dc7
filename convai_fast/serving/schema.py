"""What the addresses take and give, for the OpenAPI document at /openapi.json.

It describes; what a body means, and which sentence refuses it, `openai_api` decides.
"""

from typing import Any

_TEXT: dict[str, Any] = {"type": "string"}
_TEXTS: dict[str, Any] = {"type": "array", "items": _TEXT}
_NUMBER, _INTEGER = {"type": "number"}, {"type": "integer"}
_IDS = {"type": "array", "items": _INTEGER}

_PERSONA = {"persona": {"anyOf": [_TEXT, _TEXTS]}}
_STREAMED = {"include_usage": {"anyOf": [{"type": "boolean"}, {"type": "null"}]}}
_DRAWING: dict[str, Any] = {
    "max_tokens": {"type": "integer", "minimum": 1, "description": "most tokens in a reply"},
    "max_completion_tokens": {"type": "integer", "minimum": 1, "description": "the same"},
    "max_length": {"type": "integer", "minimum": 1, "description": "the same"},
    "min_length": {"type": "integer", "minimum": 0, "description": "fewest tokens in a reply"},
    "no_sample": {"type": "boolean", "description": "the likeliest token"},
    "temperature": {"type": "number", "minimum": 0, "description": "0: the likeliest token"},
    "top_p": {"type": "number", "minimum": 0, "maximum": 1, "description": "0 or 1: off"},
    "top_k": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1, "description": "0: off"},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1, "description": "0: off"},
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
    "stop": {"anyOf": [{**_TEXT, "minLength": 1}, {**_TEXTS, "items": {**_TEXT, "minLength": 1}}]},
    "n": {"type": "integer", "minimum": 1, "maximum": 10_000, "description": "replies"},
    "best_of": {
        "type": "integer",
        "minimum": 1,
        "maximum": 10_000,
        "description": "drafts, of which the n that the multiple-choice head ranks best are given",
    },
    "repetition_penalty": {"type": "number", "minimum": 0.01, "maximum": 100},
    "no_repeat_ngram_size": {"type": "integer", "minimum": 0},
    "stream": {"type": "boolean", "description": "tell tokens as they are drawn"},
    "stream_options": {"type": "object", "properties": _STREAMED},
    "model": {"type": "string", "description": "the one of /v1/models"},
}


def _or_null(properties: dict[str, Any]) -> dict[str, Any]:
    """Null means that a field is not given."""
    return {name: {"anyOf": [each, {"type": "null"}]} for name, each in properties.items()}


_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "user", "assistant"]},
        "content": {**_TEXT, "description": "of the system: the persona, a sentence a line"},
    },
    "required": ["role", "content"],
}
_REQUESTS: dict[str, dict[str, Any]] = {
    "chat": {
        "type": "object",
        "properties": {
            "messages": {"type": "array", "items": _MESSAGE, "minItems": 1},
            **_or_null({**_PERSONA, "logprobs": {"type": "boolean"}, **_DRAWING}),
        },
        "required": ["messages"],
        "additionalProperties": False,
    },
    "text": {
        "type": "object",
        "properties": {
            "prompt": {"anyOf": [_TEXT, _TEXTS, _IDS]},
            "history": {"anyOf": [_TEXTS, {"type": "array", "items": _IDS}]},
            "input_ids": _IDS,
            "token_type_ids": _IDS,
            **_or_null(
                {
                    **_PERSONA,
                    "logprobs": {"enum": [0], "description": "of the tokens that were drawn"},
                    **_DRAWING,
                }
            ),
        },
        "anyOf": [{"required": [name]} for name in ("prompt", "history", "input_ids")],
        "additionalProperties": False,
    },
}

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"], "description": "the field it is about"},
            },
            "required": ["message", "type"],
        }
    },
    "required": ["error"],
}
_USAGE = {
    "type": "object",
    "properties": dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), _INTEGER),
}
_ANSWER = {
    "type": "object",
    "properties": {
        "id": _TEXT,
        "object": _TEXT,
        "created": _INTEGER,
        "model": _TEXT,
        "choices": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "index": _INTEGER,
                    "finish_reason": {"enum": ["stop", "length"]},
                    "score": {**_NUMBER, "description": "with best_of: by which it is ranked"},
                },
                "required": ["index", "finish_reason"],
            },
        },
        "usage": _USAGE,
    },
    "required": ["id", "object", "created", "model", "choices", "usage"],
}
_STATUSES = {
    400: "The request cannot be answered: one sentence says why.",
    401: "The key is missing or wrong.",
    404: "There is no such model.",
    408: "The body has not come in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    421: "The host is another one.",
    429: "Too many requests are waiting.",
    500: "The model or the machine has failed.",
    503: "The server is closing.",
    504: "The answer has taken too long.",
}


def fields_of(kind: str) -> list[str]:
    """The names of what a body of completions may hold."""
    return list(_REQUESTS[kind]["properties"])


def described(kind: str) -> dict[str, Any]:
    """What an address of completions takes and gives."""
    body = {"required": True, "content": _json(_REQUESTS[kind])}
    answer = {
        "description": "The replies; with `stream`, events whose data are chunks of them.",
        # OpenAPI 3.1 has no word for the data of an event.
        "content": {**_json(_ANSWER), "text/event-stream": {}},
    }
    return {"requestBody": body, "responses": {"200": answer, **errors()}}


def errors() -> dict[str, Any]:
    """The errors that an address may give."""
    return {
        str(status): {"description": description, "content": _json(_ERROR)}
        for status, description in _STATUSES.items()
    }


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
