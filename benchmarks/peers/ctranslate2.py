"""CTranslate2. `CT2_USE_MKL` in the environment chooses MKL (1) or oneDNN (0)."""

import json
from pathlib import Path

import ctranslate2

from benchmarks.peers import Drawing, converted


class Peer:
    """All prompts in one batch; without segments, which it has no input for."""

    package = "ctranslate2"

    def __init__(self, folder: Path, number_format: str, num_threads: int) -> None:
        # Weights are stored as float32 and quantised when they are loaded. "int8" alone also
        # means to choose what is left in floating point, which is float32 on a CPU.
        kind = {"int8": "int8_float32"}.get(number_format, number_format)
        path = converted(
            folder,
            "ctranslate2",
            lambda out: ctranslate2.converters.TransformersConverter(str(folder)).convert(
                str(out), force=True
            ),
        )
        self.vocabulary = json.loads((path / "vocabulary.json").read_text(encoding="utf-8"))
        self.generator = ctranslate2.Generator(
            str(path), compute_type=kind, intra_threads=num_threads
        )

    def generate(
        self, prompts: list[list[int]], new_tokens: int, drawing: Drawing
    ) -> list[list[int]]:
        results = self.generator.generate_batch(
            [[self.vocabulary[token] for token in prompt] for prompt in prompts],
            max_length=new_tokens,
            min_length=new_tokens,
            sampling_topk=1 if drawing.is_greedy else drawing.top_k,
            sampling_topp=drawing.top_p,
            sampling_temperature=drawing.temperature or 1.0,
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]
