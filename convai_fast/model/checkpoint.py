"""Reading and writing a model folder in transformers' layout, without executing anything in it.

A folder holds `config.json`, the weights (`model.safetensors`, `pytorch_model.bin`, or either in
shards with an index) and usually the tokenizer's files, which are not read here.
"""

import json
import logging
import re
import tempfile
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from convai_fast.errors import UserError, reason_of
from convai_fast.model import legacy
from convai_fast.model.config import TransformerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# In the order in which they are looked for.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# Floating-point weights, and what constants beside them are stored as.
_DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
)

# Of the tokenizer, too: whoever wants the weights wants it next.
_TEXT_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "special_tokens.txt",
    "vocab.json",
    "merges.txt",
)

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
_EMBEDDING = "transformer.token_embedding.weight"
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


def find_folder(path: str | Path) -> Path:
    """The folder itself, or the local copy of a Hugging Face hub id's files, downloaded if needed.

    Raises:
        UserError: there is no such folder, nor a model of that id that can be downloaded.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(
            f"{path} is neither a folder nor an archive; give the folder that holds config.json "
            "and weights."
        )
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(path)):
        raise UserError(f"there is no folder {path}.")
    return _download(str(path))


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = (
        [*_TEXT_FILES, "model.safetensors", "model-*-of-*.safetensors", WEIGHT_FILES[1]],
        ["pytorch_model.bin", "pytorch_model-*-of-*.bin", WEIGHT_FILES[3]],
    )
    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=wanted[0]))
        if not any((folder / name).exists() for name in WEIGHT_FILES):
            folder = Path(snapshot_download(repo_id, allow_patterns=wanted[1]))
    # The client's errors, its HTTP library's and the operating system's have no common base.
    except Exception as error:
        raise UserError(
            f"there is no folder {repo_id}, and the Hugging Face hub gave no model of that name "
            f"({reason_of(error)}); check the name or the network, or give a folder."
        ) from error
    return folder


def read_config_file(folder: Path) -> dict[str, Any]:
    """The content of the folder's `config.json`, as it is.

    Raises:
        UserError: it is missing, or holds no JSON object.
    """
    return _read_json(folder / "config.json")


def read_config(folder: Path, tensor_names: Collection[str] = ()) -> TransformerConfig:
    """The model's shape, from the folder's `config.json`.

    Args:
        folder: a model folder.
        tensor_names: those of its weights, which tell GPT from GPT-2 where an old config does not.

    Raises:
        UserError: it is missing, not JSON, or describes a model that is not supported.
    """
    content = read_config_file(folder)
    try:
        config = TransformerConfig.from_transformers(legacy.current_config(content, tensor_names))
        if tensor_names and config.n_layer > len(tensor_names):
            raise UserError(
                f"n_layer {config.n_layer} is more than the {len(tensor_names)} tensors of the "
                "weights can make; use the config.json that belongs to these weights."
            )
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    return config


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
            f"{config.architecture}: {_listing(unknown)}; check model_type in config.json, or load "
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
            f"{path} lacks tensors of the model that config.json describes: {_listing(missing)}; "
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
    _tie_head(accounted, _EMBEDDINGS[config.architecture][_EMBEDDING], path)
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


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """All tensors of the folder's weights as they are stored, and the file that was read.

    Raises:
        UserError: there is no such file, or one that is damaged or holds more than tensors.
    """
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if path is None:
        raise UserError(
            f"{folder} holds no weights; it needs one of {', '.join(WEIGHT_FILES)} (rename the "
            "checkpoint_mymodel_N.pth of a run that the predecessor did not finish to "
            "pytorch_model.bin; `convai-fast train --from_scratch` begins without any)."
        )
    if path.suffix != ".json":
        return _read_file(path), path

    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{path} has no weight_map; it is not the index of a sharded checkpoint.")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if Path(shard).name != shard:
            raise UserError(f"{path}: weight_map names {shard}, which is not in the same folder.")
        if not (folder / shard).exists():
            raise UserError(f"{folder} lacks {shard}, which {path.name} names; get that file.")
        tensors |= _read_file(folder / shard)
    return tensors, path


def write_config(
    folder: Path,
    config: TransformerConfig,
    dtype: torch.dtype,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> None:
    """Write `config.json` of a model stored as `dtype`, with the tokenizer's bos, eos and pad."""
    content = config.to_transformers()
    content["dtype"] = str(dtype).removeprefix("torch.")
    if tokenizer is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            content[name] = getattr(tokenizer, name)
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file, as readable for others as any file that is written here."""
    path.touch()
    mode = path.stat().st_mode  # safetensors leaves its files to their owner alone
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def write_folder(
    folder: str | Path,
    config: TransformerConfig,
    weights: Mapping[str, Tensor],
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> None:
    """Write `model.safetensors`, `config.json` and the tokenizer's files for transformers to load.

    Each file is written beside the folder's own and then renamed, so that a reader finds the old
    one or the new one, never a part.

    Args:
        folder: made where missing.
        config: the model's.
        weights: its parameters by our names.
        tokenizer: saved along; its bos, eos and pad ids go into `config.json`.

    Raises:
        UserError: the tokenizer has more tokens than the model, or the folder cannot be written.
    """
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens but the model only "
            f"{config.vocab_size}; call resize_token_embeddings({len(tokenizer)}) first."
        )
    tensors = {
        theirs: weights[ours].t().contiguous()
        if theirs.endswith(_CONV1D_WEIGHTS)
        else weights[ours].contiguous()
        for ours, theirs in transformers_names(config).items()
    }
    folder = Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as name:
            staging = Path(name)
            save_tensors(tensors, staging / "model.safetensors")
            write_config(staging, config, weights[_EMBEDDING].dtype, tokenizer)
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)
            for file in sorted(staging.iterdir()):
                file.replace(folder / file.name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the model cannot be saved in {folder}: {error}") from error


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on pickles, which nobody here can follow
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged pickle can raise nearly anything.
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as weights: it is damaged, incomplete or holds more than "
            "tensors (nothing in it was executed); get it again, or as model.safetensors."
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()
    ):
        raise UserError(f"{path} is not a table of named tensors; save the model's state_dict.")
    odd = [name for name, tensor in tensors.items() if not _is_ordinary(tensor)]
    if odd:
        raise UserError(
            f"{path} holds tensors that are sparse, nested, of unusual numbers or without numbers "
            f"of their own: {_listing(odd)}; save the model's state_dict as dense float32 tensors."
        )
    return tensors


def _is_ordinary(tensor: Tensor) -> bool:
    """Dense, in memory, and with a number of its own for every element: no small file grows."""
    return (
        not tensor.is_nested
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and tensor.dtype in _DTYPES
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    # A file of nothing but brackets is too deep for the parser.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def _listing(names: Iterable[str], limit: int = 8) -> str:
    names = [name if name.isprintable() else repr(name) for name in sorted(names)]
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
