"""Ranking candidates beside transformers' double-heads class, padded per batch.

python -m pytest benchmarks/bench_rank.py --benchmark-only

The peer computes its logits of the vocabulary, as its class does, and in another row its body and
multiple-choice head alone, as a careful user would call them.
"""

import statistics

import pytest
import torch
from torch import nn

from benchmarks import shapes
from benchmarks.timing import record
from benchmarks.workers import Work, Worker, pairwise, take_turns
from convai_fast._native import keep_freed_memory
from convai_fast.comparison import plain
from convai_fast.evaluation.scoring import computing_in
from convai_fast.training.flops import matrix_rate

ROUNDS = 5


def make_ours(store_folder: str, architecture: str, dtype: torch.dtype) -> Work:
    """Multiple-choice logits of a batch in the shared-prefix layout, as `evaluate` computes them;
    returns them and its size."""
    model, _ = shapes.model_and_tokenizer(architecture)
    batches = shapes.open_batches(store_folder, "valid", shapes.RANK_SHAPE, "shared")
    keep_freed_memory()

    with computing_in(model, dtype) as packed:
        pass  # its layers are packed once, as for many batches

    @torch.inference_mode()
    def rank(turn: int):
        batch = shapes.batch_of_turn(batches, turn)
        batch.pop("labels")
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = packed(**batch, return_logits=False)
        return output.mc_logits.float().tolist(), len(batch["input_ids"])

    return rank


def make_transformers(
    store_folder: str, architecture: str, dtype: torch.dtype, head_only: bool, folder: str
) -> Work:
    """The same of transformers' class, or of its body and multiple-choice head alone."""
    model = shapes.peer_class(architecture).from_pretrained(folder).eval()
    batches = shapes.open_batches(store_folder, "valid", shapes.RANK_SHAPE, "padded")
    if head_only:
        model.lm_head = nn.Identity()  # its logits are then the hidden states

    def rank(turn: int):
        batch = shapes.batch_of_turn(batches, turn)
        return plain.rank(model, batch, dtype).tolist(), batch["input_ids"].numel()

    return rank


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("architecture", ["openai-gpt", "SmolLM2 135M"])
def test_rank(benchmark, store_folder, architecture, precision, say, tmp_path):
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    model, tokenizer = shapes.model_and_tokenizer(architecture)
    model.save_pretrained(tmp_path / "model", tokenizer)
    peer = (store_folder, architecture, dtype)
    workers = {
        "convai_fast": Worker(make_ours, store_folder, architecture, dtype, repeats=3),
        "transformers": Worker(make_transformers, *peer, False, str(tmp_path / "model")),
        "its body and head": Worker(make_transformers, *peer, True, str(tmp_path / "model")),
    }
    turns = benchmark.pedantic(lambda: take_turns(workers, ROUNDS), rounds=1)

    # The same work: logits of both agree to the precision they are computed in.
    for ours, theirs in zip(turns["convai_fast"], turns["transformers"], strict=True):
        a, b = torch.tensor(ours.result[0]), torch.tensor(theirs.result[0])
        assert (a - b).abs().max() < (0.1 if precision == "bf16" else 1e-3) * b.abs().max()

    rate = matrix_rate(torch.device("cpu"), torch.float32)
    body = sum(p.numel() for p in model.transformer.blocks.parameters() if p.dim() == 2)
    floor = statistics.median(2 * body * turn.result[1] / rate for turn in turns["convai_fast"])
    name, _, _ = shapes.dialogues_and_tokenizer()
    say(f"\n{architecture}, {shapes.RANK_SHAPE}, {precision}, {name}")
    for way, done in turns.items():
        seconds = statistics.median(turn.seconds for turn in done)
        tokens = statistics.median(turn.result[1] for turn in done)
        figures = {
            "seconds": round(seconds, 3),
            "tokens": tokens,
            "peak_mb": round(done[-1].peak_mb),
        }
        line = f"  {way:18} {seconds:7.2f} s, {tokens:,.0f} tokens, {done[-1].peak_mb:,.0f} MB"
        if way == "convai_fast":
            line += f"; floor {floor:.2f} s at {rate / 1e9:,.0f} GFLOP/s"
        else:
            median, least, most = pairwise(turns, "convai_fast", way)
            figures |= {"ratio": round(median, 2), "spread": f"{least:.1f}-{most:.1f}"}
            line += f"; {median:.1f} x ours ({least:.1f}-{most:.1f})"
        record("rank", f"{way}, {architecture}, {shapes.RANK_SHAPE}, {precision}", figures)
        say(line)
