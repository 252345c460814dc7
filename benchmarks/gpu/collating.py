"""Collating on the GPU beside collating on the CPU and copying, and beside torch's padding.

The store is made up, so that torch is enough.
"""

from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.gpu.clock import figures, in_turn
from benchmarks.gpu.notes import Notes, Setting
from convai_fast import ops
from convai_fast.dialogue.format import SpecialIds
from convai_fast.dialogue.layout import classic
from convai_fast.ops.plan import layout_numbers, pieces_of

LAYOUT = classic(SpecialIds(1, 2, 3, 4, 0))
PERSONA, HISTORY, MAX_LENGTH = 5, 5, 512
SHAPES = ((8, 2), (64, 20), (256, 20))  # examples, candidates


class Store:
    """Random utterances of 5 to 15 tokens, and a plan of examples of them; all on the CPU.

    Attributes:
        padded, shared: what the two operators want beside the tables.
    """

    def __init__(self, num_utterances: int, examples: int, num_candidates: int) -> None:
        rng = np.random.default_rng(0)
        lengths = rng.integers(5, 16, num_utterances)
        pieces = pieces_of(LAYOUT)
        offsets = np.cumsum([0, *lengths, *map(len, pieces)])
        tokens = rng.integers(5, 40_000, lengths.sum())
        tokens = np.append(tokens, [*chain(*pieces)])

        def ids(count: int) -> np.ndarray:
            return rng.integers(0, num_utterances, (examples, count)).astype(np.int32)

        parts = ids(PERSONA), ids(HISTORY), ids(num_candidates)
        self._tables = [
            torch.from_numpy(tokens).to(torch.uint16),
            torch.from_numpy(offsets),
            *(torch.from_numpy(part.reshape(-1)) for part in parts),
        ]
        rows = np.arange(examples)
        plan = np.zeros((examples, len(ops.PLAN_COLUMNS)), np.int64)
        values = {
            "persona_first": rows * PERSONA,
            "persona_count": PERSONA,
            "persona_kept": PERSONA,
            "history_first": rows * HISTORY,
            "history_count": HISTORY,
            "candidate_first": rows * num_candidates,
            "candidate_count": num_candidates,
        }
        for name, value in values.items():
            plan[:, ops.PLAN_COLUMNS.index(name)] = value
        persona, history, candidates = (lengths[part] for part in parts)
        prefix = 1 + persona.sum(1) + (1 + history).sum(1)
        seq_len = int((prefix + candidates.max(1)).max()) + 2
        sizes = prefix + (candidates + 2).sum(1)
        begins = np.concatenate([[0], sizes.cumsum()])
        layout = layout_numbers(LAYOUT, num_utterances)
        common = (torch.from_numpy(plan), layout, num_candidates)
        self.padded = (*common, seq_len)
        self.shared = (*common, torch.from_numpy(begins), int(begins[-1]), MAX_LENGTH)

    def tables(self, device: torch.device) -> list[Tensor]:
        """Tokens and indices, on a device."""
        return [table.to(device) for table in self._tables]


def run(notes: Notes, setting: Setting) -> None:
    """Both layouts in each shape."""
    for examples, num_candidates in SHAPES[:1] if setting.smoke else SHAPES:
        store = Store(10_000, examples, num_candidates)
        for layout in ("padded", "shared"):
            workload = f"{examples} x {num_candidates} {layout}"
            with notes.attempt(workload):
                notes.figure(workload, **measure(store, layout, setting))


def measure(store: Store, layout: str, setting: Setting) -> dict[str, float | str]:
    """Figures of one workload; raises RuntimeError where two ways give different batches."""
    device = setting.device
    here, there = store.tables(torch.device("cpu")), store.tables(device)
    operator = ops.collate if layout == "padded" else ops.collate_shared
    arguments = store.padded if layout == "padded" else store.shared

    def ours() -> tuple[Tensor, ...]:
        return operator(*there, *arguments)

    def on_cpu() -> list[Tensor]:
        batch = operator(*here, *arguments, pin_memory=setting.is_gpu)
        return [tensor.to(device, non_blocking=True) for tensor in batch]

    outputs = ours()
    if not all(torch.equal(a, b) for a, b in zip(outputs, on_cpu(), strict=True)):
        raise RuntimeError("the batch is not the CPU's")
    ways = {"convai_fast": ours, "cpu_and_copy": on_cpu}
    if layout == "padded":
        sequences = [
            [row.clone() for row in tensor.flatten(0, 1)[:, :-1]] for tensor in outputs[:3]
        ]  # of one length, which is the easiest to pad
        ways["pad_sequence"] = lambda: [pad_sequence(rows, True) for rows in sequences]
    ways["copy"] = lambda: [tensor.clone() for tensor in outputs]
    values = figures(in_turn(ways, setting))
    return values | {"megabytes": round(sum(tensor.nbytes for tensor in outputs) / 1e6, 3)}
