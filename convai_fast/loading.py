"""The one door to a fine-tuned model: the model and its tokenizer, which fit each other."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from convai_fast.archive import unpacked
from convai_fast.dialogue.format import SPEAKERS, SPECIAL_TOKENS
from convai_fast.dialogue.layout import Layout, classic
from convai_fast.dialogue.tokenizer import add_special_tokens, read_tokenizer, special_ids
from convai_fast.errors import UserError
from convai_fast.files import fingerprint, read_json
from convai_fast.model import families
from convai_fast.model.checkpoint import read_config
from convai_fast.model.config import TransformerConfig
from convai_fast.model.double_heads import DoubleHeadsModel


def load(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    resize: bool = False,
    segments: bool = False,
    report: Callable[[str], None] = print,
) -> tuple[DoubleHeadsModel, PreTrainedTokenizerFast]:
    """Load the model at `path` and its tokenizer.

    `path` is a folder (also a LoRA adapter's, or that of a run, which stands for its best
    checkpoint), a tar archive of one, or a Hub id, in the layout of transformers or of the old
    libraries.

    Args:
        tokenizer: where the tokenizer is, if not with the model.
        resize: give a model that was not trained on dialogues yet the special tokens that it lacks,
            and rows for them in its embedding.
        segments: with `resize`, let the model read who speaks, if it does not yet: see
            `add_segments`.
        report: told how many rows that were, and how many that no token has were dropped.

    Returns:
        The model, in eval mode on the CPU, whose embedding has a row for each token of the
        tokenizer, and the tokenizer, with the five special tokens unless the model reads what its
        chat template writes.

    Raises:
        UserError: there is no such model or tokenizer, they are damaged, or do not fit each other.

    Example:
        >>> model, tokenizer = load("runs/mine/best")
        >>> engine = GenerationEngine(model, tokenizer)
    """
    with unpacked(path) as source:
        model = DoubleHeadsModel.from_pretrained(source.path)
        found = read_tokenizer(tokenizer or source.path)
    rows = rows_of_tokens(model.config, found)
    if rows < model.config.vocab_size:
        report(f"embedding: {model.config.vocab_size - rows:,} rows of no token dropped")
        model.resize_token_embeddings(rows)
    reads_chat = families.of(model.config).reads_chat(found)
    opens_turns = not reads_chat and set(SPEAKERS) <= found.get_vocab().keys()
    if resize and not reads_chat:
        num_tokens, added = len(found), add_special_tokens(found)
        beyond = set(range(rows, num_tokens + added))
        if rows <= num_tokens and beyond <= set(special_ids(found)):
            model.resize_token_embeddings(len(found))
            if beyond:
                report(
                    f"special tokens: {len(beyond)} added, embedding {rows:,} -> {len(found):,} "
                    "rows"
                )
    check_fit(found, model.config, path)
    if resize and segments and not model.config.segments:
        add_segments(model, found, report, begin_as_zeros=not opens_turns)
    return model, found


def add_segments(
    model: DoubleHeadsModel,
    tokenizer: PreTrainedTokenizerFast,
    report: Callable[[str], None],
    *,
    begin_as_zeros: bool = True,
) -> None:
    """Let a model add to each token the embedding of who speaks, `<speaker1>` or `<speaker2>`.

    The two begin as zeros: until it is trained, the model computes what it did. Where it has learnt
    them as tokens, which stand before turns, it keeps what it has.
    """
    _add_speakers(tokenizer)
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[token] for token in SPEAKERS]
    model.resize_token_embeddings(max(model.config.vocab_size, max(ids) + 1))
    if begin_as_zeros:
        with torch.no_grad():
            model.transformer.token_embedding.weight[ids] = 0
    model.read_segments()
    report(f"segments: each token is read with its speaker, {' or '.join(SPEAKERS)}")


def _add_speakers(tokenizer: PreTrainedTokenizerFast) -> None:
    missing = [token for token in SPEAKERS if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing, special_tokens=True)


def rows_of_tokens(config: TransformerConfig, tokenizer: PreTrainedTokenizerFast) -> int:
    """How many rows of the embedding belong to tokens: some families pad it with more."""
    if not families.of(config).pads_vocabulary:
        return config.vocab_size
    return min(config.vocab_size, max(tokenizer.get_vocab().values()) + 1)


def check_fit(
    tokenizer: PreTrainedTokenizerFast,
    config: TransformerConfig,
    path: str | Path,
    *,
    needs_special_tokens: bool = True,
) -> None:
    """Raise UserError unless a model of this `config` has a row for each token of `tokenizer`.

    Where rows and tokens differ, nobody knows which row is whose, so that special tokens must not
    be given the rows of others. `path` is the model's, for the sentence.
    """
    rows, tokens, vocabulary = config.vocab_size, len(tokenizer), tokenizer.get_vocab()
    if families.of(config).reads_chat(tokenizer) and max(vocabulary.values()) < rows:
        return
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if rows != tokens:
        raise UserError(
            f"{path} has embeddings for {rows:,} tokens, but its tokenizer has {tokens:,}: restore "
            "the tokenizer's files (an old library's special tokens are in special_tokens.txt or "
            "added_tokens.json), or name the model's own tokenizer"
        )
    if missing and needs_special_tokens:
        raise UserError(
            f"the tokenizer of {path} lacks {', '.join(missing)}: fine-tune the model with "
            "`convai-fast train` first, or restore the tokenizer's files"
        )
    if not missing:
        add_special_tokens(tokenizer)  # none is new, but transformers learns which is which


class Reading(NamedTuple):
    """How a model reads dialogues, as far as its tokenizer and its `config.json` tell.

    Attributes:
        tokenizer: with all tokens of the layout.
        layout: what stands around the texts.
        chat: whether that is what the tokenizer's chat template writes.
        segments: whether each token is read with who speaks.
        n_positions: of the model; None where there is none that can be read.
    """

    tokenizer: PreTrainedTokenizerFast
    layout: Layout
    chat: bool
    segments: bool
    n_positions: int | None


def reading_of(path: str | Path, *, segments: bool = False) -> Reading:
    """How the model at `path` reads dialogues when it is trained, `segments` as for `load`.

    Where there is a tokenizer alone, its layout is that of the five special tokens, which it is
    given where it lacks them, and each token is read with who speaks.

    Raises UserError when there is no tokenizer, or one whose files contradict each other, or a
    model with too few positions.
    """
    family = n_positions = None
    with unpacked(path) as source:
        tokenizer = read_tokenizer(source.path)
        # Where it came from the Hub, it names its folder; one of the old libraries names none.
        folder = Path(tokenizer.name_or_path or source.path)
        config_file = folder / "config.json"
        settings = read_json(config_file) if config_file.is_file() else {}
        with suppress(UserError):  # what is no model here is a tokenizer all the same
            family = families.find(settings)
            n_positions = read_config(folder).n_positions
    segments = segments or family is None or family.reads_segments(settings)
    if family is None or not family.reads_chat(tokenizer):
        add_special_tokens(tokenizer)
        layout, chat = classic(special_ids(tokenizer)), False
    else:
        if segments:
            _add_speakers(tokenizer)
        layout, chat = family.layout(tokenizer), True
    if n_positions is not None:
        _check_positions(n_positions, layout)
    return Reading(tokenizer, layout, chat, segments, n_positions)


def layout_for(tokenizer: PreTrainedTokenizerFast, config: TransformerConfig) -> Layout:
    """How dialogues are laid out for a model with this config and tokenizer.

    Raises UserError when the tokenizer lacks tokens that the layout of its family has, or has a
    chat template that is no layout, or one that fills the model's positions alone.
    """
    layout = families.of(config).layout(tokenizer)
    _check_positions(config.n_positions, layout)
    return layout


def _check_positions(n_positions: int, layout: Layout) -> None:
    if n_positions < (needed := layout.empty_prompt + 2):  # a reply of a token, and its end
        raise UserError(
            f"the model has {n_positions} positions, as its config.json says, too few for "
            f"any reply, which takes {needed} with what stands around it: name another model"
        )


def model_fingerprint(model: DoubleHeadsModel) -> str:
    """A hash of the model's shape and weights, since training again keeps a folder's name."""
    weights = (
        part
        for name, weight in model.state_dict().items()
        for part in (name.encode(), weight.contiguous().view(torch.uint8).numpy().data)
    )
    return fingerprint(repr(model.config).encode(), *weights)
