"""transformers as people use it, one function a kind of work: the other side of a comparison.

It knows nothing of the rest of this library: it also runs where that is not there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    segments: Sequence[Sequence[int]] | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    **settings: Any,
) -> list[list[int]]:
    """The token ids that transformers' `generate` writes after each prompt, `new_tokens` of them.

    All prompts are one batch, padded on the left.

    Args:
        model: one of transformers' language models.
        segments: the segment ids of the prompts; the new tokens have those of the last ones.
        temperature: 0 takes the likeliest token, and the filters do nothing.
        settings: more arguments of `generate`.
    """
    longest = max(map(len, prompts))
    config: Any = model.config
    pad = config.eos_token_id or 0

    def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        rows = [[value] * (longest - len(row)) + list(row) for row in rows]
        return torch.tensor(rows, device=model.device)

    draw: dict[str, Any] = {"do_sample": False}
    if temperature:
        draw = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    replies = model.generate(  # type: ignore[operator]  # only some of the classes have it
        padded(prompts, pad),
        attention_mask=padded([[1] * len(prompt) for prompt in prompts], 0),
        token_type_ids=padded(segments, pad) if segments else None,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=pad,
        **draw,
        **settings,
    )
    return replies[:, longest:].tolist()


@torch.inference_mode()
def rank(model: PreTrainedModel, batch: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """Multiple-choice logits of a padded batch by transformers' double-heads class, float32.

    Products are in `dtype`, under autocast. The class computes its logits of the vocabulary, too.
    """
    names = ("input_ids", "token_type_ids", "mc_token_ids")
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        output = model(**{name: batch[name] for name in names})
    return output.mc_logits.float()


def train_step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Any],
    dtype: torch.dtype,
    max_norm: float = 1.0,
) -> float:
    """The step of a plain loop over transformers' double-heads class; returns its loss.

    Products are in `dtype`, under autocast; the gradient is clipped to `max_norm`.
    """
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        output = model(**batch)
        loss = output.loss + output.mc_loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
