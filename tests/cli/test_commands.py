"""The commands as a user types them: prepare, info, demo, and what all of them share."""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from typing import get_type_hints

import pytest

from convai_fast import _native
from convai_fast.cli.demo import prime_attention
from convai_fast.cli.main import ALIASES, COMMANDS, main
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.data.store import DialogueStore
from convai_fast.model.config import TransformerConfig
from convai_fast.model.double_heads import DoubleHeadsModel


@pytest.fixture(scope="module")
def files(tokenizer, tmp_path_factory):
    """A folder with dialogues.json and a tokenizer."""
    folder = tmp_path_factory.mktemp("commands")
    dialogues = builtin_dialogues(num_train=10, num_valid=3)
    (folder / "dialogues.json").write_text(
        json.dumps({s: [dataclasses.asdict(d) for d in ds] for s, ds in dialogues.items()})
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def prepare(files, *arguments):
    data, tokenizer = str(files / "dialogues.json"), str(files / "tokenizer")
    return main(["prepare", "--data", data, "--tokenizer", tokenizer, *arguments])


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "convai_fast", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def exit_code(*arguments):
    with pytest.raises(SystemExit) as caught:  # by the library that parses options
        main(arguments)
    return caught.value.code


def test_prepare_writes_a_store_and_says_what_it_holds(files, tmp_path, capsys):
    assert prepare(files, "--out", str(tmp_path / "store")) == 0
    printed = capsys.readouterr().out
    store = DialogueStore(tmp_path / "store")
    tables = store.splits["train"]
    assert f"train: 10 dialogues, {tables.num_examples} examples" in printed
    assert f"{len(store.tokens):,} tokens" in printed
    assert "candidates: 20.0 an example" in printed
    assert "cut to fit: nothing" in printed
    assert f"MB in {tmp_path / 'store'}" in printed


def test_prepare_counts_what_it_cuts(files, tmp_path, capsys):
    assert prepare(files, "--out", str(tmp_path / "store"), "--max_length", "30") == 0
    assert "cut to fit: history in " in capsys.readouterr().out


def test_preview_shows_text_speakers_segments_and_labels(files, capsys):
    assert prepare(files, "--preview", "2") == 0
    printed = capsys.readouterr().out
    dialogue = builtin_dialogues(num_train=10, num_valid=3)["train"][0]
    first = dialogue.utterances[0]
    assert "<bos>" + "".join(dialogue.personality) in printed
    assert f"<speaker2>{first.history[0]}" in printed
    assert f"<speaker1> [{first.candidates[-1]}<eos>]" in printed
    assert printed.count("example ") == 2
    assert "… and 16 more" in printed


def test_a_preview_of_more_than_there_is_shows_each_example_once(files, capsys):
    assert prepare(files, "--preview", "1000") == 0
    numbers = re.findall(r"^example (\d+):", capsys.readouterr().out, re.MULTILINE)
    assert [int(number) for number in numbers] == list(range(len(numbers)))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "absent.json", "--tokenizer", "x", "--out", "y"], "absent.json"),
        (["--tokenizer", "x", "--out", "y"], "no dialogues given"),
        (["--data", "x.json", "--out", "y"], "no tokenizer given"),
        (["--data", "x.json", "--tokenizer", "x"], "nowhere to put the store"),
        (["--tokenizer", "x", "--preview", "1", "--max_history", "-2"], "--max_history must be"),
        (["--tokenizer", "x", "--preview", "1", "--max_length", "2"], "--max_length must be"),
        (
            ["--data", "x", "--tokenizer", "x", "--out", "y", "--fill_candidates", "0"],
            "fill_candidates must",
        ),
        (
            ["--data", f"{__file__}=3", "--tokenizer", "x", "--out", "y"],
            "test_commands.py would be lost, since weights count in training: prepare a store for",
        ),
    ],
)
def test_what_prepare_lacks_is_one_sentence_and_code_2(arguments, says, capsys):
    assert main(["prepare", *arguments]) == 2
    errors = capsys.readouterr().err
    assert says in errors
    assert errors.count("\n") == 1


