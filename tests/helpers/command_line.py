"""The command line: in a process of its own, or in this one with what is typed."""

import contextlib
import dataclasses
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator


def arguments_of(options) -> list[str]:
    """The command line that gives these options."""
    arguments = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value is True:
            arguments.append(f"--{field.name}")
        elif isinstance(value, tuple):
            arguments += [f"--{field.name}", *value] if value else []
        elif value is not False:
            arguments += [f"--{field.name}", str(value)]
    return arguments


def run(*arguments, **environment):
    """A command from its beginning to its end, with these environment variables."""
    return subprocess.run(
        [sys.executable, "-m", "convai_fast", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@contextlib.contextmanager
def standard_input(content: bytes) -> Iterator[None]:
    """What a command reads from its input while it runs in this process."""
    before = sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
    try:
        yield
    finally:
        sys.stdin = before


def start(options, **environment):
    """The command `train`, as a user starts it, under way."""
    return subprocess.Popen(
        [sys.executable, "-m", "convai_fast", "train", *arguments_of(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def start_server(*options, **environment):
    """The command `serve` on a port of its own: the process, and its address once it answers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "convai_fast", "serve", *options, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    line = process.stdout.readline()
    match = re.search(r"http://[\d.]+:\d+", line)
    assert match is not None, f"{options}: {line}{process.communicate()[1]}"
    return process, match[0]
