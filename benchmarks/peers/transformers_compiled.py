"""transformers' `generate` with a cache of fixed size, which lets torch.compile fuse a step."""

from typing import ClassVar

from transformers import CompileConfig

from benchmarks.peers import transformers

_COMPILE = CompileConfig(fullgraph=False, mode="default")
_COMPILE._compile_all_devices = True  # else it compiles for GPUs only


class Peer(transformers.Peer):
    """As `transformers.Peer`; the first call of each shape compiles."""

    settings: ClassVar = {"cache_implementation": "static", "compile_config": _COMPILE}
