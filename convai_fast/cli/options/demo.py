"""The options of `convai-fast demo`."""

from dataclasses import dataclass


@dataclass
class DemoOptions:
    """Train a small GPT-2 from scratch on built-in dialogues, and show what it learnt.

    Needs no network and no files, and takes about a minute on two cores.
    """

    output: str = ""
    """The run folder; by default runs/<time>_<host>_demo."""
    seed: int = 42
    """Seed of the dialogues and of the training."""
