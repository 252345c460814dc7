"""`add_norm` against its formula in float64."""

import pytest
import torch
import torch.nn.functional as F

from convai_fast import ops
from tests.helpers.emulator import EmulatedGpu, kernels, unneeded_barriers

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
EPS = 1e-3
EMULATED_GPU = EmulatedGpu()


def on_gpu(*tensors, **options):
    given = (tensor if tensor is None else tensor.cuda() for tensor in tensors)
    return tuple(tensor.cpu() for tensor in ops.add_norm(*given, **options))


def in_emulator(*tensors, **options):
    with EMULATED_GPU:
        return ops.add_norm(*tensors, **options)


KERNELS = [pytest.param(on_gpu, marks=pytest.mark.cuda), in_emulator]


@pytest.fixture(params=[ops.add_norm, *KERNELS])
def add_norm(request):
    """The operator in each of its versions; all that is given and returned is on the CPU."""
    return request.param


def make(*shape, dtype=torch.float32):
    """x, residual, weight and bias; the mean of a row is far from 0."""
    torch.manual_seed(sum(shape))
    x, residual = (torch.randn(2, *shape) + 3).to(dtype)
    return [x, residual, *torch.randn(2, shape[-1]).to(dtype)]


def assert_right(add_norm, x, residual, weight, bias, rms_norm):
    total, normed = add_norm(x, residual, weight, bias, eps=EPS, rms_norm=rms_norm)
    assert torch.equal(total, x + residual)
    assert normed.dtype == x.dtype
    z = total.double() - (0 if rms_norm else total.double().mean(-1, keepdim=True))
    z = z / (z.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    right = z if bias is None else z + bias
    rounding = ROUNDING[x.dtype]
    torch.testing.assert_close(normed.double(), right, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("n_embd", [1, 8, 100, 768, 1031, 8192])
@pytest.mark.parametrize("rms_norm", [False, True])
def test_the_sum_and_its_norm(add_norm, n_embd, dtype, rms_norm):
    x, residual, weight, bias = make(3, n_embd, dtype=dtype)
    assert_right(add_norm, x, residual, weight, bias, rms_norm)
    assert_right(add_norm, x, residual, weight, None, rms_norm)


def test_any_shape_and_strides(add_norm):
    assert_right(add_norm, *make(768), False)
    assert_right(add_norm, *make(0, 768), False)
    tensors = make(2, 3, 768)
    odd = [F.pad(tensor, (1, 0))[..., 1:] for tensor in tensors]
    assert_right(add_norm, *odd, False)
    turned = [tensor.transpose(0, 1) for tensor in tensors[:2]]
    assert_right(add_norm, *turned, *tensors[2:], False)


def test_values_far_from_0_lose_no_digits(add_norm):
    x, residual, weight, bias = make(2, 768)
    assert_right(add_norm, 64 * x.round() + 4096, residual.round(), weight, bias, False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_gives_the_same_bits_alone_and_in_company(kernel):
    x, residual, *parameters = make(5, 768)
    _, normed = kernel(x, residual, *parameters, eps=EPS)
    for _ in range(8):
        _, alone = kernel(x[2:3], residual[2:3], *parameters, eps=EPS)
        assert torch.equal(alone, normed[2:3])


def test_the_emulator_notices_each_barrier_that_is_removed():
    def check():
        for _ in range(8):
            assert_right(in_emulator, *make(2, 768), False)

    assert len(kernels("add_norm").barriers) == 1
    assert unneeded_barriers("add_norm", check) == []


def test_opcheck_passes():
    arguments = (*make(2, 16), EPS, False)
    torch.library.opcheck(torch.ops.convai_fast.add_norm.default, arguments)
