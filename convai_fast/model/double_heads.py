"""The dialogue model: a transformer with a language-model and a multiple-choice head."""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convai_fast import ops
from convai_fast.archive import unpacked
from convai_fast.errors import UserError
from convai_fast.files import scratch_folder
from convai_fast.hub import upload
from convai_fast.model import adapter, checkpoint, families, generation_config
from convai_fast.model.card import CARD, UNKNOWN_ID, model_card
from convai_fast.model.config import TransformerConfig
from convai_fast.model.context import Branches, Causal, Context
from convai_fast.model.layers import Dropout, NothingIsDrawn, init_weights, vocabulary_logits
from convai_fast.model.losses import mean_cross_entropy, targets_of
from convai_fast.model.tensors import account_for, is_head, map_weights
from convai_fast.model.transformer import Transformer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


@dataclass
class DoubleHeadsOutput:
    """What `DoubleHeadsModel.forward` returns; `...` stands for [batch] or [batch, candidates].

    Attributes:
        loss: language-model loss, a float32 scalar; None without labels.
        mc_loss: multiple-choice loss, a float32 scalar; None without labels.
        logits: language-model logits [..., seq, vocab_size], in the shared-prefix layout
            [num_tokens, vocab_size]; None where not asked for.
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

    It computes what transformers' class of the model's family computes, but vocabulary logits only
    where there is a label. The language-model head shares its weight with the token
    embedding where the config says that they are tied. A new model has random weights;
    `from_pretrained` reads saved ones.

    Attributes:
        head_is_new: whether the multiple-choice head has random weights, so that nothing is ranked
            with it: in a new model, one from a checkpoint without that head, and one saved before
            its head was trained. Training clears it; set it to False where you have trained the
            head otherwise.
        generation_config: the content of the `generation_config.json` that it was loaded with,
            which is saved with it. It may name more tokens that end a reply.

    Example:
        >>> config = TransformerConfig.from_transformers({"model_type": "gpt2", "n_layer": 4})
        >>> model = DoubleHeadsModel(config)
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = None
        if not config.tied:
            head = torch.empty(config.vocab_size, config.n_embd)
            self.lm_head = nn.Parameter(head.normal_(std=config.initializer_range))
        self.mc_dropout = Dropout(config.summary_first_dropout)
        self.multiple_choice_head = RankingHead(config.n_embd, 1)
        self.head_is_new = True
        self.generation_config: dict[str, Any] = {}
        self._init_multiple_choice_head()

    def check_ranking(self, needed: str, otherwise: str = "") -> None:
        """Raise UserError if the multiple-choice head, which is `needed`, has learnt nothing."""
        if self.head_is_new:
            raise UserError(
                f"{needed} the multiple-choice head, which this model has not learnt: fine-tune it "
                f"first{otherwise}"
            )

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
        label_positions: Tensor | None = None,
        key_index: ops.KeyIndex | None = None,
    ) -> DoubleHeadsOutput:
        """Logits of both heads, and the losses of those that have labels.

        Both losses are means over what is labelled, and 0 where nothing is.

        A batch in the shared-prefix layout, which `branch_ids` and `offsets` tell, is one row of
        tokens; see `convai_fast.ops.collate_shared` for its `input_ids`, `token_type_ids`,
        `position_ids`, `labels` and `mc_token_ids`. Beside the `branch_ids` it needs `offsets`,
        `position_ids` and `mc_token_ids`. What comes out is that of the padded layout to within
        rounding, with dropout off; with it, the candidates of an example share their prefix's mask.

        Args:
            input_ids: int64 [batch, seq] or [batch, candidates, seq], padded on the right.
            token_type_ids: segment ids, shaped like `input_ids`; without them no segment is added.
            position_ids: shaped like `input_ids`, or [seq]; default 0, 1, 2, …
            mc_token_ids: int64 [batch] or [batch, candidates], the position whose hidden state the
                multiple-choice head reads; default the last. -1 marks a candidate that does not
                exist: its logit is -inf.
            labels: int64, shaped like `input_ids` and aligned with it (they are shifted here);
                -100 is ignored. Labels that stay on the CPU spare the host from waiting for the
                device to tell which are there.
            mc_labels: int64 [batch], the index of the true candidate; -100 is ignored.
            return_logits: whether to compute language-model logits at every position; by default
                only without `labels`.
            branch_ids: int64 [num_tokens], in the shared-prefix layout.
            offsets: int64 [batch + 1] on the CPU, in the shared-prefix layout.
            label_positions: int64 [num_labels], where the labels are, numbered over all rows, none
                of them a row's first token, on the CPU or the device of `labels`; by default they
                are searched for.
            key_index: `convai_fast.ops.index_keys` of the batch, for CUDA.

        Raises:
            ValueError: the sequences are longer than the model's positions, `labels` are not
                shaped like `input_ids`, or one of the layout's arguments is missing.
        """
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} do not fit "
                f"input_ids of shape {tuple(input_ids.shape)}."
            )
        if return_logits is None:
            return_logits = labels is None
        shape, device = input_ids.shape, input_ids.device
        context: Context | None = None
        if branch_ids is not None:
            if offsets is None or position_ids is None or mc_token_ids is None:
                raise ValueError(
                    "branch_ids need offsets, position_ids and mc_token_ids beside them."
                )
            context, ends = Branches(offsets, branch_ids, position_ids, key_index), mc_token_ids
        else:
            input_ids = input_ids.reshape(-1, shape[-1])
            if token_type_ids is not None:
                token_type_ids = token_type_ids.reshape(-1, shape[-1])
            if position_ids is not None:
                context = Causal(position_ids.reshape(-1, shape[-1]))
            tokens = torch.arange(input_ids.numel(), device=device).view(shape)
            ends = tokens[..., -1]
            if mc_token_ids is not None:
                ends = tokens.gather(-1, mc_token_ids.clamp(min=0)[..., None]).squeeze(-1)
                ends = ends.masked_fill(mc_token_ids < 0, -1)

        targets = predicting = None
        if labels is not None:
            targets, predicting = targets_of(labels, label_positions, device)
        if return_logits:
            hidden = self.transformer(input_ids, token_type_ids, context).flatten(0, -2)
            logits = self.lm_logits(hidden).view(*shape, -1)
            mc_logits = self._rank(hidden.index_select(0, ends.clamp(min=0).flatten()), ends)
            states = hidden if predicting is None else hidden.index_select(0, predicting)
        else:
            logits = None
            mc_logits, states = self.score(input_ids, token_type_ids, context, ends, predicting)
        loss = mc_loss = None
        if targets is not None:
            loss = mean_cross_entropy(self.lm_logits(states), targets)
        if mc_labels is not None:
            mc_loss = mean_cross_entropy(mc_logits, mc_labels)
        return DoubleHeadsOutput(
            loss=loss,
            mc_loss=mc_loss,
            logits=logits,
            mc_logits=mc_logits,
        )

    def score(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        context: Context | None,
        ends: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the heads are asked for: training, evaluation and ranking differ in that alone.

        Args:
            input_ids, token_type_ids, context: as for `Transformer.forward`.
            ends: int64 of any shape, the last token of each candidate to be ranked, numbered over
                all rows; -1 for one that does not exist. `mc_token_ids` of a `SharedBatch`; of a
                `PaddedBatch` they are positions within a row.
            wanted: int64 [num_wanted], tokens whose hidden states the language-model head is to
                read; each predicts the token after it, as `label_positions - 1` the labels.

        Returns:
            float32 multiple-choice logits, shaped like `ends`, -inf where there is no candidate;
            and hidden states [num_wanted, n_embd], of which `lm_logits` makes logits.
        """
        none = torch.zeros(0, dtype=torch.int64, device=input_ids.device)
        ends, wanted = none if ends is None else ends, none if wanted is None else wanted
        both = torch.cat([ends.clamp(min=0).flatten(), wanted])
        hidden = self.transformer(input_ids, token_type_ids, context, both)
        of_ends, of_wanted = hidden.split([ends.numel(), len(wanted)])
        return self._rank(of_ends, ends), of_wanted

    def _rank(self, hidden: Tensor, ends: Tensor) -> Tensor:
        """Multiple-choice logits shaped like `ends` of the hidden states there."""
        mc_logits = self.multiple_choice_head(self.mc_dropout(hidden)).view(ends.shape)
        return mc_logits.masked_fill(ends < 0, -torch.inf)

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits [..., vocab_size] of hidden states [..., n_embd]."""
        return vocabulary_logits(hidden, self.lm_head_weight)

    @property
    def lm_head_weight(self) -> Tensor:
        """[vocab_size, n_embd], which makes logits of hidden states."""
        return self.transformer.token_embedding.weight if self.lm_head is None else self.lm_head

    def resize_token_embeddings(self, vocab_size: int) -> None:
        """Make room for new tokens, or drop the last: rows up to `vocab_size`.

        New ones are drawn like those of a new model. The embedding becomes another parameter: build
        the optimizer afterwards.
        """
        new_rows = vocab_size - self.config.vocab_size
        if new_rows == 0:
            return

        def resized(old: Tensor) -> Tensor:
            new = old.new_empty(max(new_rows, 0), old.shape[1])
            new.normal_(std=self.config.initializer_range)
            return torch.cat([old.detach()[:vocab_size], new])

        self.transformer.token_embedding = nn.Embedding.from_pretrained(
            resized(self.transformer.token_embedding.weight), freeze=False
        )
        if self.lm_head is not None:
            self.lm_head = nn.Parameter(resized(self.lm_head))
        self._change_config(vocab_size=vocab_size)

    def read_segments(self) -> None:
        """From now on, add the embedding of its segment to each token."""
        self._change_config(segments=True)

    def _change_config(self, **settings: Any) -> None:
        self.config = self.transformer.config = dataclasses.replace(self.config, **settings)

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
            folder = checkpoint.find_folder(source.path)
            model, has_head = cls.from_folder(folder, dtype)
        if not has_head:
            logger.warning(
                "%s has no multiple-choice head (it is a plain language model): it gets a new one, "
                "which ranks nothing until it is trained.",
                path,
            )
        return model

    @classmethod
    def from_folder(cls, folder: Path, dtype: torch.dtype) -> "tuple[DoubleHeadsModel, bool]":
        """As `from_pretrained` of a folder, with whether its multiple-choice head was there."""
        if adapter.is_adapter(folder):
            with adapter.base_of(folder) as base:
                model, has_head = cls.from_folder(base, torch.float32)
                config = adapter.config_of(folder, model.config)
                grows = model.config.vocab_size < config.vocab_size
                if grows or families.of(model.config).pads_vocabulary:
                    model.resize_token_embeddings(config.vocab_size)
                if config.segments:  # whose rows are the adapter's
                    model.read_segments()
                if model.config != config:
                    raise UserError(
                        f"{base} is not the model that the adapter in {folder} was trained on: "
                        f"correct base_model_name_or_path in its {adapter.CONFIG_FILE}"
                    )
            changed = adapter.merge_adapter(folder, config, dict(model.named_parameters()))
            if any(is_head(name) for name in changed):
                model.head_is_new = checkpoint.has_new_head(folder / adapter.WEIGHTS_FILE)
                has_head = True
            return model.to(dtype).eval(), has_head
        tensors, file = checkpoint.read_tensors(folder)
        config = checkpoint.read_config(folder, tensors)
        parameters = account_for(tensors, config, file).parameters
        # Nothing is allocated or drawn that the weights then overwrite.
        with torch.device("meta"), NothingIsDrawn():
            model = cls(config).to(dtype)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        weights = map_weights(parameters, config, shapes, file)
        # As `to_empty`, which has torch import its compiler, too.
        empty = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
        model.load_state_dict(empty, assign=True)
        model._init_multiple_choice_head()
        with torch.no_grad():
            for name, parts in weights.items():
                places = model.get_parameter(name).split([len(part) for part in parts])
                for place, part in zip(places, parts, strict=True):
                    place.copy_(part)
        model.generation_config = generation_config.read(folder)
        has_head = len(weights) == len(shapes)
        model.head_is_new = not has_head or checkpoint.has_new_head(file)
        return model.eval(), has_head

    def save_pretrained(
        self,
        folder: str | Path,
        tokenizer: "PreTrainedTokenizerFast | None" = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write `model.safetensors`, its configs and the tokenizer's files, each atomically.

        `weights` stand for the model's own state dict, where that is sharded over processes.

        transformers' own classes and `AutoTokenizer` load the folder, and `generate` ends a reply
        where one ends here. That the multiple-choice head is new is remembered in the metadata of
        `model.safetensors`.

        Raises:
            UserError: the tokenizer has more tokens than the model, or the folder is not writable.
        """
        checkpoint.write_folder(
            folder,
            self.config,
            weights or self.state_dict(),
            tokenizer,
            generation=self.generation_config,
            head_is_new=self.head_is_new,
        )

    def push_to_hub(
        self,
        repo_id: str,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        private: bool = False,
        card: str = "",
    ) -> str:
        """Upload what `save_pretrained` writes, and a model card, to the Hugging Face Hub.

        Args:
            repo_id: OWNER/NAME of the repository, which is made where missing.
            private: whether only its owner sees it; then one that is public is left alone.
            card: its README.md; by default what the model's shape says. `convai-fast push` makes
                one of all that is known of a run.

        Returns the address. The token is the one that huggingface_hub finds.

        Raises:
            UserError: the tokenizer has more tokens than the model, or nothing can be uploaded.
        """
        with scratch_folder(None, "convai-fast-") as folder:
            self.save_pretrained(folder, tokenizer)
            text = card or model_card(folder)
            (folder / CARD).write_text(text.replace(UNKNOWN_ID, repo_id), encoding="utf-8")
            return upload(folder, repo_id, private)
