"""`generation_config.json`: how transformers' `generate` draws, and which tokens end a text there.

A checkpoint's is kept for those who load the fine-tuned model in transformers. Here only its ends
are read: how a reply is drawn, `SamplingParams` says.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convai_fast.errors import UserError
from convai_fast.files import read_json
from convai_fast.model import families
from convai_fast.model.config import TransformerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILE = "generation_config.json"
_ENDS = "eos_token_id"


def read(folder: Path) -> dict[str, Any]:
    """The content of the folder's file; without one the ends in its `config.json`, if it has any.

    Raises UserError when the file holds no JSON object.
    """
    if (folder / FILE).is_file():
        content = read_json(folder / FILE)
        content.pop("_from_model_config", None)  # it would stand for config.json
        return content
    ends = read_json(folder / "config.json").get(_ENDS)
    return {} if ends is None else {_ENDS: ends}


def ends_of(content: Mapping[str, Any], tokenizer: "PreTrainedTokenizerFast") -> set[int]:
    """The tokens that end a text, by the `content` of a file.

    They have to be special tokens, such as `</s>`: where nobody has set an end, transformers writes
    a number that may be any word's.
    """
    ends = content.get(_ENDS)
    ids = ends if isinstance(ends, list) else [ends]
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {id for id in ids if type(id) is int and id in special}


def completed(
    content: Mapping[str, Any], config: TransformerConfig, tokenizer: "PreTrainedTokenizerFast"
) -> dict[str, Any]:
    """`content` with all tokens that end a reply: the layout's, the tokenizer's and its own."""
    ends = ends_of(content, tokenizer)
    with suppress(UserError):  # a tokenizer that has no layout is saved all the same
        ends.update(families.of(config).layout(tokenizer).ends)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "pad_token_id", _ENDS)}
    if ids[_ENDS] is not None:
        ends.add(ids[_ENDS])
    ids[_ENDS] = sorted(ends) or None
    return {**content, **{name: value for name, value in ids.items() if value is not None}}
