"""`convai-fast evaluate` as a user types it."""

import dataclasses
import json
import shutil
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from convai_fast.cli.main import main
from convai_fast.cli.outputs import finite
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.model.config import TransformerConfig
from tests.helpers.random_models import model_that_ranks


@pytest.fixture(scope="module")
def files(tokenizer, tmp_path_factory):
    """A folder with dialogues.json, and a model with random weights."""
    folder = tmp_path_factory.mktemp("evaluate")
    dialogues = builtin_dialogues(num_train=6, num_valid=3)
    (folder / "dialogues.json").write_text(
        json.dumps({s: [dataclasses.asdict(d) for d in ds] for s, ds in dialogues.items()})
    )
    torch.manual_seed(0)
    shape = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}
    config = TransformerConfig.from_transformers({**shape, "vocab_size": len(tokenizer)})
    model_that_ranks(config).save_pretrained(folder / "model", tokenizer)
    return folder


def evaluate(files, *arguments):
    data, model = str(files / "dialogues.json"), str(files / "model")
    return main(["evaluate", "--model", model, "--data", data, *map(str, arguments)])


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_table_json_details_and_pictures_agree(files, tmp_path, capsys):
    paths = {name: tmp_path / "new" / name for name in ("metrics.json", "details.jsonl", "plots")}
    assert (
        evaluate(
            files,
            *("--output", paths["metrics.json"], "--details", paths["details.jsonl"]),
            *("--plots", paths["plots"], "--precision", "fp32", "--max_length", "8"),
        )
        == 0
    )
    printed = capsys.readouterr().out
    report = json.loads(paths["metrics.json"].read_text())
    details = lines_of(paths["details.jsonl"])

    metrics = report["metrics"]
    assert f"hits@1 {metrics['hits@1']:.2%} the true" in " ".join(printed.split())
    assert f"word_ppl {metrics['word_ppl']:,.2f}" in " ".join(printed.split())
    assert "the true reply is the best of 20 candidates" in printed
    assert "in lower case" not in printed  # as the texts are
    assert report["counts"]["examples"] == len(details)
    assert report["options"]["sampling"]["max_length"] == 8
    assert report["versions"]["torch"] == torch.__version__
    assert report["machine"]["precision"] == "float32"
    assert report["bleu_signature"].startswith("nrefs:1")

    share = sum(line["rank"] == 1 for line in details) / len(details)
    assert metrics["hits@1"] == share
    assert metrics["f1"] == pytest.approx(sum(line["f1"] for line in details) / len(details))
    assert sum(line["num_words"] for line in details) == report["counts"]["words"]
    assert details[0]["id"] == "valid/0/0"

    assert sorted(path.name for path in paths["plots"].iterdir()) == [
        "perplexity_by_turn.png",
        "ranks.png",
        "reply_lengths.png",
    ]
    for path in paths["plots"].iterdir():
        with Image.open(path) as picture:
            colours = picture.convert("RGB").getcolors(1 << 20)
        assert len(colours) > 10  # more than an empty frame


def test_replies_are_those_of_generate_with_the_same_options(files, tmp_path):
    sampling = ["--max_history", "1", "--seed", "7", "--max_length", "10"]
    details = tmp_path / "details.jsonl"
    assert evaluate(files, "--metrics", "f1", "--details", details, *sampling) == 0
    data, model = str(files / "dialogues.json"), str(files / "model")
    replies = str(tmp_path / "replies.jsonl")
    assert main(["generate", "--model", model, "--data", data, "--output", replies, *sampling]) == 0
    written = {
        line["id"]: line["replies"][0]["text"] for line in lines_of(tmp_path / "replies.jsonl")
    }
    assert {line["id"]: line["reply"] for line in lines_of(details)} == written


def test_what_was_not_asked_for_is_null(files, tmp_path):
    details, plots = tmp_path / "details.jsonl", tmp_path / "plots"
    assert evaluate(files, "--metrics", "ppl", "--details", details, "--plots", plots) == 0
    line = lines_of(details)[0]
    assert line["nll"] > 0
    assert line["rank"] is line["reply"] is line["word_nll"] is None
    assert [path.name for path in plots.iterdir()] == ["perplexity_by_turn.png"]


