"""Matrix products alone, beside torch's own and the instruction peak.

python -m pytest benchmarks/bench_products.py --benchmark-only
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.timing import compare, memory_bandwidth, record
from convai_fast import ops
from convai_fast.comparison.measure import ratios
from convai_fast.generation.backends import WEIGHTS

# The linear layers of GPT-2 124M, and its vocabulary.
SHAPES = [(768, 3072), (3072, 768), (768, 50_262)]
ROWS = [1, 32, 592, 4096]
MOST_PRODUCTS = 2**34  # of a call: a vocabulary of 4,096 rows is none that is needed


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(benchmark, shape, rows, peaks, say):
    in_features, out_features = shape
    if rows * in_features * out_features > MOST_PRODUCTS:
        pytest.skip("nobody needs it")
    torch.manual_seed(0)
    x, weight = torch.randn(rows, in_features), torch.randn(out_features, in_features)
    packed = {name: ops.pack_weight(weight, dtype) for name, dtype in WEIGHTS.items()}
    ways = {name: (lambda w=w: ops.packed_linear(x, w)) for name, w in packed.items()}
    half = weight.bfloat16()
    ways["torch float32"] = lambda: F.linear(x, weight)
    ways["torch bfloat16"] = lambda: F.linear(x.bfloat16(), half)
    times = compare(ways, rounds=15)
    benchmark.pedantic(ways["float32"], rounds=3)

    bandwidth = memory_bandwidth()
    figures: dict[str, float | str] = {"bandwidth_gb_per_s": round(bandwidth / 1e9, 1)}
    lines = [f"\n{rows} x {in_features} x {out_features}:"]
    for name, weight_of in packed.items():
        seconds = sorted(times[name])[len(times[name]) // 2]
        giga = 2 * rows * in_features * out_features / seconds / 1e9
        read = weight_of.data.nbytes / seconds / 1e9
        figures[name] = round(giga, 1)
        line = (
            f"  {name:<9} {giga:7.0f} GFLOP/s, weights at {read:5.1f} GB/s of {bandwidth / 1e9:.0f}"
        )
        if name in peaks:
            figures[f"{name}_share_of_peak"] = round(giga / peaks[name], 3)
            line += f", {giga / peaks[name]:.0%} of the instruction peak"
        if f"torch {name}" in times:
            ratio, least, most = ratios(times, name, f"torch {name}")
            line += f"; {ratio:.2f} x torch's ({least:.2f}-{most:.2f})"
        lines.append(f"{line} [{ops.product_instructions(WEIGHTS[name])}]")
    record("products", f"{rows} x {in_features} x {out_features}", figures)
    say("\n".join(lines))
