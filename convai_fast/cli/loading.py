"""What the commands that use a fine-tuned model begin with."""

import hashlib

import torch
from transformers import PreTrainedTokenizerFast

from convai_fast.archive import unpacked
from convai_fast.data.tokenizer import load_tokenizer
from convai_fast.errors import UserError
from convai_fast.model.double_heads import DoubleHeadsModel


def load_fine_tuned(path: str) -> tuple[DoubleHeadsModel, PreTrainedTokenizerFast]:
    """Load the model at `path`, a folder, a tar archive or a Hub id, and its tokenizer.

    Raises UserError when the model does not embed exactly the tokenizer's tokens.
    """
    with unpacked(path) as source:
        model = DoubleHeadsModel.from_pretrained(source.path)
        tokenizer = load_tokenizer(source.path)
    if len(tokenizer) != model.config.vocab_size:
        raise UserError(
            f"{path} has embeddings for {model.config.vocab_size} tokens, but its tokenizer with "
            f"the dialogue's special tokens has {len(tokenizer)}: fine-tune it with `convai-fast "
            "train` first"
        )
    return model, tokenizer


def model_fingerprint(model: DoubleHeadsModel) -> str:
    """A hash of the model's shape and weights, since training again keeps a folder's name."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
