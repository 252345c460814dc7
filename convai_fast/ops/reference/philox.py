"""Random words that depend on a key and a counter alone."""

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def philox_words(seeds: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The four 32-bit words of Philox 4x32-10, for key `seeds` and counter `low + 2**64 * high`.

    All are int64 tensors, broadcast to one shape; the result is int64 in [0, 2**32), [4, *shape].
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    seeds, low, high = torch.broadcast_tensors(seeds, low, high)
    key = [seeds & _MASK32, (seeds >> 32) & _MASK32]
    counter = [low & _MASK32, (low >> 32) & _MASK32, high & _MASK32, (high >> 32) & _MASK32]
    for _ in range(10):
        # int64 products wrap modulo 2**64, so that both halves come out right after masking.
        product0, product1 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        high0, high1 = (product0 >> 32) & _MASK32, (product1 >> 32) & _MASK32
        counter = [
            high1 ^ counter[1] ^ key[0],
            product1 & _MASK32,
            high0 ^ counter[3] ^ key[1],
            product0 & _MASK32,
        ]
        key = [(key[0] + 0x9E3779B9) & _MASK32, (key[1] + 0xBB67AE85) & _MASK32]
    return torch.stack(counter)


def philox(seeds: Tensor, steps: Tensor) -> Tensor:
    """The first word for key `seeds` and counter `steps`, both int64 of one shape."""
    return philox_words(seeds, steps, torch.zeros_like(steps))[0]
