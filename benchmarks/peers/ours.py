"""This library, run as its peers are."""

from pathlib import Path

from benchmarks.peers import Drawing
from convai_fast import GenerationEngine, Request, SamplingParams, load


class Peer:
    """The engine; no prompt is found in the cache of an earlier call."""

    package = "convai-fast"

    def __init__(self, folder: Path, number_format: str, num_threads: int) -> None:
        model, tokenizer = load(str(folder))
        self.engine = GenerationEngine(model, tokenizer, weights=number_format)

    def generate(
        self, prompts: list[list[int]], new_tokens: int, drawing: Drawing
    ) -> list[list[int]]:
        params = SamplingParams(
            max_length=new_tokens,
            min_length=new_tokens,
            temperature=drawing.temperature,
            top_k=drawing.top_k,
            top_p=drawing.top_p,
        )
        self.engine.clear_prefixes()
        replies = self.engine.generate(Request(input_ids=p, params=params) for p in prompts)
        return [reply.token_ids for [reply] in replies]
