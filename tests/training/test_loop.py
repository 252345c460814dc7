"""The training loop: what a step computes, and what a run leaves behind."""

import dataclasses
import json
import math
import threading

import pytest
import torch
import yaml
from transformers import AutoTokenizer, GPT2DoubleHeadsModel

from benchmarks.plain_loop import train_plainly
from convai_fast import ops
from convai_fast.data.build_store import build_store
from convai_fast.errors import UserError
from convai_fast.model.config import TransformerConfig
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.model.packed import for_inference
from convai_fast.training import compute
from convai_fast.training.distributed import Ranks
from convai_fast.training.evaluation import MetricSums
from convai_fast.training.loop import Trainer
from convai_fast.training.optimizer import lr_factor
from convai_fast.training.run_folder import RunFolder

NO_DROPOUT = dict.fromkeys(
    ("embd_pdrop", "attn_pdrop", "resid_pdrop", "summary_first_dropout"), 0.0
)


def tiny_model(tokenizer, **settings):
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}
    settings = {"model_type": "gpt2", "vocab_size": len(tokenizer), **shape, **settings}
    return DoubleHeadsModel(TransformerConfig.from_transformers(settings))


def make_trainer(options, tokenizer, store, **settings):
    return Trainer(options, tiny_model(tokenizer, **settings), tokenizer, store, lambda _: None)


