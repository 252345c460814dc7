"""`convai-fast COMMAND …`: finds the command's file, parses its options, runs it."""

import difflib
import importlib
import io
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from convai_fast.cli.busy import OtherProcesses
from convai_fast.cli.help import help_of
from convai_fast.cli.options.common import ProcessOptions
from convai_fast.cli.parse import ALIASES, parse
from convai_fast.errors import UserError
from convai_fast.options import options_of

# Each command is a module of this package with `run(options)`, and one of `cli/options` with the
# class of its options. They are imported when asked for, so that `--help` does not wait for torch.
COMMANDS = {
    "demo": ("DemoOptions", "train a small model on built-in dialogues and show what it learnt"),
    "prepare": ("PrepareOptions", "turn a file of dialogues into a store, or preview it"),
    "train": ("TrainCommand", "fine-tune a model of two heads on dialogues"),
    "evaluate": ("EvaluateOptions", "measure a model as ConvAI2 did: hits@1, perplexity, F1, …"),
    "interact": ("InteractOptions", "talk to a model"),
    "serve": ("ServeOptions", "answer over HTTP as OpenAI's completions do, and on a page"),
    "generate": ("GenerateOptions", "write replies in bulk, from JSONL or a dataset"),
    "rank": ("RankOptions", "rank candidate replies in bulk, from JSONL or a dataset"),
    "benchmark": ("BenchmarkOptions", "measure a model here and in transformers, side by side"),
    "convert": ("ConvertOptions", "bring an old checkpoint into today's layout, or merge LoRA"),
    "push": ("PushOptions", "upload a model to the Hugging Face Hub, with a card"),
    "info": ("InfoOptions", "print versions, what is compiled, and devices; or what a model is"),
}

_SHOWN = {"dataset_path": "data"}  # the name that sentences use where it is not the option's own


def usage() -> str:
    """What `convai-fast --help` prints."""
    lines = ["usage: convai-fast COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join([*lines, "", "`convai-fast COMMAND --help` explains a command's options."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (2: a mistake the user can mend, 130: Ctrl-C)."""
    is_process = arguments is None
    others = OtherProcesses()
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
    try:
        if "--help" in rest or "-h" in rest:
            print(help_of(name, options_class(name)))
            return 0
        options, process, given = parse(options_class(name), rest)
        _check_nothing_is_missing(options)
        process.check()
        if name == "interact" and sys.stdout.isatty():
            print(f"loading {options.model} …", flush=True)  # before the seconds of importing torch
        module = _import(name, process.threads)
        if is_process and name not in ("prepare", "convert", "push", "info"):
            _tell_of(others)
        if name == "train":
            # A run that is continued has to know which options were given.
            module.run(options, given)
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
    names = {*ALIASES.values(), *options_of(options_class(command)), *options_of(ProcessOptions)}

    def shown(match: re.Match[str]) -> str:
        name = match[1]
        return f"--{_SHOWN.get(name, name)}" if name in names else match[0]

    return re.sub(r"`(\w+)`", shown, sentence)


def options_class(command: str) -> Any:
    """The class of a command's options."""
    module = importlib.import_module(f"convai_fast.cli.options.{command}")
    return getattr(module, COMMANDS[command][0])


def _check_nothing_is_missing(options: Any) -> None:
    lacks: dict[str, str] = getattr(options, "missing", dict)()
    if lacks:
        names = _listed([f"`{name}`" for name in lacks])
        verb = "is" if len(lacks) == 1 else "are"
        raise UserError(f"{names} {verb} missing: give {_listed(list(lacks.values()))}")


def _listed(texts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def _import(command: str, num_threads: int) -> ModuleType:
    """The module of a command, with torch, which computes with so many threads, unless 0."""
    if num_threads:
        os.environ["RAYON_NUM_THREADS"] = str(num_threads)  # the tokenizer's
    module = importlib.import_module(f"convai_fast.cli.{command}")
    if num_threads:
        import torch

        torch.set_num_threads(num_threads)
    return module


def _tell_of(others: OtherProcesses) -> None:
    import torch

    # Processes of one launcher know of one another.
    if "RANK" not in os.environ and (warning := others.warning(torch.get_num_threads())):
        print(warning, file=sys.stderr)


def _flush() -> None:
    """Write out what is left; where the reader (`| head`) has gone, Python must not try again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _version() -> str:
    try:
        return version("convai-fast")
    except PackageNotFoundError:
        return "(not installed as a package)"


if __name__ == "__main__":
    sys.exit(main())
