"""Drawing a token a row beside transformers' warpers, in one read of the logits and its multiples.

The warpers are written out here, so that torch is enough.
"""

import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import product

import torch
from torch import Tensor

from benchmarks.gpu.clock import Call, as_graph, figures, in_turn, ratio, read_bandwidth
from benchmarks.gpu.notes import Notes, Setting
from convai_fast import ops

TEMPERATURE = 0.7
FILTERS = {"top-p 0.9": (0, 0.9), "top-k 50, top-p 0.9": (50, 0.9)}
ROWS = (1, 8, 32, 128, 256, 1024)
VOCAB_SIZE = 50_262  # GPT-2's and the five special tokens
KINDS = ("normal", "peaked", "flat")
Peer = Callable[..., Tensor]
MAX_COPIES = 64


def run(notes: Notes, setting: Setting) -> None:
    """Every shape beside a read of the logits and, on normal logits, the warpers."""
    bandwidth = read_bandwidth(setting)
    notes.figure("memory", read_gb_s=round(bandwidth / 1e9, 1))
    rows_of_all, vocab_size = ((2, 5), 1019) if setting.smoke else (ROWS, VOCAB_SIZE)

    def one(kind: str, dtype: torch.dtype, rows: int, name: str, peers: dict[str, Peer]) -> None:
        workload = f"{rows} x {vocab_size} {str(dtype)[6:]} {kind}, {name}"
        workload += "".join(f", {peer}" for peer in peers if peer != "warpers")
        with notes.attempt(workload):
            logits = make_logits(kind, rows, vocab_size, setting.device).to(dtype)
            values = measure(logits, FILTERS[name], peers, setting, bandwidth)
            notes.figure(workload, **values)

    dtypes = (torch.float32, torch.bfloat16)
    for kind, dtype, rows, name in product(KINDS, dtypes, rows_of_all, FILTERS):
        one(kind, dtype, rows, name, {"warpers": draw_by_warpers} if kind == "normal" else {})
    # What compiles for long comes last, and for one shape.
    rows = rows_of_all[-2]
    for peer, package in (("flashinfer", "flashinfer"), ("compiled", "triton")):
        if find_spec(package) is None or not setting.is_gpu:
            notes.not_run(peer, f"{package} is not installed")
            continue
        draw = draw_by_flashinfer if peer == "flashinfer" else torch.compile(draw_by_warpers)
        for dtype in dtypes:
            one("normal", dtype, rows, "top-k 50, top-p 0.9", {peer: draw})


def make_logits(kind: str, rows: int, vocab_size: int, device: torch.device) -> Tensor:
    """Float32 logits: of normal noise, as after training (a power law), or as before it."""
    generator = torch.Generator(device).manual_seed(rows)
    noise = torch.randn(rows, vocab_size, generator=generator, device=device)
    if kind == "flat":
        return noise / 50
    if kind == "peaked":
        order = torch.rand(rows, vocab_size, generator=generator, device=device).argsort(-1)
        return noise / 2 - 1.2 * (order + 1).log()
    return noise


def warp(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """What transformers' warpers make of logits."""
    logits = logits / temperature
    if top_k:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    ascending, order = logits.sort(-1)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    removed[:, -1] = False
    return logits.masked_fill(removed.scatter(1, order, removed), -torch.inf)


def draw_by_warpers(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """A token a row, as transformers' `generate` draws it."""
    return torch.multinomial(warp(logits, temperature, top_k, top_p).softmax(-1), 1)


def make_ours(
    rows: int, top_k: int, top_p: float, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """The operator with all its parameters on the device, as in a step of decoding."""

    def value(number: float, dtype: torch.dtype) -> Tensor:
        return torch.full((rows,), number, dtype=dtype, device=device)

    parameters = {
        "temperature": value(TEMPERATURE, torch.float32),
        "top_k": value(top_k, torch.int64),
        "top_p": value(top_p, torch.float32),
        "min_p": value(0.0, torch.float32),
        "seeds": torch.arange(rows, device=device),
        "steps": value(0, torch.int64),
    }
    return lambda logits: ops.sample(logits, **parameters)[0]


def measure(
    logits: Tensor,
    filters: tuple[int, float],
    peers: dict[str, Peer],
    setting: Setting,
    bandwidth: float,
) -> dict[str, float | str]:
    """Figures of one workload.

    Raises RuntimeError where tokens come out that the warpers leave out.
    """
    rows, device = len(logits), setting.device
    ours = make_ours(rows, *filters, device)
    kept = warp(logits.float(), TEMPERATURE, *filters) > -torch.inf
    least = logits.masked_fill(~kept, torch.inf).amin(-1)  # which of its equals are kept may differ
    outside = int((logits.gather(1, ours(logits)[:, None])[:, 0] < least).sum())
    if outside > rows / 100:  # rounding moves the edge of top-p by a token
        raise RuntimeError(f"{outside} of {rows} rows drew what the warpers leave out")

    # In turn over copies that together are more than the cache holds, where that takes not many.
    cache = torch.cuda.get_device_properties(device).L2_cache_size if setting.is_gpu else 0
    inputs = [logits.clone() for _ in range(min(MAX_COPIES, 1 + 2 * cache // logits.nbytes))]

    def over_all(function: Callable[[Tensor], Tensor]) -> Call:
        return lambda: [function(x) for x in inputs]

    functions = {"convai_fast": ours, "sum": torch.sum, "amax": torch.amax}
    ways = {name: as_graph(over_all(each), setting) for name, each in functions.items()}
    not_in_graphs = []
    for name, peer in peers.items():
        way = over_all(partial(peer, temperature=TEMPERATURE, top_k=filters[0], top_p=filters[1]))
        try:
            ways[name] = as_graph(way, setting)
        except RuntimeError:  # it waits for the device
            ways[name] = way
            not_in_graphs.append(name)
    times = in_turn(ways, setting, rounds=5, calls=len(inputs), min_seconds=0.01)
    # One read of the logits is the floor: whichever reduction is faster.
    read = min(times.pop("sum"), times.pop("amax"), key=statistics.median)
    reads = ratio({"read": read, "convai_fast": times["convai_fast"]}, "read", "convai_fast")
    ideal = logits.nbytes / bandwidth
    values = figures(times) | {f"{name}_in_graph": False for name in not_in_graphs}
    return values | {
        "read_us": round(statistics.median(read) * 1e6, 2),
        "reads": reads["convai_fast_ratio"],
        "reads_spread": reads["convai_fast_spread"],
        "reads_at_bandwidth": round(statistics.median(times["convai_fast"]) / ideal, 2),
        "outside": outside,
    }


def draw_by_flashinfer(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """FlashInfer's sampler, which has filters and no temperature."""
    from flashinfer.sampling import top_k_top_p_sampling_from_logits

    return top_k_top_p_sampling_from_logits(logits.float() / temperature, top_k, top_p)
