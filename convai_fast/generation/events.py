"""What the engine tells after a step."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from convai_fast.generation.request import Reply


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of a reply that is streamed: such as no stop text can take back.

    Attributes:
        index: which of the request's replies, from 0.
        text: what they add to its text.
    """

    id: Hashable
    index: int
    token_ids: Sequence[int]
    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """All replies to a request."""

    id: Hashable
    replies: list[Reply]


@dataclass(frozen=True, slots=True)
class Failed:
    """Why there will be no replies to a request."""

    id: Hashable
    reason: str


Event = Tokens | Done | Failed
