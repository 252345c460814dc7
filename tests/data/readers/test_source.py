"""What a user names: a file, a folder, a dataset of Hugging Face's."""

import os
import sys

import pytest

from convai_fast.data.readers import load_dialogues
from convai_fast.dialogue.dialogue import Dialogue, Utterance
from tests.helpers.conversations import DOG, DOG_DIALOGUE
from tests.helpers.reading import assert_user_error, load_bare, pairs_of

TEA_DIALOGUE = {
    "personality": ["I like tea."],
    "utterances": [{"history": ["Hello!"], "candidates": ["Hi, some tea?"]}],
}
TEA = Dialogue(["I like tea."], [Utterance(["Hello!"], ["Hi, some tea?"])])
DOG_PARLAI = "1 hey\ti have a dog\n"
TEA_MESSAGES = {
    "messages": [
        {"role": "system", "content": "I like tea."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi, some tea?"},
    ]
}
TEA_SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "I like tea."},
        {"from": "human", "value": "Hello!"},
        {"from": "gpt", "value": "Hi, some tea?"},
    ]
}
TEA_ROW = {
    "user 1 personas": "I am thirsty.",
    "user 2 personas": "I like tea.",
    "Best Generated Conversation": "User 1: Hello!\nUser 2: Hi, some tea?",
}


@pytest.mark.parametrize("name", ["valid", "validation", "val", "dev", "test"])
@pytest.mark.parametrize("reader", ["auto", "json"])
def test_a_folder_holds_train_and_valid(write, name, reader):
    write("data/train.json", [TEA_DIALOGUE])
    path = write(f"data/{name}.json", [DOG_DIALOGUE])
    assert load_bare(path.parent, reader) == {"train": [TEA], "valid": [DOG]}


def test_a_folder_prefers_valid_to_test_and_the_suffix_of_train(write):
    write("data/train.txt", "1 a\tb\n")
    write("data/test.txt", "1 a\tb\n")
    write("data/valid.json", [TEA_DIALOGUE])
    path = write("data/valid.txt", DOG_PARLAI)
    assert load_bare(path.parent)["valid"] == [DOG]


def test_a_file_does_not_pick_up_its_sibling(write):
    write("data/valid.json", [DOG_DIALOGUE])
    assert load_bare(write("data/train.json", [TEA_DIALOGUE]))["valid"] == []


def test_a_folder_of_one_file_is_cut(write):
    path = write("data/train.json", [TEA_DIALOGUE, DOG_DIALOGUE])
    splits = load_dialogues(path.parent)
    assert (len(splits["train"]), len(splits["valid"])) == (1, 1)


def test_paths_that_hold_no_dialogues_are_named(write, tmp_path):
    missing = tmp_path / "missing.json"
    assert_user_error(lambda: load_dialogues(missing), [missing, "no such file", "reader hub"])
    assert_user_error(lambda: load_dialogues("a\0b"), ["no such file"])
    folder = write("a/other.json", [DOG_DIALOGUE]).parent
    assert_user_error(lambda: load_dialogues(folder), [folder, "no file train.json"])
    write("two/train.json", [DOG_DIALOGUE])
    folder = write("two/train.txt", DOG_PARLAI).parent
    assert_user_error(lambda: load_dialogues(folder), [folder, "train.json and train.txt"])
    write("both/train.json", {"train": [DOG_DIALOGUE], "valid": [DOG_DIALOGUE]})
    folder = write("both/valid.json", [DOG_DIALOGUE]).parent
    assert_user_error(lambda: load_dialogues(folder), [folder, "train.json", "both splits"])
    folder = write("gone/valid.json", [DOG_DIALOGUE]).parent
    os.symlink(tmp_path / "nowhere", folder / "train.json")
    assert_user_error(lambda: load_dialogues(folder), [folder, "no file train.json"])


def test_the_files_of_convai2_in_a_folder_are_found(write):
    write("c/train_self_original.txt", "1 a\tb\n")
    write("c/train_both_revised.txt", "1 x\ty\n")
    folder = write("c/valid_self_original.txt", "1 c\td\n").parent
    splits = load_dialogues(folder, num_candidates=1)
    assert {s: pairs_of(ds) for s, ds in splits.items()} == {
        "train": [(["a"], ["b"])],
        "valid": [(["c"], ["d"])],
    }


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield datasets
    datasets.enable_progress_bars()


@pytest.mark.parametrize("reader", ["auto", "hub"])
@pytest.mark.parametrize("row", [TEA_DIALOGUE, TEA_MESSAGES, TEA_SHAREGPT, TEA_ROW])
def test_hub_recognises_a_saved_dataset_by_its_columns(datasets, tmp_path, reader, row):
    dataset = datasets.Dataset.from_list([row | {"id": 7}])
    datasets.DatasetDict(train=dataset, validation=dataset, test=dataset).save_to_disk(
        tmp_path / "d"
    )
    splits = load_bare(tmp_path / "d", reader)
    assert splits == {"train": [TEA], "valid": [TEA]}


def test_hub_reads_a_saved_dataset_without_splits(datasets, tmp_path):
    datasets.Dataset.from_list([TEA_DIALOGUE]).save_to_disk(tmp_path / "d")
    assert load_bare(tmp_path / "d") == {"train": [TEA], "valid": []}


def test_hub_reads_a_folder_that_load_dataset_reads(datasets, tmp_path):
    (tmp_path / "d").mkdir()
    datasets.Dataset.from_list([TEA_DIALOGUE]).to_parquet(tmp_path / "d" / "train.parquet")
    assert load_bare(tmp_path / "d") == {"train": [TEA], "valid": []}


def test_hub_names_row_and_field(datasets, tmp_path):
    rows = [{"utterances": [{"history": [], "candidates": c}]} for c in (["a"], [" "])]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "d")
    parts = [str(tmp_path / "d"), "train[1].utterances[0].candidates[0]", "blank"]
    assert_user_error(lambda: load_dialogues(tmp_path / "d"), parts)


def test_hub_names_columns_and_splits_it_cannot_use(datasets, tmp_path):
    datasets.Dataset.from_list([{"text": "a", "label": 1}]).save_to_disk(tmp_path / "columns")
    assert_user_error(
        lambda: load_dialogues(tmp_path / "columns"), ["'text', 'label'", "utterances, messages"]
    )
    dataset = datasets.Dataset.from_list([TEA_DIALOGUE])
    datasets.DatasetDict(other=dataset).save_to_disk(tmp_path / "splits")
    assert_user_error(lambda: load_dialogues(tmp_path / "splits"), ["no split train", "other"])


def test_hub_without_the_datasets_library_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    parts = ["someone/dialogues", "pip install 'convai-fast[hub]'"]
    assert_user_error(lambda: load_dialogues("someone/dialogues", "hub"), parts)


def test_hub_without_a_network_says_so(datasets, monkeypatch):
    def no_network(path):
        raise ConnectionError("Couldn't reach the Hub.\nTry again.")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    parts = ["someone/dialogues", "ConnectionError: Couldn't reach the Hub", "check"]
    assert_user_error(lambda: load_dialogues("someone/dialogues", "hub"), parts)
