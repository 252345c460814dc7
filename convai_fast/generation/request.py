"""What is asked of the engine, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from convai_fast.data.readers.fields import is_blank
from convai_fast.dialogue.encoding import encode, encode_at
from convai_fast.dialogue.layout import Layout, Place
from convai_fast.dialogue.prompt import Prompt, fit_prompt, shortest_prompt
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
            the one who replies.
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
    layout: Layout,
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
        persona, history, elsewhere = dialogue_of(request, tokenizer, layout, vocab_size)
        for i, turn in enumerate(request.history):
            if isinstance(turn, str) and is_blank(turn):
                raise UserError(f"history[{i}] of the request is blank: leave it out")
        return fit_prompt(persona, history, layout, room, elsewhere)

    if len(request.persona) or len(request.history):
        raise UserError("the request has both input_ids and persona or history: give only one")
    input_ids = list(request.input_ids)
    token_type_ids = request.token_type_ids
    if token_type_ids is None:
        token_type_ids = [layout.speaker1] * len(input_ids)
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


class DialogueIds(NamedTuple):
    """Token ids of the texts of a request by their places, as `fit_prompt` takes them."""

    persona: list[list[int]]
    history: list[list[int]]
    elsewhere: dict[Place, list[list[int]]]


def dialogue_of(
    request: Request, tokenizer: PreTrainedTokenizerFast, layout: Layout, vocab_size: int
) -> DialogueIds:
    """The token ids of persona and history; those that are given are taken for any place."""

    def ids_of(texts: Texts, field: str, places: list[Place]) -> list[list[int]]:
        return token_ids_of(texts, field, tokenizer, vocab_size, places, layout)

    def differs(place: Place, usual: Place) -> bool:
        return layout.surroundings[place] != layout.surroundings[usual]

    num_sentences, num_turns = len(request.persona), len(request.history)
    persona = ids_of(request.persona, "persona", [Place.MIDDLE_SENTENCE] * num_sentences)
    history = ids_of(request.history, "history", layout.places_of_turns(num_turns, False))
    elsewhere = {
        place: ids_of(request.persona, "persona", [place] * num_sentences)
        for place in (Place.ONLY_SENTENCE, Place.FIRST_SENTENCE, Place.LAST_SENTENCE)
        if differs(place, Place.MIDDLE_SENTENCE)
    }
    if layout.persona_turn != "none" and differs(Place.PERSONA_TURN, Place.SPEAKER2):
        places = [Place.PERSONA_TURN] * num_turns
        elsewhere[Place.PERSONA_TURN] = ids_of(request.history, "history", places)
    return DialogueIds(persona, history, elsewhere)


def prompt_room(n_positions: int, params: SamplingParams, layout: Layout) -> int:
    """Number of tokens that a prompt may have so that the reply still fits the model.

    Raises UserError when `params.max_length` leaves no room for a prompt.
    """
    room = n_positions - params.max_length - (params.best_of > 1)  # ranked at its <eos>
    shortest = shortest_prompt(layout)
    if room < shortest:
        most = room + params.max_length - shortest
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
    texts: Texts,
    field: str,
    tokenizer: PreTrainedTokenizerFast,
    vocab_size: int,
    places: Sequence[Place],
    layout: Layout,
) -> list[list[int]]:
    """The token ids of each of `texts` in its place; UserError calls them `field`."""
    if isinstance(texts, str):
        raise UserError(f"{field} of the request is one text: give a list of them")
    given: list[Any] = list(texts)
    num_texts = sum(isinstance(each, str) for each in given)
    if given and num_texts == len(given):
        return encode_at(tokenizer, given, places, layout)
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
