"""What is asked of the engine, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from convai_fast.data.readers.fields import is_blank
from convai_fast.dialogue.encoding import encode
from convai_fast.dialogue.format import SpecialIds
from convai_fast.dialogue.prompt import SHORTEST_PROMPT, Prompt, fit_prompt
from convai_fast.errors import UserError
from convai_fast.generation.params import SamplingParams
from convai_fast.model.double_heads import DoubleHeadsModel

Texts = Sequence[str] | Sequence[Sequence[int]]
FinishReason = Literal["eos", "length", "stop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A dialogue to be answered, as persona and history or as the prompt's own token ids.

    Attributes:
        persona: the model's sentences about itself, as text or as token ids.
        history: the turns so far, oldest first, the partner's last turn last; text, none of them
            blank, or token ids.
        input_ids: instead of both, the whole prompt: what the reply is to follow.
        token_type_ids: the segment id of each of `input_ids`; without them every token has that of
            `<speaker1>`.
        params: how the replies are drawn.

    Example:
        >>> Request(persona=["i like tea ."], history=["hello !"], params=SamplingParams(n=5))
    """

    persona: Texts = ()
    history: Texts = ()
    input_ids: Sequence[int] | None = None
    token_type_ids: Sequence[int] | None = None
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(slots=True)
class Reply:
    """One reply.

    Attributes:
        token_ids: what was drawn, without the special token that ended it.
        text: the same as text, without special tokens, and up to the stop text if there was one.
        finish_reason: "eos" (a special token was drawn), "length" (`max_length` tokens) or "stop"
            (one of `SamplingParams.stop` was written).
        logprobs: if `SamplingParams.logprobs`, the natural logarithm of each token's probability
            after bans and penalties, before temperature and filters.
        score: with `SamplingParams.best_of`, its multiple-choice logit, by which replies to one
            request are ranked.
    """

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    logprobs: list[float] | None = None
    score: float | None = None


def build_prompt(
    request: Request,
    tokenizer: PreTrainedTokenizerFast,
    special_ids: SpecialIds,
    vocab_size: int,
    room: int,
) -> Prompt:
    """The prompt of `request`, of at most `room` tokens; persona and history are cut as `fit` says.

    Raises:
        UserError: a turn that is blank, as in training data; token ids that do not exist, or given
            together with persona or history, or too many of them: nobody but the caller knows what
            could be left out.
    """
    if request.input_ids is None:
        if request.token_type_ids is not None:
            raise UserError("the request has token_type_ids, but no input_ids")
        persona = token_ids_of(request.persona, "persona", tokenizer, vocab_size)
        history = token_ids_of(request.history, "history", tokenizer, vocab_size)
        for i, turn in enumerate(request.history):
            if isinstance(turn, str) and is_blank(turn):
                raise UserError(f"history[{i}] of the request is blank: leave it out")
        return fit_prompt(persona, history, special_ids, room)

    if len(request.persona) or len(request.history):
        raise UserError("the request has both input_ids and persona or history: give only one")
    input_ids = list(request.input_ids)
    token_type_ids = request.token_type_ids
    if token_type_ids is None:
        token_type_ids = [special_ids.speaker1] * len(input_ids)
    token_type_ids = list(token_type_ids)
    if not input_ids or len(token_type_ids) != len(input_ids):
        raise UserError(
            f"the request has {len(input_ids)} input_ids and {len(token_type_ids)} token_type_ids: "
            "give at least one, and as many of both"
        )
    if len(input_ids) > room:
        raise UserError(
            f"the request has {len(input_ids)} input_ids, but beside the reply the model has "
            f"positions for {room}"
        )
    _check_ids(input_ids, "input_ids", vocab_size)
    _check_ids(token_type_ids, "token_type_ids", vocab_size)
    return Prompt(input_ids, token_type_ids)


def prompt_room(n_positions: int, params: SamplingParams) -> int:
    """Number of tokens that a prompt may have so that the reply still fits the model.

    Raises UserError when `params.max_length` leaves no room for a prompt.
    """
    room = n_positions - params.max_length - (params.best_of > 1)  # ranked at its <eos>
    if room < SHORTEST_PROMPT:
        most = room + params.max_length - SHORTEST_PROMPT
        raise UserError(
            f"max_length is {params.max_length}, which leaves no room for a prompt in the "
            f"model's {n_positions} positions: give at most {most}"
        )
    return room


def check_ranking(params: SamplingParams, model: DoubleHeadsModel) -> None:
    """Raise UserError where drafts are to be ranked with a head that has learnt nothing."""
    if params.best_of > 1:
        model.check_ranking("best_of ranks replies with", ", or leave best_of out")


def find_blank_turn(history: Texts, tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The place in `history`, from 0, of the first turn with nothing to see, or without a token."""
    turns: list[Any] = list(history)
    if turns and all(isinstance(turn, str) for turn in turns):
        turns = encode(tokenizer, turns)
    for i, (turn, ids) in enumerate(zip(history, turns, strict=True)):
        if not len(ids) or (isinstance(turn, str) and is_blank(turn)):
            return i
    return None


def token_ids_of(
    texts: Texts, field: str, tokenizer: PreTrainedTokenizerFast, vocab_size: int
) -> list[list[int]]:
    """The token ids of each of `texts`, which UserError calls `field`."""
    if isinstance(texts, str):
        raise UserError(f"{field} of the request is one text: give a list of them")
    given: list[Any] = list(texts)
    num_texts = sum(isinstance(each, str) for each in given)
    if given and num_texts == len(given):
        return encode(tokenizer, given)
    if num_texts:
        raise UserError(f"{field} of the request mixes texts and token ids: give one kind")
    for ids in given:
        if not isinstance(ids, Sequence | np.ndarray):
            raise UserError(f"{field} of the request holds {ids!r}: give each text's ids as a list")
        _check_ids(ids, field, vocab_size)
    return [list(map(int, ids)) for ids in given]


def _check_ids(ids: Sequence[int] | np.ndarray, field: str, vocab_size: int) -> None:
    for token in ids:
        is_integer = isinstance(token, int | np.integer) and not isinstance(token, bool)
        if not is_integer or not 0 <= token < vocab_size:
            raise UserError(
                f"{field} of the request holds {token!r}, which is not a token id below "
                f"{vocab_size}"
            )
