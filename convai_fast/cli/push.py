"""`convai-fast push`: a model on the Hugging Face Hub."""

from convai_fast.cli.options.push import PushOptions
from convai_fast.publishing import publish


def run(options: PushOptions) -> None:
    """Write, upload, and say where it is."""
    address = publish(options.model, options.repo, options.output, options.private)
    if options.output:
        print(f"written to {options.output}")
    if address:
        print(f"uploaded to {address}")
