"""`decode_attention` against torch's own attention, a row at a time."""

import pytest
import torch
import torch.nn.functional as F

from convai_fast import ops
from tests.helpers.branches import heads
from tests.helpers.emulator import EmulatedGpu, kernels, unneeded_barriers

CAPACITY, NUM_SLOTS = 70, 7
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def on_gpu(*tensors):
    """Each tensor lies in its memory there as it does here."""
    given = [
        torch.empty(0, dtype=x.dtype, device="cuda").set_(
            x.untyped_storage().cuda(), x.storage_offset(), x.shape, x.stride()
        )
        for x in tensors
    ]
    out = ops.decode_attention(*given)
    for tensor, stored in zip(tensors[3:5], given[3:5], strict=True):
        tensor.copy_(stored)
    return out.cpu()


EMULATED_GPU = EmulatedGpu()


def in_emulator(*tensors):
    with EMULATED_GPU:
        return ops.decode_attention(*tensors)


KERNELS = [pytest.param(on_gpu, marks=pytest.mark.cuda), in_emulator]


@pytest.fixture(params=[ops.decode_attention, *KERNELS])
def decode(request):
    """The operator in each of its versions; all that is given and returned is on the CPU."""
    return request.param


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


def make(lengths, head_dim=16, counts=(2, 2), dtype=torch.float32, capacity=CAPACITY, slots=None):
    """q, k and v side by side in one tensor, and a layer of a cache full of what was there."""
    torch.manual_seed(len(lengths) * head_dim)
    qkv = torch.randn(len(lengths), (counts[0] + 2 * counts[1]) * head_dim).to(dtype)
    cache = torch.randn(2, 3, NUM_SLOTS, capacity, counts[1], head_dim).to(dtype)[:, 1]
    if slots is None:
        slots = torch.randperm(NUM_SLOTS)[: len(lengths)]
    return [
        *heads(qkv, counts),
        *cache,
        torch.as_tensor(slots),
        torch.tensor(lengths, dtype=torch.int64),
    ]


def expected(q, k, v, keys, values, slots, lengths):
    """In float64, of what the cache holds before it is written to."""
    outs = [q[:0].double()]
    for i, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        pasts = (
            torch.cat([cache[slot, :length], new[i : i + 1]]).double().transpose(0, 1)
            for cache, new in ((keys, k), (values, v))
        )
        query = q[i].double()[:, None]
        out = F.scaled_dot_product_attention(query, *pasts, enable_gqa=True)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)


def assert_right(decode, tensors):
    q, k, v, keys, values, slots, lengths = tensors
    right = expected(*tensors)
    stored = keys.clone(), values.clone()
    for cache, new in zip(stored, (k, v), strict=True):
        cache[slots, lengths] = new
    out = decode(*tensors)
    assert out.dtype == q.dtype
    rounding = ROUNDING[q.dtype]
    torch.testing.assert_close(out.double(), right, rtol=rounding, atol=rounding)
    assert torch.equal(keys, stored[0])
    assert torch.equal(values, stored[1])


def test_a_worked_example(decode):
    # Keys 0 and, of the new token, 1; the query 1 weighs their values as 1 to e.
    q, k, v = torch.tensor([1.0, 1.0, 3.0]).view(3, 1, 1, 1)
    keys, values = torch.tensor([[0.0, 9.0], [1.0, 9.0]]).view(2, 1, 2, 1, 1)
    out = decode(q, k, v, keys, values, torch.tensor([0]), torch.tensor([1]))
    assert out.tolist() == [[[pytest.approx((1 + 3 * torch.e) / (1 + torch.e))]]]
    assert keys.flatten().tolist() == [0, 1]
    assert values.flatten().tolist() == [1, 3]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("head_dim", [1, 8, 20, 24, 64, 80, 128, 256])
def test_each_row_is_torchs_attention_to_its_slot(decode, head_dim, dtype):
    for counts in [(2, 2), (4, 2)]:
        assert_right(decode, make([0, 40, 69, 13, 1], head_dim, counts, dtype))


@pytest.mark.parametrize("counts", [(1, 1), (3, 1), (4, 1), (6, 2), (7, 1), (16, 2), (9, 1)])
def test_heads_of_queries_share_keys(decode, counts):
    for head_dim in (5, 16, 136):
        assert_right(decode, make([33, 2], head_dim, counts))


