"""Batches: exact contents, the order of epochs, ranks, and what is cut when it is too long."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convai_fast import _native
from convai_fast.data.batches import DialogueBatches
from convai_fast.data.build_store import build_store
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.data.index import index_examples, index_examples_reference
from convai_fast.data.readers import load_dialogues
from convai_fast.dialogue.dialogue import Dialogue, Utterance
from convai_fast.dialogue.encoding import encode
from convai_fast.dialogue.sequence import build_input_from_segments
from convai_fast.dialogue.tokenizer import load_tokenizer, special_ids
from convai_fast.ops import PLAN_COLUMNS


@pytest.fixture(scope="module")
def dialogues():
    return builtin_dialogues(num_train=30, num_valid=5)


@pytest.fixture(scope="module")
def store(dialogues, tokenizer, tmp_path_factory):
    return build_store(dialogues, tokenizer, tmp_path_factory.mktemp("batches") / "store")


def make_batches(store, split="train", **options):
    defaults = {
        "batch_size": 4,
        "num_candidates": 0,
        "max_history": 2,
        "max_length": 512,
        "layout": "padded",
    }
    return DialogueBatches(store, split, **{**defaults, **options})


def rows_of(batches):
    return [rows.tolist() for rows in batches._batches]


def expected_batch(examples, ids_of, tokenizer, num_candidates, max_history):
    """The predecessor's way: Python lists, one candidate after another, then padded."""
    special = special_ids(tokenizer)
    built = []
    for persona, utterance in examples:
        history = [ids_of[text] for text in utterance.history[-(2 * max_history + 1) :]]
        candidates = utterance.candidates[-num_candidates:]
        built.append(
            [
                build_input_from_segments(
                    [ids_of[text] for text in persona],
                    history,
                    ids_of[text],
                    tokenizer,
                    lm_labels=j == len(candidates) - 1,
                )
                for j, text in enumerate(candidates)
            ]
        )
    seq_len = max(len(instance["input_ids"]) for row in built for instance in row)
    shape = (len(built), max(map(len, built)), seq_len)
    batch = {
        "input_ids": np.full(shape, special.pad),
        "token_type_ids": np.full(shape, special.pad),
        "labels": np.full(shape, -100),
        "mc_token_ids": np.full(shape[:2], -1),
        "mc_labels": np.array([len(row) - 1 for row in built]),
    }
    for r, row in enumerate(built):
        for j, instance in enumerate(row):
            length = len(instance["input_ids"])
            batch["input_ids"][r, j, :length] = instance["input_ids"]
            batch["token_type_ids"][r, j, :length] = instance["token_type_ids"]
            batch["labels"][r, j, :length] = instance["lm_labels"]
            batch["mc_token_ids"][r, j] = instance["mc_token_ids"]
    return batch


def assert_whole_split_is_exact(store, split, dialogues, tokenizer, step=1, **options):
    batches = make_batches(store, split, **options)
    examples = [(d.personality, u) for d in dialogues for u in d.utterances]
    texts = sorted({t for d, u in examples for t in [*d, *u.history, *u.candidates]})
    ids_of = dict(zip(texts, encode(tokenizer, texts), strict=True))
    for rows in batches._batches[::step]:
        expected = expected_batch(
            [examples[row] for row in rows],
            ids_of,
            tokenizer,
            options.get("num_candidates", 0),
            options.get("max_history", 2),
        )
        batch = batches.collate(rows)
        for name, array in expected.items():
            assert np.array_equal(batch[name].numpy(), array), name


@pytest.mark.parametrize("num_candidates", [0, 2])
@pytest.mark.parametrize("max_history", [0, 2])
def test_batches_are_what_the_python_way_builds(
    store, dialogues, tokenizer, num_candidates, max_history
):
    assert_whole_split_is_exact(
        store,
        "train",
        dialogues["train"],
        tokenizer,
        num_candidates=num_candidates,
        max_history=max_history,
    )


def test_thousands_of_random_dialogues_are_exact(tokenizer, tmp_path):
    rng = random.Random(0)
    words = [
        "yes",
        "no",
        "tea",
        "rain",
        "two",
        "blue",
        "cat",
        "why",
        "go",
        "home",
        "<eos>",
        "é",
        "!",
        "猫",
    ]

    def text():
        return " ".join(rng.choices(words, k=rng.randint(1, 9)))

    def texts(most):
        return [text() for _ in range(rng.randint(0, most))]

    dialogues = [
        Dialogue(texts(5), [Utterance(texts(7), [*texts(5), text()])]) for _ in range(4000)
    ]
    store = build_store({"train": dialogues}, tokenizer, tmp_path / "store")
    assert_whole_split_is_exact(store, "train", dialogues, tokenizer, batch_size=16)


