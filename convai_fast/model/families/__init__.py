"""The families of models, a file each, and how a model's is found."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from convai_fast.errors import UserError, shown
from convai_fast.model.config import TransformerConfig
from convai_fast.model.families.family import Family
from convai_fast.model.families.gpt import GPT
from convai_fast.model.families.gpt2 import GPT2
from convai_fast.model.families.llama import Llama, Mistral
from convai_fast.model.families.qwen import Qwen2, Qwen3

FAMILIES: dict[str, Family] = {
    family.name: family for family in (GPT(), GPT2(), Llama(), Mistral(), Qwen2(), Qwen3())
}


def of(config: TransformerConfig) -> Family:
    """The family that made `config`."""
    return FAMILIES[config.family]


def find(config: Mapping[str, Any], tensor_names: Collection[str] = ()) -> Family:
    """The family of a model with this content of `config.json`.

    A config older than `model_type` names a class in `architectures`, or is known by a setting that
    only one family has, or else by the names of its weights' tensors.

    Raises:
        UserError: it is none of those here, or nothing tells which.
    """
    model_type = config.get("model_type")
    if model_type is not None:
        if model_type not in list(FAMILIES):  # which may be no string
            raise UserError(
                f"model_type {shown(model_type)} is not supported; "
                f"use one of {', '.join(FAMILIES)}."
            )
        return FAMILIES[model_type]
    classes = config.get("architectures")
    if classes:
        first = classes[0] if isinstance(classes, list) else classes
        for family in FAMILIES.values():
            # Llama4ForCausalLM is no class of Llama.
            own = family.config_class.removesuffix("Config")
            if re.match(f"{own}(Model|LMHead|DoubleHeads|For)", str(first)):
                return family
        raise UserError(
            f"architectures {shown(classes)} is not supported; "
            f"only the classes of {', '.join(f.title for f in FAMILIES.values())} are."
        )
    for family in FAMILIES.values():
        if family.recognises(config, tensor_names):
            return family
    raise UserError(f"model_type is missing; set it to one of {', '.join(FAMILIES)}.")
