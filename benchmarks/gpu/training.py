"""A training step beside transformers' double-heads class, with autocast and fused AdamW in both.

Both take the same examples of the built-in dialogues, which are padded for the peer; dropout is on.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from typing import get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.gpu import workload
from benchmarks.gpu.clock import figures, in_turn
from benchmarks.gpu.notes import Notes, Setting
from convai_fast.data.batches import Batch, Layout, Share, count_labels, count_tokens
from convai_fast.data.store import DialogueStore
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.training.compute import Compute
from convai_fast.training.distributed import Ranks
from convai_fast.training.flops import FlopsCounter
from convai_fast.training.interruption import Stop
from convai_fast.training.optimizer import make_optimizer
from convai_fast.training.options import TrainOptions
from convai_fast.training.step import TrainStep

LR = 0.0  # a step costs the same, and all turns keep the same weights
MANY_TOKENS = 16_000
STEPS = 3  # of a turn
Step = Sequence[tuple[Batch, Share]]
Figures = dict[str, float | str]


def run(notes: Notes, setting: Setting) -> None:
    """A large batch and the default one, of OpenAI GPT 117M and of GPT-2 124M; then compiled."""
    store = workload.store(setting)
    sizes = sizes_of_steps(store, setting)
    every = zip if setting.smoke else product
    for architecture, options in every(workload.VOCAB_SIZES, sizes):
        with notes.attempt(name := describe(architecture, options)):
            notes.figure(name, **beside_transformers(architecture, store, options, setting))
    for architecture in () if setting.smoke else workload.VOCAB_SIZES:  # which takes long
        with notes.attempt(name := describe(f"{architecture} compiled", sizes[0])):
            notes.figure(name, **compiled_beside_eager(architecture, store, sizes[0], setting))


def beside_transformers(
    architecture: str, store: DialogueStore, options: TrainOptions, setting: Setting
) -> Figures:
    """Figures of one model and size of steps."""
    ours = workload.model(architecture, setting)
    theirs = workload.twin(ours, architecture)
    steps = {x: steps_of(store, x, options, setting) for x in get_args(Layout)}
    peers = {"transformers": Theirs(theirs, steps["padded"], options)}
    return measure(Ours(ours, steps["shared"], options), peers, setting)


def compiled_beside_eager(
    architecture: str, store: DialogueStore, options: TrainOptions, setting: Setting
) -> Figures:
    """Figures of `compile`."""
    steps = steps_of(store, "shared", options, setting)
    compiled = dataclasses.replace(options, compile=True)
    ours = Ours(workload.model(architecture, setting), steps, compiled)
    peers = {"eager": Ours(workload.model(architecture, setting), steps, options)}
    return measure(ours, peers, setting)


def sizes_of_steps(store: DialogueStore, setting: Setting) -> list[TrainOptions]:
    """One batch of 16,000 tokens, and the default batches."""
    options = TrainOptions(precision="bf16", lr=LR, device=str(setting.device))
    batches = workload.batches(store, "train", "shared", setting, batch_size=1, num_candidates=2)
    wanted = 200 if setting.smoke else MANY_TOKENS
    # One twentieth more: the first examples may be shorter than the mean.
    many = math.ceil(1.05 * wanted / batches.index.shared_lengths.mean())
    large = dataclasses.replace(options, train_batch_size=many, gradient_accumulation_steps=1)
    return [large, options]


def describe(name: str, options: TrainOptions) -> str:
    """What is measured, for the file."""
    size = f"{options.gradient_accumulation_steps} x {options.train_batch_size} examples"
    return f"{name}, bf16, {size} of {options.num_candidates} candidates"


def steps_of(
    store: DialogueStore, layout: Layout, options: TrainOptions, setting: Setting
) -> list[Step]:
    """The first steps of an epoch, collated."""
    batches = workload.batches(
        store,
        "train",
        layout,
        setting,
        batch_size=options.train_batch_size,
        batches_per_step=options.gradient_accumulation_steps,
        num_candidates=options.num_candidates,
    )
    return [[(batches[i], batches.shares[i]) for i in step] for step in batches.steps[:STEPS]]


class Ours:
    """`TrainStep` over the same steps again and again."""

    def __init__(self, model: DoubleHeadsModel, steps: list[Step], options: TrainOptions) -> None:
        ranks = Ranks()
        self.train_step = TrainStep(model.train(), options, Compute(options, ranks), ranks)
        self.model, self.steps, self.ranks = model, steps, ranks
        self.stop, self.number = Stop(ranks), 0

    def __call__(self) -> None:
        for step in self.steps:
            self.number += 1
            self.train_step.take(self.number, step, len(step), LR, self.stop)

    def mean_loss(self) -> float:
        """Of all steps so far."""
        return self.train_step.log.read(self.ranks)["loss"]


class Theirs:
    """The plain loop that the class's documentation suggests."""

    def __init__(self, model: PreTrainedModel, steps: list[Step], options: TrainOptions) -> None:
        self.model, self.steps = model.train(), steps
        self.optimizer = make_optimizer(model, LR, options.weight_decay, options.adam_beta2)
        self.max_norm = options.max_norm
        self.losses: list[Tensor] = []

    def _take(self, step: Step) -> Tensor:
        device, total = self.model.device, torch.zeros((), device=self.model.device)
        for batch, share in step:
            arguments = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
            with torch.autocast(device.type, torch.bfloat16):
                output = self.model(**arguments)
                loss = output.loss * share.tokens + output.mc_loss * share.examples
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def __call__(self) -> None:
        self.losses = [self._take(step) for step in self.steps]

    def mean_loss(self) -> float:
        """Of the steps of the last call."""
        return torch.stack(self.losses).mean().item()


def measure(ours: Ours, peers: Mapping[str, "Ours | Theirs"], setting: Setting) -> Figures:
    """Figures of one size of steps.

    Raises RuntimeError where the losses are not alike.
    """
    ways = {"convai_fast": ours, **peers}
    peaks = {}
    for name, way in ways.items():
        way()
        if setting.is_gpu:
            setting.wait()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            way()
            peaks[f"{name}_gb"] = round((torch.cuda.max_memory_allocated() - before) / 1e9, 2)
    losses = {name: way.mean_loss() for name, way in ways.items()}
    if max(losses.values()) > 1.05 * min(losses.values()):  # dropout makes them differ
        raise RuntimeError(f"other losses: {losses}")
    times = in_turn(ways, setting, rounds=5, calls=len(ours.steps))
    counts = [(count_tokens(b), count_labels(b)) for step in ours.steps for b, _ in step]
    flops = sum(FlopsCounter(ours.model).count(*count) for count in counts) / len(ours.steps)
    rate = ours.train_step.log.matrix_rate
    values = {
        "tokens": round(sum(tokens for tokens, _ in counts) / len(ours.steps)),
        "matrix_tflop_s": round(rate / 1e12, 2),
    }
    for name, seconds in times.items():
        values[f"{name}_mfu"] = round(flops / rate / statistics.median(seconds), 4)
    return values | figures(times) | peaks
