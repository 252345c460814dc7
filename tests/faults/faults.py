"""Lets every call that touches a file fail once, or cuts the power there, in a whole command.

    python tests/faults/faults.py                 all commands, every call
    python tests/faults/faults.py train --every 5

Afterwards the same command must end as if nothing had been: what it wrote equals that of a run that
was not disturbed. Until then it may say one sentence and exit with code 2, and nothing else.
"""

import argparse
import contextlib
import ctypes
import errno
import filecmp
import io
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

LIBRARY = "CONVAI_FAST_FAULTS"
POWER_CUT = 137
KINDS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EACCES": errno.EACCES, "power cut": 0}


def build(folder: Path) -> Path:
    """Compile the library that lets calls fail."""
    library = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return library


def start(arguments: list[str]) -> int:
    """Run this file again, with the library loaded before all others."""
    with tempfile.TemporaryDirectory() as folder:
        library = str(build(Path(folder)))
        environment = {**os.environ, "LD_PRELOAD": library, LIBRARY: library}
        environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
        return subprocess.run([sys.executable, __file__, *arguments], env=environment).returncode


# ---- commands ----------------------------------------------------------------------------------


@dataclass
class Command:
    """A command in a folder `{work}`, with inputs in `{inputs}`; what must be equal at the end."""

    arguments: str
    results: tuple[str, ...]
    again: str = ""  # what is added where a power cut came between two of its files
    is_done: str = ""  # what it says when there is nothing left to do, with exit code 2

    def words(self, work: Path | str, inputs: Path) -> list[str]:
        """The command line."""
        return self.arguments.format(work=work, inputs=inputs).split()


COMMANDS = {
    "train": Command(
        "train --data {inputs}/dialogues.json --model {inputs}/shape --from_scratch --max_steps 3 "
        "--save_every 2 --log_every 1 --precision fp32 --device cpu --dataset_cache {work}/cache "
        "--train_batch_size 2 --gradient_accumulation_steps 1 --output {work}/run --resume auto",
        ("run/last/model.safetensors", "run/best/model.safetensors"),
    ),
    "prepare": Command(
        "prepare --data {inputs}/dialogues.json --tokenizer {inputs}/shape --output {work}/store",
        ("store/tokens.bin", "store/train.candidate_ids.bin", "store/meta.json"),
    ),
    "generate": Command(
        "generate --model {inputs}/model --input {inputs}/requests.jsonl --max_length 3 "
        "--device cpu --output {work}/replies.jsonl",
        ("replies.jsonl", "replies.jsonl.errors.jsonl"),
        is_done="is already there",
    ),
    "prepare into a folder": Command(
        "prepare --data {inputs}/dialogues.json --tokenizer {inputs}/shape --output {work}",
        ("tokens.bin", "train.candidate_ids.bin", "meta.json"),
    ),
    "convert into a folder": Command(
        "convert --model {inputs}/model --output {work}",
        ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"),
        is_done="is there already",
    ),
    "convert": Command(
        "convert --model {inputs}/model --output {work}/converted",
        (
            *("converted/model.safetensors", "converted/config.json"),
            *("converted/generation_config.json", "converted/tokenizer.json"),
        ),
        is_done="is there already",
    ),
    "evaluate": Command(
        "evaluate --model {inputs}/model --data {inputs}/dialogues.json --metrics ppl hits@1 "
        "--precision fp32 --device cpu --details {work}/details.jsonl --output {work}/figures.json",
        ("details.jsonl",),
        again=" --overwrite",
    ),
}


