"""Signals: the first asks for a save, a second may not spoil it unless a person means it."""

import signal

import pytest

from convai_fast.training.distributed import Ranks
from convai_fast.training.interruption import stop_on_signal


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
    assert "one more Ctrl-C stops at once" in capfd.readouterr().err
