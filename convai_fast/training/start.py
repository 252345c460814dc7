"""What a run starts from: a tokenizer and a model that fit each other, and what was saved."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from convai_fast.archive import checkpoint_of, unpacked
from convai_fast.data.dataset import checked_sources
from convai_fast.data.trained_with import TrainedSource, TrainedWith
from convai_fast.dialogue.tokenizer import add_special_tokens, read_tokenizer
from convai_fast.errors import UserError
from convai_fast.files import read_json
from convai_fast.loading import add_segments, load
from convai_fast.model import adapter, families
from convai_fast.model.checkpoint import has_new_head
from convai_fast.model.config import TransformerConfig
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.training.checkpoints import (
    TrainingState,
    last_checkpoint,
    read_training_state,
)
from convai_fast.training.options import TrainOptions
from convai_fast.training.run_folder import check_output


class Start(NamedTuple):
    """A model, its tokenizer, and the state of the run that is continued, if any.

    `base` is the folder or Hub id from which the weights that LoRA adapts were read, and `before`
    what the model of the options had been trained on.
    """

    model: DoubleHeadsModel
    tokenizer: PreTrainedTokenizerFast
    state: TrainingState | None
    base: str
    before: Sequence[TrainedSource]


def start_or_continue(options: TrainOptions, report: Callable[[str], None]) -> Start:
    """What the options name, or with `options.resume` what was saved of that run.

    Raises UserError for options that cannot be used, and for a checkpoint that is damaged.
    """
    options.check()
    checked_sources(options)
    last = state = None
    if not options.resume:
        check_output(options.output)
    else:
        try:
            last = last_checkpoint(Path(options.resume))
            state = read_training_state(last) if last is not None else None
        except PermissionError as error:
            raise UserError(f"{error.filename} cannot be read: get permission for it") from error
    torch.manual_seed(options.seed)
    if last is not None:
        trained = TrainedWith.read(last)
        before = trained.before if trained else ()
    else:
        trained = None if options.from_scratch else TrainedWith.read(options.model)
        before = trained.learnt if trained else ()
    if last is not None and not options.lora_r:
        return Start(*load(last), state, options.model, before)
    base = _base(options) if options.lora_r else options.model
    model, tokenizer = load_model_and_tokenizer(replace(options, model=base), report)
    if last is not None:  # the head of the state, not that of the base
        name = "model.safetensors" if options.merge_lora else adapter.WEIGHTS_FILE
        model.head_is_new = has_new_head(last / name)
    return Start(model, tokenizer, state, base, before)


def _base(options: TrainOptions) -> str:
    """Where the base model of LoRA is now; of a checkpoint of a run its own name, not a link's."""
    kept = Path(options.resume) / adapter.KEPT_BASE
    if options.resume and kept.is_dir():
        return str(kept)
    base = checkpoint_of(options.model)
    if adapter.is_adapter(Path(base)):
        raise UserError(
            f"{options.model} is a LoRA adapter itself: merge it into ordinary weights with "
            f"`convai-fast convert --model {options.model} --output NEW`, and give `model` NEW"
        )
    return str(base)


def load_model_and_tokenizer(
    options: TrainOptions, report: Callable[[str], None]
) -> tuple[DoubleHeadsModel, PreTrainedTokenizerFast]:
    """Load what the options name, and give the model a row for each special token it lacks.

    Raises UserError when the embedding and the tokenizer do not belong together.
    """
    if options.from_scratch:
        with unpacked(options.model) as source:
            file = Path(source.path) / "config.json"
            lack = f"`from_scratch` needs the shape of the model: there is no {file}"
            config = read_json(file, missing=lack)
        tokenizer = read_tokenizer(options.tokenizer or options.model)
        if not families.find(config).reads_chat(tokenizer):
            add_special_tokens(tokenizer)
        settings = {**config, "vocab_size": len(tokenizer)}
        model = DoubleHeadsModel(TransformerConfig.from_transformers(settings))
        if options.segments and not model.config.segments:
            add_segments(model, tokenizer, report)
        report(f"model: {_shape(model)}, random weights, {len(tokenizer):,} tokens")
        return model, tokenizer

    model, tokenizer = load(
        options.model,
        tokenizer=options.tokenizer or None,
        resize=True,
        segments=options.segments,
        report=report,
    )
    report(f"model: {_shape(model)} from {options.model}")
    if families.of(model.config).reads_chat(tokenizer):
        report("dialogues: as the tokenizer's chat template writes them")
    return model, tokenizer


def _shape(model: DoubleHeadsModel) -> str:
    config = model.config
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return (
        f"{config.family}, {config.n_layer} layers of width {config.n_embd}, "
        f"{millions:.1f}M parameters"
    )
