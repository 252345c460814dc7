"""A loss or a gradient that is no number: noticed, kept from the weights, and explained."""

import json
import math

import pytest
import torch

from convai_fast.data.batches import DialogueBatches
from convai_fast.errors import UserError
from convai_fast.model.config import TransformerConfig
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.training import loop, step
from convai_fast.training.guard import FiniteGuard
from convai_fast.training.interruption import Stop

CPU = torch.device("cpu")


@pytest.fixture
def trainer(options, tokenizer, store):
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256}
    config = {"model_type": "gpt2", "vocab_size": len(tokenizer), **shape}
    model = DoubleHeadsModel(TransformerConfig.from_transformers(config))
    return loop.Trainer(options, model, tokenizer, store, lambda _: None)


def poison(monkeypatch, call, change):
    """Change the loss of the `call`-th batch."""
    combined_loss, calls = step.combined_loss, []

    def poisoned(*args):
        calls.append(args)
        loss = combined_loss(*args)
        return change(loss) if len(calls) == call else loss

    monkeypatch.setattr(step, "combined_loss", poisoned)


class InfiniteGradient(torch.autograd.Function):
    """A loss as it is, with a gradient that overflows."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


def test_a_loss_that_is_no_number_never_reaches_the_weights(
    trainer, options, tokenizer, monkeypatch, tmp_path
):
    poison(monkeypatch, 5, lambda loss: loss * math.nan)
    options.save_every = 1
    with pytest.raises(UserError, match=r"the loss at step 2 is nan: its batches are in .*json"):
        trainer.run()
    run = tmp_path / "run"
    assert json.loads((run / "last" / "metrics.json").read_text())["step"] == 1
    saved = DoubleHeadsModel.from_pretrained(run / "last").state_dict()
    assert all(torch.equal(saved[n], p) for n, p in trainer.model.state_dict().items())
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]

    report = json.loads((run / "bad_batch.json").read_text())
    assert (report["step"], report["epoch"]) == (2, 0)
    (batch,) = report["batches"]
    assert (batch["batch"], batch["loss"]) == (4, "nan")
    assert math.isfinite(batch["lm_loss"])
    trainer.batches.set_epoch(0)
    assert batch["input_ids"] == trainer.batches[4]["input_ids"].tolist()
    assert batch["text"][0] == tokenizer.decode(batch["input_ids"][: batch["offsets"][1]])


def test_a_gradient_that_overflows_ends_the_run_too(trainer, monkeypatch, tmp_path):
    poison(monkeypatch, 8, InfiniteGradient.apply)
    with pytest.raises(UserError, match=r"the gradient at step 3 has the norm (nan|inf)"):
        trainer.run()
    report = json.loads((tmp_path / "run" / "bad_batch.json").read_text())
    assert [batch["batch"] for batch in report["batches"]] == [6, 7, 8]


def test_the_first_bad_step_is_found_when_the_log_is_read_later(trainer, monkeypatch, tmp_path):
    """As on a GPU, where nobody looks at every step: later steps go on from sound weights."""
    poison(monkeypatch, 5, lambda loss: loss * math.inf)
    look, looks = trainer._stop_if_not_finite, []
    monkeypatch.setattr(
        trainer, "_stop_if_not_finite", lambda: looks.append(0) or (len(looks) == 4 and look())
    )
    with pytest.raises(UserError, match="the loss at step 2 is inf"):
        trainer.run()
    assert trainer.progress.step == 4
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    report = json.loads((tmp_path / "run" / "bad_batch.json").read_text())
    assert [batch["batch"] for batch in report["batches"]] == [4]


def test_a_bad_step_is_not_saved_by_a_signal_either(trainer, monkeypatch, tmp_path):
    poison(monkeypatch, 2, lambda loss: loss * math.nan)
    trainer.folder = loop.RunFolder(trainer.options)
    batches = trainer.batches
    own = [(batches[i], batches.shares[i]) for i in batches.steps[0]]
    trainer.train_step.take(1, own, 3, 1e-3, Stop(trainer.ranks))
    with pytest.raises(UserError, match="the loss at step 1 is nan"):
        trainer._save()
    assert not (tmp_path / "run" / "last").exists()


def test_a_gradient_that_a_scaler_skips_is_not_a_mistake():
    losses, infinite = torch.ones(1, 3), torch.tensor(math.inf)
    guard = FiniteGuard(CPU, 1, check_gradient=False)
    assert guard.check(1, losses, infinite) == 0
    assert guard.read() is None
    assert guard.check(2, losses * math.nan, infinite) == 1
    assert guard.read().step == 2


def test_batches_of_an_epoch_that_ends_in_a_smaller_step(trainer, monkeypatch, tmp_path):
    assert isinstance(trainer.batches, DialogueBatches)
    last = len(trainer.batches)
    assert last % 3  # the last step has fewer batches
    poison(monkeypatch, 2 * last, lambda loss: loss * math.nan)
    with pytest.raises(UserError, match="is nan"):
        trainer.run()
    report = json.loads((tmp_path / "run" / "bad_batch.json").read_text())
    assert (report["epoch"], report["batches"][0]["batch"]) == (1, last - 1)
