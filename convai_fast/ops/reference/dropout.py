"""`dropout`, with a random word for every element."""

import torch
from torch import Tensor

from convai_fast.ops.reference.philox import philox_words


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """See `convai_fast.ops.dropout`."""
    # 64 elements draw the four words of 16 blocks, word after word.
    element = torch.arange(x.numel(), device=x.device)
    block, word = element // 64 * 16 + element % 16, element // 16 % 4
    words = philox_words(seed.to(x.device), block, torch.zeros_like(block))
    kept = words.gather(0, word[None]).view(x.shape) >= int(p * 2**32)
    return torch.where(kept, x.float() * (1 / (1 - p)), 0.0).to(x.dtype)
