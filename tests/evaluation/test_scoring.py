import pytest
import torch

from convai_fast.data.build_store import build_store
from convai_fast.evaluation import scoring
from convai_fast.evaluation.scoring import Rows, computing_in, score_examples, share_speaker
from convai_fast.evaluation.word_perplexity import (
    WordVocabulary,
    count_words,
    score_words,
    with_separate_words,
)
from convai_fast.model.config import TransformerConfig
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.model.packed import OneDnnLinear
from tests.helpers.batches import make_batches
from tests.helpers.meta import META, NothingWaits, fetched_once, stand_in_for_a_gpu

S = 9  # <speaker1>


def test_the_speaker_of_all_candidates_is_computed_once():
    # Two examples: with three candidates, the second of them empty, and with one.
    input_ids = torch.tensor([1, 2, S, 3, 4, S, 4, S, 5, 6, 4, 1, S, 7, 4])
    branch_ids = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 0, 1, 1, 1])
    batch = Rows(
        input_ids=input_ids,
        token_type_ids=input_ids + 10,
        position_ids=torch.tensor([0, 1, 2, 3, 4, 2, 3, 2, 3, 4, 5, 0, 1, 2, 3]),
        branch_ids=branch_ids,
        offsets=torch.tensor([0, 11, 15]),
    )
    shared, place = share_speaker(batch)
    assert shared.input_ids.tolist() == [1, 2, S, 3, 4, 4, 5, 6, 4, 1, S, 7, 4]
    assert shared.branch_ids.tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3, 0, 0, 1, 1]
    assert shared.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 3, 4, 5, 0, 1, 2, 3]
    assert shared.offsets.tolist() == [0, 9, 13]
    for name in ("input_ids", "token_type_ids", "position_ids"):
        assert torch.equal(getattr(shared, name)[place], getattr(batch, name))


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
    with computing_in(model, dtype) as packed:
        assert type(packed.transformer.blocks[0].mlp.up) is OneDnnLinear
        logits = packed(ids).logits.float()
    largest = (logits - expected).abs().max() / expected.abs().max()
    assert largest < (1e-5 if dtype == torch.float32 else 0.05)


def test_without_fast_bf16_products_packed_layers_compute_in_float32(monkeypatch):
    monkeypatch.setattr(scoring, "cpu_multiplies_bf16", lambda: False)
    model = make_model("gelu_new")
    with computing_in(model, torch.bfloat16) as packed:
        assert packed.transformer.blocks[0].mlp.up.dtype == torch.float32


def test_packing_leaves_the_model_as_it_is_and_shares_what_is_not_packed():
    model = make_model("gelu")
    before = [(name, type(module)) for name, module in model.named_modules()]
    with computing_in(model, torch.float32) as packed:
        assert [type(module) for module in packed.modules()] != [kind for _, kind in before]
        assert packed.lm_logits.__self__ is packed
        embedding = packed.transformer.token_embedding.weight
        assert embedding.data_ptr() == model.transformer.token_embedding.weight.data_ptr()
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_cannot_be_packed_stays_as_it_is(dtype):
    model = make_model("relu").to(dtype)
    with computing_in(model, dtype) as packed:
        assert type(packed.transformer.blocks[0].mlp.up).__name__ == "Linear"


@pytest.mark.parametrize("kind", ["plain", "wrapped", "parametrized"])
def test_layers_that_somebody_replaced_compute_what_they_did(kind):
    model, ids = make_model("gelu_new"), torch.arange(14)[None]
    expected = model(ids).logits
    for block in model.transformer.blocks:
        up = block.mlp.up
        plain = torch.nn.Linear(up.in_features, up.out_features)
        plain.load_state_dict(up.state_dict())
        if kind == "parametrized":
            torch.nn.utils.parametrize.register_parametrization(up, "weight", torch.nn.Identity())
        else:
            block.mlp.up = plain if kind == "plain" else torch.nn.Sequential(plain)
    with computing_in(model, torch.float32) as packed:
        logits = packed(ids).logits
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_pass_waits_for_a_gpu_once(dialogues, tokenizer, tmp_path, monkeypatch):
    stand_in_for_a_gpu(monkeypatch, scoring)
    calls = fetched_once(monkeypatch, scoring)
    said = {"valid": with_separate_words(dialogues["valid"])}
    store = build_store(said, tokenizer, tmp_path / "store")
    batches = make_batches(store, "valid", layout="shared", max_length=256)
    replies = [turn.candidates[-1] for each in said["valid"] for turn in each.utterances]
    vocabulary = WordVocabulary(count_words(dialogues["valid"]), tokenizer)
    shape = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 256}
    config = {"model_type": "gpt2", "vocab_size": len(tokenizer), **shape}
    model = DoubleHeadsModel(TransformerConfig.from_transformers(config)).to(META)
    with NothingWaits():
        scores = score_examples(model, batches, torch.float32, ranks=True, tokens=True)
        assert len(calls) == 1
        words = score_words(model, batches, replies, vocabulary, torch.float32)
    assert len(calls) == 2
    assert len(batches) > 1
    assert len(scores) == len(words) == batches.num_examples
    assert all(len(each.eos_nlls) == 1 for each in scores.values())
    assert all(each.word_nlls for each in words.values())
