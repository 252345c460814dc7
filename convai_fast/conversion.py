"""An old checkpoint, or a LoRA adapter, as an ordinary model of today; and what any model is."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from convai_fast.archive import unpacked
from convai_fast.data.trained_with import TrainedWith
from convai_fast.dialogue.encoding import encode
from convai_fast.dialogue.format import SPECIAL_TOKENS
from convai_fast.dialogue.sequence import build_input_from_segments
from convai_fast.dialogue.tokenizer import read_tokenizer, special_ids
from convai_fast.errors import UserError, reason_of
from convai_fast.files import check_is_free, new_folder
from convai_fast.loading import check_fit, layout_for, rows_of_tokens
from convai_fast.model import adapter, checkpoint, families, legacy
from convai_fast.model.config import TransformerConfig
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.model.families.family import LM_HEAD
from convai_fast.model.tensors import EMBEDDING, Accounted, account_for, head_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Largest difference of logits that rounding explains, relative to the largest logit.
_TOLERANCE = 1e-4


@dataclass
class _Source:
    """A checkpoint as it was found."""

    settings: dict[str, Any]  # the content of config.json
    file: Path  # of weights, or the index of its shards
    layout: str
    config: TransformerConfig
    accounted: Accounted
    tokenizer: PreTrainedTokenizerFast
    has_special_tokens: bool
    has_multiple_choice_head: bool
    adapter: "_Adapter | None"


@dataclass
class _Adapter:
    """A LoRA adapter as it was found; what is said of its source is said of the base model."""

    settings: dict[str, Any]  # the content of adapter_config.json
    tensors: dict[str, Tensor]  # by their names without `adapter.PREFIX`


def convert(old: str, new: str) -> list[tuple[str, str]]:
    """Write the model `old` into the folder `new`, which appears complete or not at all.

    Returns lines of what was found and what became of it, each with what it is about.

    Raises:
        UserError: it cannot be read or written, or computes something else than it did.
    """
    place = Path(new).expanduser()
    try:
        check_is_free(place)
    except OSError as error:
        raise UserError(f"{new} cannot be read: {error.strerror}.") from error
    with unpacked(old) as unpacked_old:
        folder = checkpoint.find_folder(unpacked_old.path)
        torch.manual_seed(0)  # a multiple-choice head that has to be added
        model, source = _open(folder)
    trained = TrainedWith.read(old)
    try:
        with new_folder(place, ".converting-") as staging:
            model.save_pretrained(staging, source.tokenizer)
            if trained is not None:
                trained.write(staging)
            difference = _check(staging, source)
    except OSError as error:
        raise UserError(f"{new} cannot be written: {error.strerror}.") from error
    return [
        *_report(source, unpacked_old.ignored),
        ("checked", f"logits differ from those of the source by {difference:.1e} at most"),
        ("written", new),
    ]


def describe(path: str) -> list[tuple[str, str]]:
    """What the model at `path` is, in lines, each with what it is about.

    Raises UserError for one that `load` refuses, but that it may lack the special tokens, which
    `train` adds.
    """
    with unpacked(path) as unpacked_path:
        model, source = _open(checkpoint.find_folder(unpacked_path.path), torch.bfloat16)
    config, tokenizer = source.config, source.tokenizer
    count = sum(p.numel() for p in model.parameters())
    stored = {str(t.dtype).removeprefix("torch.") for t in source.accounted.parameters.values()}
    dialogues = f"between {' '.join(SPECIAL_TOKENS)}"
    if reads_chat := families.of(config).reads_chat(tokenizer):
        dialogues = "as the tokenizer's chat template writes them"
    elif not source.has_special_tokens:
        dialogues += ", of which `train` adds those that the tokenizer lacks"
    if reads_chat or source.has_special_tokens:
        layout_for(tokenizer, config)  # which refuses some
    heads = f"{config.n_head} heads"
    if config.n_kv_head < config.n_head:
        heads += f" ({config.n_kv_head} of keys and values)"
    rows = [
        (
            "model",
            f"{config.family}, {config.n_layer} layers of width {config.n_embd}, {heads}, "
            f"{config.n_positions:,} positions, {len(tokenizer):,} tokens",
        ),
        ("parameters", f"{count:,}, stored as {', '.join(sorted(stored))} in {source.file.name}"),
        ("dialogues", dialogues),
        ("segments", "read with each token" if config.segments else "not read"),
        (
            "language model",
            "head " + ("shared with the embedding" if config.tied else "of its own"),
        ),
        (
            "multiple choice",
            "head " + ("untrained: ranks nothing" if model.head_is_new else "trained"),
        ),
    ]
    if source.adapter:
        rows.insert(1, ("adapter", _adapter_line(source.adapter)))
    return rows


def _adapter_line(found: _Adapter) -> str:
    return f"of rank {found.settings['r']} into {found.settings['base_model_name_or_path']}"


def _open(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[DoubleHeadsModel, _Source]:
    """The model in `folder`, with a row for each token, and what it was found as."""
    model, _ = DoubleHeadsModel.from_folder(folder, dtype)
    source = _read(folder)
    model.resize_token_embeddings(source.config.vocab_size)
    return model, source


def _read(folder: Path) -> _Source:
    """Read everything but the weights' values, and compare what belongs together."""
    is_adapter = adapter.is_adapter(folder)
    with adapter.base_of(folder) if is_adapter else nullcontext(folder) as base:
        tensors, file = checkpoint.read_tensors(base)
        settings = checkpoint.read_config_file(base)
        config = checkpoint.read_config(base, tensors)
        accounted = account_for(tensors, config, file)
    found, names = None, set(accounted.parameters)
    if is_adapter:
        config = adapter.config_of(folder, config)  # which has a row for every special token
        adapted = load_file(folder / adapter.WEIGHTS_FILE)
        found = _Adapter(
            adapter.read_settings(folder),
            {name.removeprefix(adapter.PREFIX): tensor for name, tensor in adapted.items()},
        )
        names |= found.tensors.keys()
    tokenizer = read_tokenizer(folder)
    config = dataclasses.replace(config, vocab_size=rows_of_tokens(config, tokenizer))
    check_fit(tokenizer, config, folder, needs_special_tokens=False)
    has_special_tokens = set(SPECIAL_TOKENS) <= tokenizer.get_vocab().keys()
    return _Source(
        settings=settings,
        file=file,
        layout=legacy.describe_layout(settings, tensors),
        config=config,
        accounted=accounted,
        tokenizer=tokenizer,
        has_special_tokens=has_special_tokens,
        has_multiple_choice_head=head_names(config) <= names,
        adapter=found,
    )


