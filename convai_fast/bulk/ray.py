"""Replies by many machines: actors of a Ray cluster, each with an engine of its own.

What a reply becomes depends on its request alone, so it does not matter which actor answers it, how
many there are, or which of them die: Ray starts another one, which answers the same requests anew.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, Dataset
from ray.exceptions import RayError
from transformers import PreTrainedTokenizerFast

from convai_fast.bulk.answers import Answers, Fail, refusal
from convai_fast.bulk.jsonl import reply_record, row_line
from convai_fast.bulk.request_line import read_id, read_object, to_request
from convai_fast.errors import UserError, reason_of
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.events import Done, Failed
from convai_fast.generation.identified import IdentifiedRequest, seed_of
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Reply, Request, check_ranking, prompt_room
from convai_fast.hardware import resolve_device
from convai_fast.loading import layout_for, load
from convai_fast.model.double_heads import DoubleHeadsModel

Written = list[Reply] | str  # the replies to a request, or why there are none
Batch = list[Written]
Loaded = tuple[DoubleHeadsModel, PreTrainedTokenizerFast]

_BATCHES = 3  # that an actor has at a time, so that its engine's batch stays full between two
_RETRIES = 5  # of a batch, whose requests may be what kills the actors
_REPLY = pa.struct(
    {
        "text": pa.string(),
        "finish_reason": pa.string(),
        "token_ids": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float64()),
        "score": pa.float64(),
    }
)


@dataclass(frozen=True, slots=True)
class Actors:
    """The actors that write replies.

    Attributes:
        number: how many; 0: as many as the cluster has room for.
        cpus: cores of each, which is also the number of its threads.
        gpus: GPUs of each: 1, a share of one, or 0 to compute on the CPU.
        max_batch_size: sequences that are under way at a time in each, at most.
        weights: as for `GenerationEngine`; "auto" is bfloat16 on a GPU and float32 on a CPU.
    """

    number: int = 0
    cpus: int = 1
    gpus: float = 0
    max_batch_size: int = 64
    weights: str = "auto"

    @property
    def weights_there(self) -> str:
        """The number format of the weights, where they are computed with."""
        if self.weights != "auto":
            return self.weights
        return "bfloat16" if self.gpus else "float32"

    def most(self) -> int:
        """How many there will be, at most.

        Raises UserError where the cluster has no room for even one.
        """
        has = ray.cluster_resources()
        cpus, gpus = has.get("CPU", 0), has.get("GPU", 0)
        room = cpus // self.cpus
        if self.gpus:
            room = min(room, gpus // self.gpus)
        if not room:
            raise UserError(
                f"an actor with `ray_cpus` {self.cpus} and `ray_gpus` {self.gpus:g} has no room in "
                f"the cluster, which has {cpus:g} cores and {gpus:g} GPUs: give it less"
            )
        return self.number or int(room)


@contextmanager
def connected() -> Iterator[None]:
    """A connection to the cluster of RAY_ADDRESS, or to one on this machine, which it starts.

    A connection that is there already is used, and stays.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a run tells nobody of itself
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"there is no Ray cluster to connect to ({reason_of(error)}): see RAY_ADDRESS"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


class Writer:
    """An actor: an engine that writes replies to several batches of requests at a time."""

    def __init__(self, actors: Actors) -> None:
        self._actors = actors
        self._engine: GenerationEngine | None = None
        self._beginning = asyncio.Lock()
        self._places: dict[object, tuple[dict[int, Written], int]] = {}  # of replies, by their ids

    async def write(self, shared: "list[ray.ObjectRef]", requests: Sequence[Request]) -> Batch:
        """The replies to each request, in their order.

        Args:
            shared: a reference to the model and its tokenizer, in a list, or Ray would fetch them
                for every batch; and not once and for all, since an actor that is started again is
                given only the batches that are not written yet.
        """
        engine = await self._begun(shared)
        written: dict[int, Written] = {}
        for i, request in enumerate(requests):
            id = object()
            try:
                engine.add(id, request)
                self._places[id] = written, i
            except UserError as error:
                written[i] = str(error)
        while len(written) < len(requests):
            for event in engine.step():  # of all batches
                assert isinstance(event, Done | Failed)  # nothing is streamed
                place, i = self._places.pop(event.id)
                place[i] = event.replies if isinstance(event, Done) else event.reason
            await asyncio.sleep(0)  # other batches are taken, and given back
        return [written[i] for i in range(len(requests))]

    async def _begun(self, shared: "list[ray.ObjectRef]") -> GenerationEngine:
        async with self._beginning:
            if self._engine is None:
                torch.set_num_threads(self._actors.cpus)
                model, tokenizer = await shared[0]
                self._engine = GenerationEngine(
                    model.to(resolve_device("cuda" if self._actors.gpus else "cpu")),
                    tokenizer,
                    max_batch_size=self._actors.max_batch_size,
                    weights=self._actors.weights_there,
                )
        return self._engine


