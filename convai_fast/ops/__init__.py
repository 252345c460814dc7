"""The custom operators, usable as functions and under `torch.compile`."""

from convai_fast.ops.collate import PLAN_COLUMNS, collate
from convai_fast.ops.sample import sample

__all__ = ["PLAN_COLUMNS", "collate", "sample"]
