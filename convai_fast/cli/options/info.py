"""The options of `convai-fast info`."""

from dataclasses import dataclass


@dataclass
class InfoOptions:
    """Print versions, what is compiled, the instructions in use, and which devices there are; or
    with --model what a model is.
    """

    model: str = ""
    """Folder, run, adapter, .tar.gz or Hub id of a model: print its family and sizes, how it reads
    dialogues, and which heads it has."""
