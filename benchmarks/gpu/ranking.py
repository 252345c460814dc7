"""Ranking 20 candidates beside transformers' double-heads class, padded per batch.

The peer computes its logits of the vocabulary, as its class does, and in another way its body and
multiple-choice head alone, as a careful user would call them.
"""

from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks.gpu import workload
from benchmarks.gpu.clock import figures, in_turn
from benchmarks.gpu.notes import Notes, Setting
from convai_fast.comparison import plain
from convai_fast.data.batches import Batch, tensors_of
from convai_fast.data.store import DialogueStore
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.training.compute import Compute
from convai_fast.training.distributed import Ranks
from convai_fast.training.options import TrainOptions

EXAMPLES = (4, 16)  # a batch
NUM_CANDIDATES = 20
DTYPE = torch.bfloat16


def run(notes: Notes, setting: Setting) -> None:
    """OpenAI GPT 117M and GPT-2 124M, small batches and large ones."""
    store = workload.store(setting)
    sizes = EXAMPLES[:1] if setting.smoke else EXAMPLES
    for architecture, examples in product(workload.VOCAB_SIZES, sizes):
        name = f"{architecture}, bf16, {examples} x {NUM_CANDIDATES} candidates"
        with notes.attempt(name):
            notes.figure(name, **measure(architecture, store, examples, setting))


def measure(
    architecture: str, store: DialogueStore, examples: int, setting: Setting
) -> dict[str, float | str]:
    """Figures of one model and size of batches; RuntimeError where the logits are not alike."""
    compute = Compute(TrainOptions(precision="bf16", device=str(setting.device)), Ranks())
    ours = workload.model(architecture, setting)
    theirs = workload.twin(ours, architecture)
    head_only = workload.without_vocabulary(workload.twin(ours, architecture))
    shared, padded = (
        workload.batches(
            store, "valid", layout, setting, batch_size=examples, num_candidates=NUM_CANDIDATES
        )[0]
        for layout in ("shared", "padded")
    )
    on_device = {name: tensor.to(setting.device) for name, tensor in tensors_of(padded)}
    ways = {
        "convai_fast": partial(rank, ours, shared, compute),
        "transformers": partial(plain.rank, theirs, on_device, DTYPE),
        "body_and_head": partial(plain.rank, head_only, on_device, DTYPE),
    }
    logits = ways["transformers"]()
    difference = (ways["convai_fast"]() - logits).abs().max().item()
    if not difference < 0.1 * logits.abs().max().item() + 0.05:  # as bfloat16 rounds
        raise RuntimeError(f"logits differ from transformers' by {difference:.2g}")
    sizes = {"tokens": len(shared["input_ids"]), "padded_tokens": padded["input_ids"].numel()}
    return sizes | figures(in_turn(ways, setting))


@torch.inference_mode()
def rank(model: DoubleHeadsModel, batch: Batch, compute: Compute) -> Tensor:
    """Multiple-choice logits of a batch in the shared-prefix layout, which is on the CPU."""
    arguments = compute.to_device(batch)
    del arguments["labels"], arguments["label_positions"], arguments["mc_labels"]
    with compute.autocast():
        return model(**arguments, return_logits=False).mc_logits.float()
