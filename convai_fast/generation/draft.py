"""Replies in the making."""

from collections.abc import Hashable

from convai_fast.generation.constraints import Constraints
from convai_fast.generation.detokenizer import TextPieces
from convai_fast.generation.request import Reply, Request
from convai_fast.generation.scheduler import TokenSequence


class Draft(TokenSequence):
    """One reply in the making."""

    def __init__(self, job: "Job", index: int, prompt: TokenSequence) -> None:
        super().__init__(prompt.id, prompt.input_ids, prompt.token_type_ids, prompt.keys)
        self.job, self.index = job, index
        self.prompt_length = len(prompt.input_ids)
        # Replies to one request are drawn from one seed, by counters that never meet.
        self.first_step = index << 32
        self.constraints: Constraints | None = None  # from its first token on
        self.logprobs: list[float] = []
        self.reply: Reply | None = None  # once it is written and waits for its score
        self.pieces: TextPieces | None = None  # of one that is streamed

    @property
    def token_ids(self) -> list[int]:
        """What was drawn so far."""
        return self.input_ids[self.prompt_length :]

    @property
    def num_drawn(self) -> int:
        """How many tokens were drawn so far."""
        return len(self.input_ids) - self.prompt_length

    @property
    def step(self) -> int:
        """The counter of its next random numbers."""
        return self.first_step + self.num_drawn


class Job:
    """A request that is under way, and its replies."""

    def __init__(self, id: Hashable, request: Request) -> None:
        self.id, self.params = id, request.params
        self.drafts: list[Draft] = []
        self.replies: dict[int, Reply] = {}  # those that are done, by their index

    def result(self) -> list[Reply]:
        """What the request asked for of its replies, which are all done; ranked, the best first."""
        replies = [self.replies[index] for index in range(len(self.drafts))]
        if self.params.best_of > 1:
            replies.sort(key=_score, reverse=True)  # equal ones stay in their order
        return replies[: self.params.n]


def _score(reply: Reply) -> float:
    assert reply.score is not None  # all drafts are ranked
    return reply.score
