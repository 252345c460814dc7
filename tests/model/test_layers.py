"""Layers that the CPU computes in its own way: under bfloat16 autocast, and dropout."""

import sys

import pytest
import torch
from torch import nn

from convai_fast.model import layers

LINEAR = sys.modules["convai_fast.ops.linear"]  # the function has the module's name


@pytest.fixture(params=[False, True])
def multiplies_bf16(request, monkeypatch):
    monkeypatch.setattr(LINEAR, "_CPU_MULTIPLIES_BF16", request.param)
    return request.param


def test_nothing_is_drawn_for_weights_that_are_read_from_a_file():
    before = torch.get_rng_state()
    with layers.NothingIsDrawn():
        layers.init_weights(nn.Linear(3, 2), std=1.0)
        nn.Embedding(3, 2).weight.detach().normal_()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_under_autocast_is_closer_to_float32_than_bf16_rounding(multiplies_bf16, bias):
    torch.manual_seed(0)
    layer = layers.Linear(48, 80, bias=bias)
    x = torch.randn(2, 5, 48, requires_grad=True)
    wanted = torch.randn(2, 5, 80)

    def run(autocast):
        layer.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
        (y.float() * wanted).sum().backward()
        return [y.float(), x.grad, *(p.grad for p in layer.parameters())]

    for exact, actual in zip(run(False), run(True), strict=True):
        assert actual.dtype == torch.float32
        assert (actual - exact).norm() <= 0.01 * exact.norm()


def test_a_cpu_without_bf16_products_keeps_bf16_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr(LINEAR, "_CPU_MULTIPLIES_BF16", False)
    layer, saved = layers.Linear(8, 8), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        layer(torch.randn(3, 8, requires_grad=True))
    assert {t.dtype for t in saved if t is not layer.weight and t.shape == (3, 8)} == {
        torch.bfloat16
    }
    # The weight itself, not a copy in another dtype.
    assert any(t.data_ptr() == layer.weight.data_ptr() for t in saved)


def test_a_frozen_weight_gets_no_gradient(monkeypatch):
    monkeypatch.setattr(LINEAR, "_CPU_MULTIPLIES_BF16", False)
    layer, x = layers.Linear(8, 8).requires_grad_(False), torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad.abs().sum() > 0


def test_dropout_repeats_with_the_seed_of_torch_and_is_off_in_eval_mode():
    layer, x = layers.Dropout(0.3), torch.ones(50, 40)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    assert layer.eval()(x) is x
    assert isinstance(layer, nn.Dropout)


def test_linear_leaves_double_precision_alone_and_runs_where_there_is_no_autocast():
    layer = layers.Linear(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.double()(torch.randn(3, 8).double()).dtype == torch.float64
    assert layer.to("meta")(torch.empty(3, 8, device="meta").double()).shape == (3, 8)


@pytest.mark.parametrize("vocab_size", [100, 128])
def test_a_padded_vocabulary_changes_no_logit_and_no_gradient(monkeypatch, vocab_size):
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 48), torch.randn(vocab_size, 48)
    wanted, results = torch.randn(5, vocab_size), []
    rows, multiply = [], layers.ops.linear
    monkeypatch.setattr(
        layers.ops, "linear", lambda x, w, b: rows.append(len(w)) or multiply(x, w, b)
    )
    for is_padded in (False, True):
        monkeypatch.setattr(layers, "pads_vocabulary", lambda *_, value=is_padded: value)
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        with torch.autocast("cpu", torch.bfloat16):
            logits = layers.vocabulary_logits(*leaves)
        logits.backward(wanted.bfloat16())
        head = layers.vocabulary_head(weight.bfloat16())(hidden.bfloat16())
        results.append([logits, *(x.grad for x in leaves), head])
    assert rows == [vocab_size, 128]
    for ours, expected in zip(*results, strict=True):
        assert ours.shape == expected.shape
        torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2)


def test_a_vocabulary_is_padded_in_16_bits_on_a_gpu():
    assert layers.pads_vocabulary("cuda", torch.bfloat16)
    assert layers.pads_vocabulary("cuda", torch.float16)
    assert not layers.pads_vocabulary("cuda", torch.float32)
    assert not layers.pads_vocabulary("cpu", torch.bfloat16)
