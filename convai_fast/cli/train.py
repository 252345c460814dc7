"""`convai-fast train`: fine-tune a model."""

import dataclasses
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from convai_fast.cli.main import ALIASES
from convai_fast.terminal import say
from convai_fast.training.distributed import Ranks
from convai_fast.training.loop import train
from convai_fast.training.options import TrainOptions


@dataclass
class TrainCommand(TrainOptions):  # noqa: D101  (`--help` prints what TrainOptions says)
    __doc__ = TrainOptions.__doc__

    dataset_path: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--data"])] = ()
    model: Annotated[str, tyro.conf.arg(aliases=["--model_checkpoint"])] = TrainOptions.model


def run(options: TrainCommand, arguments: Sequence[str]) -> None:
    """Train, and say how to talk to the result."""
    result = train(options, given=_named(arguments))
    is_main = Ranks.from_environment().is_main
    if result.tokens_per_second and is_main:
        say(
            f"{result.steps:,} steps at {result.tokens_per_second:,.0f} tokens/s, using "
            f"{result.mfu:.0%} of what the device can multiply"
        )
    if result.stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    if result.stopped_by is None and is_main:
        say(f"talk to it: convai-fast interact --model {result.run / 'best'}")


def _named(arguments: Sequence[str]) -> set[str]:
    """The options that the command line names, were it only with their defaults."""
    words = (a[2:].split("=")[0].replace("-", "_") for a in arguments if a.startswith("--"))
    fields = {field.name for field in dataclasses.fields(TrainOptions)}
    return {ALIASES.get(word, word) for word in words} & fields
