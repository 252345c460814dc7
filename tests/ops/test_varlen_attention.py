"""`varlen_attention` against plain attention, a sequence at a time."""

import pytest
import torch

from convai_fast.ops.varlen_attention import varlen_attention

QUERIES, KEYS = [1, 5, 3, 64], [9, 5, 40, 70]  # a past before some of them
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def plain_attention(q, k, v):
    """[queries, heads, head_dim], of which the last sees all of [keys, kv_heads, head_dim]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("counts", "head_dim"), [((2, 2), 16), ((4, 2), 64), ((2, 2), 12)])
def test_each_query_sees_the_keys_of_its_sequence_up_to_its_own(device, dtype, counts, head_dim):
    torch.manual_seed(head_dim)
    q = torch.randn(sum(QUERIES), counts[0], head_dim).to(dtype)
    k, v = torch.randn(2, sum(KEYS), counts[1], head_dim).to(dtype)
    cu_queries, cu_keys = (
        torch.tensor([0, *lengths]).cumsum(0).int().to(device) for lengths in (QUERIES, KEYS)
    )
    given = (x.to(device) for x in (q, k, v))
    out = varlen_attention(*given, cu_queries, cu_keys, max(QUERIES), max(KEYS)).cpu()
    assert out.dtype == dtype
    parts = zip(q.split(QUERIES), k.split(KEYS), v.split(KEYS), strict=True)
    expected = torch.cat([plain_attention(*(x.float() for x in part)) for part in parts])
    torch.testing.assert_close(out.float(), expected, atol=ROUNDING[dtype], rtol=ROUNDING[dtype])
