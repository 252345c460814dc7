"""A tokenizer as OpenAI GPT's, of a hundred tokens."""

import string

import transformers

from convai_fast.dialogue.tokenizer import add_special_tokens


def openai_gpt_tokenizer():
    """Words end with </w>, and there is no space in a token."""
    letters = [*string.ascii_lowercase, *string.digits, *".,;:!?'-"]
    merges = [("t", "e"), ("te", "a</w>"), ("l", "i"), ("k", "e</w>"), ("t", "h"), ("th", "e</w>")]
    tokens = ["<unk>", *letters, *(f"{each}</w>" for each in letters), *map("".join, merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = transformers.OpenAIGPTTokenizer(vocab=vocabulary, merges=merges)
    add_special_tokens(tokenizer)
    return tokenizer
