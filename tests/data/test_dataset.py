"""From what a user names to an open store: cached, mixed, rebuilt, built once."""

import gzip
import json
import multiprocessing
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from convai_fast.data import build_store, dataset
from convai_fast.data.batches import DialogueBatches
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.data.dataset import (
    checked_sources,
    sources_of,
    trained_with,
    unknown_share,
)
from convai_fast.data.options import DataOptions
from convai_fast.data.readers import load_dialogues
from convai_fast.dialogue.layout import classic
from convai_fast.dialogue.new_tokenizer import train_tokenizer
from convai_fast.dialogue.tokenizer import special_ids
from convai_fast.errors import UserError


def open_dataset(options, tokenizer, cache, report=print):
    return dataset.open_dataset(options, tokenizer, classic(special_ids(tokenizer)), cache, report)


def write_pairs(path, names, valid=()):
    records = [{"utterances": [{"history": ["hi"], "candidates": [name]}]} for name in names]
    content = {"train": records}
    if valid:
        content["valid"] = [{"utterances": [{"history": ["hi"], "candidates": [n]}]} for n in valid]
    path.write_text(json.dumps(content))
    return str(path)


def replies(store, split="train"):
    return [u.candidates[-1] for d in store.dialogues(split) for u in d.utterances]


@pytest.fixture
def files(tmp_path):
    a = write_pairs(tmp_path / "a.json", [f"a {i}" for i in range(10)])
    b = write_pairs(tmp_path / "b.json", [f"b {i}" for i in range(6)], ["v 1", "v 2"])
    return a, b


def test_a_store_holds_the_dialogues_that_load_dialogues_gives(files, tokenizer, tmp_path):
    options = DataOptions(files, data_seed=3)
    store = open_dataset(options, tokenizer, tmp_path / "cache", report=lambda line: None)
    dialogues = load_dialogues(files, seed=3)
    assert {split: list(store.dialogues(split)) for split in store.splits} == dialogues
    again = load_dialogues(store.folder)
    assert again == dialogues


def test_a_cached_store_is_found_without_reading_the_data(files, tokenizer, tmp_path, monkeypatch):
    said = []
    first = open_dataset(DataOptions(files), tokenizer, tmp_path / "cache", said.append)
    monkeypatch.setattr(dataset, "read_into", None)
    again = open_dataset(DataOptions(files), tokenizer, tmp_path / "cache", said.append)
    assert again.folder == first.folder and "found tokenised" in said[-1]
    with pytest.raises(TypeError):  # it has to be read for another seed
        open_dataset(DataOptions(files, data_seed=1), tokenizer, tmp_path / "cache", said.append)
    write_pairs(tmp_path / "a.json", ["changed", "too"])
    with pytest.raises(TypeError):
        open_dataset(DataOptions(files), tokenizer, tmp_path / "cache", said.append)


def test_what_reading_told_is_told_again_when_the_store_is_found(tokenizer, tmp_path):
    path = tmp_path / "chat.json"
    turns = [{"role": role, "content": role, "mask": 1} for role in ("user", "assistant")]
    path.write_text(json.dumps([{"messages": turns}, {"messages": 5}]))
    options = DataOptions(str(path), skip_bad_records=True)
    first, again = [], []
    open_dataset(options, tokenizer, tmp_path / "cache", first.append)
    open_dataset(options, tokenizer, tmp_path / "cache", again.append)
    assert "1 of 2 records cannot be read and are skipped" in first[0]
    assert "the field 'mask' is not understood and not used" in first[1]
    assert "found tokenised" in again[0] and again[1:] == first[:2]


def test_what_reading_tells_is_told_once_where_it_has_to_be_read_to_be_found(tokenizer, tmp_path):
    (tmp_path / "reader.py").write_text(
        "def read(path):\n"
        "    turns = {'utterances': [{'history': ['hi'], 'candidates': ['yes']}]}\n"
        "    return {'train': [turns, {'utterances': []}]}\n"
    )
    options = DataOptions("x", f"{tmp_path / 'reader.py'}:read")
    for _ in range(2):
        said = []
        open_dataset(options, tokenizer, tmp_path / "cache", said.append)
        assert sum("nothing is answered" in line for line in said) == 1
    assert "found tokenised" in said[-1]


def test_a_compressed_copy_is_the_same_data(files, tokenizer, tmp_path):
    a, _ = files
    with open(a, "rb") as plain, gzip.open(tmp_path / "a.json.gz", "wb") as packed:
        packed.write(plain.read())
    assert load_dialogues(a) == load_dialogues(tmp_path / "a.json.gz")


