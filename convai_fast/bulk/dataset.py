"""The turns of a dataset as a source of requests."""

from collections.abc import Iterator, Sequence
from itertools import islice

from convai_fast.bulk.shard import ALL, Shard
from convai_fast.data.spool import fingerprint
from convai_fast.dialogue.dialogue import Dialogue
from convai_fast.generation.identified import IdentifiedRequest, request_of_turn, turn_id
from convai_fast.generation.params import SamplingParams


class DatasetRequests:
    """A request for every turn of `dialogues`, to be iterated over like a `RequestFile`."""

    def __init__(
        self,
        dialogues: Sequence[Dialogue],
        split: str,
        max_history: int,
        params: SamplingParams,
        shard: Shard = ALL,
    ) -> None:
        self.dialogues, self.split, self.params = dialogues, split, params
        self.max_history = max_history
        self.shard = shard
        self.positions = shard.positions(sum(len(dialogue.utterances) for dialogue in dialogues))
        self.num_requests = len(self.positions)
        self.settings = {
            "data": fingerprint({split: dialogues}),
            "split": split,
            "max_history": max_history,
            **shard.settings,
        }

    def __iter__(self) -> Iterator[IdentifiedRequest]:
        turns = (
            (dialogue_number, dialogue, turn)
            for dialogue_number, dialogue in enumerate(self.dialogues)
            for turn in range(len(dialogue.utterances))
        )
        own = islice(turns, self.positions.start, self.positions.stop)
        for number, (dialogue_number, dialogue, turn) in enumerate(own):
            id = turn_id(self.split, dialogue_number, turn)
            yield request_of_turn(id, dialogue, turn, self.max_history, self.params, number)