def metrics_of(options):
    with open(f"{options.output}/metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize(("batch_size", "batches_per_step"), [(1, 8), (2, 4), (3, 3)])
def test_batches_that_are_accumulated_are_one_large_batch(
    options, tokenizer, store, batch_size, batches_per_step
):
    def run(name, batch_size, batches_per_step):
        own = dataclasses.replace(
            options,
            output=f"{options.output}-{name}",
            train_batch_size=batch_size,
            gradient_accumulation_steps=batches_per_step,
        )
        trainer = make_trainer(own, tokenizer, store, **NO_DROPOUT)
        trainer.run()
        return trainer.model, metrics_of(own)

    model, records = run("parts", batch_size, batches_per_step)
    peer, expected = run("whole", batch_size * batches_per_step, 1)
    for ours, theirs in zip(records, expected, strict=True):
        for record in (ours, theirs):
            del record["split"]
            for name in ("tokens_per_second", "mfu"):
                record.pop(name, None)
        assert ours == pytest.approx(theirs, rel=1e-4)
    for (name, a), b in zip(model.named_parameters(), peer.parameters(), strict=True):
        if name != "multiple_choice_head.bias":  # whose gradient is rounding noise
            assert (a - b).norm() <= 1e-3 * b.norm(), name


def test_two_epochs_equal_a_straightforward_loop_over_transformers(
    options, tokenizer, store, tmp_path
):
    trainer = make_trainer(options, tokenizer, store, **NO_DROPOUT)
    trainer.model.save_pretrained(tmp_path / "start", tokenizer)
    peer = GPT2DoubleHeadsModel.from_pretrained(tmp_path / "start", attn_implementation="eager")
    trainer.run()

    trainer.batches.layout = "padded"  # which is what transformers takes
    train_plainly(peer, trainer.batches, options, trainer.total_steps)

    ours = GPT2DoubleHeadsModel.from_pretrained(f"{options.output}/last")
    for (name, a), b in zip(ours.named_parameters(), peer.parameters(), strict=True):
        if name == "multiple_choice_head.summary.bias":
            continue  # it shifts all candidates alike: its gradient is rounding noise
        # AdamW divides a gradient by its own size, so that rounding grows where it is nearly zero,
        # as for the bias of the keys.
        assert (a - b).norm() <= 1e-3 * b.norm(), name


def test_training_learns(options, tokenizer, store):
    options.n_epochs, options.lr, options.eval_before_start = 8, 1e-2, True
    result = make_trainer(options, tokenizer, store, **NO_DROPOUT).run()
    assert result.after.nll < 0.8 * result.before.nll


def test_evaluation_weighs_tokens_and_counts_hits_exactly(options, tokenizer, store):
    options.valid_batch_size = 5
    trainer = make_trainer(options, tokenizer, store)
    trainer.folder = RunFolder(options)
    metrics = trainer.evaluate()

    peer = trainer.model.eval()
    nlls, hits = [], []
    options.valid_batch_size = 1
    padded = make_trainer(options, tokenizer, store).valid_batches
    padded.layout = "padded"
    for batch in padded:
        with torch.no_grad():
            output = peer(**batch, return_logits=True)
        log_probabilities = output.logits[:, :, :-1].log_softmax(-1)
        targets = batch["labels"][:, :, 1:]
        kept = targets != -100
        picked = log_probabilities.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
        nlls += (-picked[kept]).tolist()
        hits.append(output.mc_logits.argmax(-1).item() == batch["mc_labels"].item())
    assert metrics.num_tokens == len(nlls)
    assert metrics.num_examples == len(hits)
    assert metrics.nll == pytest.approx(sum(nlls) / len(nlls), rel=1e-5)
    assert metrics.ppl == pytest.approx(math.exp(metrics.nll))
    assert metrics.hits_at_1 == sum(hits) / len(hits)


def test_an_evaluation_of_nothing_is_not_a_number():
    metrics = MetricSums(torch.device("cpu")).compute(Ranks())
    assert math.isnan(metrics.nll)
    assert math.isnan(metrics.hits_at_1)


def test_the_learning_rate_rises_then_falls_to_zero():
    assert [lr_factor(s, 4, 12) for s in range(13)] == [
        0.25, 0.5, 0.75, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0,
    ]  # fmt: skip
    assert [lr_factor(s, 0, 2) for s in range(3)] == [1.0, 0.5, 0.0]


def test_the_gradient_is_clipped_once_a_step(options, tokenizer, store):
    options.max_norm = 1e-9
    trainer = make_trainer(options, tokenizer, store)
    before = [p.clone() for p in trainer.model.parameters()]
    for group in trainer.train_step.optimizer.param_groups:
        group["weight_decay"] = 0.0
        group["eps"] = 1.0  # so that AdamW does not scale the gradient back up
    trainer.run()
    assert metrics_of(options)[0]["grad_norm"] > 1e-3  # what is recorded is the norm before
    for a, b in zip(trainer.model.parameters(), before, strict=True):
        assert (a - b).abs().max() < 1e-8


def test_a_run_leaves_options_metrics_events_and_two_checkpoints(options, tokenizer, store):
    result = make_trainer(options, tokenizer, store).run()
    run = result.run
    assert yaml.safe_load((run / "options.yaml").read_text())["lr"] == options.lr
    assert list(run.glob("events.out.tfevents*"))
    lines = metrics_of(options)
    assert {line["split"] for line in lines} == {"train", "valid"}
    assert lines[0].keys() >= {"loss", "lm_loss", "mc_loss", "lr", "grad_norm"}
    assert [line["step"] for line in lines if line["split"] == "train"] == [
        *range(1, result.steps + 1)
    ]
    for name in ("last", "best"):
        assert json.loads((run / name / "metrics.json").read_text())["nll"] > 0
        GPT2DoubleHeadsModel.from_pretrained(run / name)
        assert len(AutoTokenizer.from_pretrained(run / name)) == len(tokenizer)
    used = {(run / name).resolve() for name in ("last", "best")}
    assert {p.resolve() for p in (run / "checkpoints").iterdir()} == used


def test_best_is_the_one_with_the_lowest_nll(options, tokenizer, store, monkeypatch):
    options.n_epochs = 3
    trainer = make_trainer(options, tokenizer, store)
    evaluate, nlls = trainer.evaluate, iter([5.0, 3.0, 4.0])
    monkeypatch.setattr(
        trainer, "evaluate", lambda stop: dataclasses.replace(evaluate(stop), nll=next(nlls))
    )
    run = trainer.run().run
    assert json.loads((run / "best" / "metrics.json").read_text())["nll"] == 3.0
    assert json.loads((run / "last" / "metrics.json").read_text())["nll"] == 4.0


def test_patience_stops_a_run_that_no_longer_improves(options, tokenizer, store, monkeypatch):
    options.n_epochs, options.patience = 9, 2
    trainer = make_trainer(options, tokenizer, store)
    evaluate, nlls = trainer.evaluate, iter([5.0, 3.0, 4.0, 3.5, 1.0])
    monkeypatch.setattr(
        trainer, "evaluate", lambda stop: dataclasses.replace(evaluate(stop), nll=next(nlls))
    )
    trainer.run()
    assert trainer.progress.epoch == 4


def test_max_steps_ends_within_an_epoch_and_still_evaluates(options, tokenizer, store):
    options.max_steps = 2
    result = make_trainer(options, tokenizer, store).run()
    assert result.steps == 2
    assert result.after is not None
    # Those that the steps were taken with; the schedule is that of the shorter run.
    assert [line["lr"] for line in metrics_of(options)[:2]] == [options.lr, options.lr / 2]


def test_without_validation_the_last_checkpoint_is_the_best(
    options, tokenizer, dialogues, tmp_path
):
    data = {"train": dialogues["train"], "valid": []}
    store = build_store(data, tokenizer, tmp_path / "store")
    run = make_trainer(options, tokenizer, store).run().run
    assert (run / "best").resolve() == (run / "last").resolve()
    assert json.loads((run / "last" / "metrics.json").read_text())["epoch"] == 2


def test_no_epochs_means_only_an_evaluation(options, tokenizer, store):
    options.n_epochs = 0
    result = make_trainer(options, tokenizer, store).run()
    assert (result.steps, result.after.num_examples > 0) == (0, True)


def test_a_run_repeats_itself_bit_for_bit(options, tokenizer, store, tmp_path):
    weights = []
    for name in ("a", "b"):
        options.output = str(tmp_path / name)
        torch.manual_seed(1)
        trainer = make_trainer(options, tokenizer, store)
        trainer.run()
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_precision_of_the_cpu_learns_over_float32_weights(
    options, tokenizer, store, precision
):
    options.precision = precision
    trainer = make_trainer(options, tokenizer, store)
    trainer.run()
    losses = [line["loss"] for line in metrics_of(options) if line["split"] == "train"]
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_ragged_candidates_train(options, tokenizer, tmp_path):
    from convai_fast.dialogue.dialogue import Dialogue, Utterance

    utterances = [Utterance(["hi"], ["no"] * n + ["yes"]) for n in (0, 1, 4)]
    data = {"train": [Dialogue(["i am"], utterances)] * 3, "valid": [Dialogue([], utterances)]}
    store = build_store(data, tokenizer, tmp_path / "store")
    options.num_candidates = 4
    result = make_trainer(options, tokenizer, store).run()
    assert math.isfinite(result.after.nll)
    assert math.isfinite(result.after.mc_loss)


def test_torch_compile_gives_the_same_losses(options, tokenizer, store, tmp_path):
    options.max_steps = options.gradient_accumulation_steps = 1
    make_trainer(options, tokenizer, store, **NO_DROPOUT, n_layer=1).run()
    expected = metrics_of(options)
    options.compile, options.output = True, str(tmp_path / "compiled")
    make_trainer(options, tokenizer, store, **NO_DROPOUT, n_layer=1).run()
    for ours, theirs in zip(metrics_of(options), expected, strict=True):
        assert ours.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=1e-4)


