"""`convai-fast generate`: replies in bulk."""

import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import count, product
from pathlib import Path
from typing import Annotated, Literal

import tyro

from convai_fast.cli.remembered import RememberedOptions
from convai_fast.data.dataset import check_at_least
from convai_fast.data.spool import fingerprint
from convai_fast.dialogue.dialogue import Dialogue
from convai_fast.dialogue.encoding import tokenizer_fingerprint
from convai_fast.errors import UserError
from convai_fast.generation.dataset_requests import request_of_turn, turn_id
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.jsonl import (
    BadLine,
    IdentifiedRequest,
    RequestFile,
    id_key,
    reply_record,
)
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.reply_file import ReplyFile, check_absent, written_paths
from convai_fast.generation.request import Request, find_blank_turn, prompt_room
from convai_fast.hardware import resolve_device
from convai_fast.loading import load, model_fingerprint
from convai_fast.terminal import progress_bar

_OF_DIALOGUES = ("reader", "fill_candidates", "valid_fraction", "data_seed", "skip_bad_records")


@dataclass
class GenerateOptions(RememberedOptions):
    """Write replies in bulk: to the requests of a JSONL file, or to every turn of a dataset.

    A request is a line such as {"id": "a7", "persona": ["i like tea ."], "history": ["hello !"]},
    or {"messages": [{"role": "user", "content": "hello !"}]}, or {"prompt": "hello !"}, or a line
    of an OpenAI batch file. Any sampling option below may stand in it, as may "n" and "logprobs",
    also under the names of other engines (max_tokens), and overrides the command's. Persona and
    history may be lists of lists of token ids, or "input_ids" and "token_type_ids" stand for both.

    The replies are lines in the order of the requests, {"id": "a7", "replies": [{"text": …,
    "finish_reason": …}]}. Until all are there they are kept in OUTPUT.partial, from which the same
    command continues after an interruption; lines that cannot be answered are listed in
    OUTPUT.errors.jsonl.
    """

    output: Path | None = None
    """JSONL file for the replies."""
    input: Path | None = None
    """JSONL file with the requests; it may be gzip, bzip2, xz or zstd, or Parquet with a request a
    row."""
    split: Literal["train", "valid"] = "valid"
    """Split of the dialogues to answer; the ids are SPLIT/DIALOGUE/TURN, counted from 0."""
    num_return: Annotated[int, tyro.conf.arg(aliases=["--n"])] = 1
    """Replies to each request."""
    logprobs: bool = False
    """Write the log-probability of each token of a reply."""
    token_ids: bool = False
    """Write the token ids of a reply."""
    batch_size: int = 64
    """Replies that are written at a time, at most; on a CPU they do not depend on it."""
    weights: Literal["float32", "bfloat16", "int8"] = "float32"
    """Number format of the weights; int8 is an approximation."""
    device: str = "auto"
    """cuda, cuda:1 or cpu; auto takes cuda where there is one."""
    overwrite: bool = False
    """Replace OUTPUT, once all replies are there."""
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = field(
        default_factory=SamplingParams
    )

    def check_given(self) -> None:
        """Raise UserError for options of dialogues where requests are given: see `recall`."""
        default = GenerateOptions()
        for name in ("split", *_OF_DIALOGUES) if self.input else ():
            if getattr(self, name) != getattr(default, name):
                raise UserError(f"--{name} is about dialogues (--data), not --input: leave it out")

    def check(self) -> None:
        """Raise UserError at the first option that makes no sense."""
        if bool(self.input) == bool(self.dataset_path):
            given = "both --input and --data" if self.input else "neither --input nor --data"
            raise UserError(f"{given} given: give one, the requests or dialogues to answer")
        if self.output is None:
            raise UserError("no --output given: name a file for the replies")
        if "-" in (str(self.input), str(self.output)):
            raise UserError("a run that can be continued needs files: - is not one")
        check_at_least(self, {"max_history": 0, "num_return": 1, "batch_size": 1})
        if self.output.exists() and not self.output.is_file():
            raise UserError(f"{self.output} is not a regular file: name one with --output")
        sources = [self.input] if self.input else map(Path, self.dataset_path)
        for path, source in product(written_paths(self.output), sources):
            if path.exists() and source.exists() and path.samefile(source):
                what = "requests" if self.input else "dialogues"
                raise UserError(f"{path} holds the {what}: choose another --output")
        if not self.overwrite:
            check_absent(self.output)


class DatasetRequests:
    """A request for every turn of `dialogues`, to be iterated over like a `RequestFile`."""

    def __init__(
        self, dialogues: list[Dialogue], split: str, max_history: int, params: SamplingParams
    ) -> None:
        self.dialogues, self.split, self.params = dialogues, split, params
        self.max_history = max_history
        self.num_requests = sum(len(dialogue.utterances) for dialogue in dialogues)
        self.settings = {
            "data": fingerprint({split: dialogues}),
            "split": split,
            "max_history": max_history,
        }

    def __iter__(self) -> Iterator[IdentifiedRequest]:
        for number, dialogue in enumerate(self.dialogues):
            for turn in range(len(dialogue.utterances)):
                id = turn_id(self.split, number, turn)
                yield request_of_turn(id, dialogue, turn, self.max_history, self.params)


Source = RequestFile | DatasetRequests


