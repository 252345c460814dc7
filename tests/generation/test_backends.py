"""What the backends compute against the model itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from convai_fast import _native
from convai_fast.errors import UserError
from convai_fast.generation.backends import (
    CpuBackend,
    CudaBackend,
    TorchBackend,
    make_backend,
)
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.scheduler import Step
from convai_fast.model import DoubleHeadsModel, TransformerConfig


def next_logits(model, ids, weights, kind=CpuBackend):
    backend = kind(model, 1, weights)
    backend.allocate(len(ids))
    with torch.inference_mode():
        return backend.logits(backend.forward(step_of([0], ids[None], ids.flip(0)[None])))


def step_of(slots, input_ids, token_type_ids):
    """New sequences of equal length, [sequences, tokens] of each."""
    past = np.zeros(len(slots), np.int64)
    offsets = np.arange(len(slots) + 1) * input_ids.shape[1]
    ids = input_ids.flatten().numpy(), token_type_ids.flatten().numpy()
    return Step([], [], np.array(slots), past, offsets, *ids)


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


@pytest.mark.parametrize("kind", [CudaBackend, TorchBackend])
@pytest.mark.parametrize(("weights", "most"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_other_backends_compute_with_the_models_own_layers(models, kind, weights, most):
    ids = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = models.ours(ids[None], ids.flip(0)[None]).logits[:, -1]
    logits = next_logits(models.ours, ids, weights, kind).float()
    assert (logits - expected).norm() / expected.norm() < most


def test_a_backend_is_that_of_the_models_device(model):
    assert type(make_backend(model, 1)) is CpuBackend
    with pytest.raises(UserError, match="int8 weights are for the CPU, and the model is on meta"):
        make_backend(model_on("meta", model), 1, "int8")


def model_on(device, model):
    with torch.device(device):
        return DoubleHeadsModel(model.config)


def test_slots_that_do_not_fit_the_machine_are_refused_in_a_sentence(model):
    with pytest.raises(UserError, match=r"of 1000000000 sequences of .* choose a smaller batch"):
        TorchBackend(model, 10**9)


def test_a_head_that_is_the_embedding_takes_no_memory_of_its_own(model):
    backend = TorchBackend(model, 1, "bfloat16")
    embedding = backend.transformer.token_embedding.weight
    assert embedding.dtype == torch.bfloat16
    assert backend.lm_head.keywords["weight"].data_ptr() == embedding.data_ptr()


def test_the_copy_shares_what_is_float32_and_not_linear_and_leaves_the_model_alone(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    backend, other = CpuBackend(model.train(), 1, "int8"), TorchBackend(model, 1)
    try:
        assert model.training
        dropouts = [m for m in other.transformer.modules() if isinstance(m, torch.nn.Dropout)]
        assert dropouts and not any(dropout.training for dropout in dropouts)
    finally:
        model.eval()
    embedding = model.transformer.token_embedding.weight.data_ptr()
    assert backend.decoder.token_embedding.data_ptr() == embedding
    assert other.transformer.token_embedding.weight.data_ptr() == embedding
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_layer_with_an_adapter_around_it_is_refused_not_packed_without_it(model):
    wrapped = DoubleHeadsModel(model.config)
    mlp = wrapped.transformer.blocks[0].mlp
    mlp.up = torch.nn.Sequential(mlp.up)
    with pytest.raises(UserError, match="is Sequential instead of Linear: merge adapters"):
        CpuBackend(wrapped, 1)


@pytest.mark.skipif(_native.host is None, reason="nothing is compiled here")
@pytest.mark.parametrize("n_embd", [6, 32])
def test_logits_are_the_same_bits_alone_and_among_others(n_embd):
    torch.manual_seed(0)
    shape = dict(vocab_size=50, n_positions=32, n_embd=n_embd, n_head=2, n_layer=2)
    config = TransformerConfig.from_transformers(
        {"model_type": "gpt2", "initializer_range": 0.5, **shape}
    )
    backend = CpuBackend(DoubleHeadsModel(config), 30)
    backend.allocate(8)
    ids = torch.randint(0, 50, (30, 7))

    def logits(rows):
        with torch.no_grad():
            return backend.logits(backend.forward(step_of(rows, ids[rows], ids[rows])))

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
    message = "weights is 'int4', but must be one of auto, float32, bfloat16, int8"
    with pytest.raises(UserError, match=message):
        GenerationEngine(model, tokenizer, weights="int4")


@pytest.mark.parametrize("kind", [CudaBackend, TorchBackend])
def test_every_backend_gives_the_replies_of_the_cpu(model, tokenizer, ask, monkeypatch, kind):
    ways = [
        SamplingParams(no_sample=True, max_length=9, logprobs=True),
        SamplingParams(seed=3, max_length=7, n=3),
        SamplingParams(seed=4, max_length=5, repetition_penalty=1.5, no_repeat_ngram_size=2),
        SamplingParams(seed=5, max_length=6, best_of=4, n=2),
    ]
    # As many turns as fit, and more: slots are used up to their last token.
    requests = [ask(i, ways[i % 4], turns=[3, 9, 60][i % 3]) for i in range(24)]
    expected = GenerationEngine(model, tokenizer, max_batch_size=5).generate(requests)
    monkeypatch.setattr("convai_fast.generation.engine.make_backend", kind)
    engine = GenerationEngine(model, tokenizer, max_batch_size=5, weights="float32")
    replies = engine.generate(requests)
    for own, theirs in zip(replies, expected, strict=True):
        assert [reply.text for reply in own] == [reply.text for reply in theirs]
        assert [reply.token_ids for reply in own] == [reply.token_ids for reply in theirs]
        for one, other in zip(own, theirs, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-3)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def test_a_reply_is_not_spoilt_by_what_its_slot_held_before(model):
    """A weight of 0 times a NaN is NaN: a mask alone does not hide it."""
    for kind in (CpuBackend, CudaBackend, TorchBackend):
        backend = kind(model, 2)
        backend.allocate(10)
        ids = torch.arange(20).view(2, 10)
        with torch.inference_mode():
            backend.forward(step_of([0], ids[:1], ids[:1]))
            expected = backend.forward(step_of([1], ids[1:, :3], ids[1:, :3]))
            if kind is not CpuBackend:
                backend.keys[:, 0, 5], backend.values[:, 0, 6] = torch.nan, torch.nan
            step = step_of([0, 1], ids[:, :3], ids[:, :3])
            step = replace(step, past=np.array([0, 0]))
            backend.forward(step_of([1], ids[1:], ids[1:]))
            both = backend.forward(step)
        assert both.isfinite().all()
        torch.testing.assert_close(both[1:], expected)
