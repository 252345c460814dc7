"""Batches of a store, with the options that most tests take."""

from convai_fast.data.batches import DialogueBatches


def make_batches(store, split="train", **options):
    defaults = {
        "batch_size": 4,
        "num_candidates": 0,
        "max_history": 2,
        "max_length": 512,
        "layout": "padded",
    }
    return DialogueBatches(store, split, **{**defaults, **options})
