"""`convai-fast rank`: candidate replies ranked in bulk."""

from dataclasses import dataclass

from convai_fast._native import keep_freed_memory
from convai_fast.bulk.answers import Rankings
from convai_fast.bulk.dataset import DatasetRequests
from convai_fast.bulk.jsonl import RequestFile
from convai_fast.bulk.reply_file import ReplyFile
from convai_fast.bulk.run import BulkRun
from convai_fast.cli.bulk import BulkOptions, exit_on_sigterm
from convai_fast.dialogue.encoding import tokenizer_fingerprint
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.ranking import NEEDS_HEAD
from convai_fast.hardware import resolve_device
from convai_fast.loading import load, model_fingerprint


@dataclass
class RankOptions(BulkOptions):
    """Rank candidate replies with the multiple-choice head, best first: those of the requests of a
    JSONL file, or those of every turn of a dataset.

    A request is a line as `convai-fast generate` reads them, with its candidates beside it:
    {"id": "a7", "persona": ["i like tea ."], "history": ["what do you drink ?"], "candidates":
    ["tea , always .", "i have a dog ."]}. They may be lists of token ids.

    The rankings are lines in the order of the requests, {"id": "a7", "ranking": [{"index": 0,
    "text": "tea , always .", "probability": 0.97, "score": 5.1}, …]}: index counts the candidates
    of the request from 0, and probability is softmax over their scores. Until all are there they
    are kept in OUTPUT.partial, from which the same command continues after an interruption; lines
    that cannot be ranked are listed in OUTPUT.errors.jsonl.
    """


def run(options: RankOptions) -> None:
    """Rank what is not ranked yet, then put the file of rankings in its place."""
    options.check_given()
    options.recall()
    output = options.checked_output()
    source: RequestFile | DatasetRequests
    if options.input:
        source = RequestFile(options.input, with_candidates=True)
    else:
        source = options.requests_of(options.data, SamplingParams())
    device = resolve_device(options.device)
    model, tokenizer = load(options.model)
    model.check_ranking(NEEDS_HEAD)  # which is no line's fault
    settings = {
        **source.settings,
        "model": model_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "answers": Rankings.what,
    }
    if device.type == "cpu":
        keep_freed_memory()
    rankings = Rankings(GenerationEngine(model.to(device), tokenizer, max_batch_size=1))
    with exit_on_sigterm(), ReplyFile(output, settings, overwrite=options.overwrite) as file:
        BulkRun(rankings, source, file).run()
