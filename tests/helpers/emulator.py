"""CUDA kernels run on the CPU, by the emulator in tests/emulator/.

`EmulatedGpu` is a context in which an operator of CPU tensors is computed by its CUDA kernel, as if
they were a GPU's. An operator's kernel is launched by tests/emulator/<operator>.cpp, and from here
by the function that `@kernel_of` registers.
"""

import ctypes
import faulthandler
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from functools import cache
from itertools import chain, count
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]
CSRC, EMULATOR, BUILD = ROOT / "csrc", ROOT / "tests" / "emulator", ROOT / "build" / "emulator"
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall"]
FLAGS += ["-Wno-unknown-pragmas"]  # unroll
BARRIER = re.compile(
    r"^(\s*(?:if \(.*\) |else )?)((?:\w+(?:::|\(\)\.))*(?:__)?sync\w*\(\w*\));", re.M
)

CLUSTERS = (1, 2, 1, 4, 1, 2, 1, 8)  # blocks a row
ROWS_OF_SAMPLE = 3
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


# ---- building ------------------------------------------------------------------------------------


class Kernels:
    """The compiled kernels of an operator, and the barriers in them, each of which has a number."""

    def __init__(self, name: str):
        sources = {path: path.read_text() for path in sorted((CSRC / "ops" / name).glob("*.cuh"))}
        self.barriers: list[str] = []  # where each stands

        def numbered(path: Path) -> Callable[[re.Match], str]:
            def number(match: re.Match) -> str:
                line = match.string.count("\n", 0, match.start(2)) + 1
                self.barriers.append(f"{path.relative_to(ROOT)}:{line}: {match[2]}")
                return f"{match[1]}EMULATOR_BARRIER({len(self.barriers) - 1}, {match[2]});"

            return number

        sources = {path: BARRIER.sub(numbered(path), text) for path, text in sources.items()}
        self.library = ctypes.CDLL(str(_build(name, sources)))

    def __call__(self, function: str, *args: Tensor | int | float | None) -> None:
        """Launch; a tensor is handed over as its address. Raises what went wrong there."""
        convert = {int: ctypes.c_int64, float: ctypes.c_double, bool: ctypes.c_int64}
        launch = self.library[function]
        launch.restype = ctypes.c_char_p
        failure = launch(
            *(
                ctypes.c_void_p(None if x is None else x.data_ptr())
                if x is None or isinstance(x, Tensor)
                else convert[type(x)](x)
                for x in args
            )
        )
        if failure is not None:
            raise RuntimeError(f"{function} in the emulator: {failure.decode()}")


@cache
def kernels(name: str) -> Kernels:
    return Kernels(name)


