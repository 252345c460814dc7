"""The validation split and the distractors where data has none; the seed alone decides."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from convai_fast.data.readers import load_dialogues
from convai_fast.dialogue.dialogue import Dialogue, Utterance
from tests.helpers.reading import load_bare

HEADER = "user 1 personas,user 2 personas,Best Generated Conversation"


def numbered_dialogues(count, turns=2):
    """Dialogues in which every text occurs once."""
    return [
        {
            "utterances": [
                {"history": [f"question {i} {t}"], "candidates": [f"answer {i} {t}"]}
                for t in range(turns)
            ]
        }
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("count", "fraction", "num_valid"),
    [(1, 0.1, 0), (2, 0.1, 1), (2, 0.9, 1), (10, 0.1, 1), (30, 0.1, 3), (30, 0.0, 0)],
)
def test_a_missing_validation_split_is_cut_off_by_dialogue(write, count, fraction, num_valid):
    path = write("a.json", numbered_dialogues(count))
    whole = load_bare(path)["train"]
    splits = load_dialogues(path, valid_fraction=fraction, num_candidates=1)
    assert len(splits["valid"]) == num_valid
    assert splits["train"] == [d for d in whole if d not in splits["valid"]]
    assert splits["valid"] == [d for d in whole if d not in splits["train"]]


def test_a_given_validation_split_is_left_alone(write):
    dialogues = numbered_dialogues(10)
    path = write("a.json", {"train": dialogues[:8], "valid": dialogues[8:]})
    splits = load_dialogues(path, valid_fraction=0.5, num_candidates=1)
    assert (len(splits["train"]), len(splits["valid"])) == (8, 2)


def test_both_sides_of_a_conversation_stay_in_one_split(write):
    rows = "".join(f'p,p,"User 1: a{i}\nUser 2: b{i}\nUser 1: c{i}"\n' for i in range(40))
    splits = load_dialogues(write("a.csv", f"{HEADER}\n{rows}"), valid_fraction=0.3)
    openings = {
        split: {d.utterances[0].history[0] for d in dialogues}
        for split, dialogues in splits.items()
    }
    assert len(splits["valid"]) == 2 * len(openings["valid"]) == 24
    assert not openings["train"] & openings["valid"]


def test_distractors_come_from_other_dialogues_of_the_same_split(write):
    path = write("a.json", numbered_dialogues(40))
    splits = load_dialogues(path, num_candidates=10, valid_fraction=0.5)
    for dialogues in splits.values():
        replies = [u.candidates[-1] for d in dialogues for u in d.utterances]
        for dialogue in dialogues:
            own = {u.candidates[-1] for u in dialogue.utterances}
            for utterance in dialogue.utterances:
                distractors = utterance.candidates[:-1]
                assert len(set(distractors)) == 9
                assert set(distractors) <= set(replies) - own


def test_true_replies_stay_last(write):
    dialogues = numbered_dialogues(20)
    splits = load_dialogues(write("a.json", {"train": dialogues, "valid": dialogues}))
    for dialogue, source in zip(splits["train"], dialogues, strict=True):
        for utterance, original in zip(dialogue.utterances, source["utterances"], strict=True):
            assert utterance.candidates[-1:] == original["candidates"]


def test_distractors_do_not_repeat_the_reply_or_one_another_but_for_case_and_space(write):
    replies = ["Yes !", "yes  !", "No", " no ", "NO", "maybe"]
    path = write(
        "a.json", [{"utterances": [{"history": ["a"], "candidates": [r]}]} for r in replies]
    )
    for dialogue in load_dialogues(path, valid_fraction=0)["train"]:
        normalised = [" ".join(c.lower().split()) for c in dialogue.utterances[0].candidates]
        assert sorted(normalised) == ["maybe", "no", "yes !"]


def test_every_reply_elsewhere_is_found_even_if_one_is_most_of_the_split(write):
    own, elsewhere = [["rare", "so"], ["so", "rare"]], [["ok"]] * 600
    path = write(
        "a.json",
        [
            {"utterances": [{"history": ["a"], "candidates": [reply]} for reply in replies]}
            for replies in (*own, *elsewhere, ["own", "own"])
        ],
    )
    *dialogues, last = load_dialogues(path, valid_fraction=0)["train"]
    for utterance in (u for dialogue in dialogues for u in dialogue.utterances):
        assert sorted(utterance.candidates) == ["ok", "own", "rare", "so"]
    for utterance in last.utterances:
        assert sorted(utterance.candidates) == ["ok", "own", "rare", "so"]


def test_frequent_replies_are_frequent_distractors(write):
    replies = ["thanks"] * 50 + [f"reply {i}" for i in range(150)]
    path = write(
        "a.json", [{"utterances": [{"history": ["a"], "candidates": [r]}]} for r in replies]
    )
    drawn = [
        d.utterances[0].candidates[0]
        for d in load_dialogues(path, num_candidates=2, valid_fraction=0)["train"][50:]
    ]
    assert 20 <= drawn.count("thanks") <= 55  # a quarter of 150 draws; uniform would give one


def test_a_single_conversation_has_no_distractors(write):
    path = write("a.csv", f'{HEADER}\np,q,"User 1: a\nUser 2: b\nUser 1: c"\n')
    train = [
        Dialogue(["p"], [Utterance(["a", "b"], ["c"])]),
        Dialogue(["q"], [Utterance(["a"], ["b"])]),
    ]
    assert load_dialogues(path) == {"train": train, "valid": []}


def test_the_seed_alone_decides_what_is_drawn(write):
    path = write("a.json", numbered_dialogues(30))
    assert load_dialogues(path, seed=1) == load_dialogues(path, seed=1)
    assert load_dialogues(path, seed=1) != load_dialogues(path, seed=2)


def test_another_process_draws_the_same(write):
    path = write("a.json", numbered_dialogues(30))
    code = (
        f"from convai_fast.data.readers import load_dialogues; print(load_dialogues({str(path)!r}))"
    )
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # another than is used here
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": seed},
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(load_dialogues(path))
