"""Small models with OpenAI GPT's and GPT-2's kind of tokenizer, and dialogues for them."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from convai_fast.data.builtin import builtin_dialogues
from convai_fast.model.double_heads import DoubleHeadsModel
from tests.helpers.small_tokenizers import openai_gpt_tokenizer


@pytest.fixture(scope="session", params=["openai-gpt", "gpt2"])
def models(request, tokenizer, tmp_path_factory):
    """The same random weights as transformers' class and as ours, and a tokenizer."""
    torch.manual_seed(0)
    shape = dict(n_positions=192, n_embd=32, n_layer=2, n_head=4)
    if request.param == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=len(tokenizer), **shape, bos_token_id=None, eos_token_id=None
        )
        theirs = transformers.GPT2DoubleHeadsModel(config)
    else:
        tokenizer = openai_gpt_tokenizer()
        config = transformers.OpenAIGPTConfig(vocab_size=len(tokenizer), **shape)
        theirs = transformers.OpenAIGPTDoubleHeadsModel(config)
    # Fresh weights are so small that everything is nearly equally likely.
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return SimpleNamespace(
        theirs=theirs.eval(), ours=DoubleHeadsModel.from_pretrained(folder), tokenizer=tokenizer
    )


@pytest.fixture
def dialogues():
    return builtin_dialogues(num_train=8, num_valid=3)
