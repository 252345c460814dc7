"""Collating a batch: the operator beside Python lists, `pad_sequence`, and a plain copy.

python -m pytest benchmarks/bench_collate.py --benchmark-only
"""

import resource
import time

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks import shapes
from benchmarks.timing import compare, record
from convai_fast.comparison.measure import ratios
from convai_fast.data.batches import DialogueBatches
from convai_fast.data.build_store import build_store
from convai_fast.data.store import DialogueStore
from convai_fast.dialogue.sequence import build_input_from_segments

KEYS = {"input_ids": "input_ids", "token_type_ids": "token_type_ids", "labels": "lm_labels"}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> DialogueStore:
    _, dialogues, tokenizer = shapes.dialogues_and_tokenizer()
    return build_store(dialogues, tokenizer, tmp_path_factory.mktemp("bench") / "store")


def segments_of(batches: DialogueBatches, row: int):
    """Persona, history and candidates of one example as lists of ids: what Python starts from."""
    store, tables = batches.store, batches.tables
    first, count, _, kept, turn, num_turns, skipped, *candidates = batches.plan[row].tolist()

    def utterances(table, first: int, count: int):
        return [store.utterance(i) for i in table[first : first + count].tolist()]

    history = utterances(tables.history_ids, turn, num_turns)
    history[:1] = [ids[skipped:] for ids in history[:1]]
    return (
        utterances(tables.persona_ids, first, count)[:kept],
        history,
        utterances(tables.candidate_ids, *candidates),
    )


def build_in_python(segments, tokenizer):
    """Each candidate's sequence, one after another, as the predecessor builds them."""
    return [
        [
            build_input_from_segments(persona, history, reply, tokenizer, j == len(replies) - 1)
            for j, reply in enumerate(replies)
        ]
        for persona, history, replies in segments
    ]


def pad_in_python(built, pad):
    """Padded lists to tensors, as the predecessor does."""
    seq_len = max(len(i["input_ids"]) for row in built for i in row)
    return [
        torch.tensor(
            [
                [i[key] + [-100 if name == "labels" else pad] * (seq_len - len(i[key])) for i in r]
                for r in built
            ]
        )
        for name, key in KEYS.items()
    ]


@pytest.mark.parametrize("shape", shapes.COLLATE_SHAPES, ids=str)
def test_collate(benchmark, store, shape, say):
    name, _, tokenizer = shapes.dialogues_and_tokenizer()
    batches = DialogueBatches(
        store,
        "train",
        batch_size=shape.batch,
        num_candidates=shape.num_candidates,
        max_history=shape.max_history,
        max_length=512,
        layout="padded",
        shuffle=True,
    )
    middle = len(batches) // 2
    rows = batches._batches[middle]
    pad = store.layout.pad
    segments = [segments_of(batches, row) for row in rows]
    built = build_in_python(segments, tokenizer)
    tensors = [[torch.tensor(i[key]) for r in built for i in r] for key in KEYS.values()]
    expected = batches[middle]
    outputs = [expected[key] for key in KEYS]
    num_sequences = shape.batch * shape.num_candidates
    num_bytes = sum(tensor.nbytes for tensor in outputs)

    ways = {
        "collate": lambda: batches[middle],
        "python": lambda: pad_in_python(build_in_python(segments, tokenizer), pad),
        "pad_sequence": lambda: [pad_sequence(t, True, pad) for t in tensors],
        "copy": lambda: [tensor.clone() for tensor in outputs],
    }
    for ours, theirs in zip(outputs, ways["python"](), strict=True):
        assert torch.equal(ours, theirs)  # the same work
    times = compare(ways)
    benchmark(ways["collate"])

    median = {way: float(np.median(seconds)) for way, seconds in times.items()}
    figures = {f"{way}_us": round(seconds * 1e6, 1) for way, seconds in median.items()}
    for other in ("python", "pad_sequence", "copy"):
        median_ratio, least, most = ratios(times, "collate", other)
        figures[f"{other}_ratio"] = round(median_ratio, 2)
        figures[f"{other}_ratio_spread"] = f"{least:.2f}-{most:.2f}"
    record("collate", f"{name}, {shape}", figures)
    say(
        f"\n{shape}x{outputs[0].shape[-1]} ({num_bytes / 1e3:,.0f} KB, {name}): "
        f"{median['collate'] * 1e6:,.1f} us, {num_bytes / median['collate'] / 1e9:.1f} GB/s; "
        f"{median['python'] / num_sequences * 1e6:.0f} us a sequence in Python\n  "
        + "; ".join(
            f"{figures[f'{other}_ratio']:.1f} x {label} ({figures[f'{other}_ratio_spread']})"
            for other, label in (
                ("python", "Python"),
                ("pad_sequence", "pad_sequence alone"),
                ("copy", "a copy of the outputs"),
            )
        )
    )


def test_no_build_of_the_whole_dataset(benchmark, tmp_path, say):
    """What stands between text and the first batch, beside tokenising."""
    name, dialogues, tokenizer = shapes.dialogues_and_tokenizer()
    store = build_store(dialogues, tokenizer, tmp_path / "store")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def open_and_index() -> DialogueBatches:
        opened = DialogueStore(store.folder)
        return DialogueBatches(
            opened, "train", batch_size=8, num_candidates=0, max_history=2, max_length=512
        )

    batches = benchmark(open_and_index)
    started = time.perf_counter()
    next(iter(open_and_index()))
    seconds = time.perf_counter() - started
    growth_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    num_sequences = len(batches.tables.candidate_ids)
    figures = {"seconds": round(seconds, 4), "growth_mb": growth_mb, "sequences": num_sequences}
    record("build", name, figures)
    say(
        f"\n{num_sequences:,} sequences ({name}): {seconds:.3f} s and {growth_mb:.0f} MB to the "
        f"first batch; {store.num_bytes / 1e6:.1f} MB on disk"
    )
