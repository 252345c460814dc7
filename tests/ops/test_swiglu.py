"""`swiglu` and its gradients against torch's in double precision."""

import pytest
import torch
import torch.nn.functional as F

from convai_fast import ops

SIZES = [(), (0,), (15,), (3, 65), (2, 40_001)]


def computed(function, gate, up, grad):
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    out = function(gate, up)
    return out.detach(), *torch.autograd.grad(out, (gate, up), grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_value_and_gradients(size, dtype):
    torch.manual_seed(0)
    parts = [(2 * torch.randn(size)).to(dtype) for _ in range(3)]
    exact = computed(lambda gate, up: F.silu(gate) * up, *(part.double() for part in parts))
    for ours, true in zip(computed(ops.swiglu, *parts), exact, strict=True):
        assert ours.dtype == dtype
        assert ours.shape == size
        step = max(torch.finfo(dtype).eps, 1e-6)
        assert ((ours.double() - true).abs() <= 8 * step * (true.abs() + 1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_from_zero_the_gate_is_open_or_shut_and_a_nan_stays_one(dtype):
    gate = torch.tensor([1e4, -1e4, 0.0, torch.nan], dtype=dtype)
    ones = torch.ones_like(gate)
    value, for_gate, for_up = computed(ops.swiglu, gate, ones, ones)
    assert value[:3].equal(torch.tensor([gate[0], 0, 0], dtype=dtype))
    assert for_gate[:3].tolist() == [1, 0, 0.5]
    assert for_up[:3].equal(value[:3])
    assert value[3].isnan() and for_gate[3].isnan() and for_up[3].isnan()


def test_of_any_strides():
    torch.manual_seed(0)
    parts = [torch.randn(30, 70).T for _ in range(3)]
    dense = [part.contiguous() for part in parts]
    for ours, same in zip(computed(ops.swiglu, *parts), computed(ops.swiglu, *dense), strict=True):
        assert ours.equal(same)


def test_what_does_not_fit_is_refused():
    ones = torch.ones(3)
    with pytest.raises((ValueError, RuntimeError)):
        ops.swiglu(ones, torch.ones(4))
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.convai_fast.swiglu_backward(torch.ones(4), ones, ones)


def test_opcheck_and_a_compiled_graph():
    gate, up = (torch.randn(3, 20, requires_grad=True) for _ in range(2))
    torch.library.opcheck(torch.ops.convai_fast.swiglu, (gate, up))
    compiled = torch.compile(ops.swiglu, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(gate, up), F.silu(gate) * up)
