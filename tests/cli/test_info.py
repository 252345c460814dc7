"""`convai-fast info`: versions, and what is compiled and in use."""

import copy
import json

import torch

from convai_fast import _native, load
from convai_fast.cli import info
from convai_fast.cli.info import package_version
from convai_fast.cli.main import main
from tests.helpers.chat_tokenizers import chat_tokenizer
from tests.helpers.command_line import run
from tests.helpers.model_peers import make_peer


def info_of(folder, capsys):
    """What the command says of a model, by what it is about."""
    assert main(["info", "--model", str(folder)]) == 0
    output, errors = capsys.readouterr()
    lines = output.splitlines()
    assert errors == ""
    return {line[:16].strip(): line[17:] for line in lines}


def test_a_package_without_metadata_has_a_version_to_tell():
    told = {name: package_version(name) for name in ("torch", "no-package-of-this-name")}
    assert all(isinstance(version, str) and version for version in told.values())
    assert told["torch"][0].isdecimal()
    assert not told["no-package-of-this-name"][0].isdecimal()
    assert all(package_version(name) for name in info.PACKAGES)


def test_info_prints_versions_and_what_is_compiled(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for name in ("torch", "transformers", "built", "in use", "cpu", "cpu products", "cuda"):
        assert f"\n{name} " in printed
    if _native.host is not None:
        assert f"instruction set {_native.native_info()['isa']}" in printed


def test_the_reference_backend_runs_without_anything_compiled():
    printed = run("info", CONVAI_FAST_BACKEND="reference").stdout
    assert "plain PyTorch: CONVAI_FAST_BACKEND=reference" in printed
    assert "float32 plain PyTorch, bfloat16 plain PyTorch, int8 plain PyTorch\n" in printed


def test_info_names_the_instructions_that_each_format_is_multiplied_in():
    printed = run("info", CONVAI_FAST_ISA="portable").stdout
    how = "plain PyTorch" if _native.host is None else "portable"
    assert f"float32 {how}, bfloat16 {how}, int8 {how}\n" in printed


def test_an_unknown_backend_is_one_sentence():
    result = run("info", CONVAI_FAST_BACKEND="fortran")
    assert result.returncode == 2
    assert "must be auto, native or reference, not 'fortran'" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_chat_model_is_described_as_it_is_stored_and_read(tmp_path, capsys):
    tokenizer = chat_tokenizer("smollm2")
    peer = make_peer("llama", vocab_size=len(tokenizer) + 5)
    peer.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    count = sum(p.numel() for p in load(tmp_path, report=str)[0].parameters())
    assert info_of(tmp_path, capsys) == {
        "model": "llama, 2 layers of width 32, 4 heads (2 of keys and values), 40,000 positions, "
        f"{len(tokenizer)} tokens",
        "parameters": f"{count:,}, stored as bfloat16 in model.safetensors",
        "dialogues": "as the tokenizer's chat template writes them",
        "segments": "not read",
        "language model": "head shared with the embedding",
        "multiple choice": "head trained",
    }


def test_a_model_that_was_not_trained_yet_is_described_without_a_warning(
    tokenizer, tmp_path, capsys, caplog
):
    model = make_peer("gpt2", vocab_size=len(tokenizer)).transformer  # without heads
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    shown = info_of(tmp_path, capsys)
    assert shown["dialogues"] == "between <bos> <eos> <speaker1> <speaker2> <pad>"
    assert shown["segments"] == "read with each token"
    assert shown["multiple choice"] == "head untrained: ranks nothing"
    assert caplog.text == ""


def test_a_model_that_is_refused_elsewhere_is_refused_in_the_same_words(tmp_path, capsys):
    tokenizer = copy.deepcopy(chat_tokenizer("smollm2"))
    make_peer("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for change, says in (
        ({}, "template refuses"),
        ({"model_type": "bert"}, "'bert' is not supp"),
        (
            {"intermediate_size": settings["intermediate_size"] + 8},
            "mlp",
        ),  # not that of the weights
    ):
        (tmp_path / "config.json").write_text(json.dumps(settings | change))
        said = []
        for command in ("info", "interact"):
            assert main([command, "--model", str(tmp_path)]) == 2
            said.append(capsys.readouterr().err.replace(command, "COMMAND", 1))
        assert said[0] == said[1]
        assert says in said[0]
