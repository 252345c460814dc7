"""Broken lines of requests: a prompt comes out, or a UserError of one sentence."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch

from convai_fast.bulk.request_line import read_id, read_object, to_ranking, to_request
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.dialogue.new_tokenizer import train_tokenizer
from convai_fast.errors import UserError
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.params import SamplingParams
from convai_fast.model import TransformerConfig
from tests.fuzz.damage import check_sentence, mutate_bytes, mutate_json
from tests.helpers.random_models import model_that_ranks

PARAMS = SamplingParams(max_length=12)
MESSAGES = [
    {"role": "system", "content": "i sing .\ni am old ."},
    {"role": "user", "content": "hello !"},
    {"role": "assistant", "content": [{"type": "text", "text": "hi ."}]},
    {"role": "user", "content": "do you sing ?", "name": "ann"},
]
SETTINGS = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "n": 2, "seed": 3}
LINES = [
    {"id": "a", "persona": ["i sing ."], "history": ["hello !", "hi .", "and you ?"], **SETTINGS},
    {"id": 7, "persona": [[5, 6]], "history": [[7, 8, 9]], "max_length": 4, "min_length": 2},
    {"id": 1.5, "input_ids": [5, 6, 7], "token_type_ids": [2, 2, 3], "logprobs": True},
    {"prompt": "hello !", "system": "i sing .", "max_tokens": 3, "stop": ["a", "\n"]},
    {"messages": MESSAGES, "do_sample": False, "stop": "x", "repetition_penalty": 1.2},
    {"conversation": [{"from": "human", "value": "hello !"}], "personality": ["i sing ."]},
    {"id": "c", "history": ["hello !"], "candidates": ["hi .", "bye ."], "top_k": 3},
    {"id": "d", "history": [[7, 8]], "candidates": [[5, 6], [7]]},
    {
        "custom_id": "b",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": MESSAGES, "max_completion_tokens": 3, "tools": []},
    },
]
ENCODED = [json.dumps(line).encode() for line in LINES]


def fuzzer(folder: Path) -> Callable[[int], str]:
    """What reads the line of a number and builds its prompt, and tells how that ended."""
    tokenizer = train_tokenizer(builtin_dialogues(num_train=8, num_valid=1)["train"], 300)
    shape = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 64}
    config = TransformerConfig.from_transformers({**shape, "vocab_size": len(tokenizer)})
    torch.manual_seed(0)
    engine = GenerationEngine(model_that_ranks(config).eval(), tokenizer)

    def ask(number: int) -> str:
        rng = random.Random(number)
        line = rng.choice(ENCODED)
        for _ in range(rng.choice([0, 1, 1, 2, 3])):
            line = mutate_json(rng, line)
        if rng.random() < 0.2:
            line = mutate_bytes(rng, line)
        try:
            record = read_object(line)
            read_id(record)
            if b"candidates" in line:
                request, candidates, _ = to_ranking(record)
                engine.rank(request, candidates)
            else:
                request, _ = to_request(record, PARAMS, seed=number)
                engine.check(request)
        except UserError as error:
            check_sentence(str(error))
            return "refused"
        return "asked"

    return ask
