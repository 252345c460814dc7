"""What stands between a large file of dialogues and training: time, and memory beside the store.

Each reading is a process of its own, whose anonymous memory is looked at as it grows: the store
itself is mapped from disk. Linux only.

python -m pytest benchmarks/bench_reading.py --benchmark-only
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.timing import record
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.dialogue.new_tokenizer import train_tokenizer

GIGABYTES = float(os.environ.get("CONVAI_FAST_BENCH_GB", "1"))

_READ = """
import sys
from convai_fast.data.dataset import open_dataset
from convai_fast.data.options import DataOptions
from convai_fast.dialogue.tokenizer import load_tokenizer
tokenizer = load_tokenizer(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
store = open_dataset(DataOptions(sys.argv[1]), tokenizer, sys.argv[3], lambda line: None)
print(store.num_bytes, sum(split.num_examples for split in store.splits.values()), flush=True)
sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, and two files of chat data: a large one, and one long conversation."""
    folder = tmp_path_factory.mktemp("reading")
    dialogues = builtin_dialogues(num_train=200, num_valid=1)["train"]
    train_tokenizer(dialogues, vocab_size=1000).save_pretrained(folder / "tokenizer")
    words = sorted({w for d in dialogues for u in d.utterances for w in u.candidates[-1].split()})
    rng = random.Random(0)

    def said(fewest: int, most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(fewest, most)))

    def turns(count: int) -> list[dict]:
        return [
            {"role": ("user", "assistant")[i % 2], "content": said(4, 25)} for i in range(count)
        ]

    with open(folder / "large.jsonl", "w") as file:
        while file.tell() < GIGABYTES * 1e9:
            for _ in range(1000):
                system = "\n".join(said(4, 8) for _ in range(4))
                messages = [{"role": "system", "content": system}, *turns(2 * rng.randint(2, 7))]
                file.write(json.dumps({"messages": messages}) + "\n")
    with open(folder / "long.jsonl", "w") as file:
        file.write(json.dumps({"messages": turns(50_000)}) + "\n")
        file.write(json.dumps({"messages": turns(4)}) + "\n")
    return folder


def read(path: Path, folder: Path) -> dict[str, float]:
    """Open the dataset at `path` in a process of its own, and measure it."""
    arguments = [path, folder / "tokenizer", folder / "cache"]
    process = subprocess.Popen(
        [sys.executable, "-c", _READ, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    before = peak = anonymous_kb(process.pid)
    started = time.perf_counter()
    process.stdin.write("go\n")
    process.stdin.flush()
    os.set_blocking(process.stdout.fileno(), False)
    while not (line := process.stdout.readline()):
        peak = max(peak, anonymous_kb(process.pid))
        time.sleep(0.02)
        assert process.poll() is None
    seconds = time.perf_counter() - started
    process.communicate("done\n")
    store_bytes, examples = map(int, line.split())
    return {
        "seconds": round(seconds, 2),
        "growth_mb": round((peak - before) / 1e3),
        "store_mb": round(store_bytes / 1e6),
        "examples": examples,
    }


def anonymous_kb(pid: int) -> int:
    """Memory of a process that no file on disk stands for, in KB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0])


@pytest.mark.parametrize("name", ["large", "long"])
def test_reading(benchmark, folder, say, name):
    path = folder / f"{name}.jsonl"
    first = benchmark.pedantic(read, (path, folder), rounds=1)
    again = read(path, folder)
    record("reading", f"{name}, {path.stat().st_size / 1e6:,.0f} MB", {**first, "again": again})
    say(
        f"\n{name}: {path.stat().st_size / 1e6:,.0f} MB of JSON lines, {first['examples']:,} "
        f"examples: {first['seconds']:,.1f} s and {first['growth_mb']:,.0f} MB beside the store of "
        f"{first['store_mb']:,.0f} MB; found again in {again['seconds']:,.1f} s, "
        f"{again['growth_mb']:,.0f} MB"
    )
