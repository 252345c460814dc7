"""`convai-fast convert`: an old checkpoint, or a LoRA adapter, as an ordinary model of today."""

from convai_fast.cli.options.convert import ConvertOptions
from convai_fast.conversion import convert


def run(options: ConvertOptions) -> None:
    """Convert, check, and print the report."""
    for name, text in convert(options.model, options.output):
        print(f"{name:<16}{text}")
