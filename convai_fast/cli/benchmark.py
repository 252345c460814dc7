"""`convai-fast benchmark`: this library beside transformers, on the user's model and machine."""

from dataclasses import asdict
from pathlib import Path

from convai_fast._native import keep_freed_memory
from convai_fast.cli.info import PACKAGES, machine_of, package_version
from convai_fast.cli.options.benchmark import BenchmarkOptions
from convai_fast.cli.outputs import check_outputs, to_json, write_outputs
from convai_fast.cli.remembered import recall
from convai_fast.comparison.measure import HEADER, describe_notes, draw, measure
from convai_fast.comparison.workloads import Comparison
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.data.dataset import read_dialogues
from convai_fast.generation.backends import resolve_weights
from convai_fast.hardware import resolve_device
from convai_fast.loading import load
from convai_fast.options import check_at_least
from convai_fast.terminal import counted, say


def run(options: BenchmarkOptions) -> None:
    """Measure one workload after another, print the table, write the files that are asked for."""
    recall(options)
    assert options.max_history is not None  # recalled
    check_at_least(options, {"max_history": 0, "seconds": 0})
    outputs = {"output": options.output, "plots": options.plots}
    check_outputs(outputs, options.dataset_path, overwrite=options.overwrite)
    device = resolve_device(options.device)
    given = bool(options.dataset_path)
    splits = read_dialogues(options.data).dialogues if given else builtin_dialogues(40, 0)
    dialogues = [dialogue for split in ("valid", "train") for dialogue in splits[split]]
    model, tokenizer = load(options.model)
    if device.type == "cpu":
        keep_freed_memory()  # for transformers, too
    comparison = Comparison(
        model.to(device),
        tokenizer,
        dialogues,
        max_history=options.max_history,
        weights=resolve_weights(options.weights, device),
        precision=options.precision,
        seconds=options.seconds,
    )
    machine = machine_of(device, comparison.compute.dtype)
    cpu = f"{machine['processor']}, {counted(machine['threads'], 'thread')}"
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
