"""`convai-fast generate`: replies in bulk."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from convai_fast.bulk.answers import Replies
from convai_fast.bulk.dataset import DatasetRequests
from convai_fast.bulk.jsonl import RequestFile, candidates_record, reply_record
from convai_fast.bulk.reply_file import ReplyFile
from convai_fast.bulk.run import BulkRun
from convai_fast.bulk.shard import Shard
from convai_fast.cli.bulk import check_given, checked_output, exit_on_sigterm, requests_of
from convai_fast.cli.options.generate import GenerateOptions
from convai_fast.cli.remembered import recall
from convai_fast.dialogue.encoding import tokenizer_fingerprint
from convai_fast.errors import UserError
from convai_fast.generation.backends import resolve_weights
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.identified import IdentifiedRequest
from convai_fast.generation.request import Reply, check_ranking, prompt_room
from convai_fast.hardware import resolve_device
from convai_fast.loading import load, model_fingerprint
from convai_fast.options import check_at_least


def check(options: GenerateOptions) -> None:
    """Raise UserError at the first option that makes no sense."""
    if options.as_candidates and options.input:
        raise UserError("--as_candidates needs true replies: give dialogues with --data")
    if options.as_candidates and (options.token_ids or options.logprobs):
        raise UserError("--as_candidates writes texts alone: leave out token ids and logprobs")
    check_at_least(options, {"num_return": 1, "batch_size": 1})


def run(options: GenerateOptions) -> None:
    """Answer what is not answered yet, then put the file of replies in its place."""
    check_given(options)
    recall(options)
    check(options)
    output = checked_output(options)
    params = replace(options.sampling, n=options.num_return, logprobs=options.logprobs)
    source: RequestFile | DatasetRequests
    if options.input:
        source = RequestFile(options.input, params, Shard.parse(options.shard))
    else:  # distractors are not read
        source = requests_of(options, replace(options.data, fill_candidates=1), params)
    device = resolve_device(options.device)
    weights = resolve_weights(options.weights, device)
    model, tokenizer = load(options.model)
    prompt_room(model.config.n_positions, params)  # too long a reply is no line's fault
    check_ranking(params, model)
    settings = {
        **source.settings,
        "model": model_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "weights": weights,
        "token_ids": options.token_ids,
        **({"as_candidates": True} if options.as_candidates else {}),
        **asdict(params),
    }
    engine = GenerationEngine(
        model.to(device), tokenizer, max_batch_size=options.batch_size, weights=weights
    )
    record: Callable[[IdentifiedRequest, Sequence[Reply]], dict[str, Any]] = candidates_record
    if not options.as_candidates:
        record = partial(reply_record, with_token_ids=options.token_ids)
    answers = Replies(engine, record)
    with exit_on_sigterm(), ReplyFile(output, settings, overwrite=options.overwrite) as file:
        BulkRun(answers, source, file).run()
