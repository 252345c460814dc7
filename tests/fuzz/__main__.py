"""Tries as many broken inputs as one likes; `python -m tests.fuzz --help`."""

import argparse
import faulthandler
import sys
import tempfile
from pathlib import Path

import torch

from tests.fuzz import FUZZERS, fuzz


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("fuzzer", choices=FUZZERS)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
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
