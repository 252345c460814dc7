"""What each family of models tells of itself."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from convai_fast.errors import UserError, shown
from convai_fast.model.config import TransformerConfig
from convai_fast.model.layers import init_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from convai_fast.model.transformer import Transformer


class Family(ABC):
    """Models that transformers loads by the same classes.

    Attributes:
        name: `model_type` in config.json.
        title: as a sentence names it.
        config_class, model_class: transformers' own, by name: importing them takes time.
        supported: settings that change what transformers computes -> the value computed here.
        tensors: our name -> transformers', with `{layer}` in blocks; a module's name stands for its
            weight and its bias.
        linear_layers: how transformers calls the linear layers of a block, which LoRA changes.
        conv1d: whether these are its Conv1D, whose weight is stored as [in, out].
        constants: what older versions stored beside the parameters: a name's pattern -> why it is
            not needed, and whether a tensor holds the expected.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    config_class: ClassVar[str]
    model_class: ClassVar[str]
    supported: ClassVar[Mapping[str, Any]]
    tensors: ClassVar[Mapping[str, str]]
    linear_layers: ClassVar[tuple[str, ...]]
    conv1d: ClassVar[bool] = False
    constants: ClassVar[Mapping[re.Pattern[str], tuple[str, Callable[[Tensor], bool]]]] = {}

    @abstractmethod
    def read_config(self, settings: Mapping[str, Any]) -> TransformerConfig:
        """The decoder of a `config.json` that lacks no setting, and has only supported ones."""

    @abstractmethod
    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """The content of a `config.json` that transformers' classes load to the same model."""

    def recognises(self, config: Mapping[str, Any], tensor_names: Collection[str]) -> bool:
        """Whether a `config.json` without `model_type`, or its weights, can only be of these."""
        return False

    def initialise(self, transformer: "Transformer") -> None:
        """Draw new weights."""
        transformer.apply(partial(init_weights, std=transformer.config.initializer_range))

    def read(self, config: Mapping[str, Any]) -> TransformerConfig:
        """The content of a `config.json`, under any name that transformers accepts for a setting.

        What it lacks, or is null, has transformers' default.

        Raises:
            UserError: a setting would change the results in a way that is not supported.
        """
        import transformers

        theirs = getattr(transformers, self.config_class)
        given = {
            theirs.attribute_map.get(name, name): value
            for name, value in config.items()
            if value is not None
        }
        for name, supported in self.supported.items():
            value = given.get(name, supported)
            # An empty or false value means "none" to transformers just as null does.
            if (value or None) != (supported or None):
                raise UserError(f"{name} {shown(value)} is not supported; only {supported!r} is.")
        return self.read_config({**theirs().to_dict(), **given})

    def peer(self, settings: Mapping[str, Any]) -> "PreTrainedModel":
        """transformers' own model with these settings of its config class, and random weights."""
        import transformers

        config = getattr(transformers, self.config_class)(**settings)
        return getattr(transformers, self.model_class)(config)

    def tensor_names(self, config: TransformerConfig) -> dict[str, str]:
        """Our name of every parameter of a `DoubleHeadsModel` -> its name in transformers."""
        names = {}
        for ours, theirs in self.tensors.items():
            kinds = ("",) if ours.endswith(".weight") else (".weight", ".bias")
            for layer in range(config.n_layer if "{layer}" in ours else 1):
                for kind in kinds:
                    names[ours.format(layer=layer) + kind] = theirs.format(layer=layer) + kind
        return names

    def is_linear(self, name: str) -> bool:
        """Whether `name`, of transformers, is the weight of a block's linear layer."""
        return name.endswith(tuple(f".{layer}.weight" for layer in self.linear_layers))

    def stores_transposed(self, name: str) -> bool:
        """Whether transformers stores the tensor that it calls `name` as [in, out]."""
        return self.conv1d and self.is_linear(name)

    def constant(self, name: str) -> tuple[str, Callable[[Tensor], bool]] | None:
        """What `constants` says of a tensor of this name, if it is one."""
        return next((c for pattern, c in self.constants.items() if pattern.fullmatch(name)), None)
