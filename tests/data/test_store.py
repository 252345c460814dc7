"""The store: what goes in comes out, from disk, and nothing damaged is opened."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from convai_fast.data.build_store import build_store
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.data.spool import fingerprint
from convai_fast.data.store import DialogueStore, checksum
from convai_fast.dialogue.dialogue import Dialogue, Utterance
from convai_fast.dialogue.encoding import encode
from convai_fast.dialogue.layout import Place, Surroundings, classic
from convai_fast.dialogue.tokenizer import special_ids
from convai_fast.errors import UserError
from convai_fast.ops.plan import pieces_of


@pytest.fixture(scope="module")
def dialogues():
    return builtin_dialogues(num_train=12, num_valid=3)


@pytest.fixture
def store(dialogues, tokenizer, tmp_path):
    return build_store(dialogues, tokenizer, tmp_path / "store")


def texts_of(store, split, tokenizer):
    """Every text of a split, decoded from the store, in the shape of the dialogues."""
    tables = store.splits[split]

    def texts(ids):
        return [tokenizer.decode(store.utterance(i)) for i in ids.tolist()]

    result = []
    for d in range(tables.num_dialogues):
        persona = tables.persona_ids[tables.persona_offsets[d] : tables.persona_offsets[d + 1]]
        utterances = []
        for e in (tables.dialogue == d).nonzero().flatten().tolist():
            first = tables.history_first[e]
            history = tables.history_ids[first : first + tables.history_count[e]]
            begin, end = tables.candidate_offsets[e : e + 2]
            utterances.append(Utterance(texts(history), texts(tables.candidate_ids[begin:end])))
        result.append(Dialogue(texts(persona), utterances))
    return result


@pytest.mark.parametrize("split", ["train", "valid"])
def test_every_text_comes_back(store, dialogues, tokenizer, split):
    assert texts_of(store, split, tokenizer) == dialogues[split]


def test_histories_that_do_not_grow_come_back_too(tokenizer, tmp_path):
    histories = [["a"], ["a", "b", "c"], ["b", "c"], [], ["x", "y"], ["x", "y"], ["x"]]
    dialogue = Dialogue([], [Utterance(history, ["r"]) for history in histories])
    store = build_store({"train": [dialogue]}, tokenizer, tmp_path / "store")
    assert texts_of(store, "train", tokenizer) == [dialogue]


def test_equal_utterances_are_stored_once(tokenizer, tmp_path):
    dialogue = Dialogue(["hello"], [Utterance(["hello"], ["yes", "hello"])] * 50)
    store = build_store({"train": [dialogue], "valid": [dialogue]}, tokenizer, tmp_path / "store")
    assert len(store.text_offsets) - 1 == 2
    texts = encode(tokenizer, ["hello", "yes"])
    assert [store.utterance(i) for i in range(2)] == texts
    assert store.num_tokens == sum(map(len, texts))
    assert len(store.tokens) == sum(map(len, [*texts, *pieces_of(store.layout)]))


def test_a_text_has_tokens_of_the_places_alone_that_it_stands_in(tokenizer, tmp_path):
    around = {place: Surroundings(trailing=f" {place}") for place in Place}
    layout = replace(
        classic(special_ids(tokenizer)),
        partner_begins=True,
        persona_turn="last",
        surroundings=tuple(around[place] for place in Place),
    )
    dialogue = Dialogue(["a"], [Utterance(["b"], ["c"]), Utterance(["b", "d", "e"], ["f", "c"])])
    store = build_store({"train": [dialogue]}, tokenizer, tmp_path / "store", layout)
    assert store.layout == layout
    texts = [store.text(i) for i in range(6)]
    sentences = {*range(4)}
    expected = {"a": sentences, "d": {Place.SPEAKER1}, "c": {Place.REPLY}, "f": {Place.REPLY}}
    expected |= {text: {Place.SPEAKER2, Place.PERSONA_TURN} for text in "be"}
    for number, (place, text) in enumerate(product(Place, texts)):
        [ids] = encode(tokenizer, [f"{text} {place}"])
        assert store.utterance(number) == (ids if place in expected[text] else [])


def test_history_grows_with_the_turns_not_with_their_square(tokenizer, tmp_path):
    turns = [f"turn {i}" for i in range(400)]
    utterances = [Utterance(turns[: i + 1], ["r"]) for i in range(0, 400, 2)]
    store = build_store({"train": [Dialogue([], utterances)]}, tokenizer, tmp_path / "store")
    assert len(store.splits["train"].history_ids) == 399


def test_small_vocabularies_take_two_bytes_a_token(store):
    assert store.tokens.dtype == torch.uint16
    assert (store.folder / "tokens.bin").stat().st_size == 2 * len(store.tokens)


def test_the_fingerprint_changes_with_every_text_and_with_where_it_stands(dialogues):
    assert fingerprint(dialogues) == fingerprint(builtin_dialogues(num_train=12, num_valid=3))
    others = [
        {"train": [Dialogue(["a", "b"], [])]},
        {"train": [Dialogue(["ab"], [])]},
        {"train": [Dialogue(["a\x01b"], [])]},
        {"train": [Dialogue(["a"], []), Dialogue(["b"], [])]},
        {"valid": [Dialogue(["ab"], [])]},
        {"train": [Dialogue([], [Utterance(["a", "b"], ["c"])])]},
        {"train": [Dialogue([], [Utterance(["a"], ["b", "c"])])]},
    ]
    assert len({fingerprint(each) for each in (dialogues, *others)}) == len(others) + 1


def test_an_interrupted_build_leaves_nothing(dialogues, tokenizer, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("convai_fast.data.build_store.encode_in", fail)
    with pytest.raises(KeyboardInterrupt):
        build_store(dialogues, tokenizer, tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_building_replaces_a_store_but_nothing_else(store, dialogues, tokenizer, tmp_path):
    build_store({"train": dialogues["train"][:1]}, tokenizer, store.folder)
    assert DialogueStore(store.folder).splits["train"].num_dialogues == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="which is no store's: choose another folder"):
        build_store(dialogues, tokenizer, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_what_lies_beside_a_store_stays_when_it_is_replaced(store, dialogues, tokenizer):
    (store.folder / ".git").mkdir()
    (store.folder / ".git" / "x").write_text("mine")
    (store.folder / "notes.bin").write_text("mine, too")
    build_store({"train": [], "extra": dialogues["train"][:1]}, tokenizer, store.folder)
    build_store({"train": dialogues["train"][:1]}, tokenizer, store.folder)
    assert (store.folder / ".git" / "x").read_text() == "mine"
    assert (store.folder / "notes.bin").read_text() == "mine, too"
    assert not (store.folder / "extra.dialogue.bin").exists()  # of the store that was replaced
    assert DialogueStore(store.folder).splits["train"].num_dialogues == 1


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no whole store"):
        DialogueStore(tmp_path)


def test_an_array_that_cannot_be_mapped_is_one_sentence(store, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("unable to open file in read-only mode: Input/output error (5)")

    monkeypatch.setattr(torch, "from_file", refuse)
    with pytest.raises(UserError, match=r"tokens\.bin cannot be read \(unable to open file"):
        DialogueStore(store.folder)


def test_another_format_version_is_refused(store):
    meta = json.loads((store.folder / "meta.json").read_text())
    (store.folder / "meta.json").write_text(json.dumps({**meta, "format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        DialogueStore(store.folder)


def test_a_file_cut_short_is_named(store):
    path = store.folder / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"tokens\.bin is missing or was cut short"):
        DialogueStore(store.folder)


@pytest.mark.parametrize("meta", ['{"mine": 1}', "[]", "{"])
def test_a_folder_with_somebody_elses_meta_json_is_left_alone(dialogues, tokenizer, tmp_path, meta):
    (tmp_path / "meta.json").write_text(meta)
    (tmp_path / "thesis.bin").write_text("years of work")
    with pytest.raises(UserError, match="which is no store's: choose another folder"):
        build_store(dialogues, tokenizer, tmp_path)
    assert (tmp_path / "thesis.bin").read_text() == "years of work"


def test_a_store_with_other_files_in_it_is_not_replaced(store, dialogues, tokenizer):
    (store.folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="which is no store's: choose another folder"):
        build_store(dialogues, tokenizer, store.folder)


def test_damaged_metadata_is_named(store):
    meta = json.loads((store.folder / "meta.json").read_text())
    for name in ("layout", "token_dtype", "splits"):
        damaged = {key: value for key, value in meta.items() if key != name}
        (store.folder / "meta.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=r"meta\.json is damaged"):
            DialogueStore(store.folder)


def test_a_place_that_cannot_hold_a_store_is_one_sentence(dialogues, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write a store to"):
        build_store(dialogues, tokenizer, tmp_path / "file" / "store")
    with pytest.raises(UserError, match="cannot write a store to"):
        build_store(dialogues, tokenizer, tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "dtype", "value"),
    [
        ("train.persona_ids", np.int32, 10**6),
        ("train.history_ids", np.int32, -1),
        ("train.candidate_ids", np.int32, 10**6),
        ("train.history_first", np.int64, -5),
        ("train.history_count", np.int32, 10**6),
        ("train.candidate_offsets", np.int64, 10**6),
        ("train.dialogue", np.int32, 10**6),
        ("utterance_offsets", np.int64, 10**9),
    ],
)
def test_arrays_that_point_outside_are_refused(store, name, dtype, value):
    path = store.folder / f"{name}.bin"
    array = np.fromfile(path, dtype)
    array[len(array) // 2] = value
    array.tofile(path)
    with pytest.raises(UserError, match="is not what was written"):
        DialogueStore(store.folder)
    meta = json.loads((store.folder / "meta.json").read_text())
    meta["checksums"][name] = checksum(path)
    (store.folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="contradict one another"):
        DialogueStore(store.folder)


def test_splits_that_are_not_given_are_empty_and_an_utterance_needs_a_reply(tokenizer, tmp_path):
    dialogue = Dialogue([], [Utterance(["a"], ["b"])])
    store = build_store({"train": [dialogue]}, tokenizer, tmp_path / "store")
    assert store.splits["valid"].num_examples == 0
    dialogue.utterances[0].candidates.clear()
    with pytest.raises(UserError, match="an utterance has no candidates"):
        build_store({"train": [dialogue]}, tokenizer, tmp_path / "store")
