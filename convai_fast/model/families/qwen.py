"""Qwen 2, 2.5 and 3: Llama with biases of queries, keys and values, or with norms of them.

Sources: Yang et al., "Qwen2 Technical Report" (arXiv 2407.10671), "Qwen3 Technical Report" (arXiv
2505.09388).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from convai_fast.model.config import TransformerConfig
from convai_fast.model.families.llama import Llama


class Qwen2(Llama):
    """Qwen 2 and 2.5."""

    name = "qwen2"
    title = "Qwen2"
    config_class = "Qwen2Config"
    model_class = "Qwen2ForCausalLM"
    biases: ClassVar = {"qkv_bias": True, "out_bias": False, "mlp_bias": False}
    layer_types = ("full_attention", "sliding_attention")

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """As of Llama, without a window."""
        return super().write_config(config) | {"use_sliding_window": False}

    def window(self, settings: Mapping[str, Any]) -> int | None:
        """Of the layers that have one; none without `use_sliding_window`."""
        window: int | None = settings["sliding_window"]
        return window if "sliding_attention" in settings["layer_types"] else None


class Qwen3(Qwen2):
    """Qwen 3, whose heads may be of any width."""

    name = "qwen3"
    title = "Qwen3"
    config_class = "Qwen3Config"
    model_class = "Qwen3ForCausalLM"
    tensors: ClassVar = Llama.tensors | {
        f"transformer.blocks.{{layer}}.attention.{norm}": f"model.layers.{{layer}}.self_attn.{norm}"
        for norm in ("q_norm", "k_norm")
    }
    biases: ClassVar = {
        "qkv_bias": "attention_bias",
        "out_bias": "attention_bias",
        "mlp_bias": False,
    }
