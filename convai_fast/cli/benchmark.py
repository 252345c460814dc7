"""`convai-fast benchmark`: this library beside transformers, on the user's model and machine."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from convai_fast._native import keep_freed_memory
from convai_fast.cli.info import PACKAGES, machine_of, package_version
from convai_fast.cli.outputs import check_outputs, to_json, write_outputs
from convai_fast.cli.remembered import RememberedOptions
from convai_fast.comparison.measure import HEADER, describe_notes, draw, measure
from convai_fast.comparison.workloads import Comparison
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.data.dataset import check_at_least
from convai_fast.hardware import Precision, resolve_device
from convai_fast.loading import load
from convai_fast.terminal import say


@dataclass
class BenchmarkOptions(RememberedOptions):
    """Measure replies, ranking and a training step, here and with plain transformers, in turn.

    Both have the same model, prompts, candidates, batches and precision. Without --data the
    dialogues are built-in ones. With a GPT of 117M parameters on two CPU cores it takes about three
    minutes. Close what else computes on this machine, or the figures are of both.
    """

    output: Path | None = None
    """JSON file for the figures and all that they depend on."""
    plots: Path | None = None
    """Folder for a picture of the ratios (needs matplotlib)."""
    overwrite: bool = False
    """Replace what is there already."""
    seconds: float = 25.0
    """How long each of the workloads is measured, about; two pairs of turns are the least."""
    device: str = "auto"
    """cuda, cuda:1 or cpu; auto takes cuda where there is one."""
    weights: Literal["float32", "bfloat16", "int8"] = "float32"
    """Number format of the weights for replies; beside int8, transformers has float32."""
    precision: Precision = "auto"
    """Training steps under autocast to bf16 or fp16, or in fp32; auto takes bf16 where the hardware
    multiplies it. Ranking is in fp32."""


def run(options: BenchmarkOptions) -> None:
    """Measure one workload after another, print the table, write the files that are asked for."""
    options.recall()
    assert options.max_history is not None  # recalled
    check_at_least(options, {"max_history": 0, "seconds": 0})
    outputs = {"output": options.output, "plots": options.plots}
    check_outputs(outputs, options.dataset_path, overwrite=options.overwrite)
    device = resolve_device(options.device)
    splits = options.data.load() if options.dataset_path else builtin_dialogues(40, 0)
    dialogues = [dialogue for split in ("valid", "train") for dialogue in splits[split]]
    model, tokenizer = load(options.model)
    if device.type == "cpu":
        keep_freed_memory()  # for transformers, too
    comparison = Comparison(
        model.to(device),
        tokenizer,
        dialogues,
        max_history=options.max_history,
        weights=options.weights,
        precision=options.precision,
        seconds=options.seconds,
    )
    machine = machine_of(device, comparison.compute.dtype)
    cpu = f"{machine['processor']}, {machine['threads']} threads"
    where = machine["device"] if device.type == "cuda" else cpu
    size = sum(parameter.numel() for parameter in model.parameters())
    data = " and ".join(options.dataset_path) or "built-in dialogues"
    say(f"{options.model} ({model.config.family}, {size:,} parameters), {data}\n{where}\n")
    say(HEADER)
    figures = []
    for workload in comparison.workloads():
        figures.append(measure(workload, options.seconds))
        say(str(figures[-1]))
    say(describe_notes(figures))
    report = {
        "figures": [each.as_dict() for each in figures],
        "model": {"architecture": model.config.family, "parameters": size},
        "options": asdict(options),
        "machine": machine,
        "versions": {name: package_version(name) for name in PACKAGES},
    }
    texts = {options.output: to_json(report)} if options.output else {}
    title = f"{Path(options.model).name} on {where}"
    written = write_outputs(texts, options.plots, lambda folder: draw(figures, title, folder))
    if written:
        say("\nwritten: " + ", ".join(map(str, written)))
