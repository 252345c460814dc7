"""`dropout`: the reference's bits, the right share, the same mask for the gradient."""

import pytest
import torch

from convai_fast import _native, ops
from convai_fast.ops import reference
from tests.helpers.branches import SEED, needs_kernels


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_all_four_words_are_the_published_test_vectors():
    # Salmon et al.: key and counter 0, and all their bits set.
    zeros_and_ones = torch.tensor([0, -1])
    words = reference.philox_words(zeros_and_ones, zeros_and_ones, zeros_and_ones)
    assert words[:, 0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words[:, 1].tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (), (1,), (63,), (64,), (3, 65), (2, 40_001)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.999])
def test_the_kernel_gives_the_references_bits(dtype, shape, p):
    x = torch.randn(shape).to(dtype)
    out = ops.dropout(x, p, SEED)
    assert out.dtype == dtype
    assert torch.equal(out, reference.dropout(x, p, SEED))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_share_is_dropped_and_the_rest_scaled(p):
    out = ops.dropout(torch.ones(100_000), p, SEED)
    kept = out > 0
    assert abs(kept.float().mean() - (1 - p)) < 4 * (p * (1 - p) / 100_000) ** 0.5
    torch.testing.assert_close(out[kept] * (1 - p), torch.ones(int(kept.sum())))
    for lag in (1, 16, 64):  # neighbours, words of a block, groups
        both = (kept[lag:] & kept[:-lag]).float().mean()
        assert abs(both - (1 - p) ** 2) < 0.01


def test_a_seed_drops_the_same_and_another_seed_others():
    x = torch.ones(10_000)
    out = ops.dropout(x, 0.5, SEED)
    assert torch.equal(out, ops.dropout(x, 0.5, SEED))
    # Torch's generator on a CPU, which draws where nothing is compiled, takes 32 bits of a seed.
    for other in (SEED + 1, SEED + 2**32)[: 2 if _native.host else 1]:
        assert 0.45 < (out == ops.dropout(x, 0.5, other)).float().mean() < 0.55


def test_p_0_changes_nothing_and_what_is_dropped_is_0_even_if_it_was_nan():
    x = torch.randn(1000)
    assert torch.equal(ops.dropout(x, 0.0, SEED), x)
    kept = ops.dropout(torch.ones(1000), 0.3, SEED) > 0
    out = ops.dropout(torch.full((1000,), torch.nan), 0.3, SEED)
    assert torch.equal(out.isnan(), kept)
    assert (out[~kept] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_dropped_alike(dtype):
    x = torch.randn(7, 33).to(dtype).requires_grad_()
    grad = torch.randn(33, 7).t().to(dtype)  # not contiguous
    ops.dropout(x, 0.4, SEED).backward(grad)
    assert torch.equal(x.grad, ops.dropout(grad, 0.4, SEED))
    ones = ops.dropout(torch.ones_like(x), 0.4, SEED).detach()
    assert torch.equal(x.grad == 0, (ones == 0) | (grad == 0))


def test_gradients_of_gradients():
    x = torch.randn(20, requires_grad=True)
    (grad,) = torch.autograd.grad((ops.dropout(x, 0.4, SEED) ** 2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    twice = ops.dropout(ops.dropout(torch.ones(20), 0.4, SEED), 0.4, SEED)
    torch.testing.assert_close(second, 2 * twice)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_floating_point_numbers_are_dropped_as_float32_is(dtype):
    x = torch.randn(7, 33).to(dtype).requires_grad_()
    out = ops.dropout(x, 0.4, SEED)
    expected = ops.dropout(x.detach().float(), 0.4, SEED)
    assert out.dtype == dtype
    torch.testing.assert_close(out.detach(), expected.to(dtype))
    assert torch.equal(out == 0, expected == 0)
    out.sum().backward()
    torch.testing.assert_close(x.grad, ops.dropout(torch.ones(7, 33), 0.4, SEED).to(dtype))


def test_elements_are_counted_in_the_order_of_the_shape_not_of_memory():
    x = torch.randn(30, 50)
    expected = ops.dropout(x, 0.4, SEED)
    out = ops.dropout(x.t().contiguous().t(), 0.4, SEED)
    assert torch.equal(out, expected)
    assert out.is_contiguous()


@needs_kernels
def test_the_number_of_threads_changes_no_bit():
    before, x, outs = torch.get_num_threads(), torch.randn(200_000), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(ops.dropout(x, 0.4, SEED))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_autocast_and_inference_mode_change_nothing():
    x = torch.randn(1000)
    expected = ops.dropout(x, 0.4, SEED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.dropout(x, 0.4, SEED), expected)
    with torch.inference_mode():
        assert torch.equal(ops.dropout(x, 0.4, SEED), expected)


@pytest.mark.parametrize("p", [-0.1, 1.0, torch.nan])
def test_a_p_that_is_no_share_is_refused(p):
    with pytest.raises(ValueError, match="p must be at least 0 and less than 1"):
        ops.dropout(torch.ones(3), p, SEED)


@needs_kernels
def test_what_does_not_fit_is_named():
    for x, seed, error, message in [
        (torch.ones(3).int(), SEED, TypeError, "x must be floating-point numbers, not Int"),
        (torch.ones(3), SEED.int(), TypeError, "seed must be"),
        (torch.ones(3), SEED[None], ValueError, "seed must have 0 dim"),
    ]:
        with pytest.raises(error, match=message):
            ops.dropout(x, 0.1, seed)


def test_opcheck_passes():
    for x in (torch.randn(3, 70, requires_grad=True), torch.randn(70, 3).t()):
        torch.library.opcheck(torch.ops.convai_fast.dropout.default, (x, 0.4, SEED))


def test_it_compiles_into_a_graph():
    compiled = torch.compile(ops.dropout, backend="eager", fullgraph=True)
    x = torch.randn(100)
    assert torch.equal(compiled(x, 0.4, SEED), ops.dropout(x, 0.4, SEED))
