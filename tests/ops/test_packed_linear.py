"""`packed_linear` against its reference and `F.linear`, for all three formats of the weight."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from convai_fast import _native, ops
from convai_fast.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.int8]
ACTIVATIONS = {
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}
IN_FEATURES = [1, 2, 5, 17, 768, 1030, 3072]
OUT_FEATURES = [1, 17, 63, 64, 65, 100]
ROWS = [0, 1, 2, 3, 5, 6, 7, 8, 9, 13, 65, 200]

needs_kernels = pytest.mark.skipif(_native.host is None, reason="nothing is compiled here")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def linear(rows, in_features, out_features, dtype, with_bias=True):
    """Some x, a packed weight and a bias."""
    weight = ops.pack_weight(torch.randn(out_features, in_features), dtype)
    return torch.randn(rows, in_features), weight, torch.randn(out_features) if with_bias else None


def in_float64(x, weight, bias):
    """The product of x and the weight as it is packed, and how far rounding may be from it."""
    matrix = weight.data.double().permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    matrix = matrix[: weight.out_features, : x.shape[-1]]
    if weight.scales is not None:
        matrix = matrix * weight.scales.double()[:, None]
    expected = F.linear(x.double(), matrix, None if bias is None else bias.double())
    # Sums of absolute products bound the error of any order of summation.
    size = F.linear(x.abs().double(), matrix.abs())
    error = 1e-6 * (size + (0 if bias is None else bias.abs()))
    if weight.data.dtype == torch.bfloat16:  # half a step of x for each product
        error = error + 2**-8 * size
    if weight.scales is not None:
        low, high = F.pad(x, (0, 1)).double().aminmax(dim=-1, keepdim=True)
        error = error + 1.01 * (high - low) / 255 * matrix.abs().sum(1)
    return expected, error


def check(x, weight, bias):
    out = ops.packed_linear(x, weight, bias)
    assert out.dtype == torch.float32
    assert out.shape == (*x.shape[:-1], weight.out_features)
    expected, error = in_float64(x, weight, bias)
    assert ((out - expected).abs() <= error + 1e-30).all()
    return out


# --- packing ------------------------------------------------------------------------------------


def test_a_worked_example():
    weight = torch.tensor([[1.0, 2.0, -4.0], [0.5, 0.0, 0.25]])
    x, bias = torch.tensor([[1.0, 1.0, 0.25]]), torch.tensor([10.0, 20.0])
    packed = ops.pack_weight(weight, torch.float32)
    assert packed.data.shape == (1, 3, 64, 1)
    assert packed.data[0, :, :3, 0].tolist() == [[1, 0.5, 0], [2, 0, 0], [-4, 0.25, 0]]
    assert ops.packed_linear(x, packed, bias).tolist() == [[12.0, 20.5625]]
    packed = ops.pack_weight(weight, torch.bfloat16)
    assert packed.data.shape == (1, 2, 64, 2)
    assert packed.data[0, :, :2].tolist() == [[[1, 2], [0.5, 0]], [[-4, 0], [0.25, 0]]]
    assert ops.packed_linear(x, packed, bias).tolist() == [[12.0, 20.5625]]
    packed = ops.pack_weight(weight, torch.int8)
    assert packed.data.shape == (1, 1, 64, 4)
    assert packed.data[0, 0, :3].tolist() == [[32, 64, -127, 0], [127, 0, 64, 0], [0, 0, 0, 0]]
    assert packed.scales.tolist() == pytest.approx([4 / 127, 0.5 / 127])
    assert packed.column_sums.tolist() == [32 + 64 - 127, 127 + 64]
    # x is 255, 255 and 64 steps of 1 / 255.
    sums = torch.tensor([255 * (32 + 64) - 64 * 127, 255 * 127 + 64 * 64]) / 255
    out = ops.packed_linear(x, packed, bias)[0]
    assert out.tolist() == pytest.approx((bias + sums * packed.scales).tolist(), rel=1e-6)


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 2**-8), (torch.int8, 0.5 / 127)])
def test_packing_rounds_to_nearest(dtype, most):
    weight = torch.randn(33, 70)
    unpacked = ops.packed_linear(torch.eye(70), ops.pack_weight(weight, dtype)).T
    scale = weight.abs() if dtype == torch.bfloat16 else weight.abs().amax(1, keepdim=True)
    relative = (unpacked - weight).abs() / scale
    assert 0.8 * most < relative.max() <= 1.001 * most


def test_packing_keeps_no_hold_of_the_weight():
    weight = torch.nn.Parameter(torch.ones(16, 4))
    for dtype in DTYPES:
        packed = ops.pack_weight(weight, dtype)
        with torch.no_grad():
            weight.fill_(1)
        before = packed.data.clone()
        with torch.no_grad():
            weight.fill_(2)
        assert not packed.data.requires_grad
        assert torch.equal(packed.data, before)


# --- products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_features", IN_FEATURES)
def test_products_of_all_sizes(in_features, dtype):
    for out_features in OUT_FEATURES:
        for rows in ROWS if in_features < 2000 else [0, 1, 7]:
            check(*linear(rows, in_features, out_features, dtype, with_bias=rows % 2 == 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_with_a_whole_vocabulary(dtype):
    x, weight, _ = linear(6, 64, 50_262, dtype, with_bias=False)
    check(x, weight, None)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_computes_what_the_reference_computes(dtype, activation):
    x, weight, bias = linear(13, 1030, 50, dtype)
    arguments = (*weight[:3], bias, weight.out_features, activation)
    out = ops.packed_linear(x, weight, bias, activation)
    torch.testing.assert_close(out, reference.packed_linear(x, *arguments), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_features", [1, 17, 768, 3072])
def test_int8_is_the_same_bits_as_the_reference(in_features):
    """Whole numbers are summed, so that not even the last bit is left to the processor."""
    x, weight, _ = linear(13, in_features, 50, torch.int8)
    arguments = (*weight[:3], None, weight.out_features, None)
    assert torch.equal(ops.packed_linear(x, weight), reference.packed_linear(x, *arguments))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_from_end_to_end_of_their_range(dtype, activation):
    # One weight of 1, so that each row's result is the activation of its x.
    x = torch.tensor([-1e30, -50, -9, -5, -1, -1e-3, 0, 1e-3, 1, 5, 9, 50, 1e30, torch.nan])
    x = x[:, None].to(dtype).float() if dtype == torch.bfloat16 else x[:, None]
    out = ops.packed_linear(x, ops.pack_weight(torch.ones(1, 1), dtype), None, activation)
    expected = ACTIVATIONS[activation](x.double()).float()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-6, equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_features", [1, 17, 768, 1030])
def test_a_row_is_the_same_bits_alone_and_among_others(in_features, dtype):
    x, weight, bias = linear(200, in_features, 77, dtype)
    together = ops.packed_linear(x, weight, bias)
    for row in (0, 5, 11, 12, 198, 199):
        assert torch.equal(ops.packed_linear(x[row : row + 1], weight, bias)[0], together[row])
    for rows in range(2, 14):
        assert torch.equal(ops.packed_linear(x[7 : 7 + rows], weight, bias), together[7 : 7 + rows])


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(dtype):
    x, weight, bias = linear(31, 768, 1000, dtype)
    expected = ops.packed_linear(x, weight, bias)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(ops.packed_linear(x, weight, bias), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_x_may_have_any_number_of_dimensions(dtype):
    x, weight, bias = linear(12, 20, 18, dtype)
    flat = ops.packed_linear(x, weight, bias)
    out = ops.packed_linear(x.view(2, 1, 6, 20), weight, bias)
    torch.testing.assert_close(out, flat.view(2, 1, 6, 18))
    torch.testing.assert_close(ops.packed_linear(x[0], weight, bias), flat[0])
    assert ops.packed_linear(x.view(3, 4, 20)[:, :0], weight, bias).shape == (3, 0, 18)


@pytest.mark.parametrize("in_features", [1, 2, 768, 1030, 3072, 65_793])
def test_int8_sums_do_not_overflow(in_features):
    """All products as large as they get, and of one sign: int32 must hold their sum."""
    for sign in (1.0, -1.0):
        weight = ops.pack_weight(sign * torch.full((17, in_features), 3.0), torch.int8)
        out = ops.packed_linear(torch.full((7, in_features), 5.0), weight)
        torch.testing.assert_close(out, torch.full((7, 17), sign * 15.0 * in_features))


@needs_kernels
def test_int8_features_whose_sums_may_overflow_are_refused():
    weight = ops.pack_weight(torch.ones(2, 65_794), torch.int8)
    with pytest.raises(ValueError, match="may have up to 65793 in_features, not 65794"):
        ops.packed_linear(torch.ones(1, 65_794), weight)


@pytest.mark.parametrize("in_features", [1, 17, 768])
def test_int8_sums_are_exact(in_features):
    """Whole steps of x and of the weight lose nothing, so that not even the last bit is off."""
    if in_features > 1:
        steps = torch.randint(-100, 156, (13, in_features))
        steps[:, 0], steps[:, 1] = -100, 155
    else:
        steps = torch.full((13, 1), 255)
    whole = torch.randint(-127, 128, (50, in_features))
    whole[:, 0] = 127
    weight = ops.pack_weight(whole.float(), torch.int8)
    assert torch.equal(weight.scales, torch.ones(50))
    out = ops.packed_linear(steps.float(), weight)
    assert torch.equal(out, (steps @ whole.T).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_rows_and_zero_weights(dtype):
    x, weight, bias = linear(5, 17, 18, dtype)
    x[2] = 0
    out = check(x, weight, bias)
    assert torch.equal(out[2], bias)
    zeros = ops.pack_weight(torch.zeros(18, 17), dtype)
    assert torch.equal(ops.packed_linear(x, zeros, bias), bias.expand(5, 18))


@needs_kernels
def test_no_input_features_leave_the_bias():
    nothing = ops.pack_weight(torch.zeros(4, 0), torch.float32)
    assert ops.packed_linear(torch.zeros(2, 0), nothing, torch.ones(4)).tolist() == [[1.0] * 4] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])  # whose products round as those of x
def test_tiny_and_huge_rows(dtype, scale):
    x, weight, _ = linear(4, 64, 18, dtype)
    assert (ops.packed_linear(1e-38 * x, weight).abs() < 1e-35).all()
    out = ops.packed_linear(scale * x, weight)
    torch.testing.assert_close(out / scale, ops.packed_linear(x, weight), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_its_row_alone(dtype, bad):
    x, weight, bias = linear(9, 17, 18, dtype)
    expected = ops.packed_linear(x, weight, bias)
    for position in (0, 3, 16):
        broken = x.clone()
        broken[4, position] = bad
        out = ops.packed_linear(broken, weight, bias)
        assert not out[4].isfinite().any()
        others = [row for row in range(9) if row != 4]
        torch.testing.assert_close(out[others], expected[others])


# --- mistakes, and every processor --------------------------------------------------------------


def test_what_does_not_fit_is_named():
    x, weight, bias = linear(3, 20, 18, torch.float32)

    def call(x=x, data=weight.data, scales=None, sums=None, bias=bias, out_features=18, act=None):
        return torch.ops.convai_fast.packed_linear(x, data, scales, sums, bias, out_features, act)

    call()
    int8 = ops.pack_weight(torch.randn(18, 20), torch.int8)
    whole = {"data": int8.data, "scales": int8.scales, "sums": int8.column_sums}
    call(**whole)
    with pytest.raises((ValueError, RuntimeError)):
        call(x=x[:, :19].contiguous())
    if _native.host is None:
        return
    for wrong, error, message in [
        ({"x": x.double()}, TypeError, "x must be"),
        ({"x": x.t()}, ValueError, "x must be contiguous"),
        ({"x": x[:, :19].contiguous()}, ValueError, "does not fit"),
        ({"x": torch.tensor(1.0)}, ValueError, "at least one dimension"),
        ({"data": weight.data.double()}, TypeError, "must be float32, bfloat16 or int8"),
        ({"data": weight.data[0]}, ValueError, "weight must have 4 dimension"),
        ({"out_features": 65}, ValueError, "does not fit"),
        ({"out_features": -1}, ValueError, "does not fit"),
        ({"act": "tanh"}, ValueError, "must be gelu_new, gelu, relu or silu, not tanh"),
        ({"bias": bias[:17]}, ValueError, r"bias must have shape \[18\], not \[17\]"),
        ({"bias": bias.double()}, TypeError, "bias must be"),
        ({"scales": int8.scales}, ValueError, "go with int8 weights"),
        ({"data": int8.data}, ValueError, "go with int8 weights"),
        (whole | {"sums": None}, ValueError, "go with int8 weights"),
        (whole | {"scales": int8.scales[:9]}, ValueError, r"scales must have shape \[18\]"),
        (whole | {"sums": int8.column_sums[:9]}, ValueError, r"column_sums must have shape \[18\]"),
        (whole | {"sums": int8.scales}, TypeError, "column_sums must be"),
    ]:
        with pytest.raises(error, match=message):
            call(**wrong)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_passes(dtype):
    x, weight, bias = linear(3, 20, 18, dtype)
    for each in (x, x.view(1, 3, 20)):
        torch.library.opcheck(
            torch.ops.convai_fast.packed_linear.default,
            (each, *weight[:3], bias, 18, "gelu_new"),
        )
