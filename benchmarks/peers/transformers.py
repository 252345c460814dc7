"""transformers' `generate`, as it is."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM

from benchmarks.peers import Drawing


class Peer:
    """All prompts in one batch, padded on the left; with segments where they are given."""

    package = "transformers"
    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self, folder: Path, number_format: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        dtype = getattr(torch, number_format)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[list[int]],
        new_tokens: int,
        drawing: Drawing,
        segments: list[list[int]] | None = None,
    ) -> list[list[int]]:
        longest = max(map(len, prompts))
        pad = self.model.config.eos_token_id or 0

        def padded(rows: list[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([[value] * (longest - len(row)) + list(row) for row in rows])

        draw = {"do_sample": False}
        if not drawing.is_greedy:
            draw = {
                "do_sample": True,
                "temperature": drawing.temperature,
                "top_k": drawing.top_k,
                "top_p": drawing.top_p,
            }
        replies = self.model.generate(
            padded(prompts, pad),
            attention_mask=padded([[1] * len(prompt) for prompt in prompts], 0),
            token_type_ids=padded(segments, pad) if segments else None,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=pad,
            **draw,
            **self.settings,
        )
        return replies[:, longest:].tolist()
