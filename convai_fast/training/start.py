"""What a run starts from: a tokenizer and a model that fit each other, and what was saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from convai_fast.archive import unpacked
from convai_fast.data.tokenizer import (
    add_special_tokens,
    load_tokenizer,
    read_tokenizer,
    special_ids,
)
from convai_fast.errors import UserError
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
        return *load_checkpoint(last), state
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

    with unpacked(options.model) as source:
        model = DoubleHeadsModel.from_pretrained(source.path)
        tokenizer = read_tokenizer(options.tokenizer or source.path)
    rows, tokens = model.config.vocab_size, len(tokenizer)
    beyond = set(range(rows, tokens + add_special_tokens(tokenizer)))
    # Rows that no token of the files has may be those of special tokens, in an unknown order.
    if rows > tokens or not beyond <= set(special_ids(tokenizer)):
        raise UserError(
            f"{options.model} embeds {rows:,} tokens and the tokenizer has {tokens:,}: they do not "
            "belong together; restore the tokenizer's files (an old library's special tokens are "
            "in special_tokens.txt or added_tokens.json), or name the model's own with --tokenizer"
        )
    report(f"model: {_shape(model)} from {options.model}")
    if beyond:
        model.resize_token_embeddings(len(tokenizer))
        report(
            f"special tokens: {len(beyond)} added, embedding {rows:,} -> {len(tokenizer):,} rows"
        )
    return model, tokenizer


def load_checkpoint(folder: Path) -> tuple[DoubleHeadsModel, PreTrainedTokenizerFast]:
    """Load the model and the tokenizer of a checkpoint that a run saved.

    Raises UserError when they are damaged or do not belong together.
    """
    model = DoubleHeadsModel.from_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    if len(tokenizer) != model.config.vocab_size:
        raise UserError(
            f"{folder} embeds {model.config.vocab_size:,} tokens and its tokenizer has "
            f"{len(tokenizer):,}: restore its files, or start a new run"
        )
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