def run(options: GenerateOptions) -> None:
    """Answer what is not answered yet, then put the file of replies in its place."""
    options.check_given()
    options.recall()
    options.check()
    params = replace(options.sampling, n=options.num_return, logprobs=options.logprobs)
    source = _open_source(options, params)
    device = resolve_device(options.device)
    model, tokenizer = load(options.model)
    prompt_room(model.config.n_positions, params)  # too long a reply is no line's fault
    settings = {
        **source.settings,
        "model": model_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "weights": options.weights,
        "token_ids": options.token_ids,
        **asdict(params),
    }
    engine = GenerationEngine(
        model.to(device), tokenizer, max_batch_size=options.batch_size, weights=options.weights
    )
    reply_file = ReplyFile(options.output, settings, overwrite=options.overwrite)
    with _exit_on_sigterm(), reply_file as replies:
        _BulkRun(engine, source, replies, options.token_ids).run()


class _BulkRun:
    """One run of the command: what it keeps track of between a request and its replies."""

    def __init__(
        self, engine: GenerationEngine, source: Source, replies: ReplyFile, token_ids: bool
    ) -> None:
        self.engine, self.source, self.replies, self.token_ids = engine, source, replies, token_ids
        self.num_earlier = len(replies.positions)
        self.keys: dict[str, None] = {}  # what the file of replies will hold, in its order
        self.in_flight: dict[int, IdentifiedRequest] = {}
        self.first_bad: BadLine | None = None
        self.unused: Counter[str] = Counter()  # lines with a field that changes no reply
        self.num_replies = self.num_tokens = 0

    def run(self) -> None:
        self.started = time.perf_counter()
        self.progress = progress_bar(
            total=self.source.num_requests, initial=self.num_earlier, unit="request"
        )
        try:
            with self.progress:
                self._answer()
        except (KeyboardInterrupt, SystemExit):
            print(
                f"stopped: {len(self.replies.positions):,} of {self.source.num_requests:,} "
                f"requests are answered; the same command continues from {self.replies.partial}",
                file=sys.stderr,
            )
            raise
        self.replies.finish(list(self.keys))
        self._report()

    def _answer(self) -> None:
        for position, replies in self.engine.serve(self._requests(), self._fail):
            item = self.in_flight.pop(position)
            self.replies.add(reply_record(item, replies, with_token_ids=self.token_ids))
            self.num_replies += len(replies)
            self.num_tokens += sum(len(reply.token_ids) for reply in replies)
            self.progress.set_postfix_str(f"{self._speed():,.0f} tokens/s", refresh=False)
            self.progress.update()

    def _requests(self) -> Iterator[Request]:
        """The requests without replies so far, as the engine asks for them."""
        positions = count()
        for item in self.source:
            if isinstance(item, BadLine):
                self._reject(item)
                continue
            self.unused.update(item.unused)
            key = id_key(item.id)
            is_answered = key in self.replies.positions
            if not is_answered and (reason := self._refusal(item)):
                self._reject(BadLine(item.line, item.id, reason))
                continue
            self.keys[key] = None
            if not is_answered:
                self.in_flight[next(positions)] = item
                yield item.request

    def _refusal(self, item: IdentifiedRequest) -> str | None:
        if item.line is None:  # what the turns of a dataset hold is its reader's business
            return None
        try:
            blank = find_blank_turn(item.request.history, self.engine.tokenizer)
        except UserError as error:
            return str(error)
        return None if blank is None else f"history[{blank}] is blank: leave it out"

    def _fail(self, position: int, reason: str) -> None:
        item = self.in_flight.pop(position)
        del self.keys[id_key(item.id)]
        self._reject(BadLine(item.line, item.id, reason))

    def _reject(self, bad: BadLine) -> None:
        self.replies.add_error(bad)
        self.progress.update()
        self.first_bad = self.first_bad or bad

    def _speed(self) -> float:
        return self.num_tokens / (time.perf_counter() - self.started)

    def _report(self) -> None:
        bad = self.replies.num_errors
        if not self.keys:
            first = self.first_bad
            where = first.id if first.line is None else f"line {first.line}"
            raise UserError(
                f"not one request can be answered ({where}: {first.reason}): {self.replies.errors} "
                "lists them all; dialogues are answered with --data"
            )
        if bad:
            print(f"{bad:,} bad {'line' if bad == 1 else 'lines'}: {self.replies.errors} says why")
        if self.unused:
            fields = ", ".join(f"{name} ({count:,})" for name, count in self.unused.items())
            print(f"fields that change no reply, and in how many lines: {fields}")
        earlier = (
            f" (and those to {self.num_earlier:,} requests before)" if self.num_earlier else ""
        )
        print(
            f"{self.num_replies:,} replies{earlier}, {self.num_tokens:,} tokens in "
            f"{time.perf_counter() - self.started:.1f} s, {self._speed():,.0f} tokens/s: "
            f"{self.replies.output}"
        )


def _open_source(options: GenerateOptions, params: SamplingParams) -> Source:
    if options.input:
        return RequestFile(options.input, params)
    data = replace(options.data, fill_candidates=1)  # distractors are not read
    source = DatasetRequests(data.load()[options.split], options.split, options.max_history, params)
    if not source.num_requests:
        raise UserError(
            f"the {options.split} split of {' and '.join(options.dataset_path)} is empty"
        )
    return source


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turns SIGTERM into SystemExit with the exit code that a shell shows for it."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
