"""Tokenizers small enough to see through."""

import string

import torch
from tokenizers import pre_tokenizers
from transformers import GPT2Tokenizer, OpenAIGPTTokenizer

from convai_fast.dialogue.tokenizer import add_special_tokens, load_tokenizer
from convai_fast.model import TransformerConfig
from tests.helpers.random_models import model_that_ranks


def gpt_tokenizer():
    """Letters and a few words, in OpenAI GPT's manner: </w> marks the end of a word."""
    letters = "abcdefghijklmnopqrstuvwxyz.,?'"
    pieces = ["<unk>", *letters, *(letter + "</w>" for letter in letters)]
    pieces += ["te", "tea</w>", "li", "ke</w>", "like</w>"]
    merges = [("t", "e"), ("te", "a</w>"), ("l", "i"), ("k", "e</w>"), ("li", "ke</w>")]
    return OpenAIGPTTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)


def byte_tokenizer():
    """A token a byte, in GPT-2's alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return GPT2Tokenizer(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[])


def save_model_of_letters(folder):
    """Write a small OpenAI GPT with `gpt_tokenizer` into a folder, and return that."""
    gpt_tokenizer().save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(0)
    config = TransformerConfig.from_transformers(
        dict(model_type="openai-gpt", vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4)
    )
    model_that_ranks(config).save_pretrained(folder, tokenizer)
    return folder


def openai_gpt_tokenizer():
    """As `gpt_tokenizer`, also with digits and with the special tokens."""
    letters = [*string.ascii_lowercase, *string.digits, *".,;:!?'-"]
    merges = [("t", "e"), ("te", "a</w>"), ("l", "i"), ("k", "e</w>"), ("t", "h"), ("th", "e</w>")]
    tokens = ["<unk>", *letters, *(f"{each}</w>" for each in letters), *map("".join, merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = OpenAIGPTTokenizer(vocab=vocabulary, merges=merges)
    add_special_tokens(tokenizer)
    return tokenizer
