"""The options of how a reply is drawn, for the commands that write replies."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from convai_fast.generation.params import SamplingParams


@dataclass(frozen=True, slots=True)
class SamplingOptions(SamplingParams):
    """`SamplingParams`, but for what a command has options of its own for."""

    n: Annotated[int, tyro.conf.Suppress] = 1
    logprobs: Annotated[bool, tyro.conf.Suppress] = False
