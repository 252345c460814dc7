"""Requests whose replies are found again by their ids, among them the turns of a dataset."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from convai_fast.dialogue.dialogue import Dialogue
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Request, Texts

Id = str | int | float


@dataclass(frozen=True, slots=True)
class IdentifiedRequest:
    """A request whose replies will be found again by its id.

    Attributes:
        number: its place in what it comes from: of a file, that of the line, from 1.
        expected: the true reply, where it is known.
        unused: names of what stands in the line and changes nothing.
        candidates: replies to be ranked.
    """

    id: Id
    request: Request
    number: int = 0
    expected: str | None = None
    unused: Sequence[str] = ()
    candidates: Texts = ()


def id_key(id: Id) -> str:
    """What tells ids apart: 1, 1.0 and "1" are three."""
    return json.dumps(id)


def seed_of(seed: int, id: Id) -> int:
    """The seed of the request `id` in a run with `seed`, whatever else the run holds."""
    digest = hashlib.sha256(f"{seed} {id_key(id)}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1  # a seed has 63 bits


def turn_id(split: str, dialogue: int, turn: int) -> str:
    """The id of a turn, such as valid/3/0; dialogues and turns are counted from 0."""
    return f"{split}/{dialogue}/{turn}"


def request_of_turn(
    id: str,
    dialogue: Dialogue,
    turn: int,
    max_history: int,
    params: SamplingParams,
    number: int = 0,
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
    candidates = utterance.candidates
    return IdentifiedRequest(id, request, number, candidates[-1], candidates=candidates)