@torch.inference_mode()
def _check(folder: Path, source: _Source) -> float:
    """The largest difference of logits between the model in `folder` and the source's tensors.

    These are computed with by transformers' own class, in which they keep their names and layout.

    Raises UserError when it is more than rounding, or the tokenizers differ.
    """
    tokenizer = read_tokenizer(folder)
    text = "Hello there , i'm fine . How are you ? <eos>"
    if tokenizer.get_vocab() != source.tokenizer.get_vocab() or (
        encode(tokenizer, [text]) != encode(source.tokenizer, [text])
    ):
        raise UserError(
            "the converted tokenizer has other ids than the source's, so nothing was written: its "
            "files are damaged, or of a kind that is not supported."
        )
    inputs = _batch(tokenizer if source.has_special_tokens else None, source.config)
    ours = DoubleHeadsModel.from_pretrained(folder)(**inputs)
    theirs = _peer(source)(**inputs)
    pairs = [(ours.logits, theirs.logits)]
    if source.has_multiple_choice_head:
        pairs.append((ours.mc_logits, theirs.mc_logits))
    differences = [(ours - theirs).abs().max().item() for ours, theirs in pairs]
    for difference, (_, logits) in zip(differences, pairs, strict=True):
        # Written so that a difference that is no number counts.
        if not difference <= _TOLERANCE * logits.abs().max().item():
            raise UserError(
                f"the converted model's logits differ by {difference:.1e} from those of the source "
                "in transformers, so nothing was written: weights that are no numbers, or a model "
                "that is not supported."
            )
    return max(differences)


def _batch(
    tokenizer: PreTrainedTokenizerFast | None, config: TransformerConfig
) -> dict[str, Tensor]:
    """Two candidates of an example, of tokens from the whole vocabulary; plain ids without one."""
    tokens = torch.linspace(0, config.vocab_size - 1, 24).long().tolist()
    length = min(config.n_positions, 24)
    if tokenizer is None:
        input_ids = torch.tensor([tokens[:length], tokens[::-1][:length]])
        return {"input_ids": input_ids[None], "mc_token_ids": torch.tensor([[length - 1, 0]])}
    persona, history = [tokens[:5]], [tokens[5:10], tokens[10:13]]
    candidates = [
        build_input_from_segments(persona, history, reply, tokenizer)
        for reply in (tokens[13:20], tokens[20:])
    ]
    length = min(config.n_positions, max(len(c["input_ids"]) for c in candidates))
    pad = special_ids(tokenizer).pad

    def padded(name: Literal["input_ids", "token_type_ids"]) -> Tensor:
        rows = [(c[name] + [pad] * length)[:length] for c in candidates]
        return torch.tensor([rows])

    return {
        "input_ids": padded("input_ids"),
        "token_type_ids": padded("token_type_ids"),
        "mc_token_ids": torch.tensor([[min(c["mc_token_ids"], length - 1) for c in candidates]]),
    }


