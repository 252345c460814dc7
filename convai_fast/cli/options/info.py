"""The options of `convai-fast info`."""

from dataclasses import dataclass


@dataclass
class InfoOptions:
    """Print versions, what is compiled, the instructions in use, and which devices there are."""
