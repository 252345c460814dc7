"""`convai-fast convert`: an old checkpoint, or a LoRA adapter, as an ordinary model of today."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from convai_fast.conversion import convert


@dataclass
class ConvertOptions:
    """Bring a checkpoint of pytorch-pretrained-bert 0.6 or pytorch-transformers 1.x into the layout
    of today's transformers, check that it computes the same, and say what became of every tensor.
    A LoRA adapter that `train` wrote is merged into its base model.
    """

    old: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OLD")]
    """Folder, .tar.gz or Hub id of the old checkpoint or of the adapter."""
    new: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NEW")]
    """Folder to write; it must not exist, or be empty but for hidden files."""


def run(options: ConvertOptions) -> None:
    """Convert, check, and print the report."""
    for name, text in convert(options.old, options.new):
        print(f"{name:<16}{text}")