def test_all_of_the_real_data_is_exact(shared_dir, tmp_path):
    tokenizer = load_tokenizer(shared_dir / "tokenizers" / "openai-gpt")
    dialogues = load_dialogues(shared_dir / "data" / "synthetic-persona-chat")
    store = build_store(dialogues, tokenizer, tmp_path / "store")
    # Two candidates of every training example, all twenty of the validation split.
    assert_whole_split_is_exact(
        store, "train", dialogues["train"], tokenizer, num_candidates=2, batch_size=32
    )
    assert_whole_split_is_exact(store, "valid", dialogues["valid"], tokenizer, batch_size=8)


def test_ragged_candidate_counts_share_a_batch(tokenizer, tmp_path):
    utterances = [Utterance(["hi"], ["no"] * n + ["yes"]) for n in (0, 3, 1)]
    dialogues = [Dialogue(["i am"], utterances)]
    store = build_store({"train": dialogues}, tokenizer, tmp_path / "store")
    assert_whole_split_is_exact(store, "train", dialogues, tokenizer)


def test_an_epoch_sees_every_example_once(store):
    batches = make_batches(store, shuffle=True)
    for epoch in range(3):
        batches.set_epoch(epoch)
        seen = [row for rows in rows_of(batches) for row in rows]
        assert sorted(seen) == list(range(batches.num_examples))


def test_the_order_depends_on_seed_and_epoch_alone(store):
    orders = {}
    for seed in (1, 2):
        batches = make_batches(store, shuffle=True, seed=seed)
        for epoch in (0, 1, 0):
            batches.set_epoch(epoch)
            order = rows_of(batches)
            assert orders.setdefault((seed, epoch), order) == order
    distinct = {str(order) for order in orders.values()}
    assert len(distinct) == 4


def test_a_batch_of_an_epoch_is_the_collation_of_its_rows(store):
    batches = make_batches(store, shuffle=True)
    for i, rows in enumerate(batches._batches):
        for name, tensor in batches.collate(rows).items():
            assert torch.equal(batches[i][name], tensor), name


def test_it_resumes_at_a_saved_position(store):
    batches = make_batches(store, shuffle=True)
    batches.set_epoch(3)
    whole = [batch["input_ids"] for batch in batches]
    batches.set_epoch(3, start=5 * 4)
    rest = [batch["input_ids"] for batch in batches]
    assert len(rest) == len(whole) - 5
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[5:], strict=True))


def steps_of(ranks):
    """The rows of each step, over all ranks."""
    return [
        sorted(row for b in ranks for i in step for row in b.rows_of(i).tolist())
        for step in ranks[0].steps
    ]


