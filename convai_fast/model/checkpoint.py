"""Reading and writing a model folder in transformers' layout, without executing anything in it.

A folder holds `config.json`, the weights (`model.safetensors`, `pytorch_model.bin`, or either in
shards with an index) and usually the tokenizer's files, which are not read here.
"""

import json
import re
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from convai_fast.errors import UserError, shown
from convai_fast.files import read_json, scratch_folder
from convai_fast.hub import download
from convai_fast.model import generation_config, legacy
from convai_fast.model.config import TransformerConfig
from convai_fast.model.tensors import EMBEDDING, listing, to_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# In the order in which they are looked for.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# What the predecessor's run saved after each epoch, and renamed when it ended.
_UNFINISHED = re.compile(r"checkpoint_mymodel_(\d+)\.pth?")

# In the metadata of a safetensors file: transformers reads over it there, and does not write it
# again beside weights that it has trained, as it would in config.json.
_NEW_HEAD = {"multiple_choice_head": "new"}

# Floating-point weights, and what constants beside them are stored as.
_DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
)

# Of the tokenizer, too: whoever wants the weights wants it next.
_TEXT_FILES = (
    "config.json",
    generation_config.FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    "special_tokens.txt",
    "vocab.json",
    "merges.txt",
    "trained_with.json",
)


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
    wanted = (
        [*_TEXT_FILES, "model.safetensors", "model-*-of-*.safetensors", WEIGHT_FILES[1]],
        ["pytorch_model.bin", "pytorch_model-*-of-*.bin", WEIGHT_FILES[3]],
    )
    folder = download(repo_id, wanted[0], "model")
    if not any((folder / name).exists() for name in WEIGHT_FILES):
        folder = download(repo_id, wanted[1], "model")
    return folder


def read_config_file(folder: Path) -> dict[str, Any]:
    """The content of the folder's `config.json`, as it is.

    Raises:
        UserError: it is missing, or holds no JSON object.
    """
    return read_json(folder / "config.json")


def read_config(folder: Path, tensor_names: Collection[str] = ()) -> TransformerConfig:
    """The model's shape, from the folder's `config.json`.

    Args:
        folder: a model folder.
        tensor_names: those of its weights, which tell the family where an old config does not.

    Raises:
        UserError: it is missing, not JSON, or describes a model that is not supported.
    """
    content = read_config_file(folder)
    try:
        config = TransformerConfig.from_transformers(legacy.current_config(content, tensor_names))
        if tensor_names and config.n_layer > len(tensor_names):
            raise UserError(
                f"{config.n_layer} layers are more than the {len(tensor_names)} tensors of the "
                "weights can make; use the config.json that belongs to these weights."
            )
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    return config


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """All tensors of the folder's weights as they are stored, and the file that was read.

    Raises:
        UserError: there is no such file, or one that is damaged or holds more than tensors.
    """
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if path is None:
        raise UserError(f"{folder} holds no weights; {_why_no_weights(folder)}.")
    if path.suffix != ".json":
        return _read_file(path), path

    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{path} has no weight_map; it is not the index of a sharded checkpoint.")
    tensors: dict[str, Tensor] = {}
    present = {file.name for file in folder.iterdir()}
    for shard in sorted(set(map(str, weight_map.values()))):
        if Path(shard).name != shard:
            raise UserError(
                f"{path}: weight_map names {listing([shard])}, which is not in the same folder."
            )
        if shard not in present:
            raise UserError(
                f"{folder} lacks {listing([shard])}, which {path.name} names; get that file."
            )
        tensors |= _read_file(folder / shard)
    return tensors, path


def _why_no_weights(folder: Path) -> str:
    unfinished = {
        int(match[1]): match[0]
        for match in (_UNFINISHED.fullmatch(file.name) for file in folder.iterdir())
        if match
    }
    if unfinished:
        return (
            f"rename its {unfinished[max(unfinished)]}, of a run that the predecessor did not "
            "finish, to pytorch_model.bin"
        )
    if (folder / "adapter_model.safetensors").exists():
        return "its adapter_model.safetensors needs the adapter_config.json that was saved with it"
    return (
        f"it needs one of {', '.join(WEIGHT_FILES)} (`convai-fast train --from_scratch` begins "
        "without any)"
    )


def write_config(
    folder: Path,
    config: TransformerConfig,
    dtype: torch.dtype,
    tokenizer: "PreTrainedTokenizerFast | None" = None,
) -> None:
    """Write `config.json` of a model stored as `dtype`, with the tokenizer's bos, eos and pad."""
    content = config.to_transformers()
    content["dtype"] = str(dtype).removeprefix("torch.")
    if tokenizer is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            content[name] = getattr(tokenizer, name)
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def save_tensors(tensors: dict[str, Tensor], path: Path, *, head_is_new: bool) -> None:
    """Write a safetensors file, as readable for others as any file that is written here."""
    metadata = {"format": "pt", **(_NEW_HEAD if head_is_new else {})}
    path.touch()
    mode = path.stat().st_mode  # safetensors leaves its files to their owner alone
    save_file(tensors, path, metadata)
    path.chmod(mode)


