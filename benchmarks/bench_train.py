"""A training step beside transformers' double-heads class with autocast and fused AdamW.

python -m pytest benchmarks/bench_train.py --benchmark-only -k "2-candidates and bf16"

Both take the same random examples of real dialogues, which are padded per batch for the peer, and
end each step with the same clipping and the same optimizer. Dropout is on, as in training.
"""

import statistics
import time

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import shapes
from benchmarks.timing import record
from benchmarks.workers import Turn, Work, Worker, pairwise, take_turns
from convai_fast.comparison import plain
from convai_fast.data.batches import Share
from convai_fast.data.store import DialogueStore
from convai_fast.training.interruption import Stop
from convai_fast.training.loop import Trainer
from convai_fast.training.optimizer import make_optimizer
from convai_fast.training.options import TrainOptions

ROUNDS = 3
LR = 0.0  # a step costs the same, and all turns keep the same weights

# Where the time of a step goes: a group of operators, and what their names begin with.
GROUPS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "convai_fast::linear"),
    "attention": ("convai_fast::branch_attention", "aten::_scaled_dot"),
    "dropout": ("convai_fast::dropout", "aten::bernoulli_", "aten::native_dropout"),
    "activation": ("convai_fast::gelu", "convai_fast::swiglu", "aten::gelu", "aten::silu"),
    "norms": ("aten::native_layer_norm", "convai_fast::rms_norm", "aten::rms_norm"),
    "rotary positions": ("convai_fast::rotate",),
    "cross-entropy": ("aten::_log_softmax", "aten::nll_loss"),
    "embedding": ("aten::embedding", "aten::index_select"),
    "AdamW": ("aten::_fused_adamw_",),
    "norm and clipping": ("aten::linalg_vector_norm", "aten::_foreach"),
    "casts and copies": ("aten::copy_", "aten::fill_", "aten::cat", "aten::stack"),
}


class OurStep:
    """A step of `Trainer`; a call returns tokens, labels, loss, and where the time went."""

    def __init__(
        self,
        store_folder: str,
        architecture: str,
        shape: shapes.CandidatesShape,
        precision: str,
        profiled_turn: int,
    ) -> None:
        model, tokenizer = shapes.model_and_tokenizer(architecture)
        options = TrainOptions(
            num_candidates=shape.num_candidates,
            train_batch_size=shape.batch,
            gradient_accumulation_steps=1,
            precision=precision,
            lr=LR,
            device="cpu",
        )
        store = DialogueStore(store_folder)
        self.trainer = Trainer(options, model, tokenizer, store, lambda _: None)
        self.trainer.model.train()
        self.profiled_turn = -1
        # As in a run that has gone on for a while, the process has memory for batches of all sizes.
        for turn in range(profiled_turn + 1):
            self(turn)
        self.profiled_turn = profiled_turn

    def __call__(self, turn: int) -> tuple[int, int, float, dict[str, float], dict[str, float]]:
        trainer, parts = self.trainer, {}
        batch = shapes.batch_of_turn(trainer.batches, turn)
        batches = [(batch, Share(1.0, 1.0))]
        started = time.perf_counter()
        if turn == self.profiled_turn:
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                trainer.train_step.take(turn + 1, batches, 1, LR, Stop(trainer.ranks))
            parts = seconds_of_parts(profiler)
        else:
            trainer.train_step.take(turn + 1, batches, 1, LR, Stop(trainer.ranks))
        trainer.log.seconds += time.perf_counter() - started
        log = trainer.log.read(trainer.ranks)
        log["matrix_rate"] = trainer.log.matrix_rate
        num_labels = int((batch["labels"] >= 0).sum())
        return len(batch["input_ids"]), num_labels, log["loss"], log, parts


