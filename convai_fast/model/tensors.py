"""The tensors of a checkpoint, each told to be a parameter, a constant, or unknown.

Parameters have three names: ours, transformers' of today, and in part those of the old libraries.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from convai_fast.errors import UserError, shown
from convai_fast.model import legacy
from convai_fast.model.config import TransformerConfig

logger = logging.getLogger(__name__)

# Our parameter names on the left, transformers' on the right.
_EMBEDDINGS = {
    "openai-gpt": {
        "transformer.token_embedding.weight": "transformer.tokens_embed.weight",
        "transformer.position_embedding.weight": "transformer.positions_embed.weight",
    },
    "gpt2": {
        "transformer.token_embedding.weight": "transformer.wte.weight",
        "transformer.position_embedding.weight": "transformer.wpe.weight",
    },
}
_BLOCK = {
    "transformer.blocks.{layer}.attention.qkv": "transformer.h.{layer}.attn.c_attn",
    "transformer.blocks.{layer}.attention.out": "transformer.h.{layer}.attn.c_proj",
    "transformer.blocks.{layer}.attention_norm": "transformer.h.{layer}.ln_1",
    "transformer.blocks.{layer}.mlp.up": "transformer.h.{layer}.mlp.c_fc",
    "transformer.blocks.{layer}.mlp.down": "transformer.h.{layer}.mlp.c_proj",
    "transformer.blocks.{layer}.mlp_norm": "transformer.h.{layer}.ln_2",
}
_FINAL_NORM = {"transformer.final_norm": "transformer.ln_f"}
_HEAD = {"multiple_choice_head": "multiple_choice_head.summary"}

# The language-model head has the token embedding for a weight.
EMBEDDING = "transformer.token_embedding.weight"
_LM_HEAD = "lm_head.weight"
# transformers' Conv1D is a Linear whose weight is stored as [in, out].
_CONV1D_WEIGHTS = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# Constants that older versions stored beside the parameters, and why they are not needed.
_CONSTANTS = {
    re.compile(r"transformer\.h\.\d+\.attn\.bias"): "the causal mask, which is computed",
    re.compile(r"transformer\.h\.\d+\.attn\.masked_bias"): "a constant of the causal mask",
    re.compile(r"transformer\.position_ids"): "the numbers 0, 1, 2, …, which are computed",
}


class Accounted(NamedTuple):
    """What became of every tensor of a file."""

    parameters: dict[str, Tensor]  # by the names that transformers' double-heads classes use
    renamed: dict[str, str]  # the stored name -> that name, where they differ
    dropped: dict[str, str]  # the stored name -> why it is not needed


def transformers_names(config: TransformerConfig) -> dict[str, str]:
    """Our name of every parameter of a `DoubleHeadsModel` -> its name in transformers."""
    modules = {
        ours.format(layer=layer): theirs.format(layer=layer)
        for layer in range(config.n_layer)
        for ours, theirs in _BLOCK.items()
    }
    modules |= (_FINAL_NORM if config.final_norm else {}) | _HEAD
    return _EMBEDDINGS[config.architecture] | {
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    }


def account_for(tensors: Mapping[str, Tensor], config: TransformerConfig, path: Path) -> Accounted:
    """Tell a file's parameters, by today's names, from its constants and tied copies.

    Raises:
        UserError: a tensor is there twice, a constant is not the expected one, or the
            language-model head is not the token embedding.
    """
    known = {_LM_HEAD, *transformers_names(config).values()}
    accounted = Accounted(parameters={}, renamed={}, dropped={})
    for key, tensor in tensors.items():
        name = legacy.current_name(key)
        # A body saved without heads (as `gpt2` on the hub) leaves out the prefix.
        prefixed = f"transformer.{name}"
        if prefixed in known or _why_constant(prefixed):
            name = prefixed
        if reason := _why_constant(name):
            if not legacy.is_expected_constant(name, tensor):
                raise UserError(
                    f"{path}: {key} holds something else than {reason}, so it is not the model of "
                    "a GPT; get the file again."
                )
            accounted.dropped[key] = reason
            continue
        if name in accounted.parameters:
            raise UserError(f"{path} holds {name} twice, with and without `transformer.`.")
        accounted.parameters[name] = tensor
        if name != key:
            accounted.renamed[key] = name
    _tie_head(accounted, _EMBEDDINGS[config.architecture][EMBEDDING], path)
    return accounted


def _why_constant(name: str) -> str | None:
    return next((why for pattern, why in _CONSTANTS.items() if pattern.fullmatch(name)), None)


def _tie_head(accounted: Accounted, embedding_name: str, path: Path) -> None:
    """Leave one tensor of the token embedding and the language-model head, which are the same."""
    parameters = accounted.parameters
    lm_head = parameters.pop(_LM_HEAD, None)
    if lm_head is None:
        return
    key = next((k for k, name in accounted.renamed.items() if name == _LM_HEAD), _LM_HEAD)
    accounted.renamed.pop(key, None)
    if embedding_name not in parameters:
        # Of the two tied names, transformers 5 keeps this one for OpenAI GPT.
        parameters[embedding_name] = lm_head
        accounted.renamed[key] = embedding_name
        return
    embedding = parameters[embedding_name]
    same_kind = (embedding.shape, embedding.dtype) == (lm_head.shape, lm_head.dtype)
    if not (same_kind and torch.equal(embedding, lm_head)):
        raise UserError(
            f"{path}: {key} differs from the token embedding, but only models that tie the two "
            "are supported."
        )
    accounted.dropped[key] = "the token embedding once more, to which the head is tied"


def map_weights(
    parameters: Mapping[str, Tensor],
    config: TransformerConfig,
    shapes: Mapping[str, torch.Size],
    path: Path,
) -> dict[str, Tensor]:
    """A file's parameters under our names, in the dtype they are stored in.

    Args:
        parameters: what `account_for` kept.
        config: the model's, which names the layout.
        shapes: the shape of each of the model's parameters, by our names.
        path: the file, for messages.

    Returns:
        every parameter in `shapes`; for the weights of a plain language model, all but the
        multiple-choice head, which is logged as a warning.

    Raises:
        UserError: a tensor is unknown, missing or of another shape.
    """
    names = transformers_names(config)
    unknown = parameters.keys() - names.values()
    if unknown:
        raise UserError(
            f"{path} holds tensors that are unknown in transformers' layout of "
            f"{config.architecture}: {listing(unknown)}; check model_type in config.json, or load "
            "and save the model with a current transformers first."
        )
    missing = names.values() - parameters.keys()
    head = {names[name] for name in names if name.startswith("multiple_choice_head")}
    if missing == head:
        logger.warning(
            "%s has no multiple-choice head (it is a plain language model): "
            "the head is newly initialised and must be trained.",
            path,
        )
    elif missing:
        raise UserError(
            f"{path} lacks tensors of the model that config.json describes: {listing(missing)}; "
            "check n_layer in config.json, or get the complete file."
        )

    weights = {}
    for ours, theirs in names.items():
        if theirs not in parameters:
            continue
        tensor = parameters[theirs]
        stored = shapes[ours][::-1] if theirs.endswith(_CONV1D_WEIGHTS) else shapes[ours]
        if tensor.shape != stored:
            raise UserError(
                f"{path}: {theirs} has shape {tuple(tensor.shape)}, but config.json asks for "
                f"{tuple(stored)}; use the config.json that belongs to these weights."
            )
        if not tensor.is_floating_point():
            raise UserError(
                f"{path}: {theirs} holds {str(tensor.dtype).removeprefix('torch.')} numbers; "
                "only floating-point weights can be read."
            )
        weights[ours] = tensor.t() if theirs.endswith(_CONV1D_WEIGHTS) else tensor
    return weights


def to_transformers(weights: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """A model's parameters, given by our names, as transformers names and stores them."""
    return {
        theirs: weights[ours].t().contiguous()
        if theirs.endswith(_CONV1D_WEIGHTS)
        else weights[ours].contiguous()
        for ours, theirs in transformers_names(config).items()
    }


def listing(names: Iterable[str], limit: int = 8) -> str:
    """The first of `names` as a sentence lists them, and how many more there are."""
    names = [
        name if name.isprintable() and len(name) <= 80 else shown(name) for name in sorted(names)
    ]
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
