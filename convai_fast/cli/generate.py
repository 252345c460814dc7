"""`convai-fast generate`: replies in bulk."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from convai_fast.bulk.dataset import DatasetRequests
from convai_fast.bulk.jsonl import RequestFile, candidates_record, reply_record
from convai_fast.bulk.reply_file import ReplyFile, check_absent, written_paths
from convai_fast.bulk.run import BulkRun
from convai_fast.cli.remembered import RememberedOptions
from convai_fast.cli.sampling import SamplingOptions
from convai_fast.data.dataset import check_at_least
from convai_fast.dialogue.encoding import tokenizer_fingerprint
from convai_fast.errors import UserError
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.identified import IdentifiedRequest
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Reply, check_ranking, prompt_room
from convai_fast.hardware import resolve_device
from convai_fast.loading import load, model_fingerprint

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
    as_candidates: bool = False
    """Write turns as train reads them: the replies as candidates, the true one last (--data). Their
    history is that which --max_history lets the model see."""
    batch_size: int = 64
    """Replies that are written at a time, at most; on a CPU they do not depend on it."""
    weights: Literal["float32", "bfloat16", "int8"] = "float32"
    """Number format of the weights; int8 is an approximation."""
    device: str = "auto"
    """cuda, cuda:1 or cpu; auto takes cuda where there is one."""
    overwrite: bool = False
    """Replace OUTPUT, once all replies are there."""
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = field(
        default_factory=SamplingOptions
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
        if self.as_candidates and self.input:
            raise UserError("--as_candidates needs true replies: give dialogues with --data")
        if self.as_candidates and (self.token_ids or self.logprobs):
            raise UserError("--as_candidates writes texts alone: leave out token ids and logprobs")
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


def run(options: GenerateOptions) -> None:
    """Answer what is not answered yet, then put the file of replies in its place."""
    options.check_given()
    options.recall()
    options.check()
    assert options.output is not None  # checked
    params = replace(options.sampling, n=options.num_return, logprobs=options.logprobs)
    source = _open_source(options, params)
    device = resolve_device(options.device)
    model, tokenizer = load(options.model)
    prompt_room(model.config.n_positions, params)  # too long a reply is no line's fault
    check_ranking(params, model)
    settings = {
        **source.settings,
        "model": model_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "weights": options.weights,
        "token_ids": options.token_ids,
        **({"as_candidates": True} if options.as_candidates else {}),
        **asdict(params),
    }
    engine = GenerationEngine(
        model.to(device), tokenizer, max_batch_size=options.batch_size, weights=options.weights
    )
    record: Callable[[IdentifiedRequest, Sequence[Reply]], dict[str, Any]] = candidates_record
    if not options.as_candidates:
        record = partial(reply_record, with_token_ids=options.token_ids)
    reply_file = ReplyFile(options.output, settings, overwrite=options.overwrite)
    with _exit_on_sigterm(), reply_file as replies:
        BulkRun(engine, source, replies, record=record).run()


def _open_source(options: GenerateOptions, params: SamplingParams) -> RequestFile | DatasetRequests:
    if options.input:
        return RequestFile(options.input, params)
    assert options.max_history is not None  # recalled
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
