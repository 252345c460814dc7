"""`sample`, by sorting whole rows."""

import torch
from torch import Tensor

from convai_fast.ops.reference.philox import philox


def filter_probabilities(z: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Probabilities (float64, [batch, vocab_size], not renormalised) of the tokens that are kept.

    `z` holds logits already divided by the temperature; the filters are [batch].
    """
    vocab_size = z.shape[-1]
    ranked = z.sort(dim=-1, descending=True, stable=True)

    k = torch.where((top_k <= 0) | (top_k > vocab_size), vocab_size, top_k)
    kth_largest = ranked.values.gather(-1, (k - 1)[:, None])
    z = torch.where(z < kth_largest, -torch.inf, z)
    probabilities = z.double().softmax(-1)

    in_order = probabilities.gather(-1, ranked.indices)
    mass_before = in_order.cumsum(-1) - in_order
    off = (top_p <= 0) | (top_p >= 1)
    keep_in_order = off[:, None] | (mass_before < top_p[:, None].double())
    keep = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, ranked.indices, keep_in_order)

    largest = probabilities.max(-1, keepdim=True).values
    keep &= probabilities >= min_p.clamp(max=1)[:, None].double() * largest
    return torch.where(keep, probabilities, 0.0)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    steps: Tensor,
    return_logprobs: bool,
) -> tuple[Tensor, Tensor]:
    """See `convai_fast.ops.sample`."""
    batch, vocab_size = logits.shape
    temperature, top_k, top_p, min_p, seeds, steps = (
        values.expand(batch) for values in (temperature, top_k, top_p, min_p, seeds, steps)
    )
    logits = logits.float()
    if batch == 0:
        return seeds.new_zeros(0), logits.new_zeros(0)
    largest = logits.max(-1, keepdim=True).values
    can_be_drawn = largest.isfinite()
    logits = torch.where(can_be_drawn, logits, 0.0)
    largest = torch.where(can_be_drawn, largest, 0.0)

    greedy = temperature == 0
    # Relative to the largest, so that no temperature, however small, overflows.
    z = (logits - largest) / torch.where(greedy, 1.0, temperature)[:, None]
    kept = filter_probabilities(z, top_k, top_p, min_p)
    cumulative = kept.cumsum(-1)
    uniform = philox(seeds, steps).double() * 2.0**-32
    drawn = (cumulative > uniform[:, None] * cumulative[:, -1:]).int().argmax(-1)

    indices = torch.arange(vocab_size, device=logits.device)
    first_largest = torch.where(logits == largest, indices, vocab_size).min(-1).values
    chosen = torch.where(greedy, first_largest, drawn)[:, None]
    token_ids = torch.where(can_be_drawn, chosen, -1).squeeze(-1)
    if not return_logprobs:
        return token_ids, logits.new_zeros(0)
    logprobs = logits.log_softmax(-1).gather(-1, chosen)
    return token_ids, torch.where(can_be_drawn, logprobs, torch.nan).squeeze(-1)