@pytest.mark.parametrize(
    ("world_size", "batch_size", "batches_per_step"), [(1, 1, 12), (1, 6, 2), (3, 4, 1), (2, 1, 6)]
)
def test_a_step_has_the_same_examples_however_they_are_cut(
    store, world_size, batch_size, batches_per_step
):
    one = make_batches(store, shuffle=True, batch_size=12)
    ranks = [
        make_batches(
            store,
            shuffle=True,
            batch_size=batch_size,
            batches_per_step=batches_per_step,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    for epoch in range(2):
        for batches in (one, *ranks):
            batches.set_epoch(epoch)
        assert len({len(batches) for batches in ranks}) == 1
        assert steps_of(ranks) == steps_of([one])


def test_a_run_may_go_on_with_other_steps_and_sees_each_example_once(store):
    sizes, seen, start = [(4, 1), (1, 3), (6, 2)], [], 0
    for batch_size, batches_per_step in sizes:
        batches = make_batches(
            store, shuffle=True, batch_size=batch_size, batches_per_step=batches_per_step
        )
        batches.set_epoch(1, start)
        steps = steps_of([batches])
        taken = steps if (batch_size, batches_per_step) == sizes[-1] else steps[:2]
        seen += [row for step in taken for row in step]
        start = len(seen)
    assert sorted(seen) == list(range(batches.num_examples))


@pytest.mark.parametrize("batches_per_step", [1, 3])
def test_shares_are_what_a_batch_adds_to_the_whole_step(store, batches_per_step):
    # Replies cut by a short max_length count only what is left of them.
    ranks = [
        make_batches(
            store,
            "valid",
            rank=rank,
            world_size=3,
            batch_size=2,
            batches_per_step=batches_per_step,
            max_length=10,
        )
        for rank in range(3)
    ]
    assert any(ranks[0].cuts)
    for step in ranks[0].steps:
        parts = [(batches, i) for batches in ranks for i in step]
        tokens = [int((batches[i]["labels"] != -100).sum()) for batches, i in parts]
        examples = [int((batches[i]["mc_labels"] != -100).sum()) for batches, i in parts]
        for (batches, i), n, m in zip(parts, tokens, examples, strict=True):
            expected = (3 * n / sum(tokens), 3 * m / sum(examples))
            assert batches.shares[i] == pytest.approx(expected)


def test_a_rank_without_an_example_gets_one_without_labels(store):
    last = make_batches(store, "valid", max_examples=5, batch_size=2, rank=1, world_size=2)[1]
    assert last["input_ids"].shape[0] == 1
    assert last["labels"].eq(-100).all()
    assert last["mc_labels"].eq(-100).all()


def test_batches_hold_examples_of_similar_length(store):
    batches = make_batches(store, shuffle=True)
    spread = [np.ptp(batches.index.shared_lengths[rows]) for rows in batches._batches]
    assert np.mean(spread) < np.ptp(batches.index.shared_lengths) / 4


def test_a_permutation_rotates_the_persona(tokenizer, tmp_path):
    persona = ["a", "b", "c"]
    store = build_store(
        {"train": [Dialogue(persona, [Utterance(["hi"], ["yes"])])]}, tokenizer, tmp_path / "store"
    )
    batches = make_batches(store, personality_permutations=4, batch_size=1)
    texts = [tokenizer.decode(batches.collate(np.array([r]))["input_ids"][0, 0]) for r in range(4)]
    assert [text[5:8] for text in texts] == ["abc", "cab", "bca", "abc"]


def test_a_subset_is_spread_evenly(store):
    batches = make_batches(store, max_examples=10)
    assert batches.num_examples == 10
    assert np.all(np.diff(batches.rows) > 0)
    assert batches.rows[-1] > 0.8 * make_batches(store).num_examples


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
    assert batch["input_ids"].flatten()[-1] == store.special_ids.eos
    assert (labels != -100).sum() == num_labels
    assert (labels[-1] == -100) == bool(cuts[2])


def test_of_a_question_too_long_its_end_is_kept(tokenizer, tmp_path):
    [question], [reply] = (
        encode(tokenizer, [text]) for text in ("why do you like tea so much ?", "yes")
    )
    dialogue = Dialogue([], [Utterance(["why do you like tea so much ?"], ["yes"])])
    store = build_store({"train": [dialogue]}, tokenizer, tmp_path / "store")
    batch = make_batches(store, max_length=len(reply) + 8)[0]
    bos, eos, speaker1, speaker2, _ = store.special_ids
    expected = [bos, speaker2, *question[-4:], speaker1, *reply, eos]
    assert batch["input_ids"].flatten().tolist() == expected


def test_a_long_distractor_cuts_the_prefix_but_not_the_true_replys_end(tokenizer, tmp_path):
    store = long_store(tokenizer, tmp_path / "s", [], [5], [20, 3])
    batches = make_batches(store, max_length=12)
    assert (batches.index.num_labels.tolist(), batches.cuts) == ([4], (1, 0, 1))
    assert batches[0]["labels"][0, 1, :6].tolist()[-1] == store.special_ids.eos


@pytest.mark.skipif(_native.host is None, reason="nothing is compiled here")
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_compiled_index_equals_its_reference(data):
    def sizes(most):
        return data.draw(st.lists(st.integers(0, 9), max_size=most))

    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))
    ids = st.integers(0, len(lengths) - 1)
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


@pytest.mark.parametrize("num_candidates", [1, 3, 0])
def test_both_layouts_hold_the_same_batches_of_the_same_candidates(store, num_candidates):
    settings = {"shuffle": True, "num_candidates": num_candidates, "max_length": 80}
    padded, shared = (make_batches(store, layout=name, **settings) for name in ("padded", "shared"))
    for in_padded, in_shared in zip(list(padded)[:6], list(shared)[:6], strict=True):
        assert torch.equal(in_padded["mc_labels"], in_shared["mc_labels"])
        bounds = in_shared["offsets"].tolist()
        for row, (begin, end) in enumerate(pairwise(bounds)):
            branch = in_shared["branch_ids"][begin:end]
            for j, last in enumerate(in_padded["mc_token_ids"][row].tolist()):
                own = (branch == 0) | (branch == j + 1)
                for name in ("input_ids", "token_type_ids", "labels"):
                    sequence = in_shared[name][begin:end][own]
                    assert torch.equal(sequence, in_padded[name][row, j, : last + 1]), name
                positions = in_shared["position_ids"][begin:end][own]
                assert torch.equal(positions, torch.arange(last + 1))
                at = in_shared["mc_token_ids"][row, j]
                assert in_shared["branch_ids"][at] == j + 1
                assert in_shared["input_ids"][at] == store.special_ids.eos


def test_an_empty_split_has_no_batches(tokenizer, tmp_path):
    store = build_store({"train": [], "valid": []}, tokenizer, tmp_path / "store")
    batches = make_batches(store)
    assert len(batches) == len(list(batches)) == 0
    index = index_examples(store, "train", max_history=2, num_candidates=2, max_length=9)
    assert index.plan.shape == (0, len(PLAN_COLUMNS))
