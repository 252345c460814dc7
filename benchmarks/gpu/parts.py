"""Which parts there are, in their order, and what each may take."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One part: the module of its name.

    Attributes:
        seconds: after which it is killed; what it has noted by then stands.
        packages: that it needs beside torch, by the names they are imported by.
    """

    seconds: int
    packages: tuple[str, ...] = ()


_MODELS = ("numpy", "safetensors", "tokenizers", "tqdm", "transformers", "yaml")  # what they need

# 600 seconds in all.
PARTS = {
    "build": Part(130, ("setuptools", "pybind11", "ninja", "numpy")),
    "tests": Part(100, ("pytest", "numpy")),
    "waits": Part(25, _MODELS),
    "sanitizer": Part(60, ("numpy",)),
    "sampling": Part(60, ("numpy",)),
    "collating": Part(10, ("numpy",)),
    "attending": Part(15, ("numpy",)),
    "training": Part(75, _MODELS),
    "ranking": Part(25, _MODELS),
    "decoding": Part(100, _MODELS),
}