def test_a_store_is_tokenised_anew_for_another_tokenizer(files, tmp_path, capsys):
    assert prepare(files, "--out", str(tmp_path / "store")) == 0
    model = tmp_path / "model"
    from convai_fast.data.builtin import train_builtin_tokenizer

    other = train_builtin_tokenizer(builtin_dialogues(num_train=5, num_valid=1)["train"], 300)
    other.save_pretrained(model)
    config = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 256}
    (model / "config.json").write_text(json.dumps(config))
    arguments = ["--dataset_path", str(tmp_path / "store"), "--model", str(model)]
    arguments += ["--dataset_cache", str(tmp_path / "cache"), "--max_steps", "1"]
    assert main(["train", *arguments, "--from_scratch", "--output", str(tmp_path / "run")]) == 0
    assert "was made with another tokenizer" in capsys.readouterr().out
    (cached,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    first, second = DialogueStore(tmp_path / "store"), DialogueStore(cached)
    assert list(first.dialogues("train")) == list(second.dialogues("train"))
    assert list(first.dialogues("valid")) == list(second.dialogues("valid"))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_itself(name, capsys):
    assert exit_code(name, "--help") == 0
    assert f"usage: convai-fast {name}" in capsys.readouterr().out


def test_without_a_command_the_commands_are_listed(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name}" in printed for name in COMMANDS)


def test_an_unknown_command_or_option_is_code_2():
    assert run("dance").returncode == 2
    assert exit_code("train", "--no_such_option", "1") == 2


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        ("train", "--lr 1 --lr 2", "--lr is given twice: give it once"),
        ("train", "--train_batch_size=1 --train-batch-size 2", "--train-batch-size is given twice"),
        ("train", "--data a --data b", "twice: give them all after one --data: --data a b"),
        ("train", "--data a --dataset_path b", "--data and --dataset_path are the same option"),
        ("train", "--model a --model_checkpoint=b", "--model and --model_checkpoint are the same"),
        ("generate", "--n 1 --num_return 2", "--n and --num_return are the same option"),
        ("interact", "--stop . --stop !", "--stop is given twice: give them all after one --stop"),
        ("interact", "--persona a --persona b --seed 1 --seed 2", "--seed is given twice"),
    ],
)
def test_an_option_that_is_given_twice_is_one_sentence(command, arguments, says, capsys):
    assert main([command, *arguments.split()]) == 2
    errors = capsys.readouterr().err
    assert says in errors
    assert errors.count("\n") == 1


def test_second_names_of_options_are_those_of_the_options_classes():
    found = {}
    for command, (name, _) in COMMANDS.items():
        options = getattr(importlib.import_module(f"convai_fast.cli.{command}"), name)
        for field, hint in get_type_hints(options, include_extras=True).items():
            for part in getattr(hint, "__metadata__", ()):
                for alias in getattr(part, "aliases", None) or ():
                    found[alias.removeprefix("--")] = field
    assert found == ALIASES


def test_a_command_that_is_misspelt_gets_the_one_that_is_meant(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "convai-fast: no command 'trian': do you mean train?\n"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"convai-fast (\d+\.\d+\S*|\(not .*\))\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
)
def test_a_terminal_that_lacks_a_character_gets_another(files, environment):
    arguments = ["--data", str(files / "dialogues.json"), "--tokenizer", str(files / "tokenizer")]
    result = run("prepare", *arguments, "--preview", "1", **environment)
    assert result.returncode == 0, result.stderr
    assert "? and 16 more" in result.stdout


def test_info_prints_versions_and_what_is_compiled(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for name in ("torch", "transformers", "built", "in use", "cpu", "cuda"):
        assert f"\n{name} " in printed
    if _native.host is not None:
        assert f"instruction set {_native.native_info()['isa']}" in printed


def test_the_reference_backend_runs_without_anything_compiled():
    result = run("info", CONVAI_FAST_BACKEND="reference")
    assert "plain PyTorch: CONVAI_FAST_BACKEND=reference" in result.stdout


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"CONVAI_FAST_BACKEND": "fortran"}, "must be auto, native or reference, not 'fortran'"),
        ({"CONVAI_FAST_ISA": "sse"}, "must be portable, avx2 or avx512, not 'sse'"),
    ],
)
def test_an_unknown_backend_or_instruction_set_is_one_sentence(environment, says):
    result = run("info", **environment)
    assert result.returncode == 2
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_demo_primes_only_the_first_layer(tokenizer):
    config = {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 400}
    model = DoubleHeadsModel(TransformerConfig.from_transformers(config))
    prime_attention(model)
    first, second = (block.attention.qkv.weight.chunk(3) for block in model.transformer.blocks)
    assert (first[0] == first[1]).all()
    assert not (second[0] == second[1]).any()