def has_new_head(path: Path) -> bool:
    """Whether a file of weights says that nobody has trained the multiple-choice head in it yet.

    Files of others, and of earlier versions, say nothing.
    """
    if path.suffix != ".safetensors":
        return False
    with _readable(path), safe_open(path, framework="pt") as file:
        return _NEW_HEAD.items() <= (file.metadata() or {}).items()


def write_folder(
    folder: str | Path,
    config: TransformerConfig,
    weights: Mapping[str, Tensor],
    tokenizer: "PreTrainedTokenizerFast | None" = None,
    *,
    generation: Mapping[str, Any],
    head_is_new: bool,
) -> None:
    """Write a model and its tokenizer's files for transformers to load.

    Each file is written beside the folder's own and then renamed, so that a reader finds the old
    one or the new one, never a part.

    Args:
        folder: made where missing.
        config: the model's.
        weights: its parameters by our names.
        tokenizer: saved along; its bos, eos and pad ids go into `config.json`, and into
            `generation_config.json` with all that ends a reply.
        generation: what `generation_config.json` says besides.
        head_is_new: what `has_new_head` says of the file.

    Raises:
        UserError: the tokenizer has more tokens than the model, or the folder cannot be written.
    """
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens but the model only "
            f"{config.vocab_size}; call resize_token_embeddings({len(tokenizer)}) first."
        )
    folder = Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with scratch_folder(folder, ".saving-") as staging:
            tensors = to_transformers(weights, config)
            save_tensors(tensors, staging / "model.safetensors", head_is_new=head_is_new)
            write_config(staging, config, weights[EMBEDDING].dtype, tokenizer)
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)
                generation = generation_config.completed(generation, config, tokenizer)
            if generation:
                text = json.dumps(dict(generation), indent=2) + "\n"
                (staging / generation_config.FILE).write_text(text)
            else:  # that of another model, which was saved here before
                (folder / generation_config.FILE).unlink(missing_ok=True)
            for file in sorted(staging.iterdir()):
                file.replace(folder / file.name)
    except Exception as error:
        # The tokenizers library makes the operating system's errors plain exceptions.
        is_ours = isinstance(error, OSError | SafetensorError | UnicodeError)
        if not is_ours and type(error) is not Exception:
            raise
        raise UserError(f"the model cannot be saved in {folder}: {error}") from error


def _read_file(path: Path) -> dict[str, Tensor]:
    with _readable(path):
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # torch.save never compresses; what is compressed may grow a thousandfold.
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("compressed")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on pickles, which nobody here can follow
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()
    ):
        raise UserError(f"{path} is not a table of named tensors; {_how_to_unpack(path, tensors)}")
    if tensors and all(name.startswith("module.") for name in tensors):
        raise UserError(
            f"{path} holds tensors with the prefix `module.` of DataParallel; save "
            "model.module.state_dict(), or take it off: "
            + _rewriting(path, '{k.removeprefix("module."): v for k, v in t.items()}')
        )
    odd = [name for name, tensor in tensors.items() if not _is_ordinary(tensor)]
    if odd:
        raise UserError(
            f"{path} holds tensors that are sparse, nested, of unusual numbers or without numbers "
            f"of their own: {listing(odd)}; save the model's state_dict as dense float32 tensors."
        )
    return tensors


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    # A damaged pickle can raise nearly anything.
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as weights: it is damaged, incomplete or holds more than "
            "tensors (nothing in it was executed); get it again, or as model.safetensors."
        ) from error


def _how_to_unpack(path: Path, content: Any) -> str:
    """What to do with a file that holds more than a state dict, or something else."""
    tables = [
        key
        for key, value in (content.items() if isinstance(content, dict) else ())
        if isinstance(value, dict) and any(isinstance(part, Tensor) for part in value.values())
    ]
    key = next((k for k in tables if re.search("model|state_dict", str(k))), None)
    if key is None:
        return "save the model's state_dict"
    expression = f"t[{json.dumps(key)}]"
    return f"its {shown(key)} holds one, so keep that alone: {_rewriting(path, expression)}"


def _rewriting(path: Path, expression: str) -> str:
    """The command that saves `expression` in place of the table `t` that `path` holds."""
    return (
        f"""python -c 'import torch; t = torch.load("{path}", map_location="cpu"); """
        f"""torch.save({expression}, "{path}")'"""
    )


def _is_ordinary(tensor: Tensor) -> bool:
    """Dense, in memory, and with a number of its own for every element: no small file grows."""
    return (
        not tensor.is_nested
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and tensor.dtype in _DTYPES
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )
