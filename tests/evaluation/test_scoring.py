import pytest
import torch

from convai_fast.evaluation import packing
from convai_fast.evaluation.packing import packed
from convai_fast.evaluation.scoring import share_speaker
from convai_fast.model.config import TransformerConfig
from convai_fast.model.double_heads import DoubleHeadsModel

S = 9  # <speaker1>


def test_the_speaker_of_all_candidates_is_computed_once():
    # Two examples: with three candidates, the second of them empty, and with one.
    input_ids = torch.tensor([1, 2, S, 3, 4, S, 4, S, 5, 6, 4, 1, S, 7, 4])
    branch_ids = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 0, 1, 1, 1])
    batch = {
        "input_ids": input_ids,
        "token_type_ids": input_ids + 10,
        "position_ids": torch.tensor([0, 1, 2, 3, 4, 2, 3, 2, 3, 4, 5, 0, 1, 2, 3]),
        "branch_ids": branch_ids,
        "offsets": torch.tensor([0, 11, 15]),
    }
    shared, place = share_speaker(batch)
    assert shared["input_ids"].tolist() == [1, 2, S, 3, 4, 4, 5, 6, 4, 1, S, 7, 4]
    assert shared["branch_ids"].tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3, 0, 0, 1, 1]
    assert shared["position_ids"].tolist() == [0, 1, 2, 3, 4, 3, 3, 4, 5, 0, 1, 2, 3]
    assert shared["offsets"].tolist() == [0, 9, 13]
    for name in ("input_ids", "token_type_ids", "position_ids"):
        assert torch.equal(shared[name][place], batch[name])


def make_model(activation):
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": 50}
    config = {"model_type": "gpt2", "activation_function": activation, "initializer_range": 0.3}
    return DoubleHeadsModel(TransformerConfig.from_transformers(shape | config)).eval()


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_packed_layers_compute_what_the_model_does(activation, dtype):
    model, ids = make_model(activation), torch.arange(14)[None]
    expected = model(ids).logits
    with packed(model, dtype), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(ids).logits.float()
    largest = (logits - expected).abs().max() / expected.abs().max()
    assert largest < (1e-5 if dtype == torch.float32 else 0.05)


def test_without_fast_bf16_products_packed_layers_compute_in_float32(monkeypatch):
    monkeypatch.setattr(packing, "cpu_multiplies_bf16", lambda: False)
    model = make_model("gelu_new")
    with packed(model, torch.bfloat16):
        assert model.transformer.blocks[0].mlp.up.dtype == torch.float32


def test_the_model_is_as_before_even_after_an_error():
    model = make_model("gelu")
    before = [(name, type(module)) for name, module in model.named_modules()]
    activation = model.transformer.blocks[0].mlp.activation
    with pytest.raises(RuntimeError, match="stop"), packed(model, torch.float32):
        assert [type(module) for module in model.modules()] != [kind for _, kind in before]
        raise RuntimeError("stop")
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert model.transformer.blocks[0].mlp.activation is activation


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_cannot_be_packed_stays_as_it_is(dtype):
    model = make_model("relu").to(dtype)
    with packed(model, dtype):
        assert type(model.transformer.blocks[0].mlp.up).__name__ == "Linear"
