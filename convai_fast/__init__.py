"""Fine-tune GPT and GPT-2 persona-dialogue models, and talk to them."""

from importlib import import_module

# Where each public name lives. It is imported when first asked for, so that `convai-fast --help`
# does not wait for torch and transformers.
_HOME = {
    "Dialogue": "dialogue.dialogue",
    "DialogueBatches": "data.batches",
    "DialogueStore": "data.store",
    "DoubleHeadsModel": "model.double_heads",
    "GenerationEngine": "generation.engine",
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
    "load": "loading",
    "load_dialogues": "data.readers",
    "load_tokenizer": "dialogue.tokenizer",
    "native_info": "_native",
    "rank_candidates": "evaluation.ranking",
    "special_ids": "dialogue.tokenizer",
    "train": "training.loop",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
