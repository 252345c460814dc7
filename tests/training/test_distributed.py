"""Several ranks: the same run as on one, to rounding, and one end for all of them."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from convai_fast.cli.main import main
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.model.checkpoint import has_new_head
from convai_fast.training.checkpoints import STATE_FILE
from convai_fast.training.options import TrainOptions
from tests.helpers.command_line import arguments_of
from tests.helpers.ranks import exit_codes, start_ranks

DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop", "summary_first_dropout")

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def files(tokenizer, tmp_path_factory):
    """Dialogues, and the shape of a tiny model without dropout."""
    folder = tmp_path_factory.mktemp("ranks")
    dialogues = builtin_dialogues(num_train=8, num_valid=3)
    dialogues["train"][0].utterances.pop()  # an odd number of examples
    (folder / "dialogues.json").write_text(
        json.dumps({s: [dataclasses.asdict(d) for d in ds] for s, ds in dialogues.items()})
    )
    tokenizer.save_pretrained(folder / "shape")
    shape = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}
    (folder / "shape" / "config.json").write_text(json.dumps(shape | dict.fromkeys(DROPOUTS, 0.0)))
    shutil.copytree(folder / "shape", folder / "llama")
    (folder / "llama" / "config.json").write_text(json.dumps(LLAMA))
    return folder


@pytest.fixture(scope="module")
def dropout_files(files):
    """The same shape, with dropout."""
    folder = files / "dropout"
    shutil.copytree(files / "shape", folder / "shape")
    config = json.loads((folder / "shape" / "config.json").read_text())
    config |= dict.fromkeys(DROPOUTS, 0.1)
    (folder / "shape" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def options(files, tmp_path):
    return TrainOptions(
        dataset_path=str(files / "dialogues.json"),
        model=str(files / "shape"),
        from_scratch=True,
        output=str(tmp_path / "run"),
        dataset_cache=str(tmp_path / "cache"),
        precision="fp32",
        device="cpu",
        train_batch_size=4,
        valid_batch_size=4,
        gradient_accumulation_steps=4,
        n_epochs=2,
        lr=1e-3,
        log_every=1,
    )


def weights_of(run):
    return load_file(run / "last" / "model.safetensors")


def records_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_for(condition, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_same_run(run, expected):
    # The run of twice the batch on one rank: the same batches, the same means over them.
    for ours, theirs in zip(records_of(run), records_of(expected), strict=True):
        assert ours.pop("split") == theirs.pop("split")
        for record in (ours, theirs):
            record.pop("tokens_per_second", None)
            record.pop("mfu", None)
        assert ours == pytest.approx(theirs, rel=1e-4)
    peer = weights_of(expected)
    for name, weight in weights_of(run).items():
        if name in ("multiple_choice_head.summary.bias", "multiple_choice_head.bias"):
            continue  # it shifts all candidates alike: its gradient is rounding noise
        assert (weight - peer[name]).norm() <= 1e-3 * peer[name].norm(), name


@pytest.mark.parametrize(("shape", "fsdp"), [("shape", False), ("llama", True)])
def test_two_ranks_train_and_evaluate_as_one_with_twice_the_batch(
    options, files, tmp_path, shape, fsdp
):
    # 41 examples in batches of 8, 4 batches a step: the last batch of an epoch and that of the
    # evaluation leave one rank without an example.
    options.model, options.fsdp, options.eval_before_start = str(files / shape), fsdp, True
    processes = start_ranks([arguments_of(options)] * 2, tmp_path)
    one = dataclasses.replace(
        options,
        fsdp=False,
        train_batch_size=8,
        valid_batch_size=8,
        output=str(tmp_path / "one"),
    )
    assert main(["train", *arguments_of(one)]) == 0
    assert exit_codes(processes) == [0, 0]
    assert_same_run(tmp_path / "run", tmp_path / "one")
    assert not has_new_head(tmp_path / "run" / "last" / "model.safetensors")
    assert "4 x 4 examples x 2 processes" in (tmp_path / "out-0").read_text()
    assert (tmp_path / "out-1").read_text() == (tmp_path / "err-1").read_text() == ""
    # Each draws its own dropout.
    assert (tmp_path / "random-0").read_text() != (tmp_path / "random-1").read_text()


@pytest.mark.parametrize("fsdp", [False, True])
def test_ranks_that_were_killed_continue_to_the_weights_of_an_undisturbed_run(
    options, dropout_files, tmp_path, capsys, fsdp
):
    # Dropout, so that each rank must continue its own random numbers.
    options.model, options.fsdp = str(dropout_files / "shape"), fsdp
    options.n_epochs = options.gradient_accumulation_steps = 1  # six steps
    options.save_every, options.log_every = 2, 4
    undisturbed = dataclasses.replace(options, output=str(tmp_path / "undisturbed"))
    assert exit_codes(start_ranks([arguments_of(undisturbed)] * 2, tmp_path)) == [0, 0]

    # The one that lives on does not wait for the other.
    processes = start_ranks([arguments_of(options)] * 2, tmp_path, kill_after_save=1)
    assert exit_codes(processes) == [-signal.SIGKILL, 1]
    assert torch.load(tmp_path / "run" / "last" / STATE_FILE)["progress"]["step"] == 2

    resume = ["--resume", str(tmp_path / "run")]
    if fsdp:
        assert main(["train", *resume]) == 2
        assert capsys.readouterr().err.count("torchrun") == 1
    assert exit_codes(start_ranks([resume] * 2, tmp_path)) == [0, 0]
    assert "continuing after step" in (tmp_path / "out-0").read_text()
    weights, expected = weights_of(tmp_path / "run"), weights_of(tmp_path / "undisturbed")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    for ours, theirs in zip(
        records_of(tmp_path / "run"), records_of(tmp_path / "undisturbed"), strict=True
    ):
        speed = {"tokens_per_second": 0, "mfu": 0}
        assert ours | speed == theirs | speed


@pytest.mark.parametrize("processes", [(2, 1), (1, 2)])
def test_a_run_continues_with_another_number_of_processes(options, tmp_path, capsys, processes):
    # 41 examples: two steps of 2 x 8, and what is left in steps of 8; or the other way round.
    options.train_batch_size, options.gradient_accumulation_steps = 8, 1
    options.n_epochs, options.save_every, options.max_steps = 1, 2, 2
    first, second = processes
    arguments = arguments_of(options)
    assert exit_codes(start_ranks([arguments] * first, tmp_path)) == [0] * first
    resume = ["--resume", str(tmp_path / "run"), "--max_steps", "0"]
    if second == 1:
        assert main(["train", *resume]) == 0
        told = capsys.readouterr().out
    else:
        assert exit_codes(start_ranks([resume] * second, tmp_path)) == [0] * second
        told = (tmp_path / "out-0").read_text()
    assert f"with {second} processes instead of {first}" in told
    steps = [
        record["step"] for record in records_of(tmp_path / "run") if record["split"] == "train"
    ]
    num_left = 41 - 2 * 8 * first
    assert steps == list(range(1, 3 + -(-num_left // (8 * second))))
    progress = torch.load(tmp_path / "run" / "last" / STATE_FILE)["progress"]
    assert (progress["epoch"], progress["examples"]) == (1, 0)


def test_a_mistake_that_one_rank_meets_is_told_once_and_ends_all(options, tmp_path):
    mistaken = dataclasses.replace(options, model="./absent")
    assert exit_codes(start_ranks([arguments_of(options), arguments_of(mistaken)], tmp_path)) == [
        2,
        2,
    ]
    told = (tmp_path / "err-0").read_text()
    assert told.startswith("convai-fast train: ")
    assert "absent" in told
    assert told.count("\n") == 1
    assert (tmp_path / "err-1").read_text() == ""
    assert not (tmp_path / "run").exists()


def test_what_rank_0_alone_cannot_do_ends_all(options, tmp_path):
    (tmp_path / "file").touch()
    options.output = str(tmp_path / "file" / "run")
    assert exit_codes(start_ranks([arguments_of(options)] * 2, tmp_path)) == [2, 2]
    assert "cannot be made (File exists" in (tmp_path / "err-0").read_text()
    assert (tmp_path / "err-1").read_text() == ""


def test_a_loss_that_is_no_number_ends_all_with_the_whole_batch_set_aside(options, tmp_path):
    options.lr = 1e30
    assert exit_codes(start_ranks([arguments_of(options)] * 2, tmp_path)) == [2, 2]
    assert "is nan" in (tmp_path / "err-0").read_text()
    bad = json.loads((tmp_path / "run" / "bad_batch.json").read_text())
    parts = [part for part in bad["batches"] if part["batch"] == bad["batches"][0]["batch"]]
    assert len(parts) == 2
    assert parts[0]["input_ids"] != parts[1]["input_ids"]


def test_sharding_over_one_process_is_refused(options, capsys):
    options.fsdp = True
    assert main(["train", *arguments_of(options)]) == 2
    assert "start them with torchrun" in capsys.readouterr().err


def test_a_signal_to_one_rank_stops_all_at_the_same_step(options, tmp_path):
    options.n_epochs = 100_000
    processes = start_ranks([arguments_of(options)] * 2, tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text())
    os.kill(processes[1].pid, signal.SIGTERM)
    assert exit_codes(processes) == [0, 0]
    assert "stopped at step" in (tmp_path / "out-0").read_text()
    assert weights_of(tmp_path / "run")


def test_torchrun_starts_ranks_and_passes_a_signal_on(options, tmp_path):
    options.n_epochs = 100_000
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launcher = subprocess.Popen(
        [sys.executable, *torchrun, "-m", "convai_fast", "train", *arguments_of(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        wait_for(lambda: metrics.exists() and metrics.read_text())
    finally:
        launcher.send_signal(signal.SIGTERM)
        output, errors = launcher.communicate(timeout=60)
    assert output.count("saved as") == 1, errors
    assert weights_of(tmp_path / "run")
