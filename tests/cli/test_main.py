"""The command line: what all commands share."""

import io
import re
import sys

import pytest

from convai_fast.cli.main import COMMANDS, main, options_class, with_flags
from convai_fast.cli.options.common import ProcessOptions
from convai_fast.cli.parse import parse
from convai_fast.options import options_of
from tests.helpers.command_line import run


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_all_its_options(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    assert main([name, "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: convai-fast {name} ")
    options = options_of(options_class(name)) | options_of(ProcessOptions)
    heads = re.findall(r"^  --.*", printed, re.MULTILINE)
    named = {flag for head in heads for flag in re.findall(r"--(\w+)", head[:50])}
    assert options.keys() <= named
    assert max(map(len, printed.splitlines())) <= 90
    assert "None" not in printed
    assert "''" not in printed


def test_help_is_in_groups_and_has_the_texts_and_defaults_of_the_library(capsys):
    main(["generate", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "How replies are drawn --max_length INT Most tokens in a reply. (default: 20)" in printed
    assert "so far become less likely (1: off). (default: 1.0)" in printed
    assert "usage: convai-fast generate --model STR --input PATH --output PATH [options]" in printed
    assert "--num_return, --n INT Replies to each request." in printed
    main(["train", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "with --from_scratch, a folder with config.json is enough. (default: open" in printed
    assert "LoRA: small adapters, trained in place of the weights --lora_r INT Rank" in printed


def test_without_a_command_the_commands_are_listed(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name}" in printed for name in COMMANDS)


def test_an_unknown_command_is_code_2():
    assert run("dance").returncode == 2


@pytest.mark.parametrize(
    ("command", "words", "says"),
    [
        ("train", ["--lr", "1", "--lr", "2"], "--lr is given twice: give it once"),
        ("train", ["--max_steps=1", "--max-steps", "2"], "--max-steps is given twice"),
        ("train", ["--model", "a", "--model_checkpoint=b"], "--model and --model_checkpoint are"),
        ("generate", ["--n", "1", "--num_return", "2"], "--n and --num_return are the same option"),
        ("train", ["--lrr", "3"], "there is no option --lrr: do you mean --lr?"),
        ("train", ["--lr", "x"], "--lr must be a number, not 'x'"),
        ("train", ["--n_epochs", "1.5"], "--n_epochs must be a whole number, not '1.5'"),
        ("train", ["--layout", "x"], "--layout must be one of shared, padded, not 'x'"),
        ("train", ["--compile=1"], "--compile must be true or false, not '1'"),
        ("train", ["--data"], "--data needs a value"),
        ("train", ["--lr", "--data", "x"], "--lr needs a value: a number"),
        ("train", ["--output", "--form_scratch"], "--output needs a value: a text"),
        ("train", ["dialogues.json"], "'dialogues.json' belongs to no option"),
        ("train", [], "--data is missing: give dialogues (files, folders"),
        ("demo", ["--threads", "-1"], "--threads must be between 0 and 1024, not -1"),
        ("generate", [], "--model, --input and --output are missing: give a fine-tuned model"),
        ("evaluate", ["--model", "m"], "--data is missing: give dialogues"),
        ("prepare", ["--data", "d", "--preview", "1"], "--tokenizer is missing: give the folder"),
        ("prepare", ["--data", "d", "--tokenizer", "t"], "--output is missing: give a folder for"),
        ("convert", ["--model", "m"], "--output is missing: give a folder for the new model"),
        ("interact", [], "--model is missing: give a fine-tuned model"),
    ],
)
def test_what_the_command_line_lacks_is_one_sentence_and_code_2(command, words, says, capsys):
    assert main([command, *words]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"convai-fast {command}: {says}")
    assert errors.count("\n") == 1


def test_values_are_what_stands_behind_an_option():
    words = ["--data", "a", "--lr=-1e-3", "--dataset-path", "b", "c", "--compile", "--model=--x=y"]
    options, process, given = parse(options_class("train"), [*words, "--threads", "3"])
    assert options.dataset_path == ("a", "b", "c")
    assert (options.lr, options.compile, options.model) == (-1e-3, True, "--x=y")
    assert process.threads == 3
    assert given == {"dataset_path", "lr", "compile", "model", "threads"}


@pytest.mark.parametrize(
    ("command", "sentence", "printed"),
    [
        ("train", "`fsdp` and `precision` fp16 do not", "--fsdp and --precision fp16 do not"),
        ("generate", "lower `temperature` or `num_return`", "lower --temperature or --num_return"),
        ("convert", "a store, which `dataset_path` takes", "a store, which --data takes"),
        ("demo", "another `output`, a lower `lr`", "another --output, a lower `lr`"),
        ("train", "`convai-fast convert --model lr`", "`convai-fast convert --model lr`"),
        ("generate", "no option is called `sampling`", "no option is called `sampling`"),
    ],
)
def test_an_option_that_the_library_names_is_printed_as_a_flag(command, sentence, printed):
    assert with_flags(sentence, command) == printed


def test_a_command_that_is_misspelt_gets_the_one_that_is_meant(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "convai-fast: no command 'trian': do you mean train?\n"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"convai-fast (\d+\.\d+\S*|\(not .*\))\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("encoding", "errors"),
    [("ascii", "surrogateescape"), ("latin-1", "strict")],  # as LC_ALL=C and as PYTHONIOENCODING
)
def test_a_terminal_that_lacks_a_character_gets_another(files, encoding, errors, monkeypatch):
    arguments = ["--data", str(files / "dialogues.json"), "--tokenizer", str(files / "tokenizer")]
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding, errors))
    assert main(["prepare", *arguments, "--preview", "1"]) == 0
    assert b"? and 16 more" in terminal.getvalue()


@pytest.mark.parametrize("seed", ["-1", "18446744073709551616"])
def test_a_seed_out_of_range_is_one_sentence_before_anything_is_loaded(seed, capsys):
    for command in (["demo"], ["train", "--data", "absent.json"]):
        assert main([*command, "--seed", seed]) == 2
        assert "--seed must be at" in capsys.readouterr().err
