"""Training attention over prefixes and branches beside torch's with a mask; dropout beside torch's.

python -m pytest benchmarks/bench_branch_attention.py --benchmark-only
"""

import statistics

import pytest
import torch
import torch.nn.functional as F

from benchmarks import shapes
from benchmarks.timing import compare, record
from convai_fast import ops
from convai_fast.comparison.measure import ratios

NUM_HEADS, HEAD_DIM = 12, 64
SEED = torch.tensor(1)


def report(benchmark, say, workload, ways):
    """Measure `ways`, of which the first is ours, and say how they compare."""
    times = compare(ways)
    ours, other = ways
    benchmark(ways[ours])
    median_ratio, least, most = ratios(times, ours, other)
    figures = {f"{way}_ms": round(statistics.median(t) * 1e3, 3) for way, t in times.items()}
    figures |= {"ratio": round(median_ratio, 2), "ratio_spread": f"{least:.2f}-{most:.2f}"}
    record(ours, workload, figures)
    say(f"\n{workload}: " + ", ".join(f"{name} {value}" for name, value in figures.items()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("shape", shapes.BRANCH_SHAPES, ids=str)
def test_branch_attention_forward_and_backward(benchmark, shape, dropout_p, dtype, say):
    branches = [j + 1 for j in range(shape.branches) for _ in range(shape.branch)]
    branch = torch.tensor([0] * shape.prefix + branches)
    seq_len = len(branch)
    visible = (branch == 0) | (branch == branch[:, None])
    mask = visible.tril()
    offsets, branch_ids = torch.arange(shape.rows + 1) * seq_len, branch.repeat(shape.rows)
    tokens = len(branch_ids)
    qkv = torch.randn(tokens, 3, NUM_HEADS, HEAD_DIM, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, NUM_HEADS, HEAD_DIM, dtype=dtype)

    def ours(p=dropout_p):
        out = ops.branch_attention(*qkv.unbind(1), offsets, branch_ids, p, SEED)
        return out, torch.autograd.grad(out, qkv, grad)[0]

    def masked(p=dropout_p):
        parts = qkv.unflatten(0, (shape.rows, seq_len)).unbind(2)
        out = F.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in parts), attn_mask=mask, dropout_p=p
        )
        out = out.transpose(1, 2).reshape(grad.shape)
        return out, torch.autograd.grad(out, qkv, grad)[0]

    for one, other in zip(ours(0.0), masked(0.0), strict=True):  # the same work
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    workload = f"{shape}, dropout {dropout_p}, {dtype}"
    report(benchmark, say, workload, {"branch_attention": ours, "masked": masked})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout(benchmark, dtype, say):
    x = torch.randn(1016, 3072, dtype=dtype)  # the MLP of a training step
    ways = {"dropout": lambda: ops.dropout(x, 0.1, SEED), "torch": lambda: F.dropout(x, 0.1)}
    report(benchmark, say, f"{tuple(x.shape)}, {dtype}", ways)
