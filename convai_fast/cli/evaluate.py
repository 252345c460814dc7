"""`convai-fast evaluate`: the figures of ConvAI2, as a table, as JSON, and as pictures."""

import json
import time
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from convai_fast._native import keep_freed_memory
from convai_fast.cli.info import PACKAGES, machine_of, package_version
from convai_fast.cli.options.evaluate import EvaluateOptions
from convai_fast.cli.outputs import check_outputs, finite, to_json, write_outputs
from convai_fast.cli.remembered import check_not_trained_on, recall
from convai_fast.data.dataset import read_dialogues
from convai_fast.data.spool import fingerprint
from convai_fast.dialogue.encoding import encode
from convai_fast.evaluation.evaluate import Evaluation, evaluate
from convai_fast.evaluation.metrics import check_metrics
from convai_fast.hardware import resolve_device, resolve_precision
from convai_fast.loading import load, model_fingerprint
from convai_fast.options import check_at_least

_MEANINGS = {
    "ppl": "perplexity of a token of the true reply, its end included",
    "ppl_without_eos": "the same, its end left out",
    "word_ppl": "perplexity of a word, whatever the tokenizer (ConvAI2)",
    "f1": "words that reply and true reply have in common (ConvAI2)",
    "bleu": "BLEU of the replies",
    "distinct_1": "different words in all replies, as a share of their words",
    "distinct_2": "the same of two words in a row",
    "mean_length": "words in a reply",
}


def check(options: EvaluateOptions) -> None:
    """Raise UserError at the first option that makes no sense."""
    check_metrics(options.metrics)
    check_at_least(options, {"max_history": 0, "max_examples": 0, "batch_size": 1})
    named = {"output": options.output, "details": options.details, "plots": options.plots}
    check_outputs(named, options.dataset_path, overwrite=options.overwrite)


def run(options: EvaluateOptions) -> None:
    """Measure, print the table, write the files that are asked for."""
    trained = recall(options)
    check(options)
    assert options.max_history is not None  # recalled
    loaded = read_dialogues(options.data)
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
        "options": asdict(options),
        # Of the split with the distractors that were drawn.
        "data_fingerprint": fingerprint({options.split: dialogues[options.split]}),
        "machine": machine_of(device, dtype),
        "versions": {name: package_version(name) for name in (*PACKAGES, "sacrebleu")},
        "seconds": seconds,
    }
    print(_table(evaluation, options, seconds, tokenizer))
    texts = {options.output: to_json(report)} if options.output else {}
    if options.details:
        texts[options.details] = "".join(
            json.dumps(finite(asdict(example)), ensure_ascii=False) + "\n"
            for example in evaluation.examples
        )

    def draw_into(folder: Path) -> list[Path]:
        from convai_fast.evaluation.plots import draw

        return draw(evaluation.examples, folder)

    written = write_outputs(texts, options.plots, draw_into)
    if written:
        print("\nwritten: " + ", ".join(map(str, written)))


def _table(
    evaluation: Evaluation,
    options: EvaluateOptions,
    seconds: float,
    tokenizer: PreTrainedTokenizerFast,
) -> str:
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
        true = [example.expected for example in evaluation.examples]
        if encode(tokenizer, true) != encode(tokenizer, [text.lower() for text in true]):
            lines += [
                "word_ppl is of texts in lower case, as ConvAI2 has it: of a model that has learnt "
                "capitals it is",
                "worse than ppl, and compares with models of lower case alone",
            ]
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
