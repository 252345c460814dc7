"""The same learning: our training beside a plain loop over transformers' double-heads class.

python -m benchmarks.learning

Same initial weights, same batches in the same order, dropout off: the loss of every optimizer step
in float32 and in bf16, beside the spread of two seeds. A seed of these curves changes the initial
weights and nothing else; with another order as well, the noise of the batches would make the
spread, and any difference look small beside it. Then three seeds with dropout on, each of weights,
order and dropout: figures of the validation split, which our evaluation computes for both.

Prints the figures, adds them to results.jsonl, and draws the curves.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import transformers
from PIL import Image
from torch import Tensor

from benchmarks import shapes
from benchmarks.plain_loop import train_plainly
from benchmarks.timing import machine, record
from convai_fast.data.build_store import build_store
from convai_fast.data.store import DialogueStore
from convai_fast.model.config import TransformerConfig
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.training.evaluation import Metrics
from convai_fast.training.loop import Trainer
from convai_fast.training.options import TrainOptions

SHAPE = {"model_type": "openai-gpt", "n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": 512}
DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop", "summary_first_dropout")
SEEDS = (1, 2, 3)
VALID_EXAMPLES = 200

Run = tuple[Tensor, Metrics]  # the loss of each optimizer step, [steps], and figures at the end


class Runs:
    """Runs of both ways, over one store."""

    def __init__(self, options: TrainOptions, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.data, dialogues, self.tokenizer = shapes.dialogues_and_tokenizer()
        build_store(dialogues, self.tokenizer, folder / "store")
        self.store = DialogueStore(folder / "store")

    def ours(self, weights_seed: int, dropout: float = 0.0, **options: Any) -> Run:
        trainer = self._trainer(self._new_model(weights_seed, dropout), **options)
        torch.manual_seed(weights_seed)
        result = trainer.run()
        lines = (result.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [x["loss"] for x in map(json.loads, lines) if x["split"] == "train"]
        return torch.tensor(losses), result.after

    def plain(self, weights_seed: int, dropout: float = 0.0, **options: Any) -> Run:
        model, path = self._new_model(weights_seed, dropout), self.folder / "peer"
        trainer = self._trainer(model, **options)
        trainer.batches.layout = "padded"  # the same batches, as transformers takes them
        model.save_pretrained(path, self.tokenizer)
        peer = transformers.OpenAIGPTDoubleHeadsModel.from_pretrained(path)
        torch.manual_seed(weights_seed)
        curve = train_plainly(peer, trainer.batches, trainer.options, trainer.total_steps)
        peer.save_pretrained(path)
        model = DoubleHeadsModel.from_pretrained(path)
        return curve.sum(1), self._trainer(model, **options, n_epochs=0).run().after

    def _new_model(self, seed: int, dropout: float) -> DoubleHeadsModel:
        torch.manual_seed(seed)
        settings = {**SHAPE, "vocab_size": len(self.tokenizer), **dict.fromkeys(DROPOUTS, dropout)}
        return DoubleHeadsModel(TransformerConfig.from_transformers(settings))

    def _trainer(self, model: DoubleHeadsModel, **options: Any) -> Trainer:
        output = tempfile.mkdtemp(dir=self.folder)
        changed = replace(self.options, output=output, **options)
        return Trainer(changed, model, self.tokenizer, self.store, lambda _: None)


def curves_of(runs: Runs) -> dict[str, Tensor]:
    """The loss of each step with dropout off, under the names that the figures use."""
    curves = {}
    for name, run, seed, precision in (
        ("convai_fast float32", runs.ours, 1, "fp32"),
        ("plain float32", runs.plain, 1, "fp32"),
        ("convai_fast bf16", runs.ours, 1, "bf16"),
        ("plain bf16", runs.plain, 1, "bf16"),
        ("plain bf16, other seed", runs.plain, 2, "bf16"),
    ):
        started = time.perf_counter()
        curves[name], _ = run(seed, precision=precision)
        last = curves[name][-20:].mean()
        print(
            f"{name}: {time.perf_counter() - started:.0f} s, last 20 losses {last:.3f}", flush=True
        )
    return curves


def differences_of(curves: dict[str, Tensor]) -> dict[str, Tensor]:
    """How far two curves are apart at each step, [steps]."""
    ours, plain = curves["convai_fast bf16"], curves["plain bf16"]
    return {
        "float32": (curves["convai_fast float32"] - curves["plain float32"]).abs(),
        "bf16": (ours - plain).abs(),
        "two seeds of the plain loop, bf16": (plain - curves["plain bf16, other seed"]).abs(),
    }


def draw(curves: dict[str, Tensor], differences: dict[str, Tensor], data: str, path: Path) -> None:
    """The curves above, their differences below."""
    figure, (above, below) = plt.subplots(
        2, sharex=True, figsize=(8, 6.4), height_ratios=(3, 2), layout="constrained"
    )
    steps = torch.arange(1, len(curves["plain float32"]) + 1)
    # Lines for ours and dots for the plain loop: both are seen where they coincide.
    for precision, color, first in (("float32", "tab:blue", 0), ("bf16", "tab:orange", 3)):
        ours, plain = curves[f"convai_fast {precision}"], curves[f"plain {precision}"]
        dots = slice(first, None, 6)
        above.plot(steps, ours, color=color, lw=1, label=f"convai_fast, {precision}")
        above.plot(steps[dots], plain[dots], "o", color=color, ms=3.5, mec="k", mew=0.4,
                   label=f"plain loop, {precision}")  # fmt: skip
    above.set_ylabel("loss of both heads (nats)")
    above.set_title(f"OpenAI GPT, 4 layers of width 128, dropout off\n{data}", fontsize=10)
    above.legend(loc="upper right")
    for (name, difference), color in zip(
        differences.items(), ("tab:blue", "tab:orange", "tab:gray"), strict=True
    ):
        below.semilogy(steps, difference.clamp(min=1e-7), color=color, lw=1, label=name)
    below.axhline(1e-3, color="k", ls=":", lw=0.8)
    below.set_xlabel("optimizer step")
    below.set_ylabel("difference (nats)")
    below.set_ylim(5e-8, 30)
    below.legend(loc="upper center", ncol=3, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    with Image.open(path) as image:
        few_colours = image.quantize(64)  # a quarter of the size, and it looks the same
    few_colours.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of every run")
    parser.add_argument("--picture", type=Path, default=Path("docs/learning.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = TrainOptions(
        train_batch_size=2,
        num_candidates=2,
        gradient_accumulation_steps=1,
        max_steps=arguments.steps,
        lr=1e-3,
        warmup_steps=20,
        precision="fp32",
        device="cpu",
        valid_examples=1,
        log_every=1,
    )
    with tempfile.TemporaryDirectory() as scratch:
        runs = Runs(options, Path(scratch))
        print(f"{arguments.steps} steps of 2 x 2 candidates, {runs.data}\n{machine()}\n")
        curves = curves_of(runs)
        differences = differences_of(curves)
        for name, difference in differences.items():
            print(
                f"largest difference, {name}: {difference.max():.2g}, mean {difference.mean():.2g}"
            )
        draw(curves, differences, runs.data, arguments.picture)

        print(f"\nwith dropout 0.1, float32, {VALID_EXAMPLES} examples of 20 candidates:")
        results: dict[str, list[Metrics]] = {"convai_fast": [], "plain": []}
        for seed in SEEDS:
            for way, run in (("convai_fast", runs.ours), ("plain", runs.plain)):
                _, metrics = run(seed, dropout=0.1, seed=seed, valid_examples=VALID_EXAMPLES)
                results[way].append(metrics)
                print(f"  seed {seed}, {way:11} {metrics}", flush=True)
    figures = {f"difference, {name}": float(d.max()) for name, d in differences.items()}
    for way, metrics in results.items():
        figures |= {
            f"{way} {name}": statistics.mean(m.as_dict()[name] for m in metrics)
            for name in ("nll", "hits@1")
        }
    record("learning", f"{arguments.steps} steps, {runs.data}", figures)


if __name__ == "__main__":
    main()
