"""What each family of models tells of itself."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from convai_fast.dialogue import chat_template
from convai_fast.dialogue.layout import Layout, classic
from convai_fast.dialogue.tokenizer import special_ids
from convai_fast.errors import UserError, shown
from convai_fast.model.config import Activation, TransformerConfig
from convai_fast.model.layers import init_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from convai_fast.model.transformer import Transformer

# transformers' name of the language-model head, in all families.
LM_HEAD = "lm_head.weight"

# transformers' names of activations -> ours.
ACTIVATIONS: Mapping[str, Activation] = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class Family(ABC):
    """Models that transformers loads by the same classes.

    Attributes:
        name: `model_type` in config.json.
        title: as a sentence names it.
        config_class, model_class: transformers' own, by name: importing them takes time.
        supported: settings that change what transformers computes -> the value computed here.
        prefix: of the tensors of transformers' class without heads, in one with heads.
        tensors: our name -> transformers', with `{layer}` in blocks; a module's name stands for its
            weight and its bias. Several of theirs are ours one below the other.
        linear_layers: how transformers calls the linear layers of a block, which LoRA changes.
        may_chat: whether its models may have learnt to chat before.
        conv1d: whether these are its Conv1D, whose weight is stored as [in, out].
        activation_field: of config.json.
        activations: what that may say -> ours.
        pads_vocabulary: whether an embedding may have rows that belong to no token.
        constants: what older versions stored beside the parameters: a name's pattern -> why it is
            not needed, and whether a tensor holds the expected.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    config_class: ClassVar[str]
    model_class: ClassVar[str]
    supported: ClassVar[Mapping[str, Any]]
    prefix: ClassVar[str]
    tensors: ClassVar[Mapping[str, str | tuple[str, ...]]]
    linear_layers: ClassVar[tuple[str, ...]]
    may_chat: ClassVar[bool] = False
    conv1d: ClassVar[bool] = False
    activation_field: ClassVar[str]
    activations: ClassVar[Mapping[str, Activation]] = ACTIVATIONS
    pads_vocabulary: ClassVar[bool] = False
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

    def reads_segments(self, settings: Mapping[str, Any]) -> bool:
        """Whether a model with this content of `config.json` adds its segment to each token."""
        return True

    def reads_chat(self, tokenizer: "PreTrainedTokenizerFast") -> bool:
        """Whether dialogues are laid out as the tokenizer's chat template writes them."""
        return self.may_chat and bool(tokenizer.chat_template)

    def layout(self, tokenizer: "PreTrainedTokenizerFast") -> Layout:
        """How dialogues are laid out for its models.

        Raises UserError for a chat template that is no layout.
        """
        if self.reads_chat(tokenizer):
            return chat_template.layout_of(tokenizer)
        return classic(special_ids(tokenizer))

    def initialise(self, transformer: "Transformer") -> None:
        """Draw new weights."""
        transformer.apply(partial(init_weights, std=transformer.config.initializer_range))

    def read(self, config: Mapping[str, Any]) -> TransformerConfig:
        """The content of a `config.json`, under any name that transformers accepts for a setting.

        What it lacks, or is null, has transformers' default.

        Raises:
            UserError: a setting would change the results in a way that is not supported.
        """
        names = self._config_class().attribute_map
        named = [(names.get(name, name), value) for name, value in config.items()]
        # Of two names of a setting, the one that is not null.
        given = dict(named) | {name: value for name, value in named if value is not None}
        for name, supported in self.supported.items():
            value = given.get(name)
            if value is None:  # which means the default
                continue
            # An empty or false value means "none" to transformers just as null does.
            if (value or None) != (supported or None):
                raise UserError(f"{name} {shown(value)} is not supported; only {supported!r} is.")
        return self.read_config(self.completed(given))

    def completed(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings `given`, and transformers' defaults for what they lack.

        Raises UserError when transformers refuses them.
        """
        defaults = self._config_class()().to_dict()
        return defaults | {name: value for name, value in given.items() if value is not None}

    def _config_class(self) -> Any:
        import transformers

        return getattr(transformers, self.config_class)

    def peer_class(self) -> type["PreTrainedModel"]:
        """transformers' own class with both heads."""
        import transformers

        found: type[PreTrainedModel] = getattr(transformers, self.model_class)
        return found

    def peer(self, settings: Mapping[str, Any]) -> "PreTrainedModel":
        """transformers' own model with these settings of its config class, and random weights."""
        return self.peer_class()(self._config_class()(**settings))

    def activation(self, settings: Mapping[str, Any]) -> Activation:
        """Ours of what `settings` name; raises UserError for one that is not computed here."""
        name = settings[self.activation_field]
        if name not in list(self.activations):  # which may be no string
            raise UserError(
                f"{self.activation_field} {shown(name)} is not supported for "
                f"{self.name}; use one of {', '.join(self.activations)}."
            )
        return self.activations[name]

    def activation_name(self, config: TransformerConfig) -> str:
        """What `activation` reads."""
        return next(k for k, v in self.activations.items() if v == config.activation)

    def tensor_names(self, config: TransformerConfig) -> dict[str, tuple[str, ...]]:
        """Our name of every parameter of a `DoubleHeadsModel` -> its names in transformers.

        Where these are several, they are parts of ours, which `split` tells.
        """
        names = {}
        for ours, theirs in self.tensors.items():
            parts = (theirs,) if isinstance(theirs, str) else theirs
            for kind in _kinds(ours, config):
                for layer in range(config.n_layer if "{layer}" in ours else 1):
                    there = tuple(part.format(layer=layer) + kind for part in parts)
                    names[ours.format(layer=layer) + kind] = there
        return names if config.tied else names | {"lm_head": (LM_HEAD,)}

    def is_linear(self, name: str) -> bool:
        """Whether `name`, of transformers, is the weight of a block's linear layer."""
        return name.endswith(tuple(f".{layer}.weight" for layer in self.linear_layers))

    def stores_transposed(self, name: str) -> bool:
        """Whether transformers stores the tensor that it calls `name` as [in, out]."""
        return self.conv1d and self.is_linear(name)

    def constant(self, name: str) -> tuple[str, Callable[[Tensor], bool]] | None:
        """What `constants` says of a tensor of this name, if it is one."""
        return next((c for pattern, c in self.constants.items() if pattern.fullmatch(name)), None)


def _kinds(module: str, config: TransformerConfig) -> tuple[str, ...]:
    """What a module, by our name of it with `{layer}`, has of `.weight` and `.bias`."""
    if module.endswith(".weight"):
        return ("",)
    in_block = module.rpartition("{layer}.")[2]
    has_bias = {
        "attention.qkv": config.qkv_bias,
        "attention.out": config.out_bias,
        "mlp.gate": config.mlp_bias,
        "mlp.up": config.mlp_bias,
        "mlp.down": config.mlp_bias,
        "multiple_choice_head": True,
    }.get(in_block, config.norm == "layer")
    return (".weight", ".bias") if has_bias else (".weight",)


def split(ours: Tensor, names: Sequence[str], config: TransformerConfig) -> tuple[Tensor, ...]:
    """The parts of one of our parameters that have these `names` in transformers, as views.

    Queries, keys and values are the only parameters of several parts.
    """
    if len(names) == 1:
        return (ours,)
    heads = (config.n_head, config.n_kv_head, config.n_kv_head)
    return ours.split([count * config.head_dim for count in heads])
