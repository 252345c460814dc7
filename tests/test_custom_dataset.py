"""docs/custom-dataset.md: its commands run, in order, on a tiny checkpoint in place of the real."""

import io
import json
import re
import shlex
import shutil
import string
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import OpenAIGPTConfig, OpenAIGPTDoubleHeadsModel

from convai_fast.cli.main import main
from convai_fast.data.readers import load_dialogues
from convai_fast.dialogue.format import SPECIAL_TOKENS
from tests.helpers.pages import fences

pytestmark = pytest.mark.usefixtures("no_measured_speed")

DOCS = Path(__file__).parents[1] / "docs"
FILES = DOCS / "custom-dataset"
PAGE = (DOCS / "custom-dataset.md").read_text(encoding="utf-8")


BLOCKS = fences(DOCS / "custom-dataset.md")


@pytest.fixture
def page_folder(tmp_path, monkeypatch):
    """The working directory, with the page's files."""
    folder = shutil.copytree(FILES, tmp_path / "work", ignore=shutil.ignore_patterns("__*"))
    monkeypatch.chdir(folder)
    yield folder
    sys.modules.pop("yesands", None)


def test_the_page_shows_its_files_as_they_are():
    shown = {block.title: block.body for block in BLOCKS if block.title}
    assert shown.keys() == {"yesands.py", "requests.jsonl"}
    for name, body in shown.items():
        assert (FILES / name).read_text(encoding="utf-8") == body


def test_pairs_without_persona_get_distractors_and_a_validation_split(page_folder):
    splits = load_dialogues("yesands.json", "yesands:load")
    assert {split: len(dialogues) for split, dialogues in splits.items()} == dict(train=49, valid=5)
    for dialogue in splits["train"]:
        assert dialogue.personality == []
        assert len(dialogue.utterances[0].candidates) == 20


def test_every_command_of_the_page_runs(page_folder, monkeypatch, capsys):
    for i, block in enumerate(BLOCKS):
        if block.language != "sh" or block.mark == "install":
            continue
        if block.mark == "network":
            write_old_checkpoint(page_folder / block.body.strip().rpartition("/")[2])
            continue
        program, *arguments = shlex.split(block.body.replace("\\\n", " "))
        if program == "tensorboard":
            assert_curves(arguments)
            continue
        assert program == "convai-fast"
        if arguments[0] == "interact":
            typed = re.findall(r"^>>> (.*)$", BLOCKS[i + 1].body, re.M)
            assert typed[-1] == "/quit"
            stdin = io.TextIOWrapper(io.BytesIO("\n".join(typed).encode()), encoding="utf-8")
            monkeypatch.setattr(sys, "stdin", stdin)
        code = main(arguments)
        captured = capsys.readouterr()
        assert code == 0, f"{block.body}{captured.err}"
        if arguments[0] == "interact":
            assert captured.out.count(">>> ") == len(typed)
            persona = [arguments[k + 1] for k, a in enumerate(arguments) if a == "--persona"]
            assert captured.out.startswith(
                "".join(["The model's persona:\n", *(f"  {sentence}\n" for sentence in persona)])
                if persona
                else "The model has no persona.\n"
            )

    resume = re.search(r"Interrupted: `convai-fast (train --resume[^`]*)`", PAGE)[1].split()
    assert main(resume[:-2]) == 2
    assert "give --reader yesands:load again" in capsys.readouterr().err
    assert main(resume) == 0
    assert (page_folder / "runs" / "yesands" / "best" / "model.safetensors").is_file()
    assert json.loads((page_folder / "metrics.json").read_text())
    replies = read_lines(page_folder / "replies.jsonl")
    assert [(r["id"], len(r["replies"])) for r in replies] == [
        ("hat", 1),
        ("oven", 2),
        ("captain", 1),
    ]
    expected = [r["expected"] for r in read_lines(page_folder / "validation.jsonl")]
    valid = load_dialogues("yesands.json", "yesands:load")["valid"]
    assert expected == [d.utterances[0].candidates[-1] for d in valid]


def assert_curves(arguments):
    """TensorBoard would show the curves that the page names."""
    option, folder = arguments
    assert option == "--logdir"
    (events,) = Path(folder).rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    named = set(re.findall(r"`((?:train|valid)/[\w@]+)`", PAGE))
    assert named and named <= set(accumulator.Tags()["scalars"])


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_old_checkpoint(archive):
    """An archive as pytorch-pretrained-bert 0.6 left one, with random weights of width 16."""
    pieces = [*string.ascii_lowercase, *string.digits, *".,?!'", "th", "an", "the", "and"]
    vocabulary = {p: i for i, p in enumerate(["<unk>", *pieces, *(f"{p}</w>" for p in pieces)])}
    merges = ["t h", "a n", "th e", "an d", "th e</w>", "an d</w>", "t h</w>", "a n</w>"]
    rows = len(vocabulary) + len(SPECIAL_TOKENS)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 512}
    torch.manual_seed(0)
    config = OpenAIGPTConfig(vocab_size=rows, bos_token_id=None, eos_token_id=None, **shape)
    tensors = {
        name.replace("lm_head.", "lm_head.decoder.").replace("head.summary", "head.linear"): tensor
        for name, tensor in OpenAIGPTDoubleHeadsModel(config).state_dict().items()
    }
    for layer in range(shape["n_layer"]):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 512, 512).tril()
    weights = io.BytesIO()
    torch.save(tensors, weights, _use_new_zipfile_serialization=False)
    config = {**shape, "afn": "gelu", "n_ctx": 512, "vocab_size": len(vocabulary), "n_special": 5}
    files = {
        "config.json": json.dumps(config).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
        "pytorch_model.bin": weights.getvalue(),
        "special_tokens.txt": "\n".join(SPECIAL_TOKENS).encode(),
        "vocab.json": json.dumps(vocabulary).encode(),
    }
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