class RayReplies(Answers):
    """Replies that the actors of a cluster write, while `connected`; see `Replies`.

    The engines that are there do not wait for those that Ray still looks a place for.
    """

    noun, unit = "reply", "token"

    def __init__(
        self,
        actors: Actors,
        model: DoubleHeadsModel,
        tokenizer: PreTrainedTokenizerFast,
        record: Callable[[IdentifiedRequest, Sequence[Reply]], dict[str, Any]] = reply_record,
    ) -> None:
        super().__init__(tokenizer)
        self.model, self.actors, self.record = model, actors, record

    def answer(
        self, items: Iterable[IdentifiedRequest], fail: Fail
    ) -> Iterator[tuple[IdentifiedRequest, dict[str, Any]]]:
        """See `Answers`.

        Raises UserError where an actor cannot begin, or the same requests end one after another.
        """
        for item, written in self._written(iter(items)):
            if isinstance(written, str):
                fail(item, written)
                continue
            self.num_answers += len(written)
            self.num_units += sum(len(reply.token_ids) for reply in written)
            yield item, self.record(item, written)

    def _written(
        self, items: Iterator[IdentifiedRequest]
    ) -> Iterator[tuple[IdentifiedRequest, Written]]:
        actors = self.actors
        make: Any = ray.remote(Writer).options(
            num_cpus=actors.cpus,
            num_gpus=actors.gpus,
            max_concurrency=_BATCHES,
            max_restarts=-1,
            max_task_retries=_RETRIES,
        )
        shared = [ray.put((self.model, self.tokenizer))]
        writers = [make.remote(actors) for _ in range(actors.most())]
        # An actor takes requests once it has answered none: by then it is there.
        under_way: dict[Any, tuple[Any, list[IdentifiedRequest]]] = {
            writer.write.remote(shared, []): (writer, [])
            for writer in writers
            for _ in range(_BATCHES)
        }
        try:
            while True:
                [done], _ = ray.wait(list(under_way), num_returns=1)
                writer, batch = under_way.pop(done)
                if more := list(islice(items, actors.max_batch_size)):
                    requests = [item.request for item in more]
                    under_way[writer.write.remote(shared, requests)] = writer, more
                yield from zip(batch, ray.get(done), strict=True)
                if not more and not any(left for _, left in under_way.values()):
                    return
        except RayError as error:
            reason = reason_of(getattr(error, "cause", None) or error)
            raise UserError(
                f"an actor of the Ray cluster cannot go on ({reason}); the same command continues "
                "with what is answered so far"
            ) from error
        finally:
            for writer in writers:
                ray.kill(writer)


def generate(
    dataset: Dataset,
    model: str | Path | Loaded,
    params: SamplingParams | None = None,
    actors: Actors | None = None,
) -> Dataset:
    """The replies to each row of a dataset, which is read and written as it streams.

    A row is a request as a line of `convai-fast generate`, with a column "id" (or "custom_id"); its
    replies are those of that command. What comes of it has the columns "id" (of the same name),
    "replies" (a list of text, finish_reason, token_ids, logprobs and score) and "error", which says
    why there are none.

    Args:
        model: what `load` takes, or what it gives.
        params: how replies are drawn where the row does not say.

    Raises:
        UserError: there is no such column, no room in the cluster, or no room for a prompt.

    Example:
        >>> requests = ray.data.read_parquet("requests/")
        >>> generate(requests, "runs/mine").write_parquet("replies/")
    """
    params, actors = params or SamplingParams(), actors or Actors()
    if not {"id", "custom_id"} & {*(dataset.columns() or [])}:
        raise UserError("the dataset has no column id: give each row one of its own")
    loaded = model if isinstance(model, tuple) else load(model)
    prompt_room(loaded[0].config.n_positions, params, layout_for(loaded[1], loaded[0].config))
    check_ranking(params, loaded[0])
    most = actors.most()
    # What reads the rows needs cores as well: with a choice, Ray starts no more than leaves them.
    least = most if actors.number else 1
    return dataset.map_batches(
        _RowWriter,
        fn_constructor_args=([ray.put(loaded)], actors, params),
        compute=ActorPoolStrategy(min_size=least, max_size=most),
        batch_size=actors.max_batch_size,
        batch_format="pyarrow",
        num_cpus=actors.cpus,
        num_gpus=actors.gpus,
    )


class _RowWriter(Writer):
    """One that takes and gives tables, for `Dataset.map_batches`."""

    def __init__(
        self, shared: "list[ray.ObjectRef]", actors: Actors, params: SamplingParams
    ) -> None:
        super().__init__(actors)
        self._shared, self._params = shared, params

    async def __call__(self, table: pa.Table) -> pa.Table:
        tokenizer = (await self._begun(self._shared)).tokenizer
        rows = [self._read(row, tokenizer) for row in table.to_pylist()]
        requests = [row.request for row in rows if isinstance(row, IdentifiedRequest)]
        written = iter(await self.write(self._shared, requests))
        records = []
        for row in rows:
            answer = row if isinstance(row, str) else next(written)
            if isinstance(answer, str):
                records.append({"error": answer})
            else:
                assert isinstance(row, IdentifiedRequest)
                records.append(reply_record(row, answer, with_token_ids=True))
        id = "id" if "id" in table.column_names else "custom_id"
        columns = {"replies": pa.list_(_REPLY), "error": pa.string()}
        return pa.table(
            {id: table[id]}
            | {
                name: pa.array([record.get(name) for record in records], kind)
                for name, kind in columns.items()
            }
        )

    def _read(
        self, row: dict[str, Any], tokenizer: PreTrainedTokenizerFast
    ) -> IdentifiedRequest | str:
        """The request of a row, or why it cannot be answered."""
        try:
            record = read_object(row_line(row))
            if (id := read_id(record)) is None:
                return "the row has no id"
            request, unused = to_request(record, self._params, seed_of(self._params.seed, id))
        except UserError as error:
            return str(error)
        reason = refusal(request, tokenizer)
        return IdentifiedRequest(id, request, unused=unused) if reason is None else reason
