"""What pytorch-pretrained-bert 0.6 and pytorch-transformers 1.x wrote otherwise than today.

                      pytorch-pretrained-bert           pytorch-transformers
language-model head   lm_head.decoder.weight            lm_head.weight
multiple-choice head  multiple_choice_head.linear.*     multiple_choice_head.summary.*
embedding rows        vocab_size + n_special            vocab_size
model_type            not in config.json                not in config.json

The multiple-choice head of the second, and all other names of tensors, are those of today.
"""

from collections.abc import Collection, Mapping
from typing import Any

from convai_fast.errors import UserError, shown
from convai_fast.model import families

_RENAMED = {
    "lm_head.decoder.weight": "lm_head.weight",
    "multiple_choice_head.linear.weight": "multiple_choice_head.summary.weight",
    "multiple_choice_head.linear.bias": "multiple_choice_head.summary.bias",
}
# What settings were called, and their values, in the first versions of pytorch-transformers.
_OLD_SETTINGS = {
    "summary_type": ("summary_type", {"token_ids": "cls_index"}),
    "summary_dropout": ("summary_first_dropout", {}),
}


def current_name(name: str) -> str:
    """The name that transformers gives today to a tensor that an old library called `name`."""
    return _RENAMED.get(name, name)


def describe_layout(config: Mapping[str, Any], names: Collection[str]) -> str:
    """Who wrote a checkpoint with this content of `config.json` and these names of tensors."""
    if config.get("model_type") is not None:
        return "transformers"
    if "n_special" in config or not _RENAMED.keys().isdisjoint(names):
        return "pytorch-pretrained-bert 0.6"
    return "pytorch-transformers 1.x"


def current_config(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The content of an old `config.json` with `model_type` and every embedding row counted.

    `names` are those of the weights' tensors, which tell the family where the config does not.
    A config that has a `model_type` is today's, and stays as it is.

    Raises:
        UserError: `n_special` is no count, `predict_special_tokens` is false, or the model is of
            no family that is supported.
    """
    config = dict(config)
    if config.get("model_type") is not None:
        return config
    for old, (name, values) in _OLD_SETTINGS.items():
        if old in config:
            value = config.pop(old)
            config[name] = values.get(value, value) if isinstance(value, str) else value
    if config.get("predict_special_tokens") is False:
        raise UserError(
            "predict_special_tokens false is not supported: such a model cannot write <eos>, so it "
            "must be trained with predict_special_tokens true."
        )
    n_special = config.pop("n_special", None) or 0
    if type(n_special) is not int or n_special < 0:
        raise UserError(f"n_special must be a whole number from 0 on, not {shown(n_special)}.")
    if n_special and type(config.get("vocab_size")) is not int:
        raise UserError("vocab_size must be a whole number beside n_special; add it.")
    if n_special:
        config["vocab_size"] += n_special
    config["model_type"] = families.find(config, names).name
    return config
