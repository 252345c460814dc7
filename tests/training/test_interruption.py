"""Signals: the first asks for a save, a second may not spoil it unless a person means it."""

import dataclasses
import signal

import pytest

from convai_fast.cli import info
from convai_fast.cli.main import main
from convai_fast.training.distributed import Ranks
from convai_fast.training.interruption import stop_on_signal
from convai_fast.training.loop import train
from convai_fast.training.run_folder import RunFolder
from convai_fast.training.step import TrainStep


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
