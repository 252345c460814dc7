"""`convai-fast evaluate`: the figures of ConvAI2, as a table, as JSON, and as pictures."""

import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass, field
from operator import methodcaller
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from convai_fast._native import keep_freed_memory, native_info
from convai_fast.bulk.reply_file import check_absent
from convai_fast.cli.info import package_version
from convai_fast.cli.remembered import RememberedOptions, check_not_trained_on
from convai_fast.cli.sampling import SamplingOptions
from convai_fast.data.dataset import check_at_least
from convai_fast.data.spool import fingerprint
from convai_fast.errors import UserError
from convai_fast.evaluation.evaluate import METRICS, Evaluation, check_metrics, evaluate
from convai_fast.extras import require
from convai_fast.files import scratch_folder, write_whole
from convai_fast.hardware import Precision, resolve_device, resolve_precision
from convai_fast.loading import load, model_fingerprint

_MEANINGS = {
    "ppl": "perplexity of a token of the true reply, <eos> included",
    "ppl_without_eos": "the same, <eos> left out",
    "word_ppl": "perplexity of a word, whatever the tokenizer (ConvAI2)",
    "f1": "words that reply and true reply have in common (ConvAI2)",
    "bleu": "BLEU of the replies",
    "distinct_1": "different words in all replies, as a share of their words",
    "distinct_2": "the same of two words in a row",
    "mean_length": "words in a reply",
}
_PACKAGES = ("convai-fast", "torch", "transformers", "tokenizers", "numpy", "sacrebleu")


@dataclass
class EvaluateOptions(RememberedOptions):
    """Measure a model on dialogues as the ConvAI2 challenge did.

    hits@K: the true reply is among the K best of its candidates. ppl: perplexity of a token of the
    true reply. word_ppl: that of a word, which compares models with different tokenizers. f1, bleu
    and distinct are about replies that the model writes: those of `convai-fast generate --data`
    with the same options.
    """

    split: Literal["train", "valid"] = "valid"
    """Split of the dialogues to measure on."""
    metrics: tuple[str, ...] = METRICS
    """Any of hits@K (hits@1, hits@5, …), ppl, word_ppl, f1, bleu, distinct."""
    output: Path | None = None
    """JSON file for the figures and all that they depend on."""
    details: Path | None = None
    """JSONL file for what was measured about each example."""
    plots: Path | None = None
    """Folder for pictures: ranks, perplexity by turn, lengths of replies (needs matplotlib)."""
    overwrite: bool = False
    """Replace what is there already."""
    allow_trained_on: bool = False
    """Measure also where the validation split holds dialogues that the model was trained on."""
    max_examples: int = 0
    """Measure on so many examples, spread evenly over the split; 0: on all."""
    batch_size: int = 16
    """Examples that are scored at a time."""
    device: str = "auto"
    """cuda, cuda:1 or cpu; auto takes cuda where there is one."""
    precision: Precision = "auto"
    """Score under autocast to bf16 or fp16, or in fp32; auto takes bf16 where the hardware
    multiplies it. Replies are written in fp32."""
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = field(
        default_factory=SamplingOptions
    )

    def check(self) -> None:
        """Raise UserError at the first option that makes no sense."""
        check_metrics(self.metrics)
        check_at_least(self, {"max_history": 0, "max_examples": 0, "batch_size": 1})
        if self.plots:
            require("matplotlib", "`plots`")
        named = {"output": self.output, "details": self.details, "plots": self.plots}
        outputs = {name: path for name, path in named.items() if path}
        if len({path.resolve() for path in outputs.values()}) < len(outputs):
            raise UserError("--output, --details and --plots must differ: name one file for each")
        for name, path in outputs.items():
            if not self.overwrite:
                check_absent(path, name)
            if path.exists() and not (path.is_dir() if name == "plots" else path.is_file()):
                kind = "folder" if name == "plots" else "regular file"
                raise UserError(f"{path} is there and no {kind}: choose another --{name}")
            if path.resolve() in [Path(data).resolve() for data in self.dataset_path]:
                raise UserError(f"{path} holds the dialogues: choose another --{name}")
            if any(path.resolve() in other.resolve().parents for other in outputs.values()):
                raise UserError(f"{path} would hold the other outputs: choose another --{name}")
            folder = next(p for p in path.absolute().parents if p.exists())
            if not folder.is_dir() or not os.access(folder, os.W_OK):
                raise UserError(f"nothing can be written in {folder}: choose another --{name}")


