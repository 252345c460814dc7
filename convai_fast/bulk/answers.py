"""What is done with the requests of a run: replies are written, or candidates ranked."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerFast

from convai_fast.bulk.jsonl import ranking_record, reply_record
from convai_fast.errors import UserError
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.identified import IdentifiedRequest
from convai_fast.generation.ranking import rank
from convai_fast.generation.request import Reply, Request, find_blank_turn
from convai_fast.loading import layout_for
from convai_fast.model.double_heads import DoubleHeadsModel

Fail = Callable[[IdentifiedRequest, str], None]


def refusal(request: Request, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Why a request of a user's is not answered, though the engine would: a turn of it is blank."""
    try:
        blank = find_blank_turn(request.history, tokenizer)
    except UserError as error:
        return str(error)
    return None if blank is None else f"history[{blank}] is blank: leave it out"


class Answers(ABC):
    """Answers to requests, and what they add up to.

    Attributes:
        noun, unit: what one is called, and what their speed is told in.
        num_answers, num_units: how many there are so far.
    """

    noun: ClassVar[str]
    unit: ClassVar[str]

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.num_answers = self.num_units = 0

    @abstractmethod
    def answer(
        self, items: Iterable[IdentifiedRequest], fail: Fail
    ) -> Iterator[tuple[IdentifiedRequest, dict[str, Any]]]:
        """Yield each item, in any order, with the record to be written for it.

        `fail` is told of each that cannot be answered, and why.
        """


class Replies(Answers):
    """Replies that the engine writes; `record` makes of them what is written for their request."""

    noun, unit = "reply", "token"

    def __init__(
        self,
        engine: GenerationEngine,
        record: Callable[[IdentifiedRequest, Sequence[Reply]], dict[str, Any]] = reply_record,
    ) -> None:
        super().__init__(engine.tokenizer)
        self.engine = engine
        self.record = record

    def answer(
        self, items: Iterable[IdentifiedRequest], fail: Fail
    ) -> Iterator[tuple[IdentifiedRequest, dict[str, Any]]]:
        """See `Answers`."""
        in_flight: dict[int, IdentifiedRequest] = {}

        def requests() -> Iterator[Request]:
            for position, item in enumerate(items):
                in_flight[position] = item
                yield item.request

        served = self.engine.serve(requests(), lambda at, reason: fail(in_flight.pop(at), reason))
        for position, replies in served:
            item = in_flight.pop(position)
            self.num_answers += len(replies)
            self.num_units += sum(len(reply.token_ids) for reply in replies)
            yield item, self.record(item, replies)


class Rankings(Answers):
    """Each item's candidates, ranked by the model's multiple-choice head."""

    noun, unit = "ranking", "candidate"

    def __init__(self, model: DoubleHeadsModel, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(tokenizer)
        self.model = model.eval()
        self.layout = layout_for(tokenizer, model.config)

    def answer(
        self, items: Iterable[IdentifiedRequest], fail: Fail
    ) -> Iterator[tuple[IdentifiedRequest, dict[str, Any]]]:
        """See `Answers`."""
        for item in items:
            try:
                ranking = rank(
                    self.model, self.tokenizer, self.layout, item.request, item.candidates
                )
            except UserError as error:
                fail(item, str(error))
                continue
            self.num_answers += 1
            self.num_units += len(ranking)
            yield item, ranking_record(item, ranking)