def make_inputs(folder: Path) -> None:
    """Dialogues, a tokenizer, the shape of a model, a model, and requests."""
    import torch

    from convai_fast.data.builtin import builtin_dialogues
    from convai_fast.dialogue.new_tokenizer import train_tokenizer
    from convai_fast.model import DoubleHeadsModel, TransformerConfig

    dialogues = builtin_dialogues(num_train=4, num_valid=2)
    text = json.dumps({split: [asdict(d) for d in own] for split, own in dialogues.items()})
    (folder / "dialogues.json").write_text(text)
    tokenizer = train_tokenizer(dialogues["train"], vocab_size=300)
    shape = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 256}
    tokenizer.save_pretrained(folder / "shape")
    (folder / "shape" / "config.json").write_text(json.dumps(shape))
    torch.manual_seed(0)
    config = TransformerConfig.from_transformers({**shape, "vocab_size": len(tokenizer)})
    model = DoubleHeadsModel(config)
    model.head_is_new = False  # its random weights are asked to rank
    model.save_pretrained(folder / "model", tokenizer)
    requests = [{"history": ["hello"]}, {"top_p": 7}, {"history": ["bye"], "n": 2}]
    (folder / "requests.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in requests))


def import_all(command: Command, inputs: Path) -> None:
    """Run it once in this process: what a command imports takes longer than all else it does."""
    from convai_fast.cli.main import main

    with (
        tempfile.TemporaryDirectory() as work,
        contextlib.chdir(inputs),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        main(command.words(work, inputs))


# ---- one case ----------------------------------------------------------------------------------


@dataclass
class Outcome:
    code: int
    calls: int
    told: str


def run(command: Command, work: Path, inputs: Path, at: int = 0, number: int = 0) -> Outcome:
    """Run it in a fork of this process; call `at` fails (0: none)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        faults, told, code = ctypes.CDLL(os.environ[LIBRARY]), io.StringIO(), 70
        try:
            os.chdir(inputs)
            from convai_fast.cli.main import main

            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                faults.faults_arm(os.fsencode(work), ctypes.c_long(at), number)
                code = main(command.words(work, inputs))
        except BaseException:
            told.write(traceback.format_exc())
        faults.faults_count.restype = ctypes.c_long
        calls = faults.faults_count()
        faults.faults_arm(b"", ctypes.c_long(0), 0)
        os.write(writing, json.dumps([code, calls, told.getvalue()[-3000:]]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Outcome(*json.loads(said)) if said else Outcome(status, 0, "")


def check(command: Command, inputs: Path, expected: Path, at: int, number: int) -> tuple[str, str]:
    """(how the disturbed run ended, what is wrong) with the fault at call `at`."""
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        work = Path(name)
        first = run(command, work, inputs, at, number)
        if first.code not in ((POWER_CUT,) if number == 0 else (0, 2)):
            return "wrong", f"exit code {first.code}: {first.told}"
        if first.code == 2 and len(first.told.strip().splitlines()[-1]) > 1500:
            return "wrong", f"not one sentence: {first.told}"
        if first.code != 0:
            again = replace(command, arguments=command.arguments + (command.again * (number == 0)))
            last = run(again, work, inputs)
            is_done = command.is_done and command.is_done in last.told
            if last.code != 0 and not is_done:
                return "wrong", f"cannot go on, code {last.code}: {last.told}\n---\n{first.told}"
        for result in command.results:
            if not (work / result).exists() or not filecmp.cmp(
                work / result, expected / result, shallow=False
            ):
                return "wrong", f"{result} differs after: {first.told}"
        left = sorted(p.name for p in work.iterdir() if p.name.startswith("."))
        if left and number != 0 and first.code != 0:
            return "wrong", f"left behind: {left} after: {first.told}"
        return {0: "went on", 2: "one sentence", POWER_CUT: "died"}[first.code], ""


def examine(name: str, inputs: Path, every: int, kinds: dict[str, int]) -> tuple[Counter, list]:
    """Every `every`-th call of a command, with each kind of fault."""
    command, outcomes, wrong = COMMANDS[name], Counter(), []
    with tempfile.TemporaryDirectory(prefix="faults-") as undisturbed:
        whole = run(command, Path(undisturbed), inputs)
        assert whole.code == 0, whole.told
        for kind, number in kinds.items():
            for at in range(1, whole.calls + 1, every):
                outcome, what = check(command, inputs, Path(undisturbed), at, number)
                outcomes[kind, outcome] += 1
                if what:
                    wrong.append(f"{name}, {kind} at call {at} of {whole.calls}: {what}")
    return outcomes, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    options = parser.parse_args()
    if unknown := set(options.commands) - COMMANDS.keys():
        parser.error(f"no command of {', '.join(COMMANDS)}: {', '.join(sorted(unknown))}")
    if LIBRARY not in os.environ:
        return start(sys.argv[1:])
    import torch

    torch.set_num_threads(1)
    from convai_fast.training import step

    step.matrix_rate = lambda *_: 1.0  # two seconds of every case, and nothing here is timed
    names = options.commands or list(COMMANDS)
    wrong = []
    with tempfile.TemporaryDirectory(prefix="faults-inputs-") as folder:
        make_inputs(Path(folder))
        for name in names:
            import_all(COMMANDS[name], Path(folder))
            kinds = {kind: KINDS[kind] for kind in options.kinds}
            outcomes, found = examine(name, Path(folder), options.every, kinds)
            for (kind, outcome), count in sorted(outcomes.items()):
                print(f"{name:<21} {kind:<10} {outcome:<13} {count:>5}", flush=True)
            wrong += found
    for what in wrong[:20]:
        print(f"\n{what}")
    print(f"{len(wrong)} faults that were not met")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
