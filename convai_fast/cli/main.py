"""`convai-fast COMMAND …`: finds the command's file, parses its options, runs it."""

import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from convai_fast.errors import UserError

# Each command is a module of this package with an options class and `run(options)`. They are
# imported when asked for, so that `--help` does not wait for torch.
COMMANDS = {
    "demo": ("DemoOptions", "train a small model on built-in dialogues and show what it learnt"),
    "prepare": ("PrepareOptions", "turn a file of dialogues into a store, or preview it"),
    "train": ("TrainOptions", "fine-tune a GPT or GPT-2 double-heads model on dialogues"),
    "evaluate": ("EvaluateOptions", "measure a model as ConvAI2 did: hits@1, perplexity, F1, …"),
    "interact": ("InteractOptions", "talk to a model"),
    "generate": ("GenerateOptions", "write replies in bulk, from JSONL or a dataset"),
    "convert": ("ConvertOptions", "bring a checkpoint of the old libraries into today's layout"),
    "info": ("InfoOptions", "print versions, what is compiled, and which devices there are"),
}


def usage() -> str:
    """What `convai-fast --help` prints."""
    lines = ["usage: convai-fast COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join([*lines, "", "`convai-fast COMMAND --help` explains a command's options."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (2: a mistake the user can mend, 130: Ctrl-C)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"convai-fast: no command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2

    # transformers' advice on stderr would stand between a user and the one sentence that matters.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import tyro

    try:
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
        print(f"convai-fast {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has gone; Python must not try to flush what is left.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
