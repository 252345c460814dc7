"""`cached_attention` against its reference and torch's own attention over whole sequences."""

import copy

import pytest
import torch
import torch.nn.functional as F

from convai_fast import ops
from convai_fast.ops import reference
from tests.helpers.branches import heads, needs_kernels

HEAD_DIMS = [1, 3, 16, 64, 80]
LENGTHS = [1, 15, 16, 17, 63, 64, 65, 130]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Cache:
    """Keys and values full of what was there before, and the calls on them."""

    def __init__(self, head_dim, counts=(2, 2), num_slots=3, capacity=192, dtype=torch.float32):
        self.counts, self.head_dim = counts, head_dim
        self.keys, self.values = ops.make_cache(
            num_slots, counts[1], capacity=capacity, head_dim=head_dim, dtype=dtype
        )
        self.keys.normal_(std=100)
        self.values.normal_(std=100)

    def copy(self):
        other = copy.copy(self)
        other.keys, other.values = self.keys.clone(), self.values.clone()
        return other

    def attend(self, runs, operator=ops.cached_attention):
        """`runs` is {slot: (its tokens so far, qkv of the new ones)}; the output of each."""
        counts = [len(qkv) for _, qkv in runs.values()]
        out = operator(
            *heads(torch.cat([qkv for _, qkv in runs.values()]), self.counts),
            self.keys,
            self.values,
            torch.tensor(list(runs)),
            torch.tensor([0, *counts]).cumsum(0),
            torch.tensor([length for length, _ in runs.values()]),
        )
        return out.split(counts)

    def new_tokens(self, count):
        num_heads, num_kv_heads = self.counts
        return torch.randn(count, (num_heads + 2 * num_kv_heads) * self.head_dim)


def whole_attention(qkv, counts=(2, 2)):
    query, key, value = (part.transpose(0, 1) for part in heads(qkv.double(), counts))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(0, 1)


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-5)


def test_a_worked_example():
    cache = Cache(head_dim=1, counts=(1, 1), num_slots=1)
    # Two tokens of query, key and value; the second sees both keys, weighted 1 to e.
    (out,) = cache.attend({0: (0, torch.tensor([[5.0, 0.0, 1.0], [1.0, 1.0, 3.0]]))})
    e = torch.e
    assert out[:, 0, 0].tolist() == pytest.approx([1.0, (1 + 3 * e) / (1 + e)])
    assert cache.keys[0, 0, 0, 0, :2].flatten().tolist() == [0, 1]
    assert cache.values[0, 0, 0, :2, 0].flatten().tolist() == [1, 3]
    (out,) = cache.attend({0: (2, torch.tensor([[0.0, 9.0, 5.0]]))})
    assert out.tolist() == [[[pytest.approx(3.0)]]]  # an indifferent query: the mean


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_whole_sequence_is_torchs_causal_attention(head_dim, length):
    cache = Cache(head_dim)
    qkv = cache.new_tokens(length)
    (out,) = cache.attend({1: (0, qkv)})
    close(out, whole_attention(qkv))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_several_sequences_at_once_each_after_its_own_past(head_dim):
    cache = Cache(head_dim)
    qkvs = [cache.new_tokens(length) for length in (65, 150, 20)]
    before, after = [0, 63, 17], [65, 150, 18]
    cache.attend({slot: (0, qkvs[slot][: before[slot]]) for slot in (1, 2)})
    outs = cache.attend(
        {slot: (before[slot], qkvs[slot][before[slot] : after[slot]]) for slot in (2, 0, 1)}
    )
    for slot, out in zip((2, 0, 1), outs, strict=True):
        expected = whole_attention(qkvs[slot][: after[slot]])
        close(out, expected[before[slot] :])


def chunked(cache, slot, qkv, sizes):
    length, outs = 0, []
    for size in sizes:
        outs += cache.attend({slot: (length, qkv[length : length + size])})
        length += size
    assert length == len(qkv)
    return torch.cat(outs)


@needs_kernels
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_tokens_in_other_chunks_or_company_give_the_same_bits(head_dim):
    expected = None
    for slot, sizes in enumerate(
        [[130], [1] * 130, [15, 2, 46, 1, 1, 65], [5, 3, 2, 120], [129, 1]]
    ):
        cache = Cache(head_dim, num_slots=5)
        torch.manual_seed(1)
        qkv = cache.new_tokens(130)
        out = chunked(cache, slot, qkv, sizes)
        expected = out if expected is None else expected
        assert torch.equal(out, expected)
    cache = Cache(head_dim, capacity=256)
    torch.manual_seed(1)
    qkv = cache.new_tokens(130)
    cache.attend({0: (0, cache.new_tokens(9)), 2: (0, qkv[:33]), 1: (0, cache.new_tokens(70))})
    _, out, _ = cache.attend(
        {1: (70, cache.new_tokens(40)), 2: (33, qkv[33:]), 0: (9, cache.new_tokens(1))}
    )
    assert torch.equal(out, expected[33:])


