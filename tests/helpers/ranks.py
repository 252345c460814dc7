"""Starts `convai-fast train` as the ranks of one run, as a launcher would, but faster."""

import contextlib
import gc
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from convai_fast.cli.main import main
from convai_fast.training import step
from convai_fast.training.run_folder import RunFolder

# A server that has imported everything is forked for each rank.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["convai_fast.cli.train"])


def start_ranks(
    arguments_of_ranks: list[list[str]], folder: Path, kill_after_save: int = 0
) -> list[multiprocessing.Process]:
    """A process for each list of arguments; rank r leaves out-r, err-r, random-r in `folder`.

    Rank 0 is killed after its `kill_after_save`-th checkpoint (0: never).
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = len(arguments_of_ranks)
    processes = [
        _CONTEXT.Process(
            target=_run, args=(arguments, folder, rank, size, port, kill_after_save), daemon=True
        )
        for rank, arguments in enumerate(arguments_of_ranks)
    ]
    for process in processes:
        process.start()
    return processes


def exit_codes(processes, timeout_s=60) -> list[int | None]:
    """Wait for all; None for one that hangs, which is then killed."""
    for process in processes:
        process.join(timeout_s)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def _run(
    arguments: list[str], folder: Path, rank: int, world_size: int, port: int, kill_after_save: int
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    step.matrix_rate = lambda *_: 1.0  # half a second of every run, and none is timed
    saves, save = [], RunFolder.save

    def save_and_die(*args, **kwargs):
        save(*args, **kwargs)
        saves.append(kwargs)
        if len(saves) == kill_after_save:
            os.kill(os.getpid(), signal.SIGKILL)

    destroy = dist.destroy_process_group

    def destroy_alone():
        # What else owns the group could deadlock when it is freed, though it rarely does.
        assert not any(type(o) is DistributedDataParallel for o in gc.get_objects())
        destroy()

    RunFolder.save, dist.destroy_process_group = save_and_die, destroy_alone
    with (
        open(folder / f"out-{rank}", "w") as out,
        open(folder / f"err-{rank}", "w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = main(["train", *arguments])
        (folder / f"random-{rank}").write_text(str(torch.rand(()).item()))
        sys.exit(code)
