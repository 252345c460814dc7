"""`linear` against `F.linear` and its gradients, in each format that it multiplies in."""

import pytest
import torch
import torch.nn.functional as F

from convai_fast import ops

ROWS = [0, 1, 15, 65, 130]
FEATURES = [(1, 1), (2, 64), (3, 17), (17, 130), (70, 65), (768, 100), (1600, 5), (3072, 70)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(actual, exact, size, dtype):
    """Whether they differ by rounding: of sums of products of this `size`, and of the result."""
    step = torch.finfo(dtype).eps
    return ((actual.double() - exact).abs() <= 1e-6 * size + step * exact.abs() + 1e-30).all()


def run(x, weight, bias, grad):
    """The result, and the gradients of x, weight and bias."""
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    out = ops.linear(*leaves)
    out.backward(grad)
    return out.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize(
    ("dtype", "in_float32"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("in_features", "out_features"), FEATURES)
def test_results_and_gradients_are_those_of_exact_products(
    rows, in_features, out_features, dtype, in_float32
):
    x, grad = (torch.randn(rows, n).to(dtype) for n in (in_features, out_features))
    weight, bias = torch.randn(out_features, in_features), torch.randn(out_features)
    out = torch.ops.convai_fast.linear(x, weight, bias, in_float32)
    gradients = torch.ops.convai_fast.linear_backward(grad, x, weight, in_float32, [True] * 3)
    multiplied = weight if in_float32 else weight.to(dtype)
    X, W, G = x.double(), multiplied.double(), grad.double()
    assert [t.dtype for t in (out, *gradients)] == [dtype, dtype, torch.float32, torch.float32]
    # A bias is rounded where torch computes, and added in float32 where we do.
    size = X.abs() @ W.abs().T + (bias.abs() * (1e4 if dtype == torch.bfloat16 else 1))
    assert close(out, X @ W.T + bias, size, dtype)
    assert close(gradients[0], G @ W, G.abs() @ W.abs(), dtype)
    # Never rounded to bfloat16.
    assert close(gradients[1], G.T @ X, G.abs().T @ X.abs(), torch.float32)
    assert close(gradients[2], G.sum(0), G.abs().sum(0), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_bits_that_generation_gives_it_beside_any_rows(dtype):
    if "oneDNN" not in ops.product_instructions(dtype):
        pytest.skip("torch multiplies here, and may round otherwise for another number of rows")
    x = torch.randn(200, 770).to(dtype)
    weight, bias = torch.randn(100, 770), torch.randn(100)
    out = ops.linear(x, weight, bias)
    for rows in (1, 33, 64, 199):
        assert torch.equal(ops.linear(x[:rows], weight, bias), out[:rows])
    packed = ops.pack_weight(weight, dtype)
    assert torch.equal(ops.packed_linear(x.float(), packed, bias).to(dtype), out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_leading_dimensions_and_layouts_of_any_kind(dtype):
    x, weight, bias = torch.randn(2, 20, 3).to(dtype), torch.randn(20, 70), torch.randn(70)
    views = x.transpose(1, 2), weight.T, bias
    grad = torch.randn(70, 2, 3).to(dtype).permute(1, 2, 0)
    copies = [t.contiguous() for t in (*views, grad)]
    for ours, plain in zip(run(*views, grad), run(*copies), strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2)
    row = run(x[0, :, 0], weight.T, bias, grad[0, 0])
    assert [t.shape for t in row] == [(70,), (20,), (70, 20), (70,)]


def test_only_the_gradients_that_are_wanted_are_computed():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8)
    ops.linear(x, weight, torch.randn(5)).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 8))
    backward = torch.ops.convai_fast.linear_backward
    assert backward(torch.ones(3, 5), None, weight, False, [False] * 3) == (None, None, None)


def test_a_frozen_weight_keeps_nothing_of_x():
    x, weight, kept = torch.randn(30, 8, requires_grad=True), torch.randn(5, 8), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks:
        ops.linear(x, weight)
    assert [t.shape for t in kept] == [weight.shape]


def test_it_computes_under_autocast_what_it_computes_without():
    x, weight = torch.randn(9, 30).bfloat16(), torch.randn(70, 30)
    for in_float32 in (False, True):
        plain = torch.ops.convai_fast.linear(x, weight, None, in_float32)
        arguments = (torch.ones(9, 70).bfloat16(), x, weight, in_float32, [True] * 3)
        gradients = torch.ops.convai_fast.linear_backward(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(torch.ops.convai_fast.linear(x, weight, None, in_float32), plain)
            cast = torch.ops.convai_fast.linear_backward(*arguments)
            assert all(map(torch.equal, cast, gradients))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_multiplied_by_torch(dtype):
    x, weight, bias = torch.randn(7, 30).to(dtype), torch.randn(70, 30), torch.randn(70)
    out, for_x, for_weight, _ = run(x, weight, bias, torch.ones(7, 70, dtype=dtype))
    assert torch.equal(out, F.linear(x, weight.to(dtype), bias.to(dtype)))
    assert (for_x.dtype, for_weight.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [((3, 4), (5, 6), None), ((3, 4), (5,), None), ((), (5, 4), None), ((3, 4), (5, 4), (4,))],
)
def test_shapes_that_do_not_fit_are_refused(x, weight, bias):
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        ops.linear(torch.randn(x), torch.randn(weight), None if bias is None else torch.randn(bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    x, weight = torch.randn(5, 8).to(dtype).requires_grad_(), torch.randn(7, 8, requires_grad=True)
    bias = torch.randn(7, requires_grad=True)
    torch.library.opcheck(torch.ops.convai_fast.linear, (x, weight, bias, False))


def test_a_compiled_graph_holds_it():
    x, weight = torch.randn(5, 8), torch.randn(7, 8, requires_grad=True)
    compiled = torch.compile(ops.linear, backend="aot_eager", fullgraph=True)
    compiled(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(7, 8))
