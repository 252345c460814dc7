"""`rms_norm` and its gradients against the formula in double precision."""

import pytest
import torch

from convai_fast import ops

SIZES = [(0, 4), (1,), (3, 17), (2, 5, 64), (300, 33)]
KINDS = [torch.float32, torch.bfloat16]
EPS = 1e-3


def formula(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def computed(function, x, weight, grad):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = function(x, weight)
    return out.detach(), *torch.autograd.grad(out, (x, weight), grad)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("dtype", "out"),
    [(x, out) for x in KINDS for out in KINDS] + [(torch.float64,) * 2, (torch.float16,) * 2],
)
def test_value_and_gradients(size, dtype, out):
    torch.manual_seed(0)
    x, grad = torch.randn(size).to(dtype), torch.randn(size).to(out)
    weight = 1 + torch.randn(size[-1]).to(torch.promote_types(dtype, torch.float32)) / 2
    ours = computed(lambda x, weight: ops.rms_norm(x, weight, EPS, out), x, weight, grad)
    exact = computed(formula, x.double(), weight.double(), grad.double())
    for value, true, kind in zip(ours, exact, (out, dtype, weight.dtype), strict=True):
        assert (value.dtype, value.shape) == (kind, true.shape)
        step = max(torch.finfo(kind).eps, 1e-6)
        largest = true.abs().max() if true.numel() else 0.0
        assert ((value.double() - true).abs() <= 4 * step * (true.abs() + largest + 1)).all()


def test_the_weights_gradient_does_not_depend_on_the_threads():
    torch.manual_seed(0)
    x, grad, weight = torch.randn(1000, 24), torch.randn(1000, 24), torch.randn(24)
    threads = torch.get_num_threads()
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append(torch.ops.convai_fast.rms_norm_backward(grad, x, weight, EPS)[1])
    torch.set_num_threads(threads)
    assert found[0].equal(found[1]) and found[0].equal(found[2])


def test_a_row_of_zeros_stays_one_and_a_nan_spoils_its_row_alone():
    x = torch.ones(3, 20)
    x[0], x[1, 7] = 0, torch.nan
    out = ops.rms_norm(x, torch.ones(20), EPS)
    assert out[0].eq(0).all() and out[1].isnan().all() and out[2].isfinite().all()


def test_of_any_strides():
    torch.manual_seed(0)
    x, weight = torch.randn(30, 6, 70)[:, 1:3], torch.randn(140)[::2]
    assert ops.rms_norm(x, weight, EPS).equal(
        ops.rms_norm(x.contiguous(), weight.contiguous(), EPS)
    )


def test_what_does_not_fit_is_refused():
    x = torch.ones(2, 4)
    with pytest.raises((ValueError, RuntimeError)):
        ops.rms_norm(x, torch.ones(5), EPS)
    with pytest.raises(ValueError, match="eps must not be below 0"):
        ops.rms_norm(x, torch.ones(4), -1.0)
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.convai_fast.rms_norm_backward(torch.ones(2, 5), x, torch.ones(4), EPS)


def test_opcheck_and_a_compiled_graph():
    x, weight = torch.randn(3, 20, requires_grad=True), torch.randn(20, requires_grad=True)
    torch.library.opcheck(torch.ops.convai_fast.rms_norm, (x, weight, EPS, torch.bfloat16))
    compiled = torch.compile(ops.rms_norm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, EPS), formula(x, weight))
