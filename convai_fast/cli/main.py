"""`convai-fast COMMAND …`: finds the command's file, parses its options, runs it."""

import dataclasses
import difflib
import importlib
import io
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from convai_fast.errors import UserError

# Each command is a module of this package with an options class and `run(options)`. They are
# imported when asked for, so that `--help` does not wait for torch.
COMMANDS = {
    "demo": ("DemoOptions", "train a small model on built-in dialogues and show what it learnt"),
    "prepare": ("PrepareOptions", "turn a file of dialogues into a store, or preview it"),
    "train": ("TrainCommand", "fine-tune a GPT or GPT-2 double-heads model on dialogues"),
    "evaluate": ("EvaluateOptions", "measure a model as ConvAI2 did: hits@1, perplexity, F1, …"),
    "interact": ("InteractOptions", "talk to a model"),
    "generate": ("GenerateOptions", "write replies in bulk, from JSONL or a dataset"),
    "rank": ("RankOptions", "rank candidate replies in bulk, from JSONL or a dataset"),
    "benchmark": ("BenchmarkOptions", "measure a model here and in transformers, side by side"),
    "convert": ("ConvertOptions", "bring an old checkpoint into today's layout, or merge LoRA"),
    "info": ("InfoOptions", "print versions, what is compiled, and which devices there are"),
}

# Options that have a second name, that take many values, and that add to what was given before.
ALIASES = {"data": "dataset_path", "model_checkpoint": "model", "n": "num_return"}
_LISTS = ("dataset_path", "reader", "metrics", "stop")
_APPENDING = ("persona",)
_SHOWN = {"dataset_path": "data"}  # the name that sentences use where it is not the option's own
_OPTION = re.compile(r"(--[A-Za-z][\w-]*)(=.*)?", re.DOTALL)


def usage() -> str:
    """What `convai-fast --help` prints."""
    lines = ["usage: convai-fast COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join([*lines, "", "`convai-fast COMMAND --help` explains a command's options."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (2: a mistake the user can mend, 130: Ctrl-C)."""
    is_process = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack a character that we print
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *rest = arguments
    if name == "--version":
        print(f"convai-fast {_version()}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        advice = f": do you mean {near[0]}?" if near else f"\n\n{usage()}"
        print(f"convai-fast: no command {name!r}{advice}", file=sys.stderr)
        return 2

    # transformers' advice on stderr would stand between a user and the one sentence that matters.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import tyro

    try:
        _check_given_once(rest)
        module = importlib.import_module(f"convai_fast.cli.{name}")
        options = tyro.cli(
            getattr(module, COMMANDS[name][0]),
            args=rest,
            prog=f"convai-fast {name}",
            use_underscores=True,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        if name == "train":
            # A run that is continued has to know which options were given.
            module.run(options, rest)
        else:
            module.run(options)
    except UserError as error:
        print(f"convai-fast {name}: {with_flags(str(error), name)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(
            f"convai-fast {name}: {error.filename} cannot be used ({error.strerror}): see that it "
            "is there and that you may read and write it",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        if is_process:  # one more, while Python ends, would show a traceback
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        return 130
    finally:
        _flush()
    return 0


def with_flags(sentence: str, command: str) -> str:
    """`sentence` of the library as `command` prints it: with --lr for a `lr` in backticks."""

    def shown(match: re.Match[str]) -> str:
        name = match[1]
        is_option = name in ALIASES.values() or name in _option_names(_options_class(command))
        return f"--{_SHOWN.get(name, name)}" if is_option else match[0]

    return re.sub(r"`(\w+)`", shown, sentence)


def _options_class(command: str) -> type:
    return getattr(importlib.import_module(f"convai_fast.cli.{command}"), COMMANDS[command][0])


def _option_names(options_class: Any) -> Iterator[str]:
    for field in dataclasses.fields(options_class):
        nested: Any = field.default_factory
        if dataclasses.is_dataclass(nested):  # its options are the command's own
            yield from _option_names(nested)
        else:
            yield field.name


def _flush() -> None:
    """Write out what is left; where the reader (`| head`) has gone, Python must not try again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _check_given_once(arguments: Sequence[str]) -> None:
    """Raise UserError for an option that is named twice, since the first would not count."""
    given: dict[str, str] = {}
    for option in (match[1] for match in map(_OPTION.fullmatch, arguments) if match):
        name = option[2:].replace("-", "_")
        name = ALIASES.get(name, name)
        if name not in given or name in _APPENDING:
            given[name] = option
            continue
        twice = f"{option} is given twice"
        if given[name].replace("-", "_") != option.replace("-", "_"):
            twice = f"{given[name]} and {option} are the same option"
        if name in _LISTS:
            raise UserError(f"{twice}: give them all after one {option}: {option} a b")
        raise UserError(f"{twice}: give it once")


def _version() -> str:
    try:
        return version("convai-fast")
    except PackageNotFoundError:
        return "(not installed as a package)"


if __name__ == "__main__":
    sys.exit(main())
