"""hits@1 out of 20 beside a loop over transformers' double-heads class.

python -m pytest benchmarks/bench_evaluate.py --benchmark-only

Both begin with the same dialogues as text and end with hits@1. The peer tokenises and pads batch by
batch, as the predecessor's evaluation fed its model, and computes its logits of the vocabulary, as
its class does; in another row its body and multiple-choice head alone.
"""

import statistics

import pytest
import torch
import transformers
from torch import nn

from benchmarks import shapes
from benchmarks.timing import record
from benchmarks.workers import Work, Worker, pairwise, take_turns
from convai_fast._native import keep_freed_memory
from convai_fast.dialogue.encoding import encode
from convai_fast.dialogue.sequence import build_input_from_segments
from convai_fast.evaluation.evaluate import evaluate

ROUNDS = 3


def make_ours(dtype: torch.dtype) -> Work:
    """hits@1 of the public function."""
    model, tokenizer = shapes.model_and_tokenizer("openai-gpt")
    dialogues = {"valid": shapes.dialogues_to_evaluate()}
    keep_freed_memory()

    def measure(turn: int):
        shape = shapes.EVALUATE_SHAPE
        result = evaluate(
            model,
            tokenizer,
            dialogues,
            metrics=["hits@1"],
            max_history=shape.max_history,
            batch_size=shape.batch,
            dtype=dtype,
        )
        return [example.rank for example in result.examples]

    return measure


def make_transformers(dtype: torch.dtype, head_only: bool, folder: str) -> Work:
    """Ranks from transformers' class, or from its body and multiple-choice head alone."""
    model = transformers.OpenAIGPTDoubleHeadsModel.from_pretrained(folder).eval()
    _, tokenizer = shapes.model_and_tokenizer("openai-gpt")
    dialogues = shapes.dialogues_to_evaluate()
    if head_only:
        model.lm_head = nn.Identity()  # its logits are then the hidden states

    def sequences(persona, utterance):
        shape = shapes.EVALUATE_SHAPE
        history = utterance.history[-(2 * shape.max_history + 1) :]
        persona, history = encode(tokenizer, persona), encode(tokenizer, history)
        return [
            build_input_from_segments(persona, history, reply, tokenizer)
            for reply in encode(tokenizer, utterance.candidates[-shape.num_candidates :])
        ]

    def padded(batch, name):
        longest = max(len(instance[name]) for example in batch for instance in example)
        return torch.tensor(
            [[i[name] + [0] * (longest - len(i[name])) for i in example] for example in batch]
        )

    @torch.inference_mode()
    def measure(turn: int):
        examples = [(d.personality, u) for d in dialogues for u in d.utterances]
        size, ranks = shapes.EVALUATE_SHAPE.batch, []
        for first in range(0, len(examples), size):
            batch = [sequences(*example) for example in examples[first : first + size]]
            ends = [[instance["mc_token_ids"] for instance in example] for example in batch]
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                output = model(
                    input_ids=padded(batch, "input_ids"),
                    token_type_ids=padded(batch, "token_type_ids"),
                    mc_token_ids=torch.tensor(ends),
                )
            logits = output.mc_logits.float()
            ranks += (logits >= logits[:, -1:]).sum(1).tolist()
        return ranks

    return measure


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_hits(benchmark, precision, say, tmp_path):
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    model, tokenizer = shapes.model_and_tokenizer("openai-gpt")
    model.save_pretrained(tmp_path / "model", tokenizer)
    folder = str(tmp_path / "model")
    workers = {
        "convai_fast": Worker(make_ours, dtype),
        "transformers": Worker(make_transformers, dtype, False, folder),
        "its body and head": Worker(make_transformers, dtype, True, folder),
    }
    turns = benchmark.pedantic(lambda: take_turns(workers, ROUNDS), rounds=1)

    # The same work: but for rounding, and a distractor that equals the true reply, ranks agree.
    ours, theirs = (turns[way][0].result for way in ("convai_fast", "transformers"))
    moved = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    assert sum(moved) <= len(moved) * (2 if precision == "bf16" else 0.1)

    name, _, _ = shapes.dialogues_and_tokenizer()
    count = len(ours)
    say(f"\nhits@1, {count} examples, {shapes.EVALUATE_SHAPE}, {precision}, {name}")
    for way, done in turns.items():
        seconds = statistics.median(turn.seconds for turn in done)
        figures = {"seconds": round(seconds, 3), "peak_mb": round(done[-1].peak_mb)}
        line = f"  {way:18} {seconds:7.2f} s, {count / seconds:6.2f} examples/s"
        if way != "convai_fast":
            median, least, most = pairwise(turns, "convai_fast", way)
            figures |= {"ratio": round(median, 2), "spread": f"{least:.1f}-{most:.1f}"}
            line += f"; {median:.1f} x ours ({least:.1f}-{most:.1f})"
        record("evaluate", f"{way}, hits@1, {shapes.EVALUATE_SHAPE}, {precision}", figures)
        say(line)
