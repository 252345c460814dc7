"""`convai-fast train`: fine-tune a model."""

import signal

from convai_fast.training.loop import train
from convai_fast.training.options import TrainOptions

__all__ = ["TrainOptions", "run"]


def run(options: TrainOptions) -> None:
    """Train, and say how to talk to the result."""
    result = train(options)
    if result.steps:
        print(f"{result.steps:,} steps at {result.tokens_per_second:,.0f} tokens/s")
    if result.stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    if result.stopped_by is None:
        print(f"talk to it: convai-fast interact --model {result.run / 'best'}")
