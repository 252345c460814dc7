"""`convai-fast train`: fine-tune a model."""

import signal
from collections.abc import Collection

from convai_fast.archive import best_checkpoint
from convai_fast.cli.options.train import TrainCommand
from convai_fast.options import options_of
from convai_fast.terminal import say
from convai_fast.training.distributed import Ranks
from convai_fast.training.loop import train
from convai_fast.training.summary import conclude


def run(options: TrainCommand, given: Collection[str]) -> None:
    """Train, and say how to talk to the result."""
    result = train(options, given=options_of(TrainCommand).keys() & given)
    if result.stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    if result.stopped_by is None and Ranks.from_environment().is_main:
        for line in conclude(result):
            say(line)
        say(f"talk to it: convai-fast interact --model {best_checkpoint(result.run)}")
