"""A LoRA adapter as peft stores it, read without peft and merged into its base model.

adapter_config.json         the base model, r, alpha
adapter_model.safetensors   under transformers' names: `lora_A` and `lora_B` of every linear layer,
                            the multiple-choice head, and the embedding's rows of special tokens
                            (and those of a language-model head of its own)
config.json                 the shape of the merged model

An adapter that peft wrote may change less, and has no config.json: the shape is the base model's.

The base model is the one that adapter_config.json names. If that was a checkpoint of another run,
which removes it when it goes on, the adapter's run keeps it in `base`, beside `checkpoints`.
"""

from collections.abc import Iterator, Mapping
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
from convai_fast.model.checkpoint import find_folder, read_config
from convai_fast.model.config import TransformerConfig
from convai_fast.model.families.family import split

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEPT_BASE = "base"
PREFIX = "base_model.model."  # of every tensor
LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"
ROWS = "token_adapter.trainable_tokens_delta"  # of an embedding or a language-model head


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


def config_of(folder: Path, base: TransformerConfig) -> TransformerConfig:
    """The shape of the model that the adapter in `folder` makes of one of the shape `base`."""
    is_ours = (folder / "config.json").is_file()
    return read_config(folder) if is_ours else base


def file_name(name: str, kind: str = "") -> str:
    """How peft calls what changes the parameter that transformers calls `name`.

    `kind` is `LORA_A` or `LORA_B` of a linear layer, `ROWS`, or nothing for what stands for it.
    """
    whole = f"{PREFIX}{name}"
    return f"{whole.removesuffix('.weight')}.{kind}" if kind else whole


@torch.no_grad()
def merge_adapter(
    folder: Path, config: TransformerConfig, parameters: dict[str, Tensor]
) -> set[str]:
    """Change `parameters`, by our names, as the adapter in `folder` says; the names of these.

    A linear layer's weight [out, in] gains `alpha / r · B A`; rows and whole tensors are replaced.

    Raises UserError when the adapter is damaged or does not fit the model.
    """
    settings, path = read_settings(folder), folder / WEIGHTS_FILE
    for key in ("use_rslora", "rank_pattern", "alpha_pattern"):
        if settings.get(key):
            raise UserError(
                f"{folder / CONFIG_FILE} sets {key}, which is unknown here: merge that adapter "
                f"with peft, and load the merged model"
            )
    changed = set()
    try:
        tensors = load_file(path)
        scale = settings["lora_alpha"] / settings["r"]
        for ours, names in families.of(config).tensor_names(config).items():
            for name, part in zip(names, split(parameters[ours], names, config), strict=True):
                if _change(part, name, tensors, scale, trained_rows(settings, name)):
                    changed.add(ours)
    # A missing file, a damaged one, a missing name, another shape.
    except Exception as error:
        raise UserError(
            f"the adapter in {folder} cannot be applied ({type(error).__name__}: {error}): it is "
            "damaged, or of another model"
        ) from error
    if tensors:
        raise UserError(f"{path} holds tensors that are unknown here, such as {min(tensors)}")
    return changed


def _change(
    parameter: Tensor, name: str, tensors: dict[str, Tensor], scale: float, rows: list[int]
) -> bool:
    """Change the parameter of this `name` by what `tensors` have of it, which is taken out."""
    before = len(tensors)
    if (lora_a := tensors.pop(file_name(name, LORA_A), None)) is not None:
        lora_b = tensors.pop(file_name(name, LORA_B))
        parameter += scale * (lora_b.float() @ lora_a.float())
    if (whole := tensors.pop(file_name(name), None)) is not None:
        parameter.copy_(whole)
    if (trained := tensors.pop(file_name(name, ROWS), None)) is not None:
        parameter[rows] = trained.float()
    return len(tensors) < before


def trained_rows(settings: Mapping[str, Any], name: str) -> list[int]:
    """Which rows an adapter gives of what transformers calls `name`."""
    rows = settings.get("trainable_token_indices") or {}
    return rows.get(name.split(".")[-2], []) if isinstance(rows, dict) else rows


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of the adapter's `adapter_config.json`; raises UserError if it is damaged."""
    return read_json(folder / CONFIG_FILE)
