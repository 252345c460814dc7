"""The tensors of a checkpoint, each told to be a parameter, a constant, or unknown.

Parameters have three names: ours, transformers' of today, and in part those of the old libraries.
"""

from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from convai_fast.errors import UserError, shown
from convai_fast.model import families, legacy
from convai_fast.model.config import TransformerConfig
from convai_fast.model.families.family import LM_HEAD, split

EMBEDDING = "transformer.token_embedding.weight"
_MULTIPLE_CHOICE_HEAD = "multiple_choice_head"


class Accounted(NamedTuple):
    """What became of every tensor of a file."""

    parameters: dict[str, Tensor]  # by the names that transformers' classes use
    renamed: dict[str, str]  # the stored name -> that name, where they differ
    dropped: dict[str, str]  # the stored name -> why it is not needed


def account_for(tensors: Mapping[str, Tensor], config: TransformerConfig, path: Path) -> Accounted:
    """Tell a file's parameters, by today's names, from its constants and tied copies.

    Raises:
        UserError: a tensor is there twice, a constant is not the expected one, or a tied
            language-model head is not the token embedding.
    """
    family = families.of(config)
    names = family.tensor_names(config)
    known = {LM_HEAD, *chain(*names.values())}
    accounted = Accounted(parameters={}, renamed={}, dropped={})
    for key, tensor in tensors.items():
        name = legacy.current_name(key)
        # A body saved without heads (as `gpt2` on the hub) leaves out the prefix.
        prefixed = f"{family.prefix}.{name}"
        if prefixed in known or family.constant(prefixed):
            name = prefixed
        if constant := family.constant(name):
            reason, is_expected = constant
            if not is_expected(tensor):
                raise UserError(
                    f"{path}: {key} holds something else than {reason}, so it is not the model of "
                    f"{family.title}; get the file again."
                )
            accounted.dropped[key] = reason
            continue
        if name in accounted.parameters:
            raise UserError(f"{path} holds {name} twice, with and without `{family.prefix}.`.")
        accounted.parameters[name] = tensor
        if name != key:
            accounted.renamed[key] = name
    if config.tied:
        (embedding,) = names[EMBEDDING]
        _tie_head(accounted, embedding, path)
    return accounted


def _tie_head(accounted: Accounted, embedding_name: str, path: Path) -> None:
    """Leave one tensor of the token embedding and the language-model head, which are the same."""
    parameters = accounted.parameters
    lm_head = parameters.pop(LM_HEAD, None)
    if lm_head is None:
        return
    key = next((k for k, name in accounted.renamed.items() if name == LM_HEAD), LM_HEAD)
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
            f"{path}: {key} differs from the token embedding, but its config.json ties the two "
            "(tie_word_embeddings); use the one that belongs to these weights."
        )
    accounted.dropped[key] = "the token embedding once more, to which the head is tied"


def map_weights(
    parameters: Mapping[str, Tensor],
    config: TransformerConfig,
    shapes: Mapping[str, torch.Size],
    path: Path,
) -> dict[str, list[Tensor]]:
    """A file's parameters under our names, in the dtype they are stored in.

    Args:
        parameters: what `account_for` kept.
        config: the model's, which names the layout.
        shapes: the shape of each of the model's parameters, by our names.
        path: the file, for messages.

    Returns:
        the parts, as of `split`, of every parameter in `shapes`; for the weights of a plain
        language model, of all but the multiple-choice head, which is logged as a warning.

    Raises:
        UserError: a tensor is unknown, missing or of another shape.
    """
    family = families.of(config)
    names = family.tensor_names(config)
    unknown = parameters.keys() - set(chain(*names.values()))
    if unknown:
        raise UserError(
            f"{path} holds tensors that are unknown in transformers' layout of "
            f"{family.name}: {listing(unknown)}; check model_type in config.json, or load "
            "and save the model with a current transformers first."
        )
    missing = set(chain(*names.values())) - parameters.keys()
    if missing and missing != head_names(config):
        raise UserError(
            f"{path} lacks tensors of the model that config.json describes: {listing(missing)}; "
            "check the number of layers in config.json, or get the complete file."
        )

    weights = {}
    for ours, theirs in names.items():
        if missing.isdisjoint(theirs):
            places = split(torch.empty(shapes[ours], device="meta"), theirs, config)
            weights[ours] = [
                _checked(parameters[name], place.shape, name, config, path)
                for name, place in zip(theirs, places, strict=True)
            ]
    return weights


def _checked(
    tensor: Tensor, shape: torch.Size, name: str, config: TransformerConfig, path: Path
) -> Tensor:
    """The stored `tensor` as we have it, in our `shape`."""
    is_transposed = families.of(config).stores_transposed(name)
    stored = shape[::-1] if is_transposed else shape
    if tensor.shape != stored:
        raise UserError(
            f"{path}: {name} has shape {tuple(tensor.shape)}, but config.json asks for "
            f"{tuple(stored)}; use the config.json that belongs to these weights."
        )
    if not tensor.is_floating_point():
        raise UserError(
            f"{path}: {name} holds {str(tensor.dtype).removeprefix('torch.')} numbers; "
            "only floating-point weights can be read."
        )
    return tensor.t() if is_transposed else tensor


def head_names(config: TransformerConfig) -> set[str]:
    """How transformers' layout calls the tensors of the multiple-choice head."""
    names = families.of(config).tensor_names(config)
    return {*chain(*(there for ours, there in names.items() if is_head(ours)))}


def is_head(name: str) -> bool:
    """Whether it is our name of a parameter of the multiple-choice head."""
    return name.startswith(_MULTIPLE_CHOICE_HEAD)


def to_transformers(weights: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """A model's parameters, given by our names, as transformers names and stores them."""
    family = families.of(config)
    return {
        name: (part.t() if family.stores_transposed(name) else part).contiguous()
        for ours, theirs in family.tensor_names(config).items()
        for name, part in zip(theirs, split(weights[ours], theirs, config), strict=True)
    }


def listing(names: Iterable[str], limit: int = 8) -> str:
    """The first of `names` as a sentence lists them, and how many more there are."""
    names = [
        name if name.isprintable() and len(name) <= 80 else shown(name) for name in sorted(names)
    ]
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
