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
    "build": Part(150, ("setuptools", "pybind11", "ninja", "numpy")),
    "tests": Part(75, ("pytest", "numpy")),
    "waits": Part(30, _MODELS),
    "sanitizer": Part(70, ("numpy",)),
    "sampling": Part(65, ("numpy",)),
    "collating": Part(15, ("numpy",)),
    "training": Part(85, _MODELS),
    "ranking": Part(35, _MODELS),
    "decoding": Part(75, _MODELS),
}
