"""Reading dialogues: the options, and texts that are shared."""

import pytest

from convai_fast.data.readers import load_dialogues
from tests.helpers.conversations import DOG_DIALOGUE
from tests.helpers.reading import assert_user_error

TEA_DIALOGUE = {
    "personality": ["I like tea."],
    "utterances": [{"history": ["Hello!"], "candidates": ["Hi, some tea?"]}],
}


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"reader": "yaml"}, "no reader 'yaml'; choose json, parlai"),
        ({"num_candidates": 0}, "num_candidates must be at least 1, not 0"),
        ({"valid_fraction": 1}, "valid_fraction must be at least 0 and below 1, not 1"),
        ({"valid_fraction": float("nan")}, "valid_fraction"),
    ],
)
def test_options_out_of_range_are_named(write, options, part):
    path = write("a.json", [DOG_DIALOGUE])
    assert_user_error(lambda: load_dialogues(path, **options), [part])


def test_texts_are_shared_not_copied(write):
    again = {"history": ["Hello!", "Hi, some tea?", "yes"], "candidates": ["ok"]}
    path = write("a.json", [TEA_DIALOGUE, {"utterances": [again]}])
    first, second = (d.utterances[0] for d in load_dialogues(path, valid_fraction=0)["train"])
    assert second.history[0] is first.history[0]
    assert second.history[1] is second.candidates[0] is first.candidates[-1]


def test_real_synthetic_persona_chat(shared_dir):
    splits = load_dialogues(shared_dir / "data" / "synthetic-persona-chat")
    assert {split: len(dialogues) for split, dialogues in splits.items()} == {
        "train": 1760,
        "valid": 240,
    }
    for dialogue in splits["train"] + splits["valid"]:
        assert 4 <= len(dialogue.personality) <= 5
        for utterance in dialogue.utterances:
            assert utterance.history
            assert len(utterance.candidates) == 20
            assert not any("User 1:" in text for text in utterance.history)
    first = splits["train"][1]
    assert first.personality[0] == "I am a boy."
    assert first.utterances[0].history == ["Hi!"]
    assert first.utterances[0].candidates[-1] == "Hello!"
