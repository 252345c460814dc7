"""The options of `convai-fast rank`."""

from dataclasses import dataclass

from convai_fast.cli.options.bulk import BulkOptions


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
