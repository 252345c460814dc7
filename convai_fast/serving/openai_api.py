"""OpenAI's completions: what a body asks for, and replies as its clients expect them.

Source: OpenAI's API reference, "Chat" and "Completions".
"""

import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from convai_fast.bulk.request_line import request_of
from convai_fast.errors import UserError
from convai_fast.generation.events import Done, Tokens
from convai_fast.generation.messages import quoted
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Reply, Request
from convai_fast.serving.schema import fields_of

Kind = Literal["chat", "text"]

_ASKS = {
    "chat": {"messages", "conversations", "conversation"},
    "text": {"prompt", "history", "input_ids"},
}
_MOST_PROMPTS, _MOST_STOPS = 256, 256  # in one body; every token is compared with the stop texts
_MOST_BESIDE = 1 << 20  # characters that stand beside a prompt, over all prompts of a body
_FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True)
class Asked:
    """What a body asks for.

    Attributes:
        requests: one a prompt.
        model: the name that it gives, if any.
        stream: whether tokens are told as they are drawn.
        tells_usage: whether a stream ends with the numbers of tokens.
    """

    requests: list[Request]
    model: str | None
    stream: bool
    tells_usage: bool


def read_body(
    body: Mapping[str, Any], kind: Kind, params: SamplingParams, max_history: int
) -> Asked:
    """What `body` asks for, drawn with `params` but for the fields that it gives.

    Of a history its last `2 * max_history + 1` turns are kept. Without a seed each has a new one.

    Raises UserError naming the field that does not exist or holds the wrong thing.
    """
    fields = dict(body)
    for name, kind_of in (("stream", bool), ("model", str), ("stream_options", dict)):
        _check_kind(name, fields.get(name), kind_of)
    options = fields.get("stream_options") or {}
    _check_kind("include_usage", options.get("include_usage"), bool)
    if kind == "text":
        _make_flag_of_logprobs(fields)
    prompts = _prompts(fields) if "prompt" in fields else [fields]
    requests = []
    for each in prompts:
        request, _ = request_of(each, params, secrets.randbits(63), fields_of(kind))
        if len(request.params.stop) > _MOST_STOPS:
            count = len(request.params.stop)
            raise UserError(f"stop is a list of {count:,}, but may have at most {_MOST_STOPS}")
        requests.append(replace(request, history=request.history[-(2 * max_history + 1) :]))
    if all(body.get(name) is None for name in _ASKS[kind]):
        needed = "messages are" if kind == "chat" else "prompt is"
        raise UserError(f"{needed} missing, which says what is answered")
    stream = bool(fields.get("stream"))
    if stream and len(requests) > 1:
        raise UserError("stream takes one prompt: ask for each by itself")
    tells_usage = bool(options.get("include_usage"))
    return Asked(requests, fields.get("model"), stream, tells_usage)


def field_of(sentence: str, kind: Kind) -> str | None:
    """The field that the sentence of an error is about, with whose name it then begins."""
    found = re.match(r"([a-z_]+)\S* (?:is|are|has) ", sentence)
    return found[1] if found and found[1] in fields_of(kind) else None


def _check_kind(name: str, value: Any, kind: type) -> None:
    """Raise UserError unless a field is of this kind, or not given."""
    if value is not None and type(value) is not kind:
        kinds = {bool: "true or false", str: "a text", dict: "an object"}
        raise UserError(f"{name} is {quoted(value)}, but must be {kinds[kind]}")


def _make_flag_of_logprobs(fields: dict[str, Any]) -> None:
    logprobs = fields.get("logprobs")
    if type(logprobs) is int:
        if logprobs != 0:
            raise UserError(
                f"logprobs is {logprobs}, but must be 0: only of tokens that were drawn it is told"
            )
        fields["logprobs"] = True


