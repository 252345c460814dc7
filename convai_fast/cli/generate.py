"""`convai-fast generate`: replies in bulk."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from convai_fast.bulk.dataset import DatasetRequests
from convai_fast.bulk.jsonl import RequestFile, candidates_record, reply_record
from convai_fast.bulk.reply_file import ReplyFile, check_absent, written_paths
from convai_fast.bulk.run import BulkRun
from convai_fast.cli.options.generate import GenerateOptions
from convai_fast.cli.remembered import recall
from convai_fast.data.dataset import read_dialogues
from convai_fast.dialogue.encoding import tokenizer_fingerprint
from convai_fast.errors import UserError
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.identified import IdentifiedRequest
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Reply, check_ranking, prompt_room
from convai_fast.hardware import resolve_device
from convai_fast.loading import load, model_fingerprint
from convai_fast.options import check_at_least

_OF_DIALOGUES = ("reader", "fill_candidates", "valid_fraction", "data_seed", "skip_bad_records")


def check_given(options: GenerateOptions) -> None:
    """Raise UserError for options of dialogues where requests are given: see `recall`."""
    default = GenerateOptions()
    for name in ("split", *_OF_DIALOGUES) if options.input else ():
        if getattr(options, name) != getattr(default, name):
            raise UserError(f"--{name} is about dialogues (--data), not --input: leave it out")


def check(options: GenerateOptions) -> None:
    """Raise UserError at the first option that makes no sense."""
    if options.input and options.dataset_path:
        raise UserError(
            "both --input and --data given: give one, the requests or dialogues to answer"
        )
    if options.as_candidates and options.input:
        raise UserError("--as_candidates needs true replies: give dialogues with --data")
    if options.as_candidates and (options.token_ids or options.logprobs):
        raise UserError("--as_candidates writes texts alone: leave out token ids and logprobs")
    assert options.output is not None  # or it would be missing
    if "-" in (str(options.input), str(options.output)):
        raise UserError("a run that can be continued needs files: - is not one")
    check_at_least(options, {"max_history": 0, "num_return": 1, "batch_size": 1})
    if options.output.exists() and not options.output.is_file():
        raise UserError(f"{options.output} is not a regular file: name one with --output")
    sources = [options.input] if options.input else map(Path, options.dataset_path)
    for path, source in product(written_paths(options.output), sources):
        if path.exists() and source.exists() and path.samefile(source):
            what = "requests" if options.input else "dialogues"
            raise UserError(f"{path} holds the {what}: choose another --output")
    if not options.overwrite:
        check_absent(options.output)


def run(options: GenerateOptions) -> None:
    """Answer what is not answered yet, then put the file of replies in its place."""
    check_given(options)
    recall(options)
    check(options)
    assert options.output is not None  # or it would be missing
    params = replace(options.sampling, n=options.num_return, logprobs=options.logprobs)
    source = _open_source(options, params)
    device = resolve_device(options.device)
    model, tokenizer = load(options.model)
    prompt_room(model.config.n_positions, params)  # too long a reply is no line's fault
    check_ranking(params, model.head_is_new)
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
    dialogues = read_dialogues(data).dialogues[options.split]
    source = DatasetRequests(dialogues, options.split, options.max_history, params)
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
