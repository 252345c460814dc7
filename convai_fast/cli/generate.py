"""`convai-fast generate`: replies in bulk."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerFast

from convai_fast.bulk.answers import Answers, Replies
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
from convai_fast.extras import require
from convai_fast.generation.backends import resolve_weights
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.identified import IdentifiedRequest
from convai_fast.generation.request import Reply, check_ranking, prompt_room
from convai_fast.hardware import resolve_device
from convai_fast.loading import layout_for, load, model_fingerprint
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.options import check_at_least

Record = Callable[[IdentifiedRequest, Sequence[Reply]], dict[str, Any]]
Maker = Callable[[DoubleHeadsModel, PreTrainedTokenizerFast, Record], Answers]


def check(options: GenerateOptions) -> None:
    """Raise UserError at the first option that makes no sense."""
    if options.as_candidates and options.input:
        raise UserError("--as_candidates needs true replies: give dialogues with --data")
    if options.as_candidates and (options.token_ids or options.logprobs):
        raise UserError("--as_candidates writes texts alone: leave out token ids and logprobs")
    check_at_least(options, {"num_return": 1, "batch_size": 1, "ray_actors": 0, "ray_cpus": 1})
    if not 0 <= options.ray_gpus <= 1:
        raise UserError(f"`ray_gpus` must be between 0 and 1, not {options.ray_gpus:g}")
    if options.ray and options.device != "auto":
        raise UserError("--device is where this process computes, not --ray: give --ray_gpus")
    if options.ray:
        require("ray", "`ray`")
    for name in ("ray_actors", "ray_cpus", "ray_gpus"):
        if not options.ray and getattr(options, name) != getattr(GenerateOptions, name):
            raise UserError(f"--{name} is for the actors of --ray: give that, too")


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
    weights, make_answers = _on_ray(options) if options.ray else _here(options)
    model, tokenizer = load(options.model)
    layout = layout_for(tokenizer, model.config)
    prompt_room(model.config.n_positions, params, layout)  # too long a reply is no line's fault
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
    record: Record = candidates_record
    if not options.as_candidates:
        record = partial(reply_record, with_token_ids=options.token_ids)
    answers = make_answers(model, tokenizer, record)
    # Ray takes SIGTERM when it is connected to, and we take it back.
    with _cluster(options), exit_on_sigterm():  # noqa: SIM117
        with ReplyFile(output, settings, overwrite=options.overwrite) as file:
            BulkRun(answers, source, file).run()


def _here(options: GenerateOptions) -> tuple[str, Maker]:
    """The number format of the weights, and what makes answers of an engine in this process."""
    device = resolve_device(options.device)
    weights = resolve_weights(options.weights, device)

    def make(
        model: DoubleHeadsModel, tokenizer: PreTrainedTokenizerFast, record: Record
    ) -> Answers:
        engine = GenerationEngine(
            model.to(device), tokenizer, max_batch_size=options.batch_size, weights=weights
        )
        return Replies(engine, record)

    return weights, make


def _on_ray(options: GenerateOptions) -> tuple[str, Maker]:
    """As `_here`, of engines in the actors of a cluster."""
    from convai_fast.bulk.ray import Actors, RayReplies

    actors = Actors(
        options.ray_actors,
        options.ray_cpus,
        options.ray_gpus,
        max_batch_size=options.batch_size,
        weights=options.weights,
    )
    return actors.weights_there, partial(RayReplies, actors)


def _cluster(options: GenerateOptions) -> AbstractContextManager[None]:
    if not options.ray:
        return nullcontext()
    from convai_fast.bulk.ray import connected

    return connected()