def _prompts(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """A body for each prompt of `fields`, of which there may be a list."""
    prompt = fields.pop("prompt")
    if not isinstance(prompt, list):
        return [{**fields, "prompt": prompt}]
    if prompt and all(type(token) is int for token in prompt):
        return [{**fields, "input_ids": prompt}]
    if not 1 <= len(prompt) <= _MOST_PROMPTS:
        raise UserError(f"prompt is a list of {len(prompt)}, but must have 1 to {_MOST_PROMPTS}")
    if None in prompt:
        raise UserError("prompt is a list that holds null: give a text, or token ids, for each")
    beside = len(json.dumps(fields))
    if len(prompt) * beside > _MOST_BESIDE:
        raise UserError(
            f"what stands beside prompt is read for each of its {len(prompt)} texts, and "
            f"{beside:,} characters are too many for that: ask for fewer at a time"
        )
    return [
        {**fields, "input_ids" if isinstance(each, list) else "prompt": each} for each in prompt
    ]


class Answer:
    """The answer to a body, whole or in the chunks of a stream."""

    def __init__(self, kind: Kind, model: str, tokenizer: PreTrainedTokenizerFast) -> None:
        self.kind, self.tokenizer = kind, tokenizer
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": "",
            "created": int(time.time()),
            "model": model,
        }
        self._lengths: dict[int, int] = {}  # of the texts of streamed replies so far

    def whole(self, done: Sequence[Done]) -> dict[str, Any]:
        """The answer, from what came of each prompt."""
        replies = [reply for each in done for reply in each.replies]
        choices = [self._choice(index, reply) for index, reply in enumerate(replies)]
        what = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._head, "object": what, "choices": choices, "usage": usage_of(done)}

    def chunk(self, tokens: Tokens) -> dict[str, Any]:
        """What a stream tells of new tokens."""
        start = self._lengths.get(tokens.index, 0)
        self._lengths[tokens.index] = start + len(tokens.text)
        logprobs = self._logprobs(tokens.token_ids, tokens.logprobs, start)
        return self._chunk(tokens.index, tokens.text, logprobs, None)

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        """What a stream begins with: in a chat, who speaks."""
        if self.kind == "text":
            return []
        return [self._chunk(index, "", None, None, opens=True) for index in range(num_choices)]

    def ending(self, done: Done) -> list[dict[str, Any]]:
        """What a stream ends with: why each reply does."""
        return [
            self._chunk(index, "", None, _FINISH_REASONS[reply.finish_reason], closes=True)
            for index, reply in enumerate(done.replies)
        ]

    def usage(self, done: Done) -> dict[str, Any]:
        """The last chunk, where the numbers of tokens are asked for."""
        return {**self._head, "object": self._chunk_name, "choices": [], "usage": usage_of([done])}

    @property
    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _choice(self, index: int, reply: Reply) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "logprobs": self._logprobs(reply.token_ids, reply.logprobs, 0),
            "finish_reason": _FINISH_REASONS[reply.finish_reason],
        }
        if self.kind == "chat":
            message = {"role": "assistant", "content": reply.text, "refusal": None}
            choice["message"] = message
        else:
            choice["text"] = reply.text
        if reply.score is not None:
            choice["score"] = reply.score
        return choice

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None,
        finish_reason: str | None,
        *,
        opens: bool = False,
        closes: bool = False,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        if self.kind == "text":
            choice["text"] = text
        elif closes:
            choice["delta"] = {}
        else:
            choice["delta"] = {"role": "assistant"} if opens else {}
            choice["delta"]["content"] = text
        return {**self._head, "object": self._chunk_name, "choices": [choice]}

    def _logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[float] | None, start: int
    ) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        texts: list[str] = [str(self.tokenizer.decode([token])) for token in token_ids]
        if self.kind == "chat":
            content = [
                {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
                for text, value in zip(texts, logprobs, strict=True)
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for text in texts:
            offsets.append(start)
            start += len(text)
        return {
            "tokens": texts,
            "token_logprobs": list(logprobs),
            "top_logprobs": None,
            "text_offset": offsets,
        }


def usage_of(done: Sequence[Done]) -> dict[str, int]:
    """How many tokens prompts and replies had."""
    prompt = sum(each.num_prompt_tokens for each in done)
    completion = sum(len(reply.token_ids) for each in done for reply in each.replies)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
