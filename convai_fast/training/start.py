"""What a run starts from: a tokenizer and a model that fit each other, and what was saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from convai_fast.dialogue.tokenizer import load_tokenizer
from convai_fast.errors import UserError
from convai_fast.load import load
from convai_fast.model.config import TransformerConfig
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.training.checkpoints import (
    check_output,
    last_checkpoint,
    read_training_state,
)
from convai_fast.training.options import TrainOptions


def start_or_continue(
    options: TrainOptions, report: Callable[[str], None]
) -> tuple[DoubleHeadsModel, PreTrainedTokenizerFast, dict[str, Any] | None]:
    """The model, its tokenizer, and the state of the run that is continued, if any.

    Raises UserError for options that cannot be used, and for a checkpoint that is damaged.
    """
    options.check()
    last = state = None
    if not options.resume:
        check_output(options.output)
    else:
        last = last_checkpoint(Path(options.resume))
    if last is not None:
        state = read_training_state(last)
    torch.manual_seed(options.seed)
    if state is not None and not options.lora_r:
        return *load(last), state
    return *load_model_and_tokenizer(options, report), state


def load_model_and_tokenizer(
    options: TrainOptions, report: Callable[[str], None]
) -> tuple[DoubleHeadsModel, PreTrainedTokenizerFast]:
    """Load what the options name, and give the model a row for each special token it lacks.

    Raises UserError when the embedding and the tokenizer do not belong together.
    """
    if options.from_scratch:
        config = _read_config(options.model)
        tokenizer = load_tokenizer(options.tokenizer or options.model)
        settings = {**config, "vocab_size": len(tokenizer)}
        model = DoubleHeadsModel(TransformerConfig.from_transformers(settings))
        report(f"model: {_shape(model)}, random weights, {len(tokenizer):,} tokens")
        return model, tokenizer

    model, tokenizer = load(
        options.model, tokenizer=options.tokenizer or None, resize=True, report=report
    )
    report(f"model: {_shape(model)} from {options.model}")
    return model, tokenizer


def _read_config(path: str) -> dict:
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--from_scratch needs the shape of the model: there is no {file}"
        ) from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} must hold a JSON object with the model's shape")
    return config


def _shape(model: DoubleHeadsModel) -> str:
    config = model.config
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return (
        f"{config.architecture}, {config.n_layer} layers of width {config.n_embd}, "
        f"{millions:.1f}M parameters"
    )
