"""Replies of GPT-2 124M in bulk beside transformers' `generate`: 256 prompts, top-p 0.9.

The mean context of a new token is 160. What a step takes without the prompts is the difference of
two lengths of replies.
"""

import statistics
from functools import partial

import torch

from benchmarks.gpu import workload
from benchmarks.gpu.clock import figures, in_turn
from benchmarks.gpu.notes import Notes, Setting
from convai_fast.comparison import plain
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Request

ROWS, PROMPT_TOKENS, NEW_TOKENS, FEW_TOKENS = 256, 96, 128, 2
DRAW = {"temperature": 0.7, "top_p": 0.9}


def run(notes: Notes, setting: Setting) -> None:
    """The engine beside the dynamic cache, and beside the static one, which compiles for long."""
    rows = 4 if setting.smoke else ROWS
    new_tokens = 6 if setting.smoke else NEW_TOKENS
    model = workload.model("gpt2", setting)
    vocab_size = model.config.vocab_size
    tokenizer = workload.tokenizer(setting.smoke, vocab_size)
    theirs = workload.language_model(model, torch.bfloat16)
    engine = GenerationEngine(model, tokenizer, max_batch_size=rows, weights="bfloat16")
    generator = torch.Generator().manual_seed(0)

    def prompts() -> list[list[int]]:
        """Other ones each time: nothing is to be copied from a call before."""
        size = (rows, PROMPT_TOKENS)
        return torch.randint(1010, vocab_size, size, generator=generator).tolist()

    def ours(count: int) -> None:
        params = SamplingParams(max_length=count, min_length=count, **DRAW)
        replies = engine.generate(Request(input_ids=ids, params=params) for ids in prompts())
        if any(len(reply.token_ids) != count for [reply] in replies):
            raise RuntimeError("a reply is not as long as it should be")

    def plainly(count: int, **settings: str) -> None:
        plain.generate(theirs, prompts(), count, **DRAW, **settings)

    name = f"gpt2 bfloat16, {rows} x {PROMPT_TOKENS} tokens, {new_tokens} new"
    peers = {
        "dynamic_cache": plainly,
        "static_cache": partial(plainly, cache_implementation="static"),
    }
    for peer, way in peers.items():
        with notes.attempt(f"{name}, {peer}"):
            calls = {"convai_fast": ours, peer: way}
            ways = {each: partial(call, new_tokens) for each, call in calls.items()}
            times = in_turn(ways, setting, rounds=3)
            values = figures(times)
            for each, seconds in times.items():
                total = rows * new_tokens / statistics.median(seconds)
                values[f"{each}_tokens_s"] = round(total)
            if peer == "dynamic_cache":
                short = in_turn(
                    {each: partial(call, FEW_TOKENS) for each, call in calls.items()},
                    setting,
                    rounds=3,
                )
                for each, seconds in short.items():
                    rest = statistics.median(times[each]) - statistics.median(seconds)
                    more = rows * (new_tokens - FEW_TOKENS)
                    values[f"{each}_steps_tokens_s"] = round(more / rest)
            notes.figure(f"{name}, {peer}", **values)
