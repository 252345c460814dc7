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
        logprobs: of each token, if they were asked for; see `Reply`.
    """

    id: Hashable
    index: int
    token_ids: Sequence[int]
    text: str
    logprobs: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """All replies to a request, and how many tokens its prompt had."""

    id: Hashable
    replies: list[Reply]
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """Why there will be no replies to a request, and whether another request might get some.

    Else it is the model or the machine that failed.
    """

    id: Hashable
    reason: str
    is_requests_fault: bool = False


Event = Tokens | Done | Failed
