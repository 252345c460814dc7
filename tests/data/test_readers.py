"""Reading dialogues: folders, functions of the user's, datasets."""

import os
import sys
import textwrap
from pathlib import Path

import pytest
from reading import assert_user_error, load_bare

from convai_fast.data.readers import load_dialogues
from convai_fast.dialogue.dialogue import Dialogue, Utterance

TEA_DIALOGUE = {
    "personality": ["I like tea."],
    "utterances": [{"history": ["Hello!"], "candidates": ["Hi, some tea?"]}],
}
TEA = Dialogue(["I like tea."], [Utterance(["Hello!"], ["Hi, some tea?"])])
DOG_DIALOGUE = {"utterances": [{"history": ["hey"], "candidates": ["i have a dog"]}]}
DOG = Dialogue([], [Utterance(["hey"], ["i have a dog"])])
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


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Writes a module into the working directory; its name is new in every test."""
    monkeypatch.chdir(tmp_path)
    names = []

    def make(source):
        names.append(f"my_reader_{tmp_path.name}_{len(names)}".replace("-", "_"))
        Path(f"{names[-1]}.py").write_text(textwrap.dedent(source))
        return names[-1]

    yield make
    for name in names:
        sys.modules.pop(name, None)


def test_a_function_of_the_users_reads_what_it_likes(user_module):
    module = user_module("""
        from convai_fast.dialogue.dialogue import Dialogue, Utterance
        THEIRS = Dialogue([], [Utterance(["hey"], ["i have a dog"])])
        def read(path):
            assert path == "anything at all"
            other = {"utterances": [{"history": ["x"], "candidates": ["y"]}]}
            return {"train": (THEIRS, other), "valid": [THEIRS]}
    """)
    before = list(sys.path)
    splits = load_dialogues("anything at all", f"{module}:read")
    assert splits["train"][0].utterances[0].candidates == ["y", "i have a dog"]
    assert splits["valid"] == [DOG]
    assert sys.path == before
    assert sys.modules[module].THEIRS == DOG, "the user's objects must stay as they are"


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        (
            "return {'train': [D, D, D, {'utterances': [U, U, {'history': [], 'candidates': 3}]}]}",
            ["train[3].utterances[2].candidates must be a list, not a number"],
        ),
        (
            "return {'train': [{'utterances': [Utterance('x', ['y'])]}]}",
            ["train[0].utterances[0].history must be a list, not text"],
        ),
        ("return [D, None]", ["[1] must be an object, not null"]),
        ("return None", ["the result holds null", "list of dialogues"]),
        ("return {'valid': [D]}", ["train is missing"]),
        ("return {}['x']", ["KeyError: 'x'", ".py, line 5"]),
        ("return open(path)", ["FileNotFoundError", "some path"]),
        ("yield D; yield {}['x']", ["reading failed in", ".py, line 5", "KeyError: 'x'"]),
        ("return {'train': (1 // n for n in [0])}", [".py, line 5", "ZeroDivisionError"]),
        (
            "return [{'messages': [{1: 'a', 2: 'b'}]}]",
            ["[0].messages[0].role is missing (found are '1', '2')"],
        ),
    ],
)
def test_what_a_function_of_the_users_returns_is_checked(user_module, body, parts):
    module = user_module(f"""
        from convai_fast.dialogue.dialogue import Utterance
        U = {{"history": ["x"], "candidates": ["y"]}}
        D = {{"utterances": [U]}}
        def read(path): {body}
    """)
    assert_user_error(lambda: load_dialogues("some path", f"{module}:read"), [module, *parts])


@pytest.mark.parametrize(
    ("reader", "parts"),
    [
        ("no_such_module_at_all:read", ["no_such_module_at_all", "ModuleNotFoundError"]),
        ("{module}:nothing", ["no function nothing"]),
        ("{module}:VALUE", ["no function VALUE"]),
        ("{broken}:read", ["SyntaxError"]),
        ("{module}:takes_none", ["TypeError"]),
    ],
)
def test_a_function_that_cannot_be_called_is_named(user_module, reader, parts):
    module = user_module("VALUE = 1\ndef takes_none(): pass")
    reader = reader.format(module=module, broken=user_module("def read(:"))
    assert_user_error(lambda: load_dialogues("path", reader), [f"reader {reader}", *parts])


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
