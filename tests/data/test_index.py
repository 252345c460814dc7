"""The index of examples: what is cut of one that is too long, compiled and not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convai_fast import _native
from convai_fast.data.build_store import build_store
from convai_fast.data.index import index_examples_reference
from convai_fast.dialogue.dialogue import Dialogue, Utterance
from convai_fast.dialogue.encoding import encode
from convai_fast.dialogue.tokenizer import special_ids
from convai_fast.ops import PLAN_COLUMNS
from convai_fast.ops.plan import classes_of, layout_numbers, pieces_of
from tests.helpers.batches import make_batches
from tests.helpers.layouts import layouts


def long_store(tokenizer, folder, persona, history, replies):
    def words(n):
        return " a" * n  # one token a word

    dialogue = Dialogue(
        [words(n) for n in persona],
        [Utterance([words(n) for n in history], [words(n) for n in replies])],
    )
    return build_store({"train": [dialogue]}, tokenizer, folder)


@pytest.mark.parametrize("layout", ["padded", "shared"])
@pytest.mark.parametrize(
    ("max_length", "turns", "skipped", "sentences", "length", "num_labels", "cuts"),
    [
        (37, 3, 0, 2, 37, 7, (0, 0, 0)),
        (36, 2, 0, 2, 31, 7, (1, 0, 0)),  # the oldest turn goes first
        (30, 1, 0, 2, 25, 7, (1, 0, 0)),
        (24, 1, 0, 1, 20, 7, (1, 1, 0)),  # then persona sentences from the end
        (19, 1, 0, 0, 15, 7, (1, 1, 0)),
        (14, 1, 1, 0, 14, 7, (1, 1, 0)),  # then the beginning of the turn that is answered
        (11, 1, 4, 0, 11, 7, (1, 1, 0)),
        (10, 0, 0, 0, 9, 7, (1, 1, 0)),  # of which nothing is left
        (9, 0, 0, 0, 9, 7, (1, 1, 0)),
        (8, 0, 0, 0, 8, 5, (1, 1, 1)),  # and a reply that alone is too long is cut, with its end
        (4, 0, 0, 0, 4, 1, (1, 1, 1)),
    ],
)
def test_what_is_too_long_loses_history_then_persona_then_the_reply(
    tokenizer, tmp_path, layout, max_length, turns, skipped, sentences, length, num_labels, cuts
):
    store = long_store(tokenizer, tmp_path / "s", [5, 5], [5, 5, 5], [6])
    batches = make_batches(store, max_length=max_length, layout=layout)
    row = dict(zip(PLAN_COLUMNS, batches.plan[0].tolist(), strict=True))
    assert (row["history_count"], row["history_skip"], row["persona_kept"]) == (
        turns,
        skipped,
        sentences,
    )
    assert (batches.index.padded_lengths[0], batches.index.num_labels[0]) == (length, num_labels)
    assert batches.cuts == cuts
    batch = batches.collate(np.array([0]))
    labels = batch["labels"].flatten()
    assert batch["input_ids"].shape[-1] == length <= max_length
    assert batch["input_ids"].flatten()[-1] == store.layout.eos
    assert (labels != -100).sum() == num_labels
    assert (labels[-1] == -100) == bool(cuts[2])


def test_of_a_question_too_long_its_end_is_kept(tokenizer, tmp_path):
    [question], [reply] = (
        encode(tokenizer, [text]) for text in ("why do you like tea so much ?", "yes")
    )
    dialogue = Dialogue([], [Utterance(["why do you like tea so much ?"], ["yes"])])
    store = build_store({"train": [dialogue]}, tokenizer, tmp_path / "store")
    batch = make_batches(store, max_length=len(reply) + 8)[0]
    bos, eos, speaker1, speaker2, _ = special_ids(tokenizer)
    expected = [bos, speaker2, *question[-4:], speaker1, *reply, eos]
    assert batch["input_ids"].flatten().tolist() == expected


def test_a_long_distractor_cuts_the_prefix_but_not_the_true_replys_end(tokenizer, tmp_path):
    store = long_store(tokenizer, tmp_path / "s", [], [5], [20, 3])
    batches = make_batches(store, max_length=12)
    assert (batches.index.num_labels.tolist(), batches.cuts) == ([4], (1, 0, 1))
    assert batches[0]["labels"][0, 1, :6].tolist()[-1] == store.layout.eos


@pytest.mark.skipif(_native.host is None, reason="nothing is compiled here")
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_compiled_index_equals_its_reference(data):
    def sizes(most):
        return data.draw(st.lists(st.integers(0, 9), max_size=most))

    layout, num_texts = data.draw(layouts), data.draw(st.integers(1, 8))
    count = num_texts * len(classes_of(layout))
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    lengths += map(len, pieces_of(layout))
    ids = st.integers(0, num_texts - 1)
    persona_sizes = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    examples = data.draw(
        st.lists(
            st.tuples(
                st.integers(0, len(persona_sizes) - 1),
                st.integers(0, 6),
                st.integers(0, 6),
                st.lists(ids, max_size=4),
            ),
            max_size=6,
        )
    )

    def column(values, dtype):
        return np.array(list(values), dtype)

    def offsets(values):
        return np.concatenate([[0], np.cumsum(values)]).astype(np.int64)

    persona_ids = data.draw(st.lists(ids, min_size=sum(persona_sizes), max_size=sum(persona_sizes)))
    arguments = (
        offsets(lengths),
        offsets(persona_sizes),
        column(persona_ids, np.int32),
        column(data.draw(st.lists(ids, min_size=12, max_size=12)), np.int32),
        column((e[0] for e in examples), np.int32),
        column((e[1] for e in examples), np.int64),
        column((e[2] for e in examples), np.int32),
        offsets([len(e[3]) for e in examples]),
        column((i for e in examples for i in e[3]), np.int32),
        layout_numbers(layout, num_texts).numpy(),
        data.draw(st.integers(0, 5)),
        data.draw(st.integers(0, 3)),
        data.draw(st.integers(4, 40)),
        data.draw(st.integers(1, 4)),
    )
    compiled = _native.host.index_examples(*arguments)
    expected = index_examples_reference(*arguments)
    assert np.array_equal(compiled[0], expected[0])
    assert np.array_equal(compiled[1], expected[1])
    assert tuple(compiled[2]) == expected[2]
