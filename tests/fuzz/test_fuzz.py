"""A small run of each fuzzer."""

import re

import pytest

from tests.fuzz import FUZZERS, fuzz
from tests.fuzz.__main__ import main
from tests.fuzz.arguments import MAKERS
from tests.fuzz.readers import LAYOUTS

READ = [f"{name} {how}" for name in (*LAYOUTS, "folder", "function") for how in ("read", "refused")]
CALLED = [f"{name} {how}" for name in MAKERS for how in ("computed", "refused")]


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        ("operators", 4_000, CALLED),
        ("readers", 800, READ),
        ("requests", 2_000, ["asked", "refused"]),
        ("converter", 70, ["converted", "refused"]),
    ],
)
def test_what_is_broken_is_understood_or_refused(name, count, expected):
    outcomes, findings = fuzz(name, range(count))
    assert not findings, next(iter(findings.values()))
    # It would find nothing if it broke everything, or nothing.
    assert min(outcomes[outcome] for outcome in expected) > 5, outcomes


def test_help_tells_what_each_fuzzer_breaks(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fuzz", "--help"])
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr().out
    assert "python -m tests.fuzz operators --count" in printed
    assert all(re.search(rf"^  {name} +[A-Z].*\.$", printed, re.MULTILINE) for name in FUZZERS)