def test_files_are_replaced_only_with_overwrite(files, tmp_path, capsys):
    output = tmp_path / "metrics.json"
    output.write_text("mine")
    assert evaluate(files, "--metrics", "ppl", "--output", output) == 2
    assert "already there" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert evaluate(files, "--metrics", "ppl", "--output", output, "--overwrite") == 0
    assert "ppl" in json.loads(output.read_text())["metrics"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--metrics", "rouge"], "there is no metric 'rouge'"),
        (["--metrics"], "--metrics needs a value"),
        (["--metrics", "hits@21"], "hits@21 needs 21 candidates, and valid/0/0"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--max_length", "255"], "max_length is 255"),
        (["--output", "x.json", "--details", "x.json"], "must differ"),
        (["--output", "/proc/none/x.json"], "cannot write"),
        (["--plots", __file__, "--overwrite"], "is there and no folder"),
        (["--output", "/tmp", "--overwrite"], "is there and no regular file"),
        (["--output", "/dev/null", "--overwrite"], "is there and no regular file"),
        (["--output", "x", "--plots", "x/plots"], "would hold the other outputs"),
        (["--max_history", "-1"], "--max_history must be at least 0"),
    ],
)
def test_a_mistake_is_one_sentence(files, capsys, arguments, reason):
    assert evaluate(files, "--max_examples", "1", *arguments) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("convai-fast evaluate: ")
    assert reason in told


def test_the_dialogues_are_not_overwritten(files, capsys):
    data = files / "dialogues.json"
    before = data.read_text()
    assert evaluate(files, "--output", data, "--overwrite") == 2
    assert "holds the dialogues" in capsys.readouterr().err
    assert data.read_text() == before


def test_a_link_stays_a_link(files, tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    assert evaluate(files, "--metrics", "ppl", "--output", tmp_path / "link.json") == 0
    assert (tmp_path / "link.json").is_symlink()
    assert "ppl" in json.loads((tmp_path / "real.json").read_text())["metrics"]


def test_a_history_of_any_length_may_be_asked_for(files):
    assert evaluate(files, "--metrics", "ppl", "--max_history", 10**20) == 0


def test_hits_of_a_head_that_was_never_trained_are_refused(files, tmp_path, capsys):
    shutil.copytree(files / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    kept = {name: w for name, w in weights.items() if "multiple_choice" not in name}
    save_file(kept, tmp_path / "model" / "model.safetensors")
    shutil.copy(files / "dialogues.json", tmp_path)
    assert evaluate(tmp_path, "--metrics", "hits@1") == 2
    printed = capsys.readouterr().err
    assert "has not learnt: fine-tune it first, or leave hits@K out of --metrics" in printed
    assert evaluate(tmp_path, "--metrics", "ppl") == 0


def test_pictures_without_matplotlib_name_the_package(files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert evaluate(files, "--plots", "plots") == 2
    assert "pip install 'convai-fast[plots]'" in capsys.readouterr().err


def test_numbers_that_json_does_not_have_become_null():
    assert finite({"a": [float("nan"), 1.5], "b": (float("inf"), "x", None, True)}) == {
        "a": [None, 1.5],
        "b": [None, "x", None, True],
    }


def test_word_perplexity_of_texts_with_capitals_is_explained(files, tmp_path, capsys):
    content = json.loads((files / "dialogues.json").read_text())
    for dialogue in content["valid"]:
        for utterance in dialogue["utterances"]:
            utterance["candidates"] = [c.capitalize() for c in utterance["candidates"]]
    (tmp_path / "cased.json").write_text(json.dumps(content))
    arguments = ["--data", str(tmp_path / "cased.json"), "--metrics", "word_ppl"]
    assert (
        main(["evaluate", "--model", str(files / "model"), *arguments, "--max_examples", "1"]) == 0
    )
    assert "word_ppl is of texts in lower case, as ConvAI2 has it" in capsys.readouterr().out
