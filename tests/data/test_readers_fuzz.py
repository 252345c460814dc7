"""A small run of the fuzzer of readers."""

from fuzz_readers import fuzz

FORMATS = ["json", "parlai", "csv", "messages", "sharegpt", "folder", "function"]


def test_broken_dialogues_are_read_or_refused_in_one_sentence():
    outcomes, findings = fuzz(range(2_000), seed=0)
    assert not findings, next(iter(findings.values()))
    # It would find nothing if it broke everything, or nothing.
    assert min(outcomes[name, outcome] for name in FORMATS for outcome in ("read", "refused")) > 30
