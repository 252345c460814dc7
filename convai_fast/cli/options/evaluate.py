"""The options of `convai-fast evaluate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from convai_fast.cli.options.common import DATA, DeviceOption, RememberedOptions, ReplyOptions
from convai_fast.evaluation.metrics import METRICS
from convai_fast.options import Precision


@dataclass
class MeasureOptions:
    """Measuring: what, and on which examples."""

    metrics: tuple[str, ...] = METRICS
    """Any of hits@K (hits@1, hits@5, …), ppl, word_ppl, f1, bleu, distinct."""
    split: Literal["train", "valid"] = "valid"
    """Split of the dialogues to measure on."""
    max_examples: int = 0
    """Measure on so many examples, spread evenly over the split; 0: on all."""
    allow_trained_on: bool = False
    """Measure also where the validation split holds dialogues that the model was trained on."""


@dataclass
class OutputOptions:
    """Output: beside the table on the terminal."""

    output: Path | None = None
    """JSON file for the figures and all that they depend on."""
    details: Path | None = None
    """JSONL file for what was measured about each example."""
    plots: Path | None = None
    """Folder for pictures: ranks, perplexity by turn, lengths of replies (needs matplotlib)."""
    overwrite: bool = False
    """Replace what is there already."""


@dataclass
class ScoringOptions(DeviceOption):
    """Scoring: how it is computed."""

    precision: Precision = "auto"
    """Score under autocast to bf16 or fp16, or in fp32; auto takes bf16 where the hardware
    multiplies it. Replies are written in fp32."""
    batch_size: int = 16
    """Examples that are scored at a time."""


@dataclass
class EvaluateOptions(
    OutputOptions, ScoringOptions, ReplyOptions, MeasureOptions, RememberedOptions
):
    """Measure a model on dialogues as the ConvAI2 challenge did.

    hits@K: the true reply is among the K best of its candidates. ppl: perplexity of a token of the
    true reply. word_ppl: that of a word, which compares models with different tokenizers. f1, bleu
    and distinct are about replies that the model writes: those of `convai-fast generate --data`
    with the same options.
    """

    def missing(self) -> dict[str, str]:
        """What has to be given yet."""
        return super().missing() | ({} if self.dataset_path else {"dataset_path": DATA})