def run(options: EvaluateOptions) -> None:
    """Measure, print the table, write the files that are asked for."""
    trained = options.recall()
    options.check()
    assert options.max_history is not None  # recalled
    loaded = options.data.load_sources()
    if options.split == "valid" and loaded.dialogues["valid"] and not options.allow_trained_on:
        check_not_trained_on(trained, zip(options.dataset_path, loaded.origins, strict=True))
    dialogues = loaded.dialogues
    device = resolve_device(options.device)
    dtype = resolve_precision(options.precision, device)
    model, tokenizer = load(options.model)
    described = {
        "architecture": model.config.family,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "fingerprint": model_fingerprint(model),
    }
    if device.type == "cpu":
        keep_freed_memory()
    started = time.perf_counter()
    evaluation = evaluate(
        model.to(device),
        tokenizer,
        dialogues,
        split=options.split,
        metrics=options.metrics,
        max_history=options.max_history,
        max_examples=options.max_examples,
        batch_size=options.batch_size,
        dtype=dtype,
        sampling=options.sampling,
    )
    seconds = round(time.perf_counter() - started, 1)
    report = {
        "metrics": evaluation.metrics,
        "counts": evaluation.counts,
        "bleu_signature": evaluation.bleu_signature or None,
        "model": described,
        "options": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(options).items()
        },
        # Of the split with the distractors that were drawn.
        "data_fingerprint": fingerprint({options.split: dialogues[options.split]}),
        "machine": _machine(device, dtype),
        "versions": {name: package_version(name) for name in _PACKAGES},
        "seconds": seconds,
    }
    print(_table(evaluation, options, seconds))
    try:
        written = _write(report, evaluation, options)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or 'all'}: {error.strerror}") from error
    if written:
        print("\nwritten: " + ", ".join(map(str, written)))


def _machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    native = native_info()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "precision": str(dtype).removeprefix("torch."),
        "operators": native["isa"] if native["loaded"] else "plain PyTorch",
    }


def _table(evaluation: Evaluation, options: EvaluateOptions, seconds: float) -> str:
    counts = evaluation.counts
    lines = [
        f"{options.model} on {' and '.join(options.dataset_path)}, {options.split} split, "
        f"{counts['examples']:,} examples, {seconds:,.1f} s",
        "",
    ]
    for name, value in evaluation.metrics.items():
        shown = f"{value:.2%}" if name == "f1" or name.startswith("hits@") else f"{value:,.2f}"
        if name.startswith("distinct"):
            shown = f"{value:.4f}"
        meaning = _MEANINGS.get(name) or _meaning_of_hits(name, evaluation)
        lines.append(f"{name:<16} {shown:>10}   {meaning}")
    if "words" in counts:
        unknown, words = counts["unknown_words"], counts["words"]
        lines += ["", f"words: {words:,} scored, {unknown:,} are not in the vocabulary"]
    cuts = [f"{name}: {count:,}" for name, count in counts.items() if " cut for " in name]
    if cuts:
        lines += ["", "examples of the split that do not fit the model:", *cuts]
    return "\n".join(lines)


def _meaning_of_hits(name: str, evaluation: Evaluation) -> str:
    counts = [example.num_candidates for example in evaluation.examples]
    sizes = [count for count in counts if count is not None]
    least, most = min(sizes), max(sizes)
    of = f"{most}" if least == most else f"{least} to {most}"
    return f"the true reply is among the {name[5:]} best of {of} candidates".replace(
        "among the 1 best", "the best"
    )


def _write(report: dict[str, Any], evaluation: Evaluation, options: EvaluateOptions) -> list[Path]:
    """Write each file beside its place and rename it."""
    lines = "".join(
        json.dumps(finite(asdict(example)), ensure_ascii=False) + "\n"
        for example in evaluation.examples
    )
    report_text = json.dumps(finite(report), ensure_ascii=False, indent=2) + "\n"
    written: list[Path] = []
    new: list[Path] = []
    try:
        for path, text in ((options.output, report_text), (options.details, lines)):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                new += [] if path.exists() else [path]
                write_whole(path, methodcaller("write", text.encode()))
                written.append(path)
        if options.plots:
            from convai_fast.evaluation.plots import draw

            options.plots.mkdir(parents=True, exist_ok=True)
            with scratch_folder(options.plots, ".drawing-") as scratch:
                for picture in draw(evaluation.examples, scratch):
                    place = options.plots / picture.name
                    new += [] if place.exists() else [place]
                    written.append(picture.replace(place))
    except OSError:
        # All or nothing, so that the same command may be given again.
        for path in new:
            path.unlink(missing_ok=True)
        raise
    return written


def finite(value: Any) -> Any:
    """`value` with null for numbers that JSON does not have: NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value