def test_all_blocks_share_whole_graphs_that_fit_batches_of_any_size(
    options, tokenizer, store, monkeypatch
):
    def compile_for_eager(block, **settings):
        block._compiled_call_impl = torch.compile(block._call_impl, backend="eager", **settings)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_for_eager)
    # As on a GPU, where attention reads an index.
    monkeypatch.setattr(compute, "key_index", lambda offsets, ids, _: ops.index_keys(offsets, ids))
    options.compile, options.max_steps = True, 3
    counters = torch._dynamo.utils.counters
    counters.clear()
    make_trainer(options, tokenizer, store, n_layer=10).run()
    # Of a block in training and in evaluation, and of the last, which goes on with some tokens.
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]


def test_a_compiled_model_copied_for_inference_computes_with_its_copied_weights(tokenizer):
    model, ids = tiny_model(tokenizer), torch.arange(5)[None]
    expected = for_inference(model, torch.bfloat16)(ids).logits
    model.transformer.blocks[0].compile(backend="eager")
    twin = for_inference(model, torch.bfloat16)
    torch.nn.init.zeros_(model.transformer.blocks[0].mlp.down.weight)
    assert torch.equal(twin(ids).logits, expected)


def test_a_run_folder_with_something_in_it_is_refused(options, tokenizer, store, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty: choose another run folder"):
        make_trainer(options, tokenizer, store).run()


def test_nothing_is_written_to_somebodys_folder_that_has_options_of_its_own(
    options, tokenizer, store, tmp_path
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "options.yaml").write_text("mine")
    with pytest.raises(UserError, match="is not empty: choose another run folder"):
        make_trainer(options, tokenizer, store).run()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["options.yaml"]


def test_training_in_a_thread_needs_no_signals(options, tokenizer, store):
    options.max_steps, results = 1, []
    trainer = make_trainer(options, tokenizer, store)
    thread = threading.Thread(target=lambda: results.append(trainer.run()))
    thread.start()
    thread.join()
    assert results[0].steps == 1
