"""What the commands that use a fine-tuned model begin with."""

import hashlib

import torch
from transformers import PreTrainedTokenizerFast

from convai_fast.archive import unpacked
from convai_fast.data.tokenizer import add_special_tokens, read_tokenizer
from convai_fast.errors import UserError
from convai_fast.model.double_heads import DoubleHeadsModel


def load_fine_tuned(path: str) -> tuple[DoubleHeadsModel, PreTrainedTokenizerFast]:
    """Load the model at `path`, a folder, a tar archive or a Hub id, and its tokenizer.

    Raises UserError when the model does not embed exactly the tokenizer's tokens.
    """
    with unpacked(path) as source:
        model = DoubleHeadsModel.from_pretrained(source.path)
        tokenizer = read_tokenizer(source.path)
    # Special tokens that are nowhere written down must not be given the rows of other ones.
    rows, tokens = model.config.vocab_size, len(tokenizer)
    missing = add_special_tokens(tokenizer)
    if rows != tokens or missing:
        raise UserError(
            f"{path} has embeddings for {rows} tokens, but its tokenizer has {tokens} and lacks "
            f"{missing or 'none'} of the dialogue's special tokens: restore the tokenizer's files "
            "(an old library's special tokens are in special_tokens.txt or added_tokens.json), "
            "or fine-tune the model with `convai-fast train` first"
        )
    return model, tokenizer


def model_fingerprint(model: DoubleHeadsModel) -> str:
    """A hash of the model's shape and weights, since training again keeps a folder's name."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
