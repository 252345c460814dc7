"""Batches: their exact contents in either layout."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from convai_fast.data.build_store import build_store
from convai_fast.data.index import index_examples
from convai_fast.data.readers import load_dialogues
from convai_fast.dialogue.chat_template import encode_dialogue, layout_of
from convai_fast.dialogue.dialogue import Dialogue, Utterance
from convai_fast.dialogue.encoding import encode, encode_at
from convai_fast.dialogue.layout import Place, build_sequence, sentence_place
from convai_fast.dialogue.sequence import build_input_from_segments
from convai_fast.dialogue.tokenizer import load_tokenizer, special_ids
from convai_fast.errors import UserError
from convai_fast.generation.request import Request, build_prompt
from convai_fast.ops import PLAN_COLUMNS
from tests.helpers.batches import make_batches
from tests.helpers.chat_tokenizers import chat_tokenizer
from tests.helpers.layouts import AROUND, random_layout


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


@pytest.mark.parametrize("seed", range(8))
def test_each_example_is_laid_out_as_its_layout_says(tokenizer, tmp_path, seed):
    layout = random_layout(seed, max_token=200, known=AROUND)
    texts = [f"{word} tea ." for word in ("hello", "no", "i like", "you have", "why", "yes")]
    dialogues = [
        Dialogue([], [Utterance(texts[:count], texts[count:]) for count in range(5)]),
        Dialogue(texts[:1], [Utterance(texts[1:3], texts[:2])]),
        Dialogue(texts[:3], [Utterance(texts[count:4], texts[4:]) for count in range(4)]),
    ]
    store = build_store({"train": dialogues}, tokenizer, tmp_path / "store", layout)
    batches = make_batches(store, personality_permutations=3, max_history=9)
    batch = batches.collate(batches.rows)
    examples = [(each.personality, one) for each in dialogues for one in each.utterances]
    for row in range(3 * len(examples)):
        rotation, number = divmod(row, len(examples))
        persona, utterance = examples[number]
        persona = np.roll(persona, rotation).tolist()
        count, turns = len(persona), list(utterance.history)
        places = [sentence_place(i, count) for i in range(count)]
        sentences = encode_at(tokenizer, persona, places, layout)
        places = layout.places_of_turns(len(turns), has_persona=count > 0)
        history = encode_at(tokenizer, turns, places, layout)
        for j, text in enumerate(utterance.candidates):
            [reply] = encode_at(tokenizer, [text], [Place.REPLY], layout)
            ids, segments, _ = build_sequence(sentences, history, reply, layout)
            length = int(batch["mc_token_ids"][row, j]) + 1
            assert batch["input_ids"][row, j, :length].tolist() == ids
            assert batch["token_type_ids"][row, j, :length].tolist() == segments


@pytest.mark.parametrize("name", ["qwen3", "llama2", "mistral0.3"])
def test_a_chat_model_reads_its_template_in_batches_and_in_prompts(tmp_path, name):
    tokenizer, persona = chat_tokenizer(name), ["i like tea.", "i am old.", "i sail."]
    layout = layout_of(tokenizer)
    said = ["hello!", "hi, and you?", "fine. tea?", "yes.", "no?"]
    examples = [(persona[:i], said[i % 2 : i + 1]) for i in range(4)]
    dialogues = [Dialogue(own, [Utterance(turns, ["no.", "ok."])]) for own, turns in examples]
    store = build_store({"train": dialogues}, tokenizer, tmp_path / "store", layout)
    batches = make_batches(store)
    batch = batches.collate(batches.rows)
    for row, (own, turns) in enumerate(examples):
        for j, reply in enumerate(("no.", "ok.")):
            expected = encode_dialogue(tokenizer, layout, own, turns, reply)
            assert batch["input_ids"][row, j, : len(expected)].tolist() == expected
            assert batch["mc_token_ids"][row, j] == len(expected) - 1
        request = Request(persona=own, history=turns)
        prompt = build_prompt(request, tokenizer, layout, len(tokenizer), 512)
        [answer] = encode_at(tokenizer, ["ok."], [Place.REPLY], layout)
        assert [*prompt.input_ids, *answer, layout.eos] == expected


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
                assert in_shared["input_ids"][at] == store.layout.eos


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"split": "test"}, "there is no split 'test': choose from train, valid"),
        ({"layout": "packed"}, "layout is 'packed', but must be shared or padded"),
        ({"batch_size": 0}, "batch_size is 0, but must be at least 1"),
        ({"batch_size": -1}, "batch_size is -1, but must be at least 1"),
        ({"batches_per_step": 0}, "batches_per_step is 0, but must be at least 1"),
    ],
)
def test_batches_that_cannot_be_are_refused_in_one_sentence(store, given, says):
    with pytest.raises(UserError, match=f"^{says}$"):
        make_batches(store, **given)


def test_an_empty_split_has_no_batches(tokenizer, tmp_path):
    store = build_store({"train": [], "valid": []}, tokenizer, tmp_path / "store")
    batches = make_batches(store)
    assert len(batches) == len(list(batches)) == 0
    index = index_examples(store, "train", max_history=2, num_candidates=2, max_length=9)
    assert index.plan.shape == (0, len(PLAN_COLUMNS))
