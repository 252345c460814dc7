"""What the fuzzers share: damage to files, and what a command may do with damaged files."""

import contextlib
import copy
import io
import json
import random
import signal
from collections.abc import Iterator
from typing import NamedTuple

from convai_fast.cli.main import main

# Values that programs trip over.
ODD_VALUES = [
    None, True, False, 0, -1, 1, 2, 10**9, 10**30, 10**400, 0.5, 1e-300, float("nan"), float("inf"),
    "", "a", "\n", "\ud800", "é", "<bos>", [], [[]], [None], {}, {"a": 1}, "x" * 500,
]  # fmt: skip


class Hang(BaseException):
    """It took too long; not an Exception, which what hangs might catch."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise Hang where what is within the context is not done by then."""

    def stop(*_):
        raise Hang(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Outcome(NamedTuple):
    code: int
    stdout: str
    stderr: str


def run_command(arguments, limit_s=120):
    """Run a command of convai-fast in this process. Raises whatever it raises, and Hang."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        time_limit(limit_s),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        code = main(arguments)
    return Outcome(code, stdout.getvalue(), stderr.getvalue())


def assert_one_sentence(outcome, command, allowed=()):
    """Either success, or exit code 2 and one sentence on stderr; lines of `allowed` may precede."""
    lines = outcome.stderr.splitlines()
    lines = [line for line in lines if not any(text in line for text in allowed)]
    if outcome.code == 0:
        assert not lines, outcome
        outcome.stdout.encode()  # can be printed
        return
    assert outcome.code == 2, outcome
    assert len(lines) == 1, outcome
    assert lines[0].startswith(f"convai-fast {command}: "), outcome
    assert 20 < len(lines[0]) < 2000, outcome


def check_sentence(sentence: str, most: int = 800) -> None:
    """It is one, of fewer than `most` characters, and can be printed."""
    assert len(sentence.splitlines()) == 1, f"not one line: {sentence!r}"
    assert not sentence.endswith("."), f"more than a sentence: {sentence!r}"
    assert 10 < len(sentence) < most, f"not to be read: {sentence!r}"
    sentence.encode()


def mutate_bytes(rng: random.Random, data: bytes, within: int | None = None) -> bytes:
    """`data` with a few bytes changed, cut, copied or cut off; within the first bytes, if given."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        end = min(len(data), within or len(data))
        at = rng.randrange(end + 1)
        length = rng.choice([1, 1, 2, 4, 8, 64])
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            data[at:at] = rng.choice([b"\0", b"\xff", b"\n", b'"', b"{", b"[" * 2000, b"-", b"9"])
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            source = rng.randrange(len(data) + 1)
            data[at : at + length] = data[source : source + length]
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """JSON of the same structure but for one node, or `data` itself where it is no JSON."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return data
    nodes = []

    def collect(node):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            nodes.append((node, key))
            if isinstance(value, dict | list):
                collect(value)

    if isinstance(content, dict | list):
        collect(content)
    if not nodes or rng.random() < 0.03:
        return json.dumps(rng.choice(ODD_VALUES)).encode()
    node, key = rng.choice(nodes)
    kind = rng.randrange(5)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[str(rng.choice(ODD_VALUES))] = node.pop(key)
    elif kind == 2:
        other, other_key = rng.choice(nodes)
        node[key] = copy.deepcopy(other[other_key])
    elif kind == 3 and type(node[key]) is int:
        node[key] += rng.choice([-1, 1, 1000])
    else:
        node[key] = rng.choice(ODD_VALUES)
    return json.dumps(content).encode()
