"""A LoRA adapter as peft stores it, read without peft and merged into its base model.

adapter_config.json         the base model, r, alpha
adapter_model.safetensors   under transformers' names: `lora_A` and `lora_B` of every linear layer,
                            the multiple-choice head, and the embedding's rows of special tokens
config.json                 the shape of the merged model

The base model is the one that adapter_config.json names. If that was a checkpoint of another run,
which removes it when it goes on, the adapter's run keeps it in `base`, beside `checkpoints`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from convai_fast.archive import unpacked
from convai_fast.errors import UserError
from convai_fast.files import read_json
from convai_fast.model import families
from convai_fast.model.checkpoint import find_folder
from convai_fast.model.config import TransformerConfig
from convai_fast.model.tensors import EMBEDDING

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEPT_BASE = "base"
_HEAD = "multiple_choice_head"


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds an adapter instead of a model's own weights."""
    return (folder / CONFIG_FILE).is_file()


@contextmanager
def base_of(folder: Path) -> Iterator[Path]:
    """The folder of the model that the adapter in `folder` changes, for as long as in the context.

    Raises UserError when adapter_config.json names none, one that is not there, or an adapter.
    """
    path = folder / CONFIG_FILE
    named = read_settings(folder).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise UserError(f"{path} names no base_model_name_or_path: add it")
    places = [Path(named).expanduser(), folder / named]
    checkpoints = folder.resolve().parent
    if Path(named).name == KEPT_BASE and checkpoints.name == "checkpoints":
        # By its place, since the run may have been moved.
        places.insert(0, checkpoints.parent / KEPT_BASE)
    with unpacked(next((place for place in places if place.exists()), named)) as source:
        try:
            base = find_folder(source.path)
        except UserError as error:
            raise UserError(
                f"{folder} is a LoRA adapter, whose base model cannot be found "
                f"({str(error).rstrip('.')}): put it back, or write where it is into {path} as "
                "base_model_name_or_path"
            ) from error
        if is_adapter(base):
            raise UserError(
                f"{folder} is a LoRA adapter, and so is {named}, its base model: merge that into a "
                "model with `convai-fast convert`, and write the model into "
                f"{path} as base_model_name_or_path"
            )
        yield base


def tensor_names(config: TransformerConfig) -> dict[str, list[str]]:
    """Our name of a parameter that an adapter changes -> the names of its tensors in the file.

    `[lora_A, lora_B]` for a linear layer's weight, `[rows]` for the embedding, and the tensor
    itself for the multiple-choice head.
    """
    family, names = families.of(config), {}
    for ours, theirs in family.tensor_names(config).items():
        name = f"base_model.model.{theirs}"
        stem = name.removesuffix(".weight")
        if family.is_linear(theirs):
            names[ours] = [f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"]
        elif ours.startswith(_HEAD):
            names[ours] = [name]
        elif ours == EMBEDDING:
            names[ours] = [f"{stem}.token_adapter.trainable_tokens_delta"]
    return names


@torch.no_grad()
def merge_adapter(folder: Path, config: TransformerConfig, parameters: dict[str, Tensor]) -> None:
    """Change `parameters`, by our names, as the adapter in `folder` says.

    A linear layer's weight [out, in] gains `alpha / r · B A`; the head and the rows are replaced.

    Raises UserError when the adapter is damaged or does not fit the model.
    """
    settings, path = read_settings(folder), folder / WEIGHTS_FILE
    for key in ("use_rslora", "rank_pattern", "alpha_pattern"):
        if settings.get(key):
            raise UserError(
                f"{folder / CONFIG_FILE} sets {key}, which is unknown here: merge that adapter "
                f"with peft, and load the merged model"
            )
    try:
        tensors = load_file(path)
        rows = next(iter(settings["trainable_token_indices"].values()))
        scale = settings["lora_alpha"] / settings["r"]
        for ours, names in tensor_names(config).items():
            parameter, values = parameters[ours], [tensors.pop(name) for name in names]
            if len(values) == 2:
                lora_a, lora_b = values
                parameter += scale * (lora_b @ lora_a)
            elif ours.startswith(_HEAD):
                parameter.copy_(values[0])
            else:
                parameter[rows] = values[0]
    # A missing file, a damaged one, a missing name, another shape.
    except Exception as error:
        raise UserError(
            f"the adapter in {folder} cannot be applied ({type(error).__name__}: {error}): it is "
            "damaged, or was not written by convai-fast train"
        ) from error
    if tensors:
        raise UserError(f"{path} holds tensors that are unknown here, such as {min(tensors)}")


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of the adapter's `adapter_config.json`; raises UserError if it is damaged."""
    return read_json(folder / CONFIG_FILE)
