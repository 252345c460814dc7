"""`rotate` against turning points of the plane as complex numbers, in double precision."""

import pytest
import torch

from convai_fast import ops


def turned(x, rotation):
    """The halves of a head are the coordinates of its points."""
    first, second = x.double().chunk(2, dim=-1)
    cosines, sines = rotation.double()[:, :, None]
    points = torch.complex(first, second) * torch.complex(cosines, sines)
    return torch.cat([points.real, points.imag], dim=-1)


def make(tokens=5, heads=3, half=9, dtype=torch.float32):
    torch.manual_seed(0)
    frequencies = tuple(0.7**k for k in range(half))
    rotation = ops.rotation(torch.arange(tokens) * 3, frequencies, 1.3)
    return torch.randn(tokens, heads, 2 * half).to(dtype), rotation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [(0, 2, 3), (1, 1, 1), (5, 3, 9), (40, 2, 64)])
def test_value_and_gradient(size, dtype):
    x, rotation = make(*size, dtype)
    grad = torch.randn(x.shape).to(dtype)
    x.requires_grad_()
    out = ops.rotate(x, rotation)
    (for_x,) = torch.autograd.grad(out, x, grad)
    back = torch.stack([rotation[0], -rotation[1]])
    step = 4 * max(torch.finfo(dtype).eps, 1e-6)
    for ours, true in ((out, turned(x.detach(), rotation)), (for_x, turned(grad, back))):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), true, rtol=step, atol=step)


def test_angles_are_float32_products_of_position_and_frequency():
    rotation = ops.rotation(torch.tensor([0, 7, 100_003]), (1.0, 0.123), 2.0)
    angles = torch.tensor([[0.0, 0.0], [7.0, 7 * 0.123], [100_003.0, 100_003 * 0.123]])
    assert rotation.equal(2 * torch.stack([angles.cos(), angles.sin()]))


def test_heads_that_are_a_part_of_others_rows():
    x, rotation = make(heads=6)
    for part in (x[:, :2], x[:, 4:], x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert ops.rotate(part, rotation).equal(ops.rotate(part.contiguous(), rotation))


def test_what_does_not_fit_is_refused():
    x, rotation = make()
    for wrong in (x[:4], x[..., :16]):
        with pytest.raises((ValueError, RuntimeError)):
            ops.rotate(wrong, rotation)


def test_opcheck_and_a_compiled_graph():
    x, rotation = make()
    torch.library.opcheck(torch.ops.convai_fast.rotate, (x.requires_grad_(), *rotation))
    compiled = torch.compile(ops.rotate, backend="aot_eager", fullgraph=True)
    assert compiled(x, rotation).equal(ops.rotate(x, rotation))