def make_transformers(
    store_folder: str, architecture: str, shape: shapes.CandidatesShape, precision: str, folder: str
) -> Work:
    """The plain loop that the class's documentation suggests."""
    model = shapes.peer_class(architecture).from_pretrained(folder).train()
    optimizer = make_optimizer(model, LR, weight_decay=0.01, beta2=0.999)
    batches = shapes.open_batches(store_folder, "train", shape, "padded")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def step(turn: int):
        batch = shapes.batch_of_turn(batches, turn)
        loss = plain.train_step(model, optimizer, batch, dtype)
        return batch["input_ids"].numel(), int((batch["labels"] >= 0).sum()), loss

    return step


def seconds_of_parts(profiler: profile) -> dict[str, float]:
    """Seconds in each of `GROUPS`, and in all the rest."""
    seconds = dict.fromkeys([*GROUPS, "the rest"], 0.0)
    for event in profiler.key_averages():
        # The forward pass of an operator of ours stands under the name of its gradient.
        name = event.key.replace("GeneratedBackwardFor_convai_fast_", "convai_fast::")
        groups = (group for group, names in GROUPS.items() if name.startswith(names))
        group = next(groups, "the rest")
        seconds[group] += event.self_cpu_time_total / 1e6
    return seconds


@pytest.mark.parametrize("shape", shapes.TRAIN_SHAPES.values(), ids=list(shapes.TRAIN_SHAPES))
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("architecture", ["openai-gpt", "SmolLM2 135M"])
def test_train_step(benchmark, store_folder, architecture, precision, shape, say, tmp_path):
    model, tokenizer = shapes.model_and_tokenizer(architecture)
    model.save_pretrained(tmp_path / "model", tokenizer)
    arguments = (store_folder, architecture, shape, precision)
    workers = {
        # The last turn is there for the parts alone.
        "convai_fast": Worker(OurStep, *arguments, ROUNDS, repeats=3),
        "transformers": Worker(make_transformers, *arguments, str(tmp_path / "model")),
    }
    turns = benchmark.pedantic(lambda: take_turns(workers, ROUNDS), rounds=1)
    profiled = turns["convai_fast"].pop()
    turns["transformers"].pop()
    peak_ratio = turns["transformers"][-1].peak_mb / turns["convai_fast"][-1].peak_mb
    for ours, theirs in zip(*turns.values(), strict=True):
        assert ours.result[1] == theirs.result[1]  # the same labels
        assert abs(ours.result[2] - theirs.result[2]) < 0.05 * theirs.result[2]

    median, least, most = pairwise(turns, "convai_fast", "transformers")
    logs = [turn.result[3] for turn in turns["convai_fast"]]
    mfu = statistics.median(log["mfu"] for log in logs)
    name, _, _ = shapes.dialogues_and_tokenizer()
    say(f"\n{architecture}, {shape}, {precision}, {name}")
    for way, done in turns.items():
        say(f"  {way:12} {describe(done)}")
    say(
        f"  {median:.1f} x transformers ({least:.1f}-{most:.1f}), 1/{peak_ratio:.1f} its memory, "
        f"mfu {mfu:.0%} of {logs[0]['matrix_rate'] / 1e9:,.0f} GFLOP/s"
    )
    total = sum(profiled.result[4].values())
    parts = sorted(profiled.result[4].items(), key=lambda item: -item[1])
    say("  " + ", ".join(f"{part} {seconds / total:.0%}" for part, seconds in parts))
    figures = {
        "seconds": round(statistics.median(t.seconds for t in turns["convai_fast"]), 3),
        "transformers_seconds": round(
            statistics.median(t.seconds for t in turns["transformers"]), 3
        ),
        "ratio": round(median, 2),
        "spread": f"{least:.1f}-{most:.1f}",
        "memory_ratio": round(peak_ratio, 2),
        "mfu": round(mfu, 3),
        **{part: round(seconds, 4) for part, seconds in parts},
    }
    record("train", f"{architecture}, {shape}, {precision}", figures)


def describe(turns: list[Turn]) -> str:
    seconds = statistics.median(turn.seconds for turn in turns)
    tokens = statistics.median(turn.result[0] for turn in turns)
    return f"{seconds:6.2f} s, {tokens:,.0f} tokens, {turns[-1].peak_mb:,.0f} MB"
