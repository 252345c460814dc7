"""`build_input_from_segments`: the predecessor's function."""

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convai_fast.dialogue.format import SpecialIds
from convai_fast.dialogue.layout import build_sequence, classic
from convai_fast.dialogue.sequence import build_input_from_segments
from convai_fast.dialogue.tokenizer import special_ids

parts = st.lists(st.lists(st.integers(5, 99), max_size=5), max_size=6)


def predecessor(persona, history, reply, special):
    """What huggingface/transfer-learning-conv-ai defines, from its description: sequence parts
    numbered from the front; odd parts are speaker 2's segments; speaker tokens count from the end.
    """
    bos, eos, speaker1, speaker2, _ = special
    sequence = [[bos, *chain(*persona)], *history, [*reply, eos]]
    spoken = [sequence[0]]
    for i, part in enumerate(sequence[1:]):
        spoken.append([speaker2 if (len(sequence) - i) % 2 else speaker1, *part])
    segments = [speaker2 if i % 2 else speaker1 for i, part in enumerate(spoken) for _ in part]
    return [*chain(*spoken)], segments


def test_a_worked_example(tokenizer):
    bos, eos, s1, s2, _ = special_ids(tokenizer)
    instance = build_input_from_segments([[10], [11]], [[20]], [30, 31], tokenizer, lm_labels=True)
    assert instance == {
        "input_ids": [bos, 10, 11, s2, 20, s1, 30, 31, eos],
        "token_type_ids": [s1, s1, s1, s2, s2, s1, s1, s1, s1],
        "mc_token_ids": 8,
        "lm_labels": [-100] * 6 + [30, 31, eos],
    }


def test_labels_and_eos_are_optional(tokenizer):
    special = special_ids(tokenizer)
    instance = build_input_from_segments([], [[20]], [30], tokenizer, with_eos=False)
    assert instance["input_ids"][-1] == 30
    assert set(instance["lm_labels"]) == {-100}
    empty = build_input_from_segments([], [], [], tokenizer, with_eos=False)
    assert empty["input_ids"] == [special.bos, special.speaker1]


@settings(max_examples=300, deadline=None)
@given(parts, parts, st.lists(st.integers(5, 99), max_size=5))
def test_it_is_the_predecessors_sequence_for_every_odd_history(persona, history, reply):
    special = SpecialIds(1, 2, 3, 4, 0)
    input_ids, segments, _ = build_sequence(persona, history, reply, classic(special))
    expected_ids, expected_segments = predecessor(persona, history, reply, special)
    if len(history) % 2 == 1:
        assert (input_ids, segments) == (expected_ids, expected_segments)


@settings(max_examples=300, deadline=None)
@given(parts, parts, st.lists(st.integers(5, 99), max_size=5))
def test_segments_always_agree_with_speaker_tokens(persona, history, reply):
    special = SpecialIds(1, 2, 3, 4, 0)
    input_ids, segments, _ = build_sequence(persona, history, reply, classic(special))
    speaker = special[2]
    for token, segment in zip(input_ids, segments, strict=True):
        speaker = token if token in (3, 4) else speaker
        assert segment == speaker


@pytest.mark.parametrize("turns", range(6))
def test_the_partner_always_speaks_last_before_the_reply(turns):
    _, segments, _ = build_sequence([], [[9]] * turns, [8], classic(SpecialIds(1, 2, 3, 4, 0)))
    speakers = segments[1::2][: turns + 1]
    assert speakers == [4 if (turns - i) % 2 else 3 for i in range(turns)] + [3]
