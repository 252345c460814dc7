"""The pages of the documentation: their fences, and how those are run.

The info string of a fence says what becomes of it. `sh` and `python` run, `sh network`, `sh gpu`,
`sh long` and `sh install` do not; `sh server` and `python server` ask the server that a command
`convai-fast serve` above them has started, on a port of its own. With a title, any other language
is a file, which is written, and without one it is output that is only shown.
"""

import contextlib
import io
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from convai_fast.cli.main import main
from tests.helpers.command_line import standard_input, start_server

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKS = ("network", "gpu", "long", "install", "server")
SHOWN = ("text", "json", "yaml")
MOST_STEPS = "2"
DEFAULT_PORT = "8000"

_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)
_INFO = re.compile(r'(\w+)(?: (\w+))?(?: title="([^"]+)")?')


class Fence(NamedTuple):
    language: str
    mark: str
    title: str  # of the file that it shows
    body: str

    @property
    def is_known(self) -> bool:
        """Whether its info string follows the convention."""
        if self.language in ("sh", "python"):
            return self.mark in ("", *MARKS)
        return self.language in SHOWN and not self.mark


def fences(page: Path) -> list[Fence]:
    """The fences of a page, in order; one whose info string is none has no language."""
    found = []
    for info, body in _FENCE.findall(page.read_text(encoding="utf-8")):
        match = _INFO.fullmatch(info)
        found.append(Fence(*(match.groups("") if match else ("", "", "")), body))
    return found


def commands(body: str) -> Iterator[list[str]]:
    """The command lines of a `sh` fence."""
    for line in body.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def run_page(page: Path) -> None:
    """Run the fences of a page in the working directory, which holds what its commands name.

    Training takes few steps; in `interact` is typed what the output below the command shows.
    """
    with contextlib.ExitStack() as servers:
        _run_fences(page, servers)


def _run_fences(page: Path, servers: contextlib.ExitStack) -> None:
    names = {"__name__": "page"}
    found = fences(page)
    port = ""
    for fence, after in zip(found, [*found[1:], Fence("", "", "", "")], strict=True):
        if fence.title:
            path = Path(fence.title)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(fence.body, encoding="utf-8")
        elif fence.language == "python" and not fence.mark:
            exec(compile(fence.body, str(page), "exec"), names)
        elif fence.mark == "server":
            assert port, "the command that starts the server comes first"
            body = fence.body.replace(DEFAULT_PORT, port)
            if fence.language == "sh":
                subprocess.run(["bash", "-ec", body], check=True, capture_output=True)
            else:
                exec(compile(body, str(page), "exec"), names)
        elif fence.language == "sh" and not fence.mark and "convai-fast serve" in fence.body:
            ((_, _, *options),) = commands(fence.body)
            port = servers.enter_context(server(*options))
        elif fence.language == "sh" and not fence.mark:
            typed = re.findall(r"^>>> (.*)$", after.body, re.M) if after.language == "text" else []
            for words in commands(fence.body):
                _run(words, typed or ["hello !", "/quit"])


@contextlib.contextmanager
def server(*options: str) -> Iterator[str]:
    """The port of a server that runs until the block ends."""
    process, url = start_server(*options)
    try:
        yield url.rsplit(":", 1)[1]
    finally:
        process.terminate()
        process.communicate(timeout=30)


def _run(words: list[str], typed: list[str]) -> None:
    program, command, *options = words
    assert program == "convai-fast", f"{shlex.join(words)} has no mark: {', '.join(MARKS)}"
    if command == "train":
        if "--output" in options:  # in place of the run that other pages begin with
            shutil.rmtree(options[options.index("--output") + 1], ignore_errors=True)
        options += ["--max_steps", MOST_STEPS]
    with (
        standard_input("\n".join(typed).encode()),
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        code = main([command, *options])
    assert code == 0, f"{shlex.join(words)}\n{errors.getvalue()}"
