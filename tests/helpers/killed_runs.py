"""Runs that are killed, and how they are compared."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file

from convai_fast.training import checkpoints, loop, run_folder

STEPS = 14  # of `run_options`: two epochs of 7


def records(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second", None)
        line.pop("mfu", None)
    return lines


def assert_equal_runs(run, other):
    assert records(run) == records(other)
    for link in ("last", "best"):
        file = next((other / link).glob("*.safetensors")).name
        ours, theirs = (load_file(r / link / file) for r in (run, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), link
    states = [torch.load(r / "last" / checkpoints.STATE_FILE) for r in (run, other)]
    ours, theirs = (s["optimizer"]["state"] for s in states)
    assert all(torch.equal(ours[i][k], theirs[i][k]) for i in ours for k in ours[i])
    assert {p.name for p in (run / "checkpoints").iterdir()} == {
        p.name for p in (other / "checkpoints").iterdir()
    }


def chosen(options):
    """The run that `options.resume` chooses."""
    with run_folder.Claim() as claim:
        return loop.resolve_resume(options, None, claim).resume


def in_a_process(options, before=lambda: None):
    """Train in a fork of this process, which has imported all it needs."""

    def work():
        # A tokenizer's threads do not come along, and a command that ran here asked for them.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        before()
        loop.train(options, lambda _: None)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def die_at(target, name, call):
    """Have the `call`-th call of a function end this process at once, as `kill -9` would."""
    function, calls = getattr(target, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            if name == "save":  # of a file: half of it
                Path(args[1].name).write_bytes(b"PK\3\4 half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(target, name, counted)


def tree(run):
    return {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