def _build(name: str, sources: dict[Path, str]) -> Path:
    """The library of an operator's kernels, once for whatever processes want it."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        pytest.skip("the emulator of CUDA kernels needs a C++ compiler")
    command = [*compiler, *FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    headers = [path for folder in (CSRC, EMULATOR) for path in folder.rglob("*") if path.is_file()]
    texts = [*command, *sources.values(), *(path.read_text() for path in sorted(headers))]
    library = BUILD / f"{name}-{hashlib.sha256(chr(0).join(texts).encode()).hexdigest()[:16]}.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            numbered = BUILD / name
            for path, text in sources.items():
                copy = numbered / path.relative_to(CSRC)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text(f'#line 1 "{path}"\n{text}')
            folders = [f"-I{folder}" for folder in (EMULATOR / "include", EMULATOR, numbered, CSRC)]
            unfinished = library.with_suffix(".unfinished")
            source = EMULATOR / f"{name}.cpp"
            subprocess.run([*command, *folders, str(source), "-o", str(unfinished)], check=True)
            for old in BUILD.glob(f"{name}-*.so"):
                old.unlink()
            unfinished.rename(library)
    return library


# ---- running -------------------------------------------------------------------------------------


def on_gpus(names: str = "", cuda: Iterable = [()], emulator: Iterable = [()]):
    """Parametrizes a test by `gpu`, and by what else it is given: less in the emulator than on a
    GPU, where it is as fast.

    `gpu` is the device for a kernel's tensors: "cuda", or "cpu" as long as the emulator takes the
    place of a GPU.
    """
    cases = [pytest.param("cuda", *values, marks=pytest.mark.cuda) for values in cuda]
    cases += [("emulator", *values) for values in emulator]
    return pytest.mark.parametrize(["gpu", *names.split()], cases, indirect=["gpu"])


KERNELS: dict[str, Callable] = {}  # by the name of the operator


class EmulatedGpu(TorchDispatchMode):
    """A context in which CPU tensors are taken for a GPU's by the operators that have a kernel.

    Each launch is another one: of the schedule, and of what the kernel leaves to its caller, such
    as the number of blocks.
    """

    def __init__(self, first_launch: int = 0):
        super().__init__()
        self.launches = count(first_launch)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        launch = KERNELS.get(func.name())
        if launch is None:
            return func(*args, **(kwargs or {}))
        return launch(*args, **(kwargs or {}), number=next(self.launches))


def kernel_of(operator: str) -> Callable:
    def register(launch: Callable) -> Callable:
        KERNELS[f"convai_fast::{operator}"] = launch
        return launch

    return register


@kernel_of("sample")
def _sample(logits, *given, number):
    *parameters, return_logprobs = given
    token_ids = torch.full((len(logits),), -7)
    logprobs = torch.full((len(logits) if return_logprobs else 0,), 99.0)

    def some(x: Tensor, rows: slice) -> tuple[Tensor, int]:
        return (x[rows], x.stride(0)) if len(x) > 1 else (x, 0)

    # A batch is launched in parts, each with another number of blocks a row.
    for first in range(0, len(logits), ROWS_OF_SAMPLE):
        rows = slice(first, first + ROWS_OF_SAMPLE)
        launch = number + first // ROWS_OF_SAMPLE
        kernels("sample")(
            "sample",
            DTYPES[logits.dtype],
            logits[rows],
            *logits[rows].shape,
            *logits.stride(),
            *(y for x in parameters for y in some(x, rows)),
            token_ids[rows],
            logprobs[rows] if return_logprobs else None,
            CLUSTERS[launch % 8],
            (launch + launch // 8) % 2,  # whether rows are kept in shared memory
            (launch + launch // 16) % 4 + 4 * launch,
        )
    return token_ids, logprobs


@kernel_of("collate")
def _collate(*given, number):
    *store, plan, layout, num_candidates, seq_len, _ = (*given, False)[:10]
    batch = len(plan)
    ids, segments, labels = (torch.full((batch, num_candidates, seq_len), -7) for _ in range(3))
    ends = torch.full((batch, num_candidates), -7)
    outputs = (ids, segments, None, None, labels, ends)
    sizes = (seq_len, None, seq_len)
    _launch_collate(store, plan, layout, num_candidates, sizes, outputs, number)
    return ids, segments, labels, ends


@kernel_of("collate_shared")
def _collate_shared(*given, number):
    *store, plan, layout, num_candidates, offsets, num_tokens, max_length, _ = (
        *given,
        False,
    )[:12]
    ends = torch.full((len(plan), num_candidates), -7)
    outputs = (*(torch.full((num_tokens,), -7) for _ in range(5)), ends)
    sizes = (0, offsets, max_length)
    _launch_collate(store, plan, layout, num_candidates, sizes, outputs, number)
    return outputs


def _launch_collate(store, plan, layout, num_candidates, sizes, outputs, number):
    tokens, utterance_offsets, *tables = store
    kernels("collate")(
        "collate",
        tokens.dtype == torch.int32,
        tokens,
        len(tokens),
        utterance_offsets,
        len(utterance_offsets) - 1,
        *tables,
        plan,
        len(plan),
        num_candidates,
        *sizes,
        layout,
        *outputs,
        number,
    )


@kernel_of("decode_attention")
def _decode_attention(q, k, v, keys, values, slots, lengths, number):
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.full(q.shape, 99.0, dtype=q.dtype)
    strides = [*(x.stride()[:2] for x in (q, k, v)), *(x.stride()[:3] for x in (keys, values))]
    strides = torch.tensor([*chain(*strides), slots.stride(0), lengths.stride(0)])
    sizes = (*q.shape[:2], *keys.shape[2:], *keys.shape[:2])
    tensors = (q, k, v, keys, values, slots, lengths, strides)
    kernels("decode_attention")("decode_attention", DTYPES[q.dtype], *tensors, *sizes, out, number)
    return out


@kernel_of("add_norm")
def _add_norm(x, residual, weight, bias, eps, rms_norm, number):
    x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    total, normed = (torch.full(x.shape, 99.0, dtype=x.dtype) for _ in range(2))
    tensors = (x, residual, weight, bias, total, normed)
    n_embd = len(weight)
    sizes = (x.numel() // n_embd, n_embd)
    kernels("add_norm")("add_norm", DTYPES[x.dtype], *tensors, *sizes, eps, rms_norm, number)
    return total, normed


# ---- without a barrier ---------------------------------------------------------------------------


def unneeded_barriers(name: str, check: Callable[[], None]) -> list[str]:
    """Those barriers in an operator's kernel without which `check` passes nevertheless.

    Without the others it fails, crashes or hangs, in a process of its own.
    """
    begin = time.process_time()
    check()
    most_seconds = 1 + 5 * (time.process_time() - begin)

    def passes_without(barrier: int) -> bool:
        child = os.fork()
        if child == 0:
            faulthandler.disable()
            signal.setitimer(signal.ITIMER_PROF, most_seconds)
            kernels(name).library.remove_barrier(ctypes.c_int64(barrier))
            try:
                check()
            except BaseException:
                os._exit(1)
            os._exit(0)
        return os.waitpid(child, 0)[1] == 0

    return [place for i, place in enumerate(kernels(name).barriers) if passes_without(i)]