@pytest.mark.parametrize("capacity", [1, 2, 17, 129, 1300])
def test_slots_of_any_capacity_are_used_to_their_end(decode, capacity):
    assert_right(decode, make([capacity - 1, 0, capacity // 2], 8, capacity=capacity))


@pytest.mark.parametrize("head_dim", [16, 20])
def test_what_lies_elsewhere_is_read_there(decode, head_dim):
    tensors = make([9, 66, 23, 5], head_dim)
    odd = [F.pad(tensor, (1, 0))[..., 1:] for tensor in tensors[:5]]  # no 16 bytes lie together
    assert_right(decode, [*odd, *tensors[5:]])
    new = [tensor.transpose(0, 2).contiguous().transpose(0, 2) for tensor in tensors[:3]]
    caches = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in tensors[3:5]]
    tables = [torch.stack([table, table], 1)[:, 0] for table in tensors[5:]]
    assert_right(decode, [*new, *caches, *tables])


def test_what_a_slot_holds_beyond_its_tokens_is_not_seen(decode):
    tensors = make([0, 33, 68])
    for cache in tensors[3:5]:
        for slot, length in zip(*tensors[5:], strict=True):
            cache[slot, length:] = torch.nan
    right = expected(*tensors)
    torch.testing.assert_close(decode(*tensors).double(), right, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_nan_and_inf_are_seen_by_their_own_row_alone(decode, part):
    clean = decode(*make([5, 40, 69]))
    for bad in (torch.nan, torch.inf):
        tensors = make([5, 40, 69])
        tensors[["query", "key", "value"].index(part)][1] = bad
        out = decode(*tensors)
        assert not out[1].isfinite().any()
        torch.testing.assert_close(out[::2], clean[::2])


def test_very_different_scores_do_not_overflow(decode):
    tensors = make([60, 69])
    tensors[0] *= 1000
    right = expected(*tensors)
    torch.testing.assert_close(decode(*tensors).double(), right, rtol=1e-3, atol=1e-3)


def test_rows_that_share_a_slot_spoil_no_other(decode):
    tensors = make([9, 69, 69, 0, 20, 3], slots=[4, 2, 2, 2, 0, 1])
    right, before = expected(*tensors), tensors[3].clone()
    out = decode(*tensors)
    others = [0, 4, 5]
    torch.testing.assert_close(out[others].double(), right[others], rtol=2e-5, atol=2e-5)
    written = (tensors[3] != before).any(-1).any(-1).nonzero()
    assert written.tolist() == [[0, 20], [1, 3], [2, 0], [2, 69], [4, 9]]


@pytest.mark.parametrize("head_dim", [16, 20])
def test_a_row_gives_the_same_bits_alone_and_in_company(kernel, head_dim):
    tensors = make([9, 66, 23, 5], head_dim)
    out = kernel(*tensors)
    for i in (1, 3):
        new = [tensor[i : i + 1] for tensor in tensors]
        assert torch.equal(kernel(*new[:3], *tensors[3:5], *new[5:]), out[i : i + 1])


def test_the_order_of_threads_in_the_emulator_changes_no_bit():
    tensors = make([9, 66, 23, 5], 24, counts=(6, 2))
    outs = [in_emulator(*tensors) for _ in range(12)]
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_the_emulator_notices_each_barrier_that_is_removed():
    def check():
        for _ in range(8):
            assert_right(in_emulator, make([9, 66], 64))

    assert len(kernels("decode_attention").barriers) == 1
    assert unneeded_barriers("decode_attention", check) == []


def test_a_row_that_does_not_fit_the_cache_stores_nothing_and_gives_nan(kernel):
    tensors = make([9, 70, -1, 3, 2**62, 4], slots=[4, 1, 2, 7, 0, -1])
    q, k, v, keys, values, slots, lengths = tensors
    before, right = keys.clone(), expected(q[:1], k, v, keys, values, slots[:1], lengths[:1])
    out = kernel(*tensors)
    torch.testing.assert_close(out[:1].double(), right, rtol=2e-5, atol=2e-5)
    assert out[1:].isnan().all()
    assert (keys != before).any(-1).any(-1).nonzero().tolist() == [[4, 9]]


def test_no_rows_store_nothing(decode):
    assert_right(decode, make([]))


def test_nothing_is_asked_of_the_device():
    tensors = [tensor.to("meta") for tensor in make([9, 66])]
    assert ops.decode_attention(*tensors).shape == (2, 2, 16)


def test_opcheck_passes():
    torch.library.opcheck(torch.ops.convai_fast.decode_attention.default, tuple(make([9, 66])))
