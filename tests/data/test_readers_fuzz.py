"""A small run of the fuzzer of readers."""

from fuzz_readers import LAYOUTS, fuzz


def test_broken_dialogues_are_read_or_refused_in_one_sentence():
    outcomes, findings = fuzz(range(1_200), seed=0)
    assert not findings, next(iter(findings.values()))
    # It would find nothing if it broke everything, or nothing.
    inputs = [*LAYOUTS, "folder", "function"]
    assert min(outcomes[name, outcome] for name in inputs for outcome in ("read", "refused")) > 10
