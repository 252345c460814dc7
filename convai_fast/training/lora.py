"""LoRA: small matrices beside the linear layers are trained, the layers themselves are not.

The multiple-choice head is trained too, in full, and so are the rows of the five special tokens,
which no pretrained model knows: those of the embedding, and of a language-model head of its own.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685), as peft
implements it.
"""

import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedTokenizerFast

from convai_fast.archive import is_checkpoint_file
from convai_fast.files import flush, scratch_folder
from convai_fast.model import adapter, checkpoint, families
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.model.families.family import split
from convai_fast.model.tensors import EMBEDDING, is_head
from convai_fast.options import options_file
from convai_fast.training.checkpoints import explained
from convai_fast.training.options import TrainOptions


class _TrainedRows(nn.Module):
    """A weight of which some rows are parameters of their own."""

    ids: Tensor

    def __init__(self, weight: Tensor, ids: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("ids", torch.tensor(ids))
        self.rows = nn.Parameter(weight.detach()[list(ids)].clone())

    def forward(self, weight: Tensor) -> Tensor:
        """`weight` [vocab_size, n_embd] with these rows in place."""
        return weight.index_copy(0, self.ids, self.rows)


class Lora:
    """The adapter of a model: made, saved, and put back where a run continues."""

    def __init__(
        self,
        model: DoubleHeadsModel,
        options: TrainOptions,
        token_ids: Sequence[int],
        base: str = "",
    ) -> None:
        """Add the adapter to `model`, whose other parameters no longer ask for a gradient.

        Args:
            token_ids: whose rows of the embedding and of the language-model head are trained; none
                where the model knows all of its tokens.
            base: folder or Hub id of the model's weights; by default `options.model`.
        """
        from peft import LoraConfig, inject_adapter_in_model

        self.model, self.options, self.token_ids = model, options, list(token_ids)
        settings: dict[str, Any] = {
            "r": options.lora_r,
            "lora_alpha": options.lora_alpha,
            "lora_dropout": options.lora_dropout,
        }
        layers = {
            name.rpartition(".")[2]
            for name, module in model.transformer.blocks.named_modules()
            if isinstance(module, nn.Linear)
        }
        inject_adapter_in_model(LoraConfig(target_modules=list(layers), **settings), model)
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        model.multiple_choice_head.requires_grad_(True)
        self._trained_rows = {}
        of_tokens = (EMBEDDING,) if model.config.tied else (EMBEDDING, "lm_head")
        for name in of_tokens if self.token_ids else ():
            module, kind = self._owner(name)
            self._trained_rows[name] = _TrainedRows(getattr(module, kind), self.token_ids)
            parametrize.register_parametrization(module, kind, self._trained_rows[name])
        family = families.of(model.config)
        names = family.tensor_names(model.config)
        self.base = Path(base or options.model).expanduser()
        # What peft and transformers read.
        self._saved_config = LoraConfig(
            **settings,
            base_model_name_or_path=str(self.base.resolve() if self.base.exists() else self.base),
            target_modules=list(family.linear_layers),
            fan_in_fan_out=family.conv1d,
            modules_to_save=["multiple_choice_head"],
            trainable_token_indices={
                names[name][0].split(".")[-2]: self.token_ids for name in self._trained_rows
            }
            or None,
            inference_mode=True,
        )

    def keep_base(self, run: Path) -> None:
        """Keep the base model in the folder `run` if it is a checkpoint that another run removes.

        Its files are linked where the file system can, so that they take no room.

        Raises UserError when they are gone already, or cannot be written.
        """
        checkpoints, kept = self.base.resolve().parent, run.resolve() / adapter.KEPT_BASE
        if checkpoints.name != "checkpoints" or options_file(checkpoints.parent) is None:
            return
        with (
            explained(
                f"the base model {self.base} cannot be kept in {kept}",
                f"begin again with `resume` {run}",
            ),
            scratch_folder(run, ".base-") as folder,
        ):
            scratch = folder / kept.name
            scratch.mkdir()
            for file in self.base.iterdir():
                if is_checkpoint_file(file.name):
                    _link_or_copy(file, scratch / file.name)
            os.rename(scratch, kept)
            flush(run)
        self._saved_config.base_model_name_or_path = str(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """All that is trained, by the parameters' names."""
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `state_dict` returned."""
        self.model.load_state_dict(state, strict=False)

    @cached_property
    def base_checksum(self) -> int:
        """A CRC-32 of all that is not trained: an adapter makes sense with its own base only."""
        value = 0
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                value = zlib.crc32(parameter.detach().cpu().contiguous().numpy().data, value)
        return value

    def save_pretrained(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        """Write what `DoubleHeadsModel.from_pretrained` loads.

        With --merge_lora ordinary weights, else the adapter, which names its base model.
        """
        config = self.model.config
        if self.options.merge_lora:
            checkpoint.write_folder(
                folder,
                config,
                self._merged_weights(),
                tokenizer,
                generation=self.model.generation_config,
                head_is_new=self.model.head_is_new,
            )
            return
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in self._adapted()}
        self._saved_config.save_pretrained(str(folder))
        checkpoint.save_tensors(
            tensors, folder / adapter.WEIGHTS_FILE, head_is_new=self.model.head_is_new
        )
        checkpoint.write_config(folder, config, torch.float32, tokenizer)
        tokenizer.save_pretrained(folder)

    def _owner(self, name: str) -> tuple[Any, str]:
        """The module that has the parameter `name`, and what it calls it."""
        module, _, own = name.rpartition(".")
        return self.model.get_submodule(module), own

    def _adapted(self) -> Iterator[tuple[str, Tensor]]:
        """What is trained, by its names in the adapter's file.

        peft has an A and a B for each of transformers' layers: where several of them are one here,
        they have the same A, and their parts of B.
        """
        config = self.model.config
        for ours, names in families.of(config).tensor_names(config).items():
            module, own = self._owner(ours)
            if ours in self._trained_rows:
                yield adapter.file_name(names[0], adapter.ROWS), self._trained_rows[ours].rows
            elif is_head(ours):
                yield adapter.file_name(names[0]), getattr(module, own)
            elif own == "weight" and hasattr(module, "lora_A"):
                parts = split(module.lora_B["default"].weight, names, config)
                for name, part in zip(names, parts, strict=True):
                    yield adapter.file_name(name, adapter.LORA_A), module.lora_A["default"].weight
                    yield adapter.file_name(name, adapter.LORA_B), part

    @torch.no_grad()
    def _merged_weights(self) -> dict[str, Tensor]:
        weights = {}
        for name in families.of(self.model.config).tensor_names(self.model.config):
            module, own = self._owner(name)
            weights[name] = getattr(getattr(module, "base_layer", module), own)
            if own == "weight" and hasattr(module, "lora_A"):
                weights[name] = weights[name] + module.get_delta_weight("default")
        return weights


def _link_or_copy(file: Path, place: Path) -> None:
    try:
        os.link(file.resolve(), place)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(file, place)
        flush(place)
