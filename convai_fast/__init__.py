"""Fine-tune persona-dialogue models with two heads, and talk to them."""

from importlib import import_module
from typing import TYPE_CHECKING

# Where each public name lives. It is imported when first asked for, so that `convai-fast --help`
# does not wait for torch and transformers.
_HOME = {
    "AsyncEngine": "generation.async_engine",
    "Dialogue": "dialogue.dialogue",
    "DialogueBatches": "data.batches",
    "DialogueStore": "data.store",
    "DoubleHeadsModel": "model.double_heads",
    "GenerationEngine": "generation.engine",
    "RankedCandidate": "generation.ranking",
    "Reply": "generation.request",
    "Request": "generation.request",
    "SamplingParams": "generation.params",
    "TrainOptions": "training.options",
    "TransformerConfig": "model.config",
    "UserError": "errors",
    "Utterance": "dialogue.dialogue",
    "build_input_from_segments": "dialogue.sequence",
    "build_store": "data.build_store",
    "Evaluation": "evaluation.evaluate",
    "encode": "dialogue.encoding",
    "evaluate": "evaluation.evaluate",
    "layout_for": "loading",
    "load": "loading",
    "load_dialogues": "data.readers",
    "load_tokenizer": "dialogue.tokenizer",
    "native_info": "_native",
    "rank_candidates": "generation.ranking",
    "special_ids": "dialogue.tokenizer",
    "train": "training.loop",
    "train_tokenizer": "dialogue.new_tokenizer",
}

if TYPE_CHECKING:  # what editors and type checkers read
    from convai_fast._native import native_info as native_info
    from convai_fast.data.batches import DialogueBatches as DialogueBatches
    from convai_fast.data.build_store import build_store as build_store
    from convai_fast.data.readers import load_dialogues as load_dialogues
    from convai_fast.data.store import DialogueStore as DialogueStore
    from convai_fast.dialogue.dialogue import Dialogue as Dialogue
    from convai_fast.dialogue.dialogue import Utterance as Utterance
    from convai_fast.dialogue.encoding import encode as encode
    from convai_fast.dialogue.new_tokenizer import train_tokenizer as train_tokenizer
    from convai_fast.dialogue.sequence import build_input_from_segments as build_input_from_segments
    from convai_fast.dialogue.tokenizer import load_tokenizer as load_tokenizer
    from convai_fast.dialogue.tokenizer import special_ids as special_ids
    from convai_fast.errors import UserError as UserError
    from convai_fast.evaluation.evaluate import Evaluation as Evaluation
    from convai_fast.evaluation.evaluate import evaluate as evaluate
    from convai_fast.generation.async_engine import AsyncEngine as AsyncEngine
    from convai_fast.generation.engine import GenerationEngine as GenerationEngine
    from convai_fast.generation.params import SamplingParams as SamplingParams
    from convai_fast.generation.ranking import RankedCandidate as RankedCandidate
    from convai_fast.generation.ranking import rank_candidates as rank_candidates
    from convai_fast.generation.request import Reply as Reply
    from convai_fast.generation.request import Request as Request
    from convai_fast.loading import layout_for as layout_for
    from convai_fast.loading import load as load
    from convai_fast.model.config import TransformerConfig as TransformerConfig
    from convai_fast.model.double_heads import DoubleHeadsModel as DoubleHeadsModel
    from convai_fast.training.loop import train as train
    from convai_fast.training.options import TrainOptions as TrainOptions

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
