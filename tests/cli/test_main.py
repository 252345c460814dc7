"""The command line: what all commands share."""

import importlib
import re
from typing import get_type_hints

import pytest

from convai_fast.cli.main import ALIASES, COMMANDS, main, with_flags
from tests.helpers.command_line import run


def exit_code(*arguments):
    with pytest.raises(SystemExit) as caught:  # by the library that parses options
        main(arguments)
    return caught.value.code


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_itself(name, capsys):
    assert exit_code(name, "--help") == 0
    assert f"usage: convai-fast {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["evaluate", "generate", "interact"])
def test_options_of_how_replies_are_drawn_have_the_librarys_texts(name, capsys):
    exit_code(name, "--help")
    printed = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "--max_length INT Most tokens in a reply. (default: 20)" in printed
    assert "so far become less likely (1: off). (default: 1.0)" in printed
    assert "Draw so many replies and return the n that the multiple-choice head" in printed


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


@pytest.mark.parametrize(
    ("command", "sentence", "printed"),
    [
        ("train", "`fsdp` and `precision` fp16 do not", "--fsdp and --precision fp16 do not"),
        ("generate", "lower `temperature` or `num_return`", "lower --temperature or --num_return"),
        ("convert", "a store, which `dataset_path` takes", "a store, which --data takes"),
        ("demo", "another `output`, a lower `lr`", "another --output, a lower `lr`"),
        ("train", "`convai-fast convert lr NEW`", "`convai-fast convert lr NEW`"),
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


@pytest.mark.parametrize("seed", ["-1", "18446744073709551616"])
def test_a_seed_out_of_range_is_one_sentence_before_anything_is_loaded(seed, capsys):
    for command in (["demo"], ["train", "--data", "absent.json"]):
        assert main([*command, "--seed", seed]) == 2
        assert "--seed must be at" in capsys.readouterr().err
