"""The peers, each at its best settings: a file a peer, which imports nothing of this library.

Each file has a class `Peer`, made of a folder with a model as transformers saves it, the format of
the numbers (float32, bfloat16, int8) and a number of threads. Its `generate(prompts, new_tokens,
drawing)` gives the token ids of the replies, all of them `new_tokens` long; `package` is what pip
calls it.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Drawing:
    """How a token is drawn: the likeliest at temperature 0, else with these filters (0, 1: off)."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0


def converted(folder: Path, name: str, convert: Callable[[Path], None]) -> Path:
    """The folder `name` in `folder`, which `convert` fills where it is not there yet."""
    path, part = folder / name, folder / f"{name}.part"
    if not path.exists():
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        convert(part)
        part.rename(path)
    return path
