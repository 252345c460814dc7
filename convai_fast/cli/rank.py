"""`convai-fast rank`: candidate replies ranked in bulk."""

from convai_fast._native import keep_freed_memory
from convai_fast.bulk.answers import Rankings
from convai_fast.bulk.dataset import DatasetRequests
from convai_fast.bulk.jsonl import RequestFile
from convai_fast.bulk.reply_file import ReplyFile
from convai_fast.bulk.run import BulkRun
from convai_fast.bulk.shard import Shard
from convai_fast.cli.bulk import check_given, checked_output, exit_on_sigterm, requests_of
from convai_fast.cli.options.rank import RankOptions
from convai_fast.cli.remembered import recall
from convai_fast.dialogue.encoding import tokenizer_fingerprint
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.ranking import NEEDS_HEAD
from convai_fast.hardware import resolve_device
from convai_fast.loading import load, model_fingerprint


def run(options: RankOptions) -> None:
    """Rank what is not ranked yet, then put the file of rankings in its place."""
    check_given(options)
    recall(options)
    output = checked_output(options)
    source: RequestFile | DatasetRequests
    if options.input:
        shard = Shard.parse(options.shard)
        source = RequestFile(options.input, shard=shard, with_candidates=True)
    else:
        source = requests_of(options, options.data, SamplingParams())
    device = resolve_device(options.device)
    model, tokenizer = load(options.model)
    model.check_ranking(NEEDS_HEAD)  # which is no line's fault
    settings = {
        **source.settings,
        "model": model_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "answers": "rankings",
    }
    if device.type == "cpu":
        keep_freed_memory()
    rankings = Rankings(model.to(device), tokenizer)
    with exit_on_sigterm(), ReplyFile(output, settings, overwrite=options.overwrite) as file:
        BulkRun(rankings, source, file).run()
