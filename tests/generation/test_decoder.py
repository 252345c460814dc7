"""The packed copy of the model against the model itself."""

import numpy as np
import pytest
import torch

from convai_fast import _native
from convai_fast.errors import UserError
from convai_fast.generation.decoder import Decoder
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.scheduler import Step
from convai_fast.model import DoubleHeadsModel, TransformerConfig


def next_logits(model, ids, weights):
    decoder = Decoder(model, 1, weights)
    decoder.reserve(len(ids))
    with torch.no_grad():
        return decoder.logits(decoder.forward(step_of([0], ids[None], ids.flip(0)[None])))


def step_of(slots, input_ids, token_type_ids):
    """New sequences of equal length, [sequences, tokens] of each."""
    past, counts = np.zeros(len(slots), np.int64), np.full(len(slots), input_ids.shape[1])
    ids = input_ids.flatten().numpy(), token_type_ids.flatten().numpy()
    return Step([], [], np.array(slots), past, counts, *ids)


@pytest.mark.parametrize(
    ("weights", "most"), [("float32", 1e-5), ("bfloat16", 0.01), ("int8", 0.02)]
)
def test_logits_are_the_models_to_within_the_rounding_of_its_weights(models, weights, most):
    model, errors = models.ours, []
    for seed in range(8):
        ids = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected = model(ids[None], ids.flip(0)[None]).logits[:, -1]
        logits = next_logits(model, ids, weights)
        assert logits.dtype == torch.float32
        errors.append(((logits - expected).norm() / expected.norm()).item())
    assert max(errors) < most
    assert weights == "float32" or max(errors) > most / 100  # it is rounded at all


def test_without_compiled_operators_the_layers_stay_as_they_are(models, monkeypatch):
    monkeypatch.setattr(_native, "host", None)
    ids = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(models.ours, 1)
    weights = models.ours.transformer.blocks[0].mlp.up.weight
    assert decoder._transformer.blocks[0].mlp.up.weight.data_ptr() == weights.data_ptr()
    with torch.no_grad():
        expected = models.ours(ids[None], ids.flip(0)[None]).logits[:, -1]
    logits = next_logits(models.ours, ids, "float32")
    assert (logits - expected).norm() / expected.norm() < 1e-5


def test_the_copy_shares_what_is_float32_and_not_linear_and_leaves_the_model_alone(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    decoder = Decoder(model.train(), 1, "int8")
    try:
        assert model.training
        dropouts = [m for m in decoder._transformer.modules() if isinstance(m, torch.nn.Dropout)]
        assert dropouts and not any(dropout.training for dropout in dropouts)
    finally:
        model.eval()
    assert decoder._transformer.token_embedding.weight.data_ptr() == (
        model.transformer.token_embedding.weight.data_ptr()
    )
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.skipif(_native.host is None, reason="nothing is compiled here")
@pytest.mark.parametrize("n_embd", [6, 32])
def test_logits_are_the_same_bits_alone_and_among_others(n_embd):
    torch.manual_seed(0)
    shape = dict(vocab_size=50, n_positions=32, n_embd=n_embd, n_head=2, n_layer=2)
    config = TransformerConfig.from_transformers(
        {"model_type": "gpt2", "initializer_range": 0.5, **shape}
    )
    decoder = Decoder(DoubleHeadsModel(config), 30)
    decoder.reserve(8)
    ids = torch.randint(0, 50, (30, 7))

    def logits(rows):
        with torch.no_grad():
            return decoder.logits(decoder.forward(step_of(rows, ids[rows], ids[rows])))

    together = logits([*range(30)])
    for row in range(30):
        assert torch.equal(logits([row])[0], together[row])


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_an_engine_with_smaller_weights_replies_much_like_the_exact_one(
    model, tokenizer, ask, weights
):
    params = SamplingParams(no_sample=True, max_length=5, min_length=5, logprobs=True)
    requests = [ask(number, params) for number in range(8)]
    exact = GenerationEngine(model, tokenizer).generate(requests)
    rounded = GenerationEngine(model, tokenizer, weights=weights).generate(requests)
    assert rounded != exact
    assert sum(a.token_ids == b.token_ids for [a], [b] in zip(exact, rounded, strict=True)) >= 4


def test_unknown_weights_are_named(model, tokenizer):
    message = "weights is 'int4', but must be one of float32, bfloat16, int8"
    with pytest.raises(UserError, match=message):
        GenerationEngine(model, tokenizer, weights="int4")