@needs_kernels
def test_the_number_of_threads_changes_no_bit():
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(1)
            cache = Cache(16, counts=(5, 5))
            outs.append(cache.attend({slot: (0, cache.new_tokens(40)) for slot in range(3)}))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(torch.cat(out), torch.cat(outs[0])) for out in outs)


@pytest.mark.parametrize("counts", [(2, 2), (4, 1), (4, 2), (6, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [1, 16, 80])
def test_the_kernel_computes_and_stores_what_the_reference_does(head_dim, dtype, counts):
    torch.manual_seed(1)
    one = Cache(head_dim, counts, dtype=dtype)
    other = one.copy()
    for runs in [
        {2: (0, one.new_tokens(31)), 0: (0, one.new_tokens(64))},
        {0: (64, one.new_tokens(1)), 1: (0, one.new_tokens(3)), 2: (31, one.new_tokens(100))},
    ]:
        close(
            torch.cat(one.attend(runs)), torch.cat(other.attend(runs, reference.cached_attention))
        )
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


def test_very_different_scores_do_not_overflow():
    cache = Cache(16)
    qkv = cache.new_tokens(70)
    qkv[:, : 2 * 2 * 16] *= 100  # queries and keys: the scores are in the ten thousands
    (out,) = cache.attend({0: (0, qkv)})
    assert out.isfinite().all()
    query, key = qkv[:, :16].double(), qkv[:, 32:48].double()
    best = (query @ key.T).masked_fill(torch.ones(70, 70).triu(1).bool(), -torch.inf).argmax(1)
    close(out[:, 0], qkv[best, 64:80])


@needs_kernels  # the reference multiplies what the mask hides by 0, and NaN remains
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_what_is_not_finite_stays_in_its_sequence_and_does_not_reach_back(bad, part):
    cache, clean = Cache(16), Cache(16)
    runs = {slot: (0, cache.new_tokens(40)) for slot in range(2)}
    expected = clean.attend(runs)
    column = 32 * ["query", "key", "value"].index(part)
    runs[0][1][24, column : column + 32] = bad  # the first of four that are computed together
    outs = cache.attend(runs)
    assert torch.equal(outs[1], expected[1])
    assert torch.equal(outs[0][:24], expected[0][:24])


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_nan_is_seen_by_all_who_look_at_it(part):
    cache = Cache(16)
    qkv = cache.new_tokens(40)
    column = 32 * ["query", "key", "value"].index(part)
    qkv[24, column : column + 32] = torch.nan
    (out,) = cache.attend({0: (0, qkv)})
    assert out[24 : 25 if part == "query" else None].isnan().all()


def test_no_tokens_and_no_sequences():
    cache = Cache(16)
    before = cache.keys.clone()
    empty = torch.zeros(0, 96)
    none = torch.zeros(0, dtype=torch.int64)
    out = ops.cached_attention(
        *heads(empty), cache.keys, cache.values, none, torch.tensor([0]), none
    )
    assert out.shape == (0, 2, 16)
    qkv = cache.new_tokens(3)
    none_of_1, out = cache.attend({1: (5, empty), 0: (0, qkv)})
    assert len(none_of_1) == 0
    close(out, whole_attention(qkv))
    assert torch.equal(cache.keys[1:], before[1:])


@needs_kernels
def test_what_does_not_fit_is_named():
    cache = Cache(16)

    def call(slots=(0, 1), offsets=(0, 2, 4), lengths=(0, 190), **wrong):
        x = torch.zeros(4, 2, 16)
        tensors = {"q": x, "k": x, "v": x, "keys": cache.keys, "values": cache.values} | wrong
        tables = (torch.tensor(table) for table in (slots, offsets, lengths))
        return ops.cached_attention(*tensors.values(), *tables)

    call()  # to the very end of the slot
    before = cache.keys.clone()
    for wrong, error, message in [
        ({"lengths": (0, 191)}, IndexError, "2 tokens after 191, but the cache holds 192"),
        ({"lengths": (0, 2**62)}, IndexError, "but the cache holds 192"),
        ({"lengths": (-1, 0)}, IndexError, "2 tokens after -1"),
        ({"slots": (0, 3)}, IndexError, "sequence 1 has slot 3, but there are 3"),
        ({"slots": (0, -1)}, IndexError, "sequence 1 has slot -1"),
        ({"slots": (1, 1)}, IndexError, "each may have one sequence"),
        ({"offsets": (0, 5, 4)}, IndexError, "sequence 1 has -1 tokens"),
        ({"offsets": (0, 2, 5)}, ValueError, "lead from 0 to the number of tokens, 4"),
        ({"offsets": (1, 2, 4)}, ValueError, "lead from 0 to the number of tokens, 4"),
        ({"offsets": (0, 4)}, ValueError, "2 slots need as many lengths and one offset more"),
        ({"lengths": (0,)}, ValueError, "2 slots need as many lengths"),
        ({"slots": (0.0, 1.0)}, TypeError, "cached_attention: slots must be"),
        ({"q": torch.zeros(4, 2, 15)}, ValueError, r"must be \[tokens, num_heads, head_dim\]"),
        (
            {
                **dict.fromkeys("qkv", torch.zeros(4, 2, 0)),
                "keys": torch.zeros(3, 2, 3, 0, 64, 1),
                "values": torch.zeros(3, 2, 0, 192, 64, 1),
            },
            ValueError,
            r"q \[4, 2, 0\] must be",
        ),
        ({"q": torch.zeros(4, 32)}, ValueError, r"must be \[tokens, num_heads, head_dim\]"),
        ({"q": torch.zeros(4, 3, 16)}, ValueError, "with the heads of keys"),  # no multiple of 2
        ({"k": torch.zeros(3, 2, 16)}, ValueError, r"v .* \[tokens, num_kv_heads, head_dim\]"),
        ({"v": torch.zeros(4, 1, 16)}, ValueError, r"v .* \[tokens, num_kv_heads, head_dim\]"),
        ({"q": torch.zeros(4, 2, 16).double()}, TypeError, "q must be float32, not Double"),
        ({"k": torch.zeros(4, 2, 16).bfloat16()}, TypeError, "k must be float32, not BFloat16"),
        ({"v": torch.zeros(4, 2, 16).int()}, TypeError, "v must be float32, not Int"),
        ({"keys": cache.keys.half()}, TypeError, "keys must be float32 or bfloat16, not Half"),
        ({"keys": cache.keys[:, :1].contiguous()}, ValueError, "with the heads of keys"),
        (
            {"keys": cache.keys[:, :, :, :8].contiguous()},
            ValueError,
            r"must be \[slots.* 16, 64, 1",
        ),
        ({"keys": cache.keys[:, :, ::2]}, ValueError, "must be contiguous"),
        (
            {"values": cache.values[:, :, :, :48].contiguous()},
            ValueError,
            r"1, 192, 64, 1\] for keys",
        ),
        ({"values": cache.values[:2]}, ValueError, r"1, 192, 64, 1\] for keys"),
    ]:
        with pytest.raises(error, match=message):
            call(**wrong)
    assert torch.equal(cache.keys, before)  # nothing is written before all is checked


@pytest.mark.parametrize("counts", [(4, 1), (4, 2), (6, 3)])
def test_grouped_heads_are_torchs_attention_with_grouped_heads_and_repeated_ones(counts):
    num_heads, num_kv_heads = counts
    group = num_heads // num_kv_heads
    cache = Cache(16, counts)
    repeated = Cache(16, (num_heads, num_heads))
    qkv = cache.new_tokens(70)
    query, *shared = heads(qkv, counts)
    repeats = [part.repeat_interleave(group, dim=1) for part in shared]
    qkv_repeated = torch.cat([query, *repeats], dim=1).flatten(1)
    length, outs = 0, []
    for end in (20, 21, 64, 70):
        (out,) = cache.attend({1: (length, qkv[length:end])})
        (expected,) = repeated.attend({1: (length, qkv_repeated[length:end])})
        close(out, expected)
        length, outs = end, [*outs, out]
    close(torch.cat(outs), whole_attention(qkv, counts))


def test_rows_apart_and_heads_out_of_order_change_no_bit():
    cache = Cache(16, counts=(4, 2))
    parts = heads(cache.new_tokens(21), cache.counts)
    tables = (torch.tensor([2, 0]), torch.tensor([0, 4, 21]), torch.tensor([0, 17]))

    def attend(parts):
        its = cache.copy()
        return (ops.cached_attention(*parts, its.keys, its.values, *tables), its.keys, its.values)

    expected = attend([part.contiguous() for part in parts])
    for others in (
        parts,
        [part.transpose(0, 1).contiguous().transpose(0, 1) for part in parts],
        [torch.stack([part, part], -1)[..., 0] for part in parts],
    ):
        assert all(torch.equal(a, b) for a, b in zip(attend(others), expected, strict=True))
    same = [part[:1].expand(21, -1, -1) for part in parts]
    expected = attend([part.contiguous() for part in same])
    assert all(torch.equal(a, b) for a, b in zip(attend(same), expected, strict=True))


@pytest.mark.parametrize("counts", [(2, 2), (4, 2)])
def test_opcheck_passes(counts):
    cache = Cache(16, counts)
    torch.library.opcheck(
        torch.ops.convai_fast.cached_attention.default,
        (
            *heads(cache.new_tokens(5), counts),
            cache.keys,
            cache.values,
            torch.tensor([2, 0]),
            torch.tensor([0, 4, 5]),
            torch.tensor([0, 17]),
        ),
    )
