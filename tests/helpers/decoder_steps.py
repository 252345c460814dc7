"""What the CPU backend's decoder is asked to compute."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

from convai_fast import ops


@contextmanager
def recorded_steps(what: Callable[[Tensor, Tensor], Any]) -> Iterator[list[Any]]:
    """A list of `what` of the token ids and the segment ids of each step, which grows with them."""
    steps: list[Any] = []
    decoder_step = ops.decoder_step

    def recorded(decoder, input_ids, token_type_ids, *rest):
        steps.append(what(input_ids, token_type_ids))
        return decoder_step(decoder, input_ids, token_type_ids, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "decoder_step", recorded)
        yield steps
