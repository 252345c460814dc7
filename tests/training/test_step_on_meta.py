"""Training and evaluation never wait for a GPU: the device "meta" stands in for it."""

import pytest
import torch

from convai_fast.data.batches import DialogueBatches
from convai_fast.model.config import TransformerConfig
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.training import compute, step
from convai_fast.training.distributed import Ranks
from convai_fast.training.evaluation import MetricSums, evaluate
from convai_fast.training.interruption import Stop
from tests.helpers.meta import META, NothingWaits, stand_in_for_a_gpu


@pytest.fixture
def on_meta(options, tokenizer, monkeypatch):
    """A model on the device "meta", and what computes there."""
    stand_in_for_a_gpu(monkeypatch, compute)
    monkeypatch.setattr(Ranks, "device", lambda *_: META)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}
    config = {"model_type": "gpt2", "vocab_size": len(tokenizer), **shape}
    model = DoubleHeadsModel(TransformerConfig.from_transformers(config)).to(META)
    return model, compute.Compute(options, Ranks())


def batches_of(store, layout, split="train", device=None):
    return DialogueBatches(
        store,
        split,
        batch_size=3,
        batches_per_step=2,
        num_candidates=2,
        max_history=2,
        max_length=256,
        layout=layout,
        device=device,
    )


@pytest.mark.parametrize(
    ("layout", "device"), [("shared", None), ("padded", None), ("shared", META)], ids=str
)
def test_a_step_waits_for_nothing(on_meta, options, store, layout, device):
    model, on_device = on_meta
    batches = batches_of(store, layout, device=device)
    train_step = step.TrainStep(model, options, on_device, Ranks())
    with NothingWaits():
        own = batches.steps[0]
        parts = ((batches[i], batches.shares[i]) for i in own)
        train_step.take(1, parts, len(own), 1e-3, Stop(Ranks()))
    assert train_step.log.steps == 1
    with pytest.raises(NotImplementedError):  # what does wait is noticed
        train_step.guard.read()


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_an_evaluation_waits_once_at_its_end(on_meta, store, layout, monkeypatch):
    model, on_device = on_meta
    monkeypatch.setattr(MetricSums, "compute", lambda sums, _: sums)
    batches = batches_of(store, layout, "valid")
    with NothingWaits():
        sums = evaluate(model, batches, on_device, Ranks())
    assert sums.num_examples == batches.num_examples
    assert sums.sums.device == META


def test_a_copy_that_waits_is_noticed():
    with NothingWaits():
        torch.ones(3).to(META, non_blocking=True)
        for waits in (
            lambda: torch.ones(3).to(META),
            lambda: torch.empty(3, device=META)[torch.tensor([1, 2])],
        ):
            with pytest.raises(AssertionError, match="waits for it"):
                waits()
