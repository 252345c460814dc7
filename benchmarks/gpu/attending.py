"""Attention of a decode step over the cache beside torch's with a mask, in shares of the bandwidth.

The peer reads every slot to the longest context of all, as the caches of transformers do.
"""

import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.clock import as_graph, figures, in_turn, read_bandwidth
from benchmarks.gpu.notes import Notes, Setting
from convai_fast import ops

HEAD_DIM, DTYPE = 64, torch.bfloat16
LAYERS = 4  # that take turns, so that no cache holds them


@dataclass(frozen=True)
class Shape:
    """Rows whose contexts are `context` tokens in the mean, from half to one and a half of it."""

    rows: int
    context: int
    num_heads: int = 12
    num_kv_heads: int = 12

    def __str__(self) -> str:
        heads = f"{self.num_heads} / {self.num_kv_heads} heads of {HEAD_DIM}"
        return f"{self.rows} rows x {self.context} tokens, {heads}, {str(DTYPE)[6:]}"


SHAPES = (Shape(256, 160), Shape(256, 768), Shape(8, 768), Shape(1, 768), Shape(256, 768, 32, 8))


def run(notes: Notes, setting: Setting) -> None:
    """Every shape."""
    bandwidth = read_bandwidth(setting)
    for shape in (Shape(3, 20), Shape(2, 20, 4, 2)) if setting.smoke else SHAPES:
        with notes.attempt(str(shape)):
            notes.figure(str(shape), **measure(shape, setting, bandwidth))


def measure(shape: Shape, setting: Setting, bandwidth: float) -> dict[str, float | str]:
    """Figures of a shape; raises RuntimeError where the results differ."""
    rows, device = shape.rows, setting.device
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device, dtype=DTYPE)

    longest = shape.context * 3 // 2
    cache = (LAYERS, rows, longest + 1, shape.num_kv_heads, HEAD_DIM)
    keys, values = normal(*cache), normal(*cache)
    q = normal(rows, shape.num_heads, HEAD_DIM)
    k, v = normal(2, rows, shape.num_kv_heads, HEAD_DIM)
    slots = torch.randperm(rows, generator=generator, device=device)
    lengths = torch.linspace(shape.context // 2, longest, rows, device=device).long()
    mask = torch.arange(longest + 1, device=device) <= lengths[:, None]
    mask_of_slots = mask[slots.argsort()][:, None, None]  # slot by slot, as the cache lies

    def ours(layer: int) -> Tensor:
        return ops.decode_attention(q, k, v, keys[layer], values[layer], slots, lengths)

    def masked(layer: int) -> Tensor:
        keys[layer, slots, lengths], values[layer, slots, lengths] = k, v
        queries = torch.empty_like(q).index_copy_(0, slots, q)
        out = F.scaled_dot_product_attention(
            queries[:, :, None],
            keys[layer].transpose(1, 2),
            values[layer].transpose(1, 2),
            attn_mask=mask_of_slots,
            enable_gqa=shape.num_heads != shape.num_kv_heads,
        )
        return out[:, :, 0].index_select(0, slots)

    difference = (ours(0) - masked(0)).abs().max().item()
    if not difference < 0.03:  # as bfloat16 rounds
        raise RuntimeError(f"results differ by {difference:.2g}")
    ways = {
        name: as_graph(lambda way=way: [way(layer) for layer in range(LAYERS)], setting)
        for name, way in (("convai_fast", ours), ("masked", masked))
    }
    times = in_turn(ways, setting, calls=LAYERS)
    tokens = int((lengths + 1).sum())
    num_bytes = 2 * tokens * shape.num_kv_heads * HEAD_DIM * keys.element_size()
    share = num_bytes / bandwidth / statistics.median(times["convai_fast"])
    return figures(times) | {"of_bandwidth": round(share, 3)}
