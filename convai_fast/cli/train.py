"""`convai-fast train`: fine-tune a model."""

import shlex
import signal
from collections.abc import Collection

from convai_fast.archive import best_checkpoint
from convai_fast.cli.options.train import TrainCommand
from convai_fast.data.readers import Source
from convai_fast.data.readers.user_function import is_function
from convai_fast.data.store import is_store
from convai_fast.options import options_of
from convai_fast.terminal import say
from convai_fast.training.distributed import Ranks
from convai_fast.training.loop import train
from convai_fast.training.options import TrainOptions
from convai_fast.training.summary import conclude


def run(options: TrainCommand, given: Collection[str]) -> None:
    """Train, and say how to talk to the result."""
    result = train(options, given=options_of(TrainCommand).keys() & given)
    if result.stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    if result.stopped_by is None and Ranks.from_environment().is_main:
        for line in conclude(result):
            say(line)
        say(
            f"talk to it: convai-fast interact --model {best_checkpoint(result.run)}"
            f"{_personas(result.options)}"
        )


def _personas(options: TrainOptions) -> str:
    """The option that takes personas from where the dialogues were, if a path alone says that."""
    paths = [Source.parse(path).path for path in options.dataset_path]
    if not paths or any(map(is_store, paths)) or any(map(is_function, options.reader)):
        return ""
    return f" --data {shlex.join(paths)}"
