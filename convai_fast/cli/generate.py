"""`convai-fast generate`: replies in bulk."""

import hashlib
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from convai_fast.data.dataset import DataOptions
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
from convai_fast.generation.reply_file import ReplyFile, check_absent
from convai_fast.generation.request import Request, prompt_room
from convai_fast.hardware import resolve_device
from convai_fast.load import load, model_fingerprint

_TOO_MANY_BAD = 100  # lines that are no request, before the first that is


@dataclass
class GenerateOptions:
    """Write replies in bulk: to the requests of a JSONL file, or to every turn of a dataset.

    A request is a line such as {"id": "a7", "persona": ["i like tea ."], "history": ["hello !"]};
    any sampling option below may stand in it, as may "n" and "logprobs", and overrides the
    command's. Persona and history may be lists of lists of token ids, or "input_ids" and
    "token_type_ids" stand for both.

    The replies are lines in the order of the requests, {"id": "a7", "replies": [{"text": …,
    "finish_reason": …}]}. Until all are there they are kept in OUTPUT.partial, from which the same
    command continues after an interruption; lines that are no request are listed in
    OUTPUT.errors.jsonl.
    """

    model: Annotated[str, tyro.conf.arg(aliases=["--model_checkpoint"])]
    """Folder, .tar.gz or Hub id of a fine-tuned model with its tokenizer."""
    output: Path
    """JSONL file for the replies."""
    input: Path | None = None
    """JSONL file with the requests."""
    dataset_path: Annotated[str, tyro.conf.arg(aliases=["--data"])] = ""
    """Instead of --input: dialogues of which every turn is answered, the true reply beside it."""
    reader: str = "auto"
    """Format of the dialogues at --dataset_path, or package.module:function."""
    split: Literal["train", "valid"] = "valid"
    """Split of the dialogues to answer; the ids are SPLIT/DIALOGUE/TURN, counted from 0."""
    valid_fraction: float = 0.1
    """Where the dialogues have no validation split: the share that `train` cut off."""
    data_seed: int = 42
    """Seed with which `train` cut it off."""
    max_history: int = 2
    """Exchanges of the dialogues that the model sees (2 * max_history + 1 turns); the history of a
    request in --input is used as it is."""
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

    def check(self) -> None:
        """Raise UserError at the first option that makes no sense."""
        if bool(self.input) == bool(self.dataset_path):
            raise UserError(
                "give either --input or --data, not both: the requests, or dialogues to answer"
            )
        if "-" in (str(self.input), str(self.output)):
            raise UserError("a run that can be continued needs files: - is not one")
        for name, least in {"max_history": 0, "num_return": 1, "batch_size": 1}.items():
            value = getattr(self, name)
            if value < least:
                raise UserError(f"--{name} must be at least {least}, not {value}")
        if self.output.exists() and not self.output.is_file():
            raise UserError(f"{self.output} is not a regular file: name one with --output")
        if not self.overwrite:
            check_absent(self.output)
        if self.input and self.output.resolve() == self.input.resolve():
            raise UserError(f"{self.output} holds the requests: choose another --output")


class DatasetRequests:
    """A request for every turn of `dialogues`, to be iterated over like a `RequestFile`."""

    def __init__(
        self, dialogues: list[Dialogue], split: str, max_history: int, params: SamplingParams
    ) -> None:
        self.dialogues, self.split, self.params = dialogues, split, params
        self.max_history = max_history
        self.num_requests = sum(len(dialogue.utterances) for dialogue in dialogues)
        digest = hashlib.sha256()
        for dialogue in dialogues:
            digest.update(repr(dialogue).encode("utf-8"))
        self.settings = {
            "data": digest.hexdigest()[:16],
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
        self.keys: list[str] = []  # what the file of replies will hold, in its order
        self.in_flight: dict[int, IdentifiedRequest] = {}
        self.first_bad: BadLine | None = None
        self.num_replies = self.num_tokens = 0

    def run(self) -> None:
        self.started = time.perf_counter()
        self.progress = tqdm(
            total=self.source.num_requests,
            initial=self.num_earlier,
            unit="request",
            # In a log file a line every half minute is enough.
            mininterval=0.5 if sys.stderr.isatty() else 30,
            dynamic_ncols=True,
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
        self.replies.finish(self.keys)
        self._report()

    def _answer(self) -> None:
        for position, replies in self.engine.serve(self._requests()):
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
            key = id_key(item.id)
            is_answered = key in self.replies.positions
            if not is_answered and (reason := self._refusal(item.request)):
                self._reject(BadLine(item.line, item.id, reason))
                continue
            self.keys.append(key)
            if not is_answered:
                self.in_flight[next(positions)] = item
                yield item.request

    def _refusal(self, request: Request) -> str | None:
        try:
            self.engine.check(request)
        except UserError as error:
            return str(error)
        return None

    def _reject(self, bad: BadLine) -> None:
        self.replies.add_error(bad)
        self.progress.update()
        self.first_bad = self.first_bad or bad
        if not self.keys and self.replies.num_errors == _TOO_MANY_BAD:
            raise UserError(
                f"not one of the first {_TOO_MANY_BAD} lines is a request ({self._why()}); "
                "dialogues are answered with --data"
            )

    def _why(self) -> str:
        return f"line {self.first_bad.line}: {self.first_bad.reason}"

    def _speed(self) -> float:
        return self.num_tokens / (time.perf_counter() - self.started)

    def _report(self) -> None:
        bad = self.replies.num_errors
        if not self.keys:
            raise UserError(
                f"not one line is a request ({self._why()}): {self.replies.errors} lists them all"
            )
        if bad:
            print(f"{bad:,} bad {'line' if bad == 1 else 'lines'}: {self.replies.errors} says why")
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
    data = DataOptions(
        options.dataset_path,
        options.reader,
        fill_candidates=1,  # distractors are not read
        valid_fraction=options.valid_fraction,
        data_seed=options.data_seed,
    )
    source = DatasetRequests(data.load()[options.split], options.split, options.max_history, params)
    if not source.num_requests:
        raise UserError(f"the {options.split} split of {options.dataset_path} is empty")
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
