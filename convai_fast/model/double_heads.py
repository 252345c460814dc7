"""The dialogue model: a transformer with a language-model and a multiple-choice head."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convai_fast.archive import unpacked
from convai_fast.dialogue.format import IGNORED
from convai_fast.errors import UserError
from convai_fast.model import adapter, checkpoint
from convai_fast.model.attention import Branches
from convai_fast.model.config import TransformerConfig
from convai_fast.model.layers import Dropout, init_weights, linear, to_device
from convai_fast.model.tensors import account_for, map_weights
from convai_fast.model.transformer import Transformer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class DoubleHeadsOutput:
    """What `DoubleHeadsModel.forward` returns; `...` stands for [batch] or [batch, candidates].

    Attributes:
        loss: language-model loss, a float32 scalar; None without labels.
        mc_loss: multiple-choice loss, a float32 scalar; None without labels.
        logits: language-model logits [..., seq, vocab_size]; None where not asked for.
        mc_logits: multiple-choice logits [...].
    """

    loss: Tensor | None
    mc_loss: Tensor | None
    logits: Tensor | None
    mc_logits: Tensor


class RankingHead(nn.Linear):
    """A linear layer to one value, in float32 also under autocast.

    The 8 bits of bfloat16 would make many candidates equal.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to float32 [..., 1]."""
        # Not a matrix product, which a compiled backward pass would cast again.
        return (x.float() * self.weight.float()).sum(-1, keepdim=True) + self.bias.float()


class DoubleHeadsModel(nn.Module):
    """A decoder that writes replies and ranks them (TransferTransfo, arXiv 1901.08149).

    It computes what transformers' double-heads class of the model's family computes, but vocabulary
    logits only where there is a label. The language-model head shares its weight with the token
    embedding. A new model has random weights; `from_pretrained` reads saved ones.

    Example:
        >>> config = TransformerConfig.from_transformers({"model_type": "gpt2", "n_layer": 4})
        >>> model = DoubleHeadsModel(config)
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.mc_dropout = Dropout(config.summary_first_dropout)
        self.multiple_choice_head = RankingHead(config.n_embd, 1)
        self.head_is_new = False  # whether a checkpoint was loaded that has no multiple-choice head
        self._init_multiple_choice_head()

    def _init_multiple_choice_head(self) -> None:
        init_weights(self.multiple_choice_head, std=self.config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        mc_token_ids: Tensor | None = None,
        labels: Tensor | None = None,
        mc_labels: Tensor | None = None,
        return_logits: bool | None = None,
        branch_ids: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> DoubleHeadsOutput:
        """Logits of both heads, and the losses of those that have labels.

        Both losses are means over what is labelled, and 0 where nothing is.

        A batch in the shared-prefix layout, which `branch_ids` and `offsets` tell, is one row of
        tokens; see `convai_fast.ops.collate_shared` for its `input_ids`, `token_type_ids`,
        `position_ids`, `labels` and `mc_token_ids`. All but the first are then required, except
        labels. What comes out is that of the padded layout to within rounding, with dropout off;
        with it, the candidates of an example share the mask of their prefix.

        Args:
            input_ids: int64 [batch, seq] or [batch, candidates, seq], padded on the right.
            token_type_ids: segment ids, shaped like `input_ids`.
            position_ids: shaped like `input_ids`, or [seq]; default 0, 1, 2, …
            mc_token_ids: int64 [batch] or [batch, candidates], the position whose hidden state the
                multiple-choice head reads; default the last. -1 marks a candidate that does not
                exist: its logit is -inf.
            labels: int64, shaped like `input_ids` and aligned with it (they are shifted here);
                -100 is ignored. To gather what is labelled, their number must be known: labels
                that stay on the CPU spare the host from waiting for the device to tell.
            mc_labels: int64 [batch], the index of the true candidate; -100 is ignored.
            return_logits: whether to compute language-model logits at every position; by default
                only without `labels`.
            branch_ids: int64 [num_tokens], in the shared-prefix layout.
            offsets: int64 [batch + 1] on the CPU, in the shared-prefix layout.

        Raises:
            ValueError: the sequences are longer than the model's positions, or `labels` are not
                shaped like `input_ids`.
        """
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} do not fit "
                f"input_ids of shape {tuple(input_ids.shape)}."
            )
        if return_logits is None:
            return_logits = labels is None
        shape, device = input_ids.shape, input_ids.device
        targets, labelled = _targets(labels, device) if labels is not None else (None, None)

        if branch_ids is not None:
            wanted, ends = None, mc_token_ids.clamp(min=0).flatten()
            if not return_logits:
                # Nothing else is read of what the last block computes.
                wanted = ends if labelled is None else torch.cat([ends, labelled])
                labelled = torch.arange(len(ends), len(wanted), device=device)
                ends = torch.arange(len(ends), device=device)
            hidden = self.transformer(
                input_ids,
                token_type_ids,
                position_ids,
                branches=Branches(offsets, branch_ids),
                wanted=wanted,
            )
            chosen = hidden.index_select(0, ends).unflatten(0, mc_token_ids.shape)
        else:
            hidden = self.transformer(
                input_ids.reshape(-1, shape[-1]),
                None if token_type_ids is None else token_type_ids.reshape(-1, shape[-1]),
                None if position_ids is None else position_ids.reshape(-1, shape[-1]),
            ).view(*shape, -1)
            chosen = _at_positions(hidden, mc_token_ids)
            hidden = hidden.flatten(0, -2)

        mc_logits = self.multiple_choice_head(self.mc_dropout(chosen)).squeeze(-1)
        if mc_token_ids is not None:
            mc_logits = mc_logits.masked_fill(mc_token_ids < 0, -torch.inf)
        loss = mc_loss = None
        if labels is not None:
            loss = _mean_cross_entropy(self.lm_logits(hidden.index_select(0, labelled)), targets)
        if mc_labels is not None:
            mc_loss = _mean_cross_entropy(mc_logits, mc_labels)
        return DoubleHeadsOutput(
            loss=loss,
            mc_loss=mc_loss,
            logits=self.lm_logits(hidden).view(*shape, -1) if return_logits else None,
            mc_logits=mc_logits,
        )

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits [..., vocab_size] of hidden states [..., n_embd]."""
        return linear(hidden, self.transformer.token_embedding.weight)

    def resize_token_embeddings(self, vocab_size: int) -> None:
        """Make room for new tokens: rows up to `vocab_size`, drawn like those of a new model.

        The embedding becomes another parameter: build the optimizer afterwards.

        Raises:
            ValueError: `vocab_size` is smaller than what the model has.
        """
        new_rows = vocab_size - self.config.vocab_size
        if new_rows < 0:
            raise ValueError(
                f"cannot shrink the vocabulary of {self.config.vocab_size} tokens to {vocab_size}."
            )
        if new_rows == 0:
            return
        old = self.transformer.token_embedding.weight.detach()
        new = old.new_empty(new_rows, old.shape[1]).normal_(std=self.config.initializer_range)
        self.transformer.token_embedding = nn.Embedding.from_pretrained(
            torch.cat([old, new]), freeze=False
        )
        self.config = dataclasses.replace(self.config, vocab_size=vocab_size)
        self.transformer.config = self.config

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype = torch.float32
    ) -> "DoubleHeadsModel":
        """The model saved in a folder, or under an id on the Hugging Face hub, in `eval` mode.

        Reads the layouts of transformers, pytorch-transformers 1.x and pytorch-pretrained-bert
        0.6, a folder or a tar archive (`.tar.gz`) of one; double heads or plain language models
        (whose multiple-choice head is then newly initialised, with a warning). It executes nothing
        it reads, and accounts for every tensor. A folder with a LoRA adapter that `convai-fast
        train` wrote gives its base model with the adapter merged.

        Raises:
            UserError: there is no such model, or its files are damaged or do not fit together.
        """
        with unpacked(path) as source:
            return cls._from_folder(checkpoint.find_folder(source.path), dtype)

    @classmethod
    def _from_folder(cls, folder: Path, dtype: torch.dtype) -> "DoubleHeadsModel":
        if adapter.is_adapter(folder):
            config = checkpoint.read_config(folder)
            with adapter.base_of(folder) as base:
                model = cls._from_folder(base, torch.float32)
                if model.config.vocab_size < config.vocab_size:
                    model.resize_token_embeddings(config.vocab_size)
                if model.config != config:
                    raise UserError(
                        f"{base} is not the model that the adapter in {folder} was trained on: "
                        f"correct base_model_name_or_path in its {adapter.CONFIG_FILE}"
                    )
            adapter.merge_adapter(folder, config, dict(model.named_parameters()))
            return model.to(dtype).eval()
        tensors, file = checkpoint.read_tensors(folder)
        config = checkpoint.read_config(folder, tensors)
        parameters = account_for(tensors, config, file).parameters
        # On the meta device nothing is allocated or drawn that the weights then overwrite.
        with torch.device("meta"):
            model = cls(config).to(dtype)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        weights = map_weights(parameters, config, shapes, file)
        model.to_empty(device="cpu")
        model._init_multiple_choice_head()
        model.load_state_dict(weights, strict=False)
        model.head_is_new = len(weights) < len(shapes)
        return model.eval()

    def save_pretrained(
        self,
        folder: str | Path,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write `model.safetensors`, `config.json` and the tokenizer's files, each atomically.

        `weights` stand for the model's own state dict, where that is sharded over processes.

        transformers' own double-heads classes and `AutoTokenizer` load the folder.

        Raises:
            UserError: the tokenizer has more tokens than the model, or the folder is not writable.
        """
        checkpoint.write_folder(folder, self.config, weights or self.state_dict(), tokenizer)


def _targets(labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The labels that count, and which of the flattened positions predicts each of them.

    The hidden state at a position predicts the token at the next. In the shared-prefix layout, too:
    the token before a labelled one is of its own branch, whose first is never labelled.
    """
    targets = F.pad(labels[..., 1:], (0, 1), value=IGNORED).flatten()
    labelled = (targets != IGNORED).nonzero().squeeze(1)
    if labels.device != device:
        return to_device(targets[labelled], device), to_device(labelled, device)
    return targets[labelled], labelled


def _at_positions(hidden: Tensor, positions: Tensor | None) -> Tensor:
    """Hidden states [..., n_embd] at `positions` [...] of [..., seq, n_embd]; default the last."""
    if positions is None:
        return hidden[..., -1, :]
    # Not take_along_dim, which reads on beyond the sequence where gather raises an error.
    index = positions.clamp(min=0)[..., None, None]
    return hidden.gather(-2, index.expand(*index.shape[:-1], hidden.shape[-1])).squeeze(-2)


def _mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """In float32, over the targets that are not ignored; 0, not NaN, where there are none."""
    targets = targets.flatten()
    logits = logits.reshape(len(targets), logits.shape[-1]).float()
    total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)
