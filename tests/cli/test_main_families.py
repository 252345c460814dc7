"""Every command with a model that is no GPT, as a user types it."""

import io
import json
import sys

import pytest
from transformers import AutoTokenizer

from convai_fast.cli.main import main
from convai_fast.dialogue.format import SPEAKERS, SPECIAL_TOKENS
from convai_fast.model.families import FAMILIES
from tests.helpers.bulk_files import read_lines, write_lines
from tests.helpers.chat_tokenizers import chat_tokenizer
from tests.helpers.model_peers import SIZES

CHATS = {
    "smollm2": {"model_type": "llama"},
    "qwen3 with segments": {"model_type": "qwen3", "head_dim": 16},
    "mistral0.3": {"model_type": "mistral"},
}


@pytest.mark.parametrize("kind", ["five tokens", *CHATS])
def test_a_model_is_trained_evaluated_talked_to_and_ranks(
    files, tmp_path, monkeypatch, capsys, kind
):
    """Between five special tokens, or as the chat template of its tokenizer writes a dialogue."""
    shape, run, data = (tmp_path / "shape", tmp_path / "run", files / "dialogues.json")
    shape.mkdir()
    settings = CHATS.get(kind, {"model_type": "llama"})
    config = {**SIZES, "max_position_embeddings": 512, **settings}
    (shape / "config.json").write_text(json.dumps(config))
    tokenizer = files / "tokenizer"
    if kind in CHATS:
        tokenizer = tmp_path / "tokenizer"
        chat_tokenizer(kind.split()[0]).save_pretrained(tokenizer)
        assert (
            main(["prepare", "--data", str(data), "--tokenizer", str(tokenizer), "--preview", "1"])
            == 0
        )
    options = ["--model", shape, "--tokenizer", tokenizer, "--from_scratch"]
    options += ["--segments"] if "segments" in kind else []
    options += ["--data", data, "--dataset_cache", tmp_path / "cache", "--output", run]
    options += ["--max_steps", 2, "--n_epochs", 9, "--gradient_accumulation_steps", 1]
    assert main(["train", *map(str, options)]) == 0
    assert f"model: {settings['model_type']}, 2 layers of width 32, " in capsys.readouterr().out
    assert main(["train", "--resume", str(run), "--max_steps", "3"]) == 0
    assert "with 2 layers of width 32" in (run / "last" / "README.md").read_text()
    vocabulary = AutoTokenizer.from_pretrained(run / "last").get_vocab()
    added = [token for token in SPECIAL_TOKENS if token in vocabulary]
    speakers = [*SPEAKERS] if "segments" in kind else []
    assert added == (speakers if kind in CHATS else [*SPECIAL_TOKENS])

    asked = ["--data", str(data), "--max_examples", "3"]
    assert main(["evaluate", "--model", str(run), *asked]) == 0
    printed = capsys.readouterr().out
    assert "hits@1" in printed and "perplexity of a word" in printed

    question = {"id": "a", "history": ["do you like tea ?"]}
    candidates = {"candidates": ["yes .", "no ."]}
    for command, request in (("rank", question | candidates), ("generate", question)):
        output = tmp_path / f"{command}.jsonl"
        lines = write_lines(tmp_path / "in.jsonl", request)
        arguments = ["--model", str(run), "--input", lines, "--output", str(output)]
        assert main([command, *arguments]) == 0
        assert [line["id"] for line in read_lines(output)] == ["a"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi , tea ?\n"))
    capsys.readouterr()
    assert main(["interact", "--model", str(run), "--min_length", "2"]) == 0
    assert len(capsys.readouterr().out.split(">>> ")[1].strip()) >= 2

    assert main(["convert", "--model", str(run), "--output", str(tmp_path / "converted")]) == 0
    assert "will be added by `train`" not in capsys.readouterr().out
    theirs = FAMILIES[settings["model_type"]].peer_class().from_pretrained(tmp_path / "converted")
    assert theirs.config.max_position_embeddings == 512
