"""transformers' `generate`, as it is."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM

from benchmarks.peers import Drawing
from convai_fast.comparison import plain


class Peer:
    """`convai_fast.comparison.plain.generate`."""

    package = "transformers"
    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self, folder: Path, number_format: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        dtype = getattr(torch, number_format)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def generate(
        self,
        prompts: list[list[int]],
        new_tokens: int,
        drawing: Drawing,
        segments: list[list[int]] | None = None,
    ) -> list[list[int]]:
        return plain.generate(
            self.model,
            prompts,
            new_tokens,
            segments=segments,
            temperature=drawing.temperature,
            top_k=drawing.top_k,
            top_p=drawing.top_p,
            **self.settings,
        )
