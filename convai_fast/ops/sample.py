"""`sample`: draw one token a row under temperature, top-k, top-p and min-p."""

from functools import lru_cache

import torch
from torch import Tensor

from convai_fast.ops import reference
from convai_fast.ops.schemas import library

library.impl("sample", reference.sample, "CompositeExplicitAutograd")


@torch.library.register_fake("convai_fast::sample")
def _fake(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    steps: Tensor,
    return_logprobs: bool,
) -> tuple[Tensor, Tensor]:
    batch = logits.shape[0]
    logprobs = logits.new_empty(batch if return_logprobs else 0, dtype=torch.float32)
    return logits.new_empty(batch, dtype=torch.int64), logprobs


@lru_cache(maxsize=256)
def _value(value: float, dtype: torch.dtype) -> Tensor:
    """One value for all rows: to make it anew at each call would take as long as a small row."""
    return torch.full((1,), value, dtype=dtype, device="cpu")


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seeds: int | Tensor = 0,
    steps: int | Tensor = 0,
    return_logprobs: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Draw one token id a row of `logits`; each parameter is one value, or one a row.

    1. `z = logits / temperature` in float32; temperature 0 takes the largest, lowest index on ties.
    2. top-k (<= 0: off) keeps every token at least as large as the k-th largest, ties included.
    3. top-p (<= 0 or >= 1: off), in order of decreasing probability, ties by lower index, keeps a
       token iff the mass before it is < p; probabilities are those left after top-k, renormalised.
    4. min-p (0: off) keeps what has at least `min_p` times the largest probability.
    5. With u in [0, 1) from Philox 4x32-10, keyed by the row's seed and counted by its step, take
       the first token in vocabulary order whose cumulative kept mass exceeds u times the kept mass.

    So a row's token depends on its own logits, seed and step alone.

    Args:
        logits: float32, bfloat16 or float16 [batch, vocab_size]; never written to.
        seeds, steps: int64; a request's seed, and how many tokens it has drawn.

    Returns:
        token_ids: int64 [batch]; -1 for a row from which nothing can be drawn, since its largest
            value is -inf, inf or NaN. No device has to be waited for to notice it.
        logprobs: float32 [batch], log-probability of the token under the unfiltered softmax of the
            logits, or None unless `return_logprobs`; NaN beside -1.

    Raises:
        ValueError: a temperature is negative or NaN.

    Source: top-k, Fan et al. 2018 (arXiv 1805.04833); top-p, Holtzman et al. 2019 (1904.09751);
    min-p, Nguyen et al. 2024 (2407.01082).
    """

    device = logits.device
    # Values that stay: neither fake ones, nor those of a GPU, which its streams have to wait for.
    may_keep = type(logits) is Tensor and device.type == "cpu" and not torch.compiler.is_compiling()

    def per_row(value: float | Tensor, dtype: torch.dtype) -> Tensor:
        if isinstance(value, Tensor):
            if value.dtype == dtype and value.device == device and value.dim() == 1:
                return value
        elif isinstance(value, (int, float)) and abs(value) < 2**63:
            if may_keep:
                return _value(value, dtype)
            return torch.full((1,), value, dtype=dtype, device=device)
        value = torch.as_tensor(value, dtype=dtype, device=device)
        return value.expand(1) if value.dim() == 0 else value

    token_ids, logprobs = torch.ops.convai_fast.sample(
        logits,
        per_row(temperature, torch.float32),
        per_row(top_k, torch.int64),
        per_row(top_p, torch.float32),
        per_row(min_p, torch.float32),
        per_row(seeds, torch.int64),
        per_row(steps, torch.int64),
        return_logprobs,
    )
    return token_ids, logprobs if return_logprobs else None