def test_a_damaged_store_is_built_again(files, tokenizer, tmp_path):
    said = []
    store = open_dataset(DataOptions(files), tokenizer, tmp_path / "cache", said.append)
    expected = replies(store)
    tokens = store.folder / "tokens.bin"
    tokens.write_bytes(bytes(tokens.stat().st_size))
    store = open_dataset(DataOptions(files), tokenizer, tmp_path / "cache", said.append)
    assert replies(store) == expected and store.tokens.any()
    assert any("is not what was written" in line and "built again" in line for line in said)


def test_foreign_files_of_a_file_manager_do_not_matter(files, tokenizer, tmp_path):
    store = open_dataset(DataOptions(files), tokenizer, tmp_path / "cache")
    (store.folder / ".DS_Store").write_bytes(b"x")
    assert replies(open_dataset(DataOptions(store.folder.as_posix()), tokenizer, tmp_path / "c"))


def test_processes_that_want_the_same_store_all_get_it(files, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # its threads do not come along
    fork = multiprocessing.get_context("fork")
    all_are_there, told = fork.Barrier(2), fork.SimpleQueue()

    def work():
        all_are_there.wait(60)
        for seed in range(6):
            options = DataOptions(files, data_seed=seed)
            assert len(open_dataset(options, tokenizer, tmp_path / "cache", told.put).tokens)

    workers = [fork.Process(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    lines = []
    while not told.empty():
        lines.append(told.get())
    assert sum("tokenising into" in line for line in lines) == 6


def test_data_sets_are_mixed_each_with_its_reader_and_weight(files, tokenizer, tmp_path):
    a, b = files
    options = DataOptions((f"{a}=2", f"{b}=0.5"), ("json", "auto"), valid_fraction=0.2)
    store = open_dataset(options, tokenizer, tmp_path / "cache")
    assert store.meta["num_examples"] == {"train": [8, 6], "valid": [2, 2]}
    assert replies(store, "valid")[2:] == ["v 1", "v 2"]
    weights = [source.weight for source in sources_of(options)]
    batches = DialogueBatches(
        store,
        "train",
        batch_size=4,
        num_candidates=1,
        max_history=1,
        max_length=64,
        weights=weights,
        personality_permutations=2,
        shuffle=True,
    )
    seen = Counter(np.concatenate([batches.rows_of(i) for i in range(len(batches))]).tolist())
    assert batches.num_examples == sum(seen.values()) == 2 * (2 * 8 + 3)
    texts = replies(store)
    of_a = [count for row, count in seen.items() if texts[row % 14].startswith("a")]
    of_b = [count for row, count in seen.items() if texts[row % 14].startswith("b")]
    assert set(of_a) == {2} and len(of_a) == 16
    assert set(of_b) == {1} and len(of_b) == 6


def test_the_weight_of_a_store_of_several_sources_holds_for_all_of_them(files, tokenizer, tmp_path):
    a, b = files
    store = open_dataset(DataOptions((a, b), valid_fraction=0.2), tokenizer, tmp_path / "cache")
    options = DataOptions(f"{store.folder}=2")
    weights = [source.weight for source in trained_with(options, store, max_history=1).sources]
    settings = {"batch_size": 4, "num_candidates": 1, "max_history": 1, "max_length": 64}
    batches = DialogueBatches(store, "train", **settings, weights=weights)
    assert Counter(batches.rows.tolist()) == dict.fromkeys(range(14), 2)


@pytest.mark.parametrize(
    ("path", "readers", "says"),
    [
        ((), ("auto",), "no dialogues given"),
        (("a.json", "b.json"), ("json", "csv", "json"), "2 data sets and 3 readers"),
        (("a.json=0",), ("auto",), "the weight of a.json is 0"),
        (("a.json=-1",), ("auto",), "the weight of a.json is -1"),
        (("missing.json=2",), ("auto",), "missing.json: there is no such file"),
    ],
)
def test_what_cannot_be_mixed_is_one_sentence(path, readers, says):
    with pytest.raises(UserError, match=says):
        checked_sources(DataOptions(path, readers))


def test_a_path_with_an_equals_sign_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "b=2", ["x"])
    (source,) = sources_of(DataOptions("b=2"))
    assert (source.path, source.weight) == ("b=2", 1)


def test_a_model_remembers_what_it_was_trained_with(files, tokenizer, tmp_path):
    a, b = files
    options = DataOptions((f"{a}=2", b), valid_fraction=0.3, data_seed=5)
    store = open_dataset(options, tokenizer, tmp_path / "cache")
    trained = trained_with(options, store, max_history=1)
    trained.write(tmp_path)
    assert type(trained).read(tmp_path) == trained
    found = [(s.path, s.weight, s.origins[0].is_cut) for s in trained.sources]
    assert found == [(a, 2, True), (b, 1, False)]
    assert trained.data_seed == 5 and trained.valid_fraction == 0.3
    # A store that is opened as it is was cut when it was made.
    again = trained_with(DataOptions(str(store.folder)), store, max_history=1)
    assert again.sources[0].origins == tuple(s.origins[0] for s in trained.sources)
    assert again.data_seed == 5
    file = tmp_path / "trained_with.json"
    values = json.loads(file.read_text())
    source = {**values["sources"][0], "weight": "2"}
    for damaged in ([], {**values, "max_history": "2"}, {**values, "sources": [source]}):
        file.write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="does not say what the model was trained with"):
            type(trained).read(tmp_path)


def test_a_store_is_not_taken_for_that_of_another_layout(files, tokenizer, tmp_path):
    ours = classic(special_ids(tokenizer))
    theirs, said, cache = replace(ours, no_persona=(7,)), [], tmp_path / "cache"
    first = dataset.open_dataset(DataOptions(files), tokenizer, ours, cache, said.append)
    for source in (files, str(first.folder)):
        store = dataset.open_dataset(DataOptions(source), tokenizer, theirs, cache, said.append)
        assert (store.layout, first.layout) == (theirs, ours)
        assert store.meta["fingerprint"] != first.meta["fingerprint"]
    assert f"{first.folder} was made with another layout: its texts are tokenised anew" in said


@pytest.mark.parametrize("valid_fraction", [0, 0.3])
def test_the_splits_of_a_store_stay_with_another_tokenizer_and_in_a_mixture(
    files, tokenizer, tmp_path, valid_fraction
):
    a, b = files
    how = {"valid_fraction": valid_fraction, "data_seed": 5}
    first = open_dataset(DataOptions(a, **how), tokenizer, tmp_path / "cache")
    other = train_tokenizer(builtin_dialogues(num_train=5, num_valid=1)["train"], 300)
    again = open_dataset(DataOptions(str(first.folder)), other, tmp_path / "cache")
    mixed = open_dataset(DataOptions((str(first.folder), b)), tokenizer, tmp_path / "cache")
    for split in ("train", "valid"):
        dialogues = list(first.dialogues(split))
        assert list(again.dialogues(split)) == dialogues
        assert list(mixed.dialogues(split))[: len(dialogues)] == dialogues
    assert again.origins == mixed.origins[:1] == first.origins
    trained = trained_with(DataOptions(str(first.folder)), again, max_history=2)
    assert (trained.valid_fraction, trained.data_seed) == (valid_fraction, 5)


def test_the_share_of_unknown_tokens_is_told(tmp_path, shared_dir):
    from convai_fast.dialogue.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(shared_dir / "tokenizers" / "openai-gpt")
    path = write_pairs(tmp_path / "a.json", ["漢字", "some words of a long reply to the first"])
    store = open_dataset(DataOptions(path, valid_fraction=0), tokenizer, tmp_path / "cache")
    assert unknown_share(store).startswith("WARNING: ")
    assert "of the tokens are unknown" in unknown_share(store)
    path = write_pairs(tmp_path / "b.json", ["fine"])
    store = open_dataset(DataOptions(path, valid_fraction=0), tokenizer, tmp_path / "cache")
    assert unknown_share(store) == ""


def test_a_full_disk_while_reading_is_one_sentence(files, tokenizer, tmp_path, monkeypatch):
    def full(path, mode):
        return open("/dev/full", mode)

    monkeypatch.setattr("convai_fast.data.spool.open", full, raising=False)
    with pytest.raises(UserError, match=r"cannot keep the dialogues .* No space left on device"):
        open_dataset(DataOptions(files), tokenizer, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to"):
        open_dataset(DataOptions(files), tokenizer, tmp_path / "file" / "cache")


def test_a_reply_without_a_token_is_refused_when_tokenised(files, tokenizer, tmp_path, monkeypatch):
    real = build_store.encode_in

    def encode_in(tokenizer, texts, around):
        return [[] if t == "a 3" else real(tokenizer, [t], around)[0] for t in texts]

    monkeypatch.setattr(build_store, "encode_in", encode_in)
    with pytest.raises(UserError, match="the reply 'a 3' has no token in this tokenizer"):
        open_dataset(DataOptions(files), tokenizer, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
