"""The double-heads dialogue model: one transformer for every family of models, with two heads."""

from convai_fast.model.config import TransformerConfig
from convai_fast.model.double_heads import DoubleHeadsModel, DoubleHeadsOutput
from convai_fast.model.transformer import Transformer

__all__ = ["DoubleHeadsModel", "DoubleHeadsOutput", "Transformer", "TransformerConfig"]
