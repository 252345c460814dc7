"""What is told on the terminal, and in a log file."""

import io
import sys

from convai_fast.terminal import counted, progress_bar


def test_in_a_log_file_a_bar_is_a_line_each_half_minute(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with progress_bar(total=100, desc="a") as bar:
        bar.update(1)
        assert log.getvalue() == ""  # not yet
        bar.start_t -= 40
        bar.last_print_t -= 40
        bar.update(50)
        bar.update(1)
    first, last = log.getvalue().splitlines()
    assert first.startswith("a:  51%")
    assert last.startswith("a:  52%")
    assert "\r" not in log.getvalue()


def test_one_of_a_thing_is_no_plural():
    assert [counted(1, "reply"), counted(2, "reply")] == ["1 reply", "2 replies"]
    assert counted(1234, "bad line") == "1,234 bad lines"
