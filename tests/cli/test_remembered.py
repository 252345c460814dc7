"""What a model was trained with is what it is used with, unless said otherwise."""

import dataclasses
import json
from pathlib import Path

import pytest

from convai_fast.cli.main import main
from convai_fast.data.builtin import builtin_dialogues


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory):
    """A run on dialogues without a validation split, with settings that are no defaults."""
    folder = tmp_path_factory.mktemp("remembered")
    dialogues = builtin_dialogues(num_train=20, num_valid=1)["train"]
    data = folder / "dialogues.json"
    data.write_text(json.dumps([dataclasses.asdict(dialogue) for dialogue in dialogues]))
    tokenizer.save_pretrained(folder / "model")
    shape = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 256}
    (folder / "model" / "config.json").write_text(json.dumps(shape))
    arguments = ["--data", str(data), "--model", str(folder / "model"), "--from_scratch"]
    arguments += ["--dataset_cache", str(folder / "cache"), "--output", str(folder / "run")]
    arguments += ["--max_history", "1", "--data_seed", "7", "--valid_fraction", "0.2"]
    assert main(["train", *arguments, "--max_steps", "1", "--precision", "fp32"]) == 0
    return folder / "run"


def evaluate(run, *arguments, data=None):
    data = str(data or run.parent / "dialogues.json")
    command = ["evaluate", "--model", str(run), "--data", data, "--metrics", "ppl"]
    return main([*command, "--precision", "fp32", *map(str, arguments)])


def figures(path):
    return json.loads(Path(path).read_text())


def test_evaluate_takes_the_settings_of_the_training_and_says_so(run, tmp_path, capsys):
    assert evaluate(run, "--output", tmp_path / "a.json") == 0
    told = capsys.readouterr().err
    assert "as the model was trained: max_history 1, valid_fraction 0.2, data_seed 7" in told
    given = ("--max_history", 1, "--valid_fraction", 0.2, "--data_seed", 7)
    data = run.parent / "dialogues.json"
    assert evaluate(run / "best", *given, "--output", tmp_path / "b.json", data=data) == 0
    assert "trained" not in capsys.readouterr().err
    ours, named = figures(tmp_path / "a.json"), figures(tmp_path / "b.json")
    assert ours["metrics"] == named["metrics"] and ours["counts"]["examples"] > 0
    (logged,) = (
        record
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if record["split"] == "valid"
    )
    assert ours["metrics"]["ppl"] == pytest.approx(logged["ppl"], rel=1e-5)


def test_another_setting_that_is_given_is_used_and_named(run, tmp_path, capsys):
    assert evaluate(run, "--max_history", 4, "--output", tmp_path / "a.json") == 0
    told = capsys.readouterr().err
    assert "not as the model was trained: max_history 4 (trained with 1)" in told
    assert figures(tmp_path / "a.json")["options"]["max_history"] == 4


@pytest.mark.parametrize(
    ("option", "value", "known"), [("data_seed", 8, 7), ("valid_fraction", 0.4, 0.2)]
)
def test_a_validation_split_that_was_learnt_is_refused(run, capsys, option, value, known):
    assert evaluate(run, f"--{option}", value) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the model was trained on dialogues that are in this validation split" in error
    assert f"{option} is {value} here and was {known} in training" in error
    assert evaluate(run, f"--{option}", value, "--allow_trained_on") == 0


def test_what_a_model_learnt_in_an_earlier_run_is_remembered_too(run, tmp_path, capsys):
    def train(model, data, output, *arguments):
        command = ["train", "--model", str(model), "--data", str(data), "--max_steps", "1"]
        command += ["--dataset_cache", str(tmp_path / "cache"), "--precision", "fp32"]
        assert main([*command, "--output", str(output), *arguments]) == 0
        return capsys.readouterr().out

    data, other = run.parent / "dialogues.json", tmp_path / "other.json"
    dialogues = builtin_dialogues(num_train=6, num_valid=1, seed=3)["train"]
    other.write_text(json.dumps([dataclasses.asdict(dialogue) for dialogue in dialogues]))
    same = ("--data_seed", "7", "--valid_fraction", "0.2")
    assert "WARNING" not in train(run, data, tmp_path / "same", *same)
    warning = train(run, data, tmp_path / "another")
    assert "WARNING: the model was trained on dialogues that are in this validation" in warning
    train(run, other, tmp_path / "second")
    train(tmp_path / "second", other, tmp_path / "third")
    for later in ("another", "third"):
        assert evaluate(tmp_path / later, "--data_seed", "8", data=data) == 2
        assert "the model was trained on dialogues" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path / "third"), "--max_steps", "2"]) == 0
    assert evaluate(tmp_path / "third", "--data_seed", "8", data=data) == 2


def test_an_empty_validation_split_holds_nothing_that_was_learnt(run, capsys):
    assert evaluate(run, "--valid_fraction", 0) == 2
    assert "trained on" not in capsys.readouterr().err.splitlines()[-1]


def test_other_dialogues_may_be_cut_in_any_way(run, tmp_path):
    dialogues = builtin_dialogues(num_train=6, num_valid=1, seed=3)["train"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps([dataclasses.asdict(dialogue) for dialogue in dialogues]))
    assert evaluate(run, "--data_seed", 8, data=other) == 0


def test_a_store_is_data_for_every_command(run, tmp_path, capsys):
    model, data = str(run), str(run.parent / "dialogues.json")
    store = str(tmp_path / "store")
    options = ["--data_seed", "7", "--valid_fraction", "0.2"]
    prepare = ["prepare", "--data", data, "--tokenizer", model, "--output", store, *options]
    assert main(prepare) == 0
    for output, source in (("a.json", data), ("b.json", store)):
        assert evaluate(run, "--output", tmp_path / output, data=source) == 0
    assert figures(tmp_path / "a.json")["metrics"] == figures(tmp_path / "b.json")["metrics"]
    replies = []
    for output, source in (("a.jsonl", data), ("b.jsonl", store)):
        arguments = ["--data", source, "--output", str(tmp_path / output), "--max_length", "3"]
        assert main(["generate", "--model", model, *arguments]) == 0
        replies.append((tmp_path / output).read_text())
    assert replies[0] == replies[1]
    # Cut in another way than the model was trained with.
    assert main([*prepare[:-3], "8", *prepare[-2:]]) == 0
    assert evaluate(run, data=store) == 2
    assert "data_seed is 8 here and was 7 in training" in capsys.readouterr().err


def test_a_readers_code_is_not_run_from_what_a_model_remembers(run, tmp_path, capsys):
    remembered = json.loads((run / "best" / "trained_with.json").read_text())
    remembered["sources"][0]["reader"] = "os:system"
    copy = tmp_path / "model"
    copy.mkdir()
    for file in (run / "best").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "trained_with.json").write_text(json.dumps(remembered))
    assert evaluate(copy, data=run.parent / "dialogues.json") == 0
    assert "was read with --reader os:system in training: name it" in capsys.readouterr().err


def test_things_are_named_for_what_they_are(run, tmp_path, capsys):
    data = str(run.parent / "dialogues.json")
    assert evaluate(run, data=run) == 2
    assert "is a training run, not dialogues" in capsys.readouterr().err
    assert evaluate(run, data=run / "best") == 2
    assert "holds a model, not dialogues" in capsys.readouterr().err
    store = str(tmp_path / "store")
    assert main(["prepare", "--data", data, "--tokenizer", str(run), "--output", store]) == 0
    assert evaluate(store, data=data) == 2
    assert "store" in capsys.readouterr().err.splitlines()[-1]
