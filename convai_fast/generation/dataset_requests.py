"""The turns of a dataset as requests, each with its true reply."""

from dataclasses import replace

from convai_fast.dialogue.dialogue import Dialogue
from convai_fast.generation.jsonl import IdentifiedRequest, seed_of
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Request


def turn_id(split: str, dialogue: int, turn: int) -> str:
    """The id of a turn, such as valid/3/0; dialogues and turns are counted from 0."""
    return f"{split}/{dialogue}/{turn}"


def request_of_turn(
    id: str, dialogue: Dialogue, turn: int, max_history: int, params: SamplingParams
) -> IdentifiedRequest:
    """A request for the reply to one turn, of which the last `2 * max_history + 1` turns are seen.

    Its seed depends on `params.seed` and `id` alone.
    """
    utterance = dialogue.utterances[turn]
    request = Request(
        persona=dialogue.personality,
        history=utterance.history[-(2 * max_history + 1) :],
        params=replace(params, seed=seed_of(params.seed, id)),
    )
    return IdentifiedRequest(id, request, expected=utterance.candidates[-1])
