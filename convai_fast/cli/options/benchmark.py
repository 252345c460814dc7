"""The options of `convai-fast benchmark`."""

from dataclasses import dataclass
from pathlib import Path

from convai_fast.cli.options.common import DeviceOption, RememberedOptions
from convai_fast.options import Precision, Weights


@dataclass
class MeasuringOptions(DeviceOption):
    """Measuring: how long, and in which number formats."""

    seconds: float = 25.0
    """How long each of the workloads is measured, about; two pairs of turns are the least."""
    weights: Weights = "auto"
    """Number format of the weights that replies are written with; transformers has float32 beside
    int8."""
    precision: Precision = "auto"
    """Training steps under autocast to bf16 or fp16, or in fp32; auto takes bf16 where the hardware
    multiplies it. Ranking is in fp32."""


@dataclass
class FigureOptions:
    """Output: beside the table on the terminal."""

    output: Path | None = None
    """JSON file for the figures and all that they depend on."""
    plots: Path | None = None
    """Folder for a picture of the ratios (needs matplotlib)."""
    overwrite: bool = False
    """Replace what is there already."""


@dataclass
class BenchmarkOptions(FigureOptions, MeasuringOptions, RememberedOptions):
    """Measure replies, ranking and a training step, here and with plain transformers, in turn.

    Both have the same model, prompts, candidates, batches and precision. Without --data the
    dialogues are built-in ones. With a GPT of 117M parameters on two CPU cores it takes about three
    minutes. Close what else computes on this machine, or the figures are of both.
    """
