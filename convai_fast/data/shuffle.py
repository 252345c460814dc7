"""Random numbers and orders that are the same with any numpy.

The streams of numpy's generators may change between its versions, and a run that is continued after
an update would see some examples twice and others never.
"""

import hashlib

import numpy as np


def mixed(values: np.ndarray, seed: int) -> np.ndarray:
    """Random 64-bit numbers, one for each of `values` (uint64): SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def seed_of(*key: object) -> int:
    """A 64-bit seed of its own for each key, such as ("rows", 42, 0)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8])


def permutation(count: int, *key: object) -> np.ndarray:
    """The numbers from 0 to `count` in an order drawn from the key alone, int64 [count]."""
    return mixed(np.arange(count, dtype=np.uint64), seed_of(*key)).argsort(kind="stable")
