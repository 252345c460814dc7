"""Training: what a step computes, what a run leaves behind, and how it stops."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from ranks import arguments_of
from transformers import AutoTokenizer, GPT2Config, GPT2DoubleHeadsModel

from benchmarks.plain_loop import train_plainly
from convai_fast.cli.main import main
from convai_fast.data.build_store import build_store
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.errors import UserError
from convai_fast.model.config import TransformerConfig
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.training.distributed import Ranks
from convai_fast.training.evaluation import MetricSums
from convai_fast.training.loop import Trainer, train
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
    assert json.loads((run / "options.json").read_text())["lr"] == options.lr
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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_candidates": 0}, "--num_candidates must be at least 1, not 0"),
        ({"num_candidates": 10**20}, "--num_candidates must be at most 10000"),
        ({"personality_permutations": 10**11}, "--personality_permutations must be at most 1000"),
        ({"train_batch_size": 10**20}, "--train_batch_size must be at most 2147483647"),
        ({"seed": -1}, "--seed must be at least 0, not -1"),
        ({"seed": 2**64}, "--seed must be at most 9223372036854775807"),
        ({"lr": float("nan")}, "--lr must be at least 0, not nan"),
        ({"lm_coef": 0, "mc_coef": 0}, "both 0: there is nothing to learn"),
        ({"device": "tpu"}, "device tpu is not available"),
        ({"precision": "fp16"}, "fp16 needs a CUDA device"),
        ({"model": "./absent"}, "there is no ./absent|absent"),
        ({"dataset_path": ""}, "no dialogues given"),
        ({"dataset_path": "absent.json"}, "absent.json"),
    ],
)
def test_options_that_make_no_sense_are_one_sentence(
    options, model_folder, data_file, change, says
):
    options.model, options.dataset_path = str(model_folder), str(data_file)
    options.from_scratch = True
    with pytest.raises(UserError, match=says) as raised:
        train(dataclasses.replace(options, **change), report=lambda _: None)
    assert "\n" not in str(raised.value)


def test_without_dialogues_nothing_is_loaded_or_downloaded(capsys):
    assert main(["train"]) == 2
    assert "no dialogues given: name a file, folder or Hub dataset" in capsys.readouterr().err


def test_a_model_that_has_no_room_for_a_reply_is_one_sentence(options, model_folder, data_file):
    path = model_folder / "config.json"
    config = path.read_text()
    path.write_text(json.dumps(json.loads(config) | {"n_positions": 2}))
    options.model, options.dataset_path = str(model_folder), str(data_file)
    options.from_scratch = True
    with pytest.raises(UserError, match=r"2 positions .n_positions in its config.json., too few"):
        train(options, report=lambda _: None)
    path.write_text(config)


def test_from_scratch_takes_the_shape_of_a_run(options, model_folder, data_file, tmp_path):
    options.model, options.dataset_path = str(model_folder), str(data_file)
    options.from_scratch, options.max_steps = True, 1
    run = train(options, report=lambda _: None).run
    again = dataclasses.replace(options, model=str(run), output=str(tmp_path / "again"))
    assert train(again, report=lambda _: None).steps == 1


def test_a_run_folder_with_something_in_it_is_refused(options, tokenizer, store, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty: choose another run folder"):
        make_trainer(options, tokenizer, store).run()


def test_a_tokenizer_of_another_model_is_refused(options, model_folder, data_file, tmp_path):
    options.from_scratch, options.model = True, str(model_folder)
    options.dataset_path, options.max_steps = str(data_file), 1
    run = train(options, report=lambda _: None).run
    from convai_fast.data.builtin import train_builtin_tokenizer

    other = train_builtin_tokenizer(builtin_dialogues(num_train=9, num_valid=1)["train"], 300)
    other.save_pretrained(tmp_path / "other")
    second = dataclasses.replace(
        options,
        model=str(run / "best"),
        tokenizer=str(tmp_path / "other"),
        from_scratch=False,
        output=str(tmp_path / "second"),
    )
    with pytest.raises(UserError, match="embeddings for 400 tokens, but its tokenizer has 300"):
        train(second, report=lambda _: None)


def test_special_tokens_are_added_to_a_plain_model_and_reported(
    options, data_file, shared_dir, tmp_path
):
    folder = tmp_path / "gpt2"
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=256)
    GPT2DoubleHeadsModel(config).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((shared_dir / "tokenizers" / "gpt2" / name).read_bytes())
    options.model, options.dataset_path, options.max_steps = str(folder), str(data_file), 1
    said = []
    run = train(options, report=said.append).run
    assert any("5 added, embedding 50,257 -> 50,262 rows" in line for line in said)
    assert GPT2DoubleHeadsModel.from_pretrained(run / "best").config.vocab_size == 50_262


def start(options, **environment):
    """The command in a process of its own, as a user starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "convai_fast", "train", *arguments_of(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def start_a_long_run(options, model_folder, data_file):
    """A run in a process of its own that has taken its first step."""
    options.from_scratch, options.model = True, str(model_folder)
    options.dataset_path, options.n_epochs = str(data_file), 100_000
    process = start(options)
    metrics = Path(options.output) / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_ctrl_c_and_sigterm_save_before_they_stop(
    options, model_folder, data_file, tmp_path, number, code
):
    process = start_a_long_run(options, model_folder, data_file)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "saved as" in output
    assert f"continue with: convai-fast train --resume {tmp_path / 'run'}" in output
    GPT2DoubleHeadsModel.from_pretrained(tmp_path / "run" / "last")


@pytest.mark.parametrize("closed", ["both", "stdout"])
def test_a_log_that_is_closed_first_does_not_keep_a_run_from_saving(
    options, model_folder, data_file, tmp_path, closed
):
    """As Ctrl-C under `2>&1 | tee log` does, which ends tee, too."""
    process = start_a_long_run(options, model_folder, data_file)
    process.stdout.close()
    if closed == "both":
        process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert (tmp_path / "run" / "last" / "training_state.pt").exists()
    if closed == "stdout":
        assert "continue with: convai-fast train --resume" in process.stderr.read()
        process.stderr.close()


def test_training_in_a_thread_needs_no_signals(options, tokenizer, store):
    options.max_steps, results = 1, []
    trainer = make_trainer(options, tokenizer, store)
    thread = threading.Thread(target=lambda: results.append(trainer.run()))
    thread.start()
    thread.join()
    assert results[0].steps == 1


def test_the_command_line_trains_and_says_how_to_go_on(options, model_folder, data_file):
    options.from_scratch, options.model = True, str(model_folder)
    options.dataset_path, options.max_steps = str(data_file), 2
    process = start(options)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "random weights" in output
    assert f"convai-fast interact --model {options.output}/best" in output


def test_a_mistake_on_the_command_line_is_one_sentence_and_code_2(options, data_file):
    options.model, options.dataset_path = "./absent", str(data_file)
    process = start(options)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.startswith("convai-fast train: ")
    assert errors.count("\n") == 1
    assert not os.path.exists(options.output)
