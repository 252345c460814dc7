"""A training step beside transformers' double-heads class with autocast and fused AdamW.

python -m pytest benchmarks/bench_train.py --benchmark-only -k "2-candidates"

Both take the same random examples of real dialogues, padded per batch for the peer, and end each
step with the same clipping and the same optimizer.
"""

import numpy as np
import pytest
import torch

from benchmarks import shapes
from benchmarks.workers import Work
from convai_fast.data.batches import DialogueBatches, Layout
from convai_fast.data.store import DialogueStore, build_store
from convai_fast.training.loop import Trainer
from convai_fast.training.options import Precision, TrainOptions

ROUNDS = 5
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def store_folder(tmp_path_factory) -> str:
    _, dialogues, tokenizer = shapes.dialogues_and_tokenizer()
    folder = tmp_path_factory.mktemp("bench") / "store"
    build_store(dialogues, tokenizer, folder)
    return str(folder)


def rows_of_round(batches: DialogueBatches, batch: int, turn: int) -> np.ndarray:
    """Random examples, as a shuffled epoch brings them; the same for everyone."""
    return np.random.default_rng(turn).choice(batches.num_examples, batch, replace=False)


def random_batches(store: DialogueStore, shape: shapes.TrainShape, layout: Layout):
    return DialogueBatches(
        store,
        "train",
        batch_size=shape.batch,
        num_candidates=shape.num_candidates,
        max_history=shape.max_history,
        max_length=512,
        layout=layout,
    )


def make_ours(folder: str, shape: shapes.TrainShape, precision: Precision, layout: Layout) -> Work:
    """A step of `Trainer`; returns tokens, labelled tokens and the loss."""
    model, tokenizer = shapes.model_and_tokenizer("openai-gpt")
    options = TrainOptions(
        num_candidates=shape.num_candidates,
        train_batch_size=shape.batch,
        gradient_accumulation_steps=1,
        precision=precision,
        layout=layout,
        device="cpu",
    )
    trainer = Trainer(options, model.train(), tokenizer, DialogueStore(folder), lambda _: None)

    def step(turn: int):
        batch = trainer.batches.collate(rows_of_round(trainer.batches, shape.batch, turn))
        loss = trainer.train_on([batch])
        return len(batch["input_ids"]), int((batch["labels"] >= 0).sum()), float(loss)

    return step
