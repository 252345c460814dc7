"""`gelu` and its gradient against torch's in double precision."""

import pytest
import torch
import torch.nn.functional as F

from convai_fast import _native, ops
from tests.helpers.branches import needs_kernels

SIZES = [(), (0,), (1,), (15,), (17,), (3, 65), (2, 40_001)]


def exact(x, grad):
    x = x.double().requires_grad_()
    y = F.gelu(x, approximate="tanh")
    return y.detach(), torch.autograd.grad(y, x, grad.double())[0]


def computed(x, grad):
    x = x.clone().requires_grad_()
    y = ops.gelu(x)
    return y.detach(), torch.autograd.grad(y, x, grad)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_value_and_gradient(size, dtype):
    torch.manual_seed(0)
    x, grad = (2 * torch.randn(size)).to(dtype), torch.randn(size).to(dtype)
    step = max(torch.finfo(dtype).eps, 1e-6 if _native.host else 1e-5)
    for ours, true in zip(computed(x, grad), exact(x, grad), strict=True):
        assert ours.dtype == dtype
        assert ours.shape == x.shape
        assert ((ours.double() - true).abs() <= 2 * step * (true.abs() + 1)).all()


@needs_kernels  # torch's own gradient is no number there
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_from_zero_it_is_x_or_zero_and_a_nan_stays_one(dtype):
    x = torch.tensor([1e4, 3e38, torch.inf, -1e4, -3e38, 0.0, torch.nan], dtype=dtype)
    value, slope = computed(x, torch.ones_like(x))
    assert value[:3].equal(x[:3])
    assert value[3:6].tolist() == [0, 0, 0]
    assert slope[:6].tolist() == [1, 1, 1, 0, 0, 0.5]
    assert value[6].isnan()
    assert slope[6].isnan()


def test_of_any_strides():
    torch.manual_seed(0)
    x, grad = torch.randn(30, 70).T, torch.randn(70, 30)
    for ours, dense in zip(computed(x, grad), computed(x.contiguous(), grad), strict=True):
        torch.testing.assert_close(ours, dense)


def test_a_gradient_that_does_not_fit_is_refused():
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.convai_fast.gelu_backward(torch.ones(3), torch.ones(4))


def test_opcheck_and_a_compiled_graph():
    x = torch.randn(3, 20, requires_grad=True)
    torch.library.opcheck(torch.ops.convai_fast.gelu, (x,))
    compiled = torch.compile(ops.gelu, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), F.gelu(x, approximate="tanh"))
