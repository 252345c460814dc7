"""The names of what can be measured."""

import re
from collections.abc import Sequence

from convai_fast.errors import UserError
from convai_fast.extras import require

METRICS = ("hits@1", "ppl", "word_ppl", "f1", "bleu", "distinct")


def check_metrics(metrics: Sequence[str]) -> None:
    """Raise UserError at the first name that is no metric, or for which a package is missing."""
    if not metrics:
        raise UserError(f"`metrics` names none: choose from {', '.join(METRICS)}")
    for name in metrics:
        if name not in METRICS and not re.fullmatch(r"hits@[1-9]\d{0,8}", name):
            raise UserError(
                f"there is no metric {name!r}: choose from {', '.join(METRICS)} (or hits@5 …)"
            )
    if "bleu" in metrics:
        require("sacrebleu", "bleu among `metrics`")
