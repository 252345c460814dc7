"""Millions of broken inputs: each is answered, or refused as it should be.

    python -m tests.fuzz operators --count 1000000

An input is made from its number alone: `--first 1234 --count 1` makes a finding again. At the end
stand how many inputs ended how, and the first findings with their numbers; the exit code is 1 if
there are any.
"""

import os
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.fuzz import converter, operators, readers, requests
from tests.fuzz.damage import Hang

# What makes, from a folder that it may use, a function that tries the input of a number and tells
# how that ended; what it raises is a finding.
FUZZERS: dict[str, Callable[[Path], Callable[[int], str]]] = {
    "operators": operators.fuzzer,
    "readers": readers.fuzzer,
    "requests": requests.fuzzer,
    "converter": converter.fuzzer,
}


def fuzz(
    name: str, numbers: Iterable[int], under_way: Path | None = None
) -> tuple[Counter[str], dict[int, str]]:
    """How many inputs ended how, and the traceback of each finding by the number of its input.

    The number of each is written to the file `under_way` before it is tried: a sanitizer ends the
    process.
    """
    outcomes: Counter[str] = Counter()
    findings = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        open(under_way or os.devnull, "wb", buffering=0) as file,
    ):
        try_one = FUZZERS[name](Path(folder))
        for number in numbers:
            os.pwrite(file.fileno(), b"%d\n" % number, 0)
            try:
                outcomes[try_one(number)] += 1
            except (Exception, Hang):
                findings[number] = traceback.format_exc()
    return outcomes, findings
