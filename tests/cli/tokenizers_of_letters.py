"""Tokenizers small enough to see through."""

from tokenizers import pre_tokenizers
from transformers import GPT2Tokenizer, OpenAIGPTTokenizer


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
