"""Signals: the first asks for a save, a second may not spoil it unless a person means it."""

import dataclasses
import signal
import time
from pathlib import Path

import pytest
from transformers import GPT2DoubleHeadsModel

from convai_fast.cli import info
from convai_fast.cli.main import main
from convai_fast.training.distributed import Ranks
from convai_fast.training.interruption import stop_on_signal
from convai_fast.training.loop import train
from convai_fast.training.run_folder import RunFolder
from convai_fast.training.step import TrainStep
from tests.helpers.command_line import start


@pytest.mark.parametrize(
    ("first", "second", "launched"),
    [
        (signal.SIGTERM, signal.SIGTERM, False),  # as a scheduler sends them
        (signal.SIGINT, signal.SIGTERM, False),
        (signal.SIGINT, signal.SIGINT, True),  # once from the terminal, once from the launcher
    ],
)
def test_a_signal_sent_twice_still_lets_the_run_save(monkeypatch, first, second, launched):
    monkeypatch.delenv("RANK", raising=False)
    if launched:
        monkeypatch.setenv("RANK", "0")
    with stop_on_signal(Ranks()) as stop:
        signal.raise_signal(first)
        signal.raise_signal(second)
        assert stop.poll()
    assert stop.signal == first


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_one_more_ctrl_c_stops_at_once(monkeypatch, capfd, first):
    monkeypatch.delenv("RANK", raising=False)
    with stop_on_signal(Ranks()):
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "one more Ctrl-C stops without saving" in capfd.readouterr().err


@pytest.mark.parametrize(("save_every", "after"), [(0, ""), (2, " of steps after 2")])
def test_what_a_second_ctrl_c_loses_is_told(
    options, model_folder, data_file, monkeypatch, save_every, after
):
    options = dataclasses.replace(
        options, model=str(model_folder), dataset_path=(str(data_file),), from_scratch=True
    )
    options.save_every = save_every
    take, told = TrainStep.take, []

    def interrupted(self, number, *rest):
        if number == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        take(self, number, *rest)

    monkeypatch.setattr(TrainStep, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(options, told.append)
    assert f"stopped without saving: {options.output} holds nothing{after}" in told
    assert told[-1].startswith("continue from there: ") == bool(after)


@pytest.mark.parametrize(
    ("method", "after"), [("_write_checkpoint", ""), ("_remove_unused", " of steps after 3")]
)
def test_a_second_ctrl_c_may_come_while_the_first_one_saves(
    options, model_folder, data_file, monkeypatch, method, after
):
    options = dataclasses.replace(
        options, model=str(model_folder), dataset_path=(str(data_file),), from_scratch=True
    )
    take, told, original = TrainStep.take, [], getattr(RunFolder, method)

    def stopped(self, number, *rest):
        if number == 4:
            signal.raise_signal(signal.SIGINT)
        take(self, number, *rest)

    def interrupted(self, *rest):
        signal.raise_signal(signal.SIGINT)
        return original(self, *rest)

    monkeypatch.setattr(TrainStep, "take", stopped)
    monkeypatch.setattr(RunFolder, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(options, told.append)
    assert f"stopped without saving: {options.output} holds nothing{after}" in told
    assert told[-1].startswith("continue from there: ") == bool(after)


def test_a_ctrl_c_while_python_ends_shows_no_traceback(monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupted)
    monkeypatch.setattr("sys.argv", ["convai-fast", "info"])
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert main() == 130
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, handler)
    assert main(["info"]) == 130
    assert signal.getsignal(signal.SIGINT) == handler  # a caller's own


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


def test_a_sigterm_has_a_run_save_before_it_stops(options, model_folder, data_file, tmp_path):
    process = start_a_long_run(options, model_folder, data_file)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "saved as" in output
    assert f"continue with: convai-fast train --resume {tmp_path / 'run'}" in output
    GPT2DoubleHeadsModel.from_pretrained(tmp_path / "run" / "last")


@pytest.mark.parametrize("closed", ["both", "stdout"])
def test_ctrl_c_has_a_run_save_also_where_its_log_is_closed_first(
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