def _peer(source: _Source) -> "PreTrainedModel":
    """transformers' double-heads model with the source's settings and tensors."""
    family = families.of(source.config)
    names = family.tensor_names(source.config)
    settings = source.config.to_transformers()
    settings |= {k: v for k, v in source.settings.items() if k in settings and v is not None}
    settings |= {"vocab_size": source.config.vocab_size}
    parameters = dict(source.accounted.parameters)
    try:
        peer = family.peer(settings).eval()
    except Exception as error:  # transformers checks settings in more than one way
        raise UserError(
            f"config.json has settings that transformers refuses ({reason_of(error)}): correct "
            "them."
        ) from error
    # An adapter gives new rows their values; rows of no token are dropped.
    for (name,) in (names[ours] for ours in (EMBEDDING, "lm_head") if ours in names):
        new_rows = source.config.vocab_size - len(parameters[name])
        parameters[name] = F.pad(parameters[name], (0, 0, 0, new_rows))
    state = peer.load_state_dict(parameters, strict=False)
    absent = {LM_HEAD, *head_names(source.config)}
    if state.unexpected_keys or not set(state.missing_keys) <= absent:
        raise UserError("transformers' model has other tensors than the source.")
    peer.tie_weights()
    if source.adapter:
        _adapt(peer, source.adapter)
    return peer


def _adapt(peer: "PreTrainedModel", found: _Adapter) -> None:
    """Have transformers' model compute with an adapter beside its layers, not merged into them."""
    tensors, settings = found.tensors, found.settings
    scale = settings["lora_alpha"] / settings["r"]

    def beside(lora_a: Tensor, lora_b: Tensor) -> Callable[..., Tensor]:
        return lambda module, inputs, output: output + scale * (inputs[0] @ lora_a.T @ lora_b.T)

    for name, module in peer.named_modules():
        if f"{name}.{adapter.LORA_A}" in tensors:
            lora = (tensors[f"{name}.{kind}"] for kind in (adapter.LORA_A, adapter.LORA_B))
            module.register_forward_hook(beside(*lora))
        if (rows := tensors.get(f"{name}.{adapter.ROWS}")) is not None:
            weight = peer.get_parameter(f"{name}.weight")
            weight[adapter.trained_rows(settings, f"{name}.weight")] = rows
    peer.load_state_dict(tensors, strict=False)  # the multiple-choice head


def _report(source: _Source, ignored: list[str]) -> list[tuple[str, str]]:
    """Lines of what was found and what became of it."""
    config, accounted = source.config, source.accounted
    layout = f"layout of {source.layout}"
    rows = [
        (
            "read",
            f"{layout}: {config.family}, {config.n_layer} layers of width {config.n_embd}, "
            f"{config.n_positions} positions",
        ),
        (
            "mapped",
            f"{len(accounted.parameters)} tensors, {len(accounted.renamed) or 'none'} renamed",
        ),
    ]
    rows += [("", line) for line in _grouped(f"{k} -> {v}" for k, v in accounted.renamed.items())]
    if source.adapter:
        rows.append(("merged", f"adapter {_adapter_line(source.adapter)}"))
    dropped = list(_grouped(f"{key}: {why}" for key, why in accounted.dropped.items()))
    (embedding,) = families.of(config).tensor_names(config)[EMBEDDING]
    if (unused := len(accounted.parameters[embedding]) - config.vocab_size) > 0:
        dropped.append(f"{embedding}: the last {unused:,} rows, which belong to no token")
    rows += [("dropped", line) for line in dropped or ["nothing"]]
    if source.has_multiple_choice_head:
        rows.append(("added", "nothing"))
    else:
        rows.append(("added", "a multiple-choice head with random weights, which `train` trains"))
    rows += [("ignored", name if name.isprintable() else repr(name)) for name in ignored]
    rows.append(("tokens", f"{len(source.tokenizer):,}, as many as the embedding has rows"))
    vocabulary = source.tokenizer.get_vocab()
    ids = [f"{token} {vocabulary[token]}" for token in SPECIAL_TOKENS if token in vocabulary]
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    rows.append(("special tokens", ", ".join(ids) or "none"))
    if missing and not families.of(config).reads_chat(source.tokenizer):
        rows.append(("", f"{', '.join(missing)} will be added by `train`"))
    return rows


def _grouped(lines: Iterable[str]) -> Iterable[str]:
    """`lines` with layers counted instead of listed."""
    counts = Counter(re.sub(r"\b(h|layers)\.\d+\.", r"\1.N.", line) for line in lines)
    return (f"{line}{f' ({n} layers)' if n > 1 else ''}" for line, n in counts.items())
