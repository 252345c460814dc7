"""What a run says of itself: before its first step, and how it ended."""

import dataclasses
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from convai_fast.archive import best_checkpoint
from convai_fast.data.dataset import unknown_share
from convai_fast.files import read_json
from convai_fast.terminal import counted
from convai_fast.training.evaluation import Metrics
from convai_fast.training.options import TrainOptions

if TYPE_CHECKING:
    from convai_fast.training.loop import Trainer

_FEW_STEPS = 30


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        run: the run folder; `run / "best"` and `run / "last"` are its checkpoints.
        options: those of the run, also where it was continued with few of them.
        before: figures before training, if asked for.
        after: figures of the last evaluation; None if there was none.
        stopped_by: the signal that ended the run early, or None.
        steps: optimizer steps of the whole run.
        seconds: the time that the run has taken.
        is_resumed: whether it went on from a checkpoint; steps and seconds are of all its sessions.
        tokens_per_second: in this session; 0 if it took no step.
        mfu: model-flops utilisation, the share of the device's measured matrix rate that was used.
    """

    run: Path
    options: TrainOptions
    before: Metrics | None
    after: Metrics | None
    stopped_by: signal.Signals | None
    steps: int
    seconds: float
    is_resumed: bool
    tokens_per_second: float
    mfu: float


def describe(run: "Trainer") -> Iterator[str]:
    """What will be trained on what, what of it is cut or unknown, and where the run stands."""
    options, batches, ranks = run.options, run.batches, run.ranks.world_size
    size, unit = options.train_batch_tokens, "tokens"
    if not size:
        size, unit = options.train_batch_size, "examples"
    yield (
        f"training: {batches.num_examples:,} examples of {options.num_candidates} candidates, "
        f"{run.total_steps:,} optimizer steps of up to "
        f"{size:,} x {options.gradient_accumulation_steps} {unit}"
        f"{f' x {ranks} processes' if ranks > 1 else ''}, "
        f"{str(run.compute.dtype).removeprefix('torch.')} on {run.device}"
    )
    if any(cuts := batches.cuts):
        yield (
            f"cut to {run.model.config.n_positions} positions: history in {cuts.history:,}, "
            f"persona in {cuts.persona:,}, reply in {cuts.reply:,} examples"
        )
    if run.total_steps < _FEW_STEPS and not run.is_finished:
        way_out = "lower gradient_accumulation_steps, or raise n_epochs"
        if run.total_steps == options.max_steps:
            way_out = "raise max_steps"
        yield f"only {counted(run.total_steps, 'step')} to learn from: {way_out}"
    offsets = batches.store.splits["train"].candidate_offsets
    counts = offsets[1:] - offsets[:-1]
    if few := int((counts < options.num_candidates).sum()):
        yield (
            f"{few:,} of {len(counts):,} examples have fewer than {options.num_candidates} "
            f"candidates (fewest {counts.min()}, on average {counts.double().mean():.1f}) and are "
            "learnt with those: add candidates to the data, or lower num_candidates; where the "
            "data has the true reply alone, raise fill_candidates (equal replies are drawn once)"
        )
    valid = run.valid_batches.store.splits["valid"].candidate_offsets
    if len(valid) > 1 and int((valid[1:] - valid[:-1]).max()) == 1:
        yield (
            "the examples of the validation split have one candidate: hits@1 says nothing there; "
            "fill_candidates draws distractors from that split, which valid_fraction makes larger"
        )
    if unknown := unknown_share(batches.store):
        yield unknown
    own = run.trained_with
    earlier = dataclasses.replace(own, sources=own.before, before=())
    if overlap := earlier.overlap([(source.path, source.origins) for source in own.sources]):
        yield f"WARNING: {overlap}; give the same, or the figures are too good"
    yield f"run folder: {run.path}"
    if options.compile and not run.is_finished:
        yield "compiling: the first step takes some ten seconds"
    progress, resumed = run.progress, run.resumed
    if run.is_finished:
        yield f"this run is finished, with {progress.step:,} steps: nothing left to do"
    elif resumed:
        yield f"continuing after step {progress.step:,}, in epoch {progress.epoch + 1}"
        if len(resumed.random) != ranks:
            yield f"with {ranks} processes instead of {len(resumed.random)}"
    elif options.resume:
        yield "nothing was saved in this run yet: beginning it anew"


def conclude(result: TrainResult) -> Iterator[str]:
    """What came of a run that has ended."""
    best = best_checkpoint(result.run)
    figures = read_json(best / "metrics.json")
    found = ""
    if "nll" in figures:
        found = f": nll {figures['nll']:.3f}, perplexity {figures['ppl']:,.2f}, hits@1 "
        found += f"{figures['hits@1']:.1%}"
    yield f"{best.name} checkpoint: {best}, of step {figures['step']:,}{found}"
    time = f"{result.steps:,} steps in {tqdm.format_interval(result.seconds)}"
    if result.is_resumed:
        time += ", all sessions together"
    if result.tokens_per_second:
        time += f"; {result.tokens_per_second:,.0f} tokens/s, using {result.mfu:.0%} of what the "
        time += "device can multiply"
    yield time
