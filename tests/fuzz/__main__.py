"""Tries as many broken inputs as one likes; `python -m tests.fuzz --help`."""

import argparse
import faulthandler
import inspect
import sys
import tempfile
from pathlib import Path

import torch

import tests.fuzz
from tests.fuzz import FUZZERS, fuzz


def describe() -> str:
    """What is broken, how, and by what, each as the docstring of its own module says it."""
    modules = {name: inspect.getmodule(fuzzer) for name, fuzzer in FUZZERS.items()}
    lines = (f"  {name:<11}{inspect.getdoc(m).splitlines()[0]}" for name, m in modules.items())
    return "\n".join([tests.fuzz.__doc__, *lines])


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("fuzzer", choices=FUZZERS, help="what is broken: see above")
    parser.add_argument("--count", type=int, default=10_000, help="inputs to try (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first (%(default)s)")
    options = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    numbers = range(options.first, options.first + options.count)
    with tempfile.NamedTemporaryFile(prefix="fuzz-", delete=False) as under_way:
        print(f"the number of the input that is tried: {under_way.name}", flush=True)
    outcomes, findings = fuzz(options.fuzzer, numbers, Path(under_way.name))
    Path(under_way.name).unlink()
    for outcome, count in sorted(outcomes.items()):
        print(f"{outcome:<28} {count:>10,}")
    for number, finding in list(findings.items())[:5]:
        print(f"\ninput {number}:\n{finding}")
    print(f"{options.count:,} inputs, {len(findings):,} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
