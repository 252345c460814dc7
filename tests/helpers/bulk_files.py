"""Files of the command `generate`: a small model, and lines of requests and replies."""

import json

import torch

from convai_fast.dialogue.tokenizer import load_tokenizer
from convai_fast.model import TransformerConfig
from tests.helpers.random_models import model_that_ranks

LENGTH = ["--max_length", "12", "--min_length", "12"]


def save_model(folder, tokenizer, seed=0):
    tokenizer.save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(seed)
    config = {"model_type": "gpt2", "vocab_size": len(tokenizer), "n_positions": 64}
    config |= {"n_embd": 16, "n_layer": 1, "n_head": 2}
    model_that_ranks(TransformerConfig.from_transformers(config)).save_pretrained(folder, tokenizer)
    return str(folder)


def write_lines(path, *records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def read_lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def files(folder):
    return sorted(path.name for path in folder.iterdir())
