import math

import pytest
import torch

from convai_fast.model import DoubleHeadsModel, Transformer, TransformerConfig, transformer
from convai_fast.model.context import Causal
from convai_fast.ops import reference


def make_config(architecture, **settings):
    sizes = dict(vocab_size=101, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    return TransformerConfig.from_transformers({"model_type": architecture} | sizes | settings)


def test_a_token_does_not_see_what_follows(architecture):
    model = Transformer(make_config(architecture)).eval()
    ids = torch.randint(0, 101, (2, 12))
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 101
    torch.testing.assert_close(model(ids)[:, :7], model(changed)[:, :7])
    assert not torch.allclose(model(ids)[:, 7:], model(changed)[:, 7:])


def test_segments_are_looked_up_in_the_token_embedding(architecture):
    model = Transformer(make_config(architecture)).eval()
    ids = torch.randint(0, 101, (2, 12))
    segments = torch.randint(0, 101, (2, 12))
    torch.testing.assert_close(model(ids, segments), model(segments, ids))


def test_position_ids_replace_the_counting(architecture):
    model = Transformer(make_config(architecture)).eval()
    ids = torch.randint(0, 101, (2, 12))
    counted = torch.arange(12)
    torch.testing.assert_close(model(ids), model(ids, context=Causal(counted)))
    torch.testing.assert_close(model(ids), model(ids, context=Causal(counted.expand(2, 12))))
    assert not torch.allclose(model(ids), model(ids, context=Causal(counted + 1)))


def test_too_many_tokens_are_refused_with_both_numbers(architecture):
    model = Transformer(make_config(architecture))
    with pytest.raises(ValueError, match="17 tokens, but the model has only 16 positions"):
        model(torch.zeros(1, 17, dtype=torch.int64))


def test_more_tokens_than_positions_fit_where_positions_are_given(architecture):
    """As where several candidates that follow one prefix stand side by side."""
    model = Transformer(make_config(architecture)).eval()
    ids = torch.randint(0, 101, (1, 20))
    positions = torch.arange(20) % 12
    hidden = model(ids, context=Causal(positions))
    torch.testing.assert_close(hidden[:, :12], model(ids[:, :12]))


def test_dropout_is_on_in_training_only_and_follows_its_probability(architecture):
    ids = torch.randint(0, 101, (2, 12))
    for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
        off = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
        model = Transformer(make_config(architecture, **(off | {name: 0.5})))
        assert not torch.allclose(model(ids), model(ids)), name
        model.eval()
        torch.testing.assert_close(model(ids), model(ids))
    model = Transformer(make_config(architecture, **off))
    torch.testing.assert_close(model(ids), model.eval()(ids))


def test_new_weights_have_the_published_distribution(architecture):
    torch.manual_seed(0)
    config = make_config(architecture, n_embd=256, n_layer=4, initializer_range=0.03)
    model = DoubleHeadsModel(config)
    residual_std = 0.03 / math.sqrt(2 * 4) if architecture == "gpt2" else 0.03
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            expected = residual_std if residual else 0.03
            # Four standard errors of a standard deviation estimated from n values.
            tolerance = 4 / math.sqrt(2 * parameter.numel())
            assert parameter.std().item() == pytest.approx(expected, rel=tolerance), name


def test_it_compiles_to_one_graph(architecture):
    model = Transformer(make_config(architecture)).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids = torch.randint(0, 101, (2, 12))
    torch.testing.assert_close(compiled(ids, ids), model(ids, ids))


def test_without_a_gradient_a_residual_and_its_norm_may_be_one_operator(architecture, monkeypatch):
    model, ids = Transformer(make_config(architecture)).eval(), torch.arange(12).view(2, 6)
    expected, calls = model(ids), []

    def counted(x, residual, weight, bias, eps, rms_norm):
        calls.append(x)
        return reference.add_norm(x, residual, weight, bias, eps, rms_norm)

    monkeypatch.setattr(transformer, "has_fused_norm", lambda x: True)
    monkeypatch.setattr(transformer.ops, "add_norm", counted)
    assert torch.equal(model(ids), expected) and not calls
    with torch.no_grad():
        torch.testing.assert_close(model(ids), expected)
        assert len(calls) == (2 if architecture == "gpt2" else 4)
        with torch.autocast("cpu", torch.bfloat16):  # what is added has two dtypes
            model(ids)
