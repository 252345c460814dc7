"""llama.cpp through llama-cpp-python's low-level calls, and how a model becomes a GGUF file."""

import json
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType
from safetensors.numpy import load_file
from transformers import AutoConfig

from benchmarks.peers import Drawing, converted

TYPES = {
    "float32": GGMLQuantizationType.F32,
    "bfloat16": GGMLQuantizationType.BF16,
    "int8": GGMLQuantizationType.Q8_0,
}


class Peer:
    """A sequence a prompt, all of them in one batch, with flash attention.

    The likeliest token is found by numpy, and other tokens are drawn by llama.cpp's own samplers.
    """

    package = "llama-cpp-python"

    def __init__(self, folder: Path, number_format: str, num_threads: int) -> None:
        path = converted(
            folder, f"gguf-{number_format}", lambda out: convert(folder, out, TYPES[number_format])
        )
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.use_mmap = False
        file = str(path / "model.gguf").encode()
        self.model = llama_cpp.llama_model_load_from_file(file, settings)
        self.vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
        self.num_threads = num_threads
        self.shape = (0, 0)
        self.context = self.batch = None

    def generate(
        self, prompts: list[list[int]], new_tokens: int, drawing: Drawing
    ) -> list[list[int]]:
        num, length = len(prompts), len(prompts[0])  # all of one length
        if self.shape != (num, length + new_tokens):
            self._make_context(num, length + new_tokens)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        samplers = [] if drawing.is_greedy else [_sampler(drawing, seed) for seed in range(num)]

        def decode(tokens: list[list[int]], start: int) -> list[int]:
            """Add as many tokens to each sequence, and draw its next."""
            width = len(tokens[0])
            for i, (row, column) in enumerate(np.ndindex(num, width)):
                self.batch.token[i] = tokens[row][column]
                self.batch.pos[i] = start + column
                self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, row
                self.batch.logits[i] = column == width - 1
            self.batch.n_tokens = num * width
            if llama_cpp.llama_decode(self.context, self.batch):
                raise RuntimeError("llama_decode failed")
            if samplers:
                return [
                    llama_cpp.llama_sampler_sample(sampler, self.context, (row + 1) * width - 1)
                    for row, sampler in enumerate(samplers)
                ]
            logits = llama_cpp.llama_get_logits(self.context)
            return np.ctypeslib.as_array(logits, (num, self.vocab_size)).argmax(1).tolist()

        steps = [decode(prompts, 0)]
        while len(steps) < new_tokens:
            steps.append(decode([[token] for token in steps[-1]], length + len(steps) - 1))
        for sampler in samplers:
            llama_cpp.llama_sampler_free(sampler)
        return [list(reply) for reply in zip(*steps, strict=True)]

    def _make_context(self, num: int, capacity: int) -> None:
        if self.context is not None:
            llama_cpp.llama_free(self.context)
            llama_cpp.llama_batch_free(self.batch)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = 256 * num  # a sequence has its share of it, in units of 256
        settings.n_batch = num * capacity
        settings.n_ubatch = min(512, settings.n_batch)  # 4,096 is slower
        settings.n_seq_max = num
        settings.n_threads = settings.n_threads_batch = self.num_threads
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        settings.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 1)
        self.shape = (num, capacity)


def _sampler(drawing: Drawing, seed: int) -> object:
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    if drawing.top_k:
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_top_k(drawing.top_k))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_temp(drawing.temperature))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_top_p(drawing.top_p, 1))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(seed))
    return chain


def convert(folder: Path, out: Path, kind: GGMLQuantizationType) -> None:
    """Write the model of `folder` with matrices of `kind`, and without its tokenizer."""
    config = AutoConfig.from_pretrained(folder)
    writer = gguf.GGUFWriter(out / "model.gguf", config.model_type)  # by the same names
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])

    [architecture] = (key for key, name in MODEL_ARCH_NAMES.items() if name == config.model_type)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if ".c_" in name and name.endswith("weight"):
            tensor = np.ascontiguousarray(tensor.T)
        if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _neighbours(tensor, config.head_dim)
        is_matrix = tensor.ndim == 2 and "wpe" not in name
        stored = kind if is_matrix else GGMLQuantizationType.F32
        data = gguf.quants.quantize(tensor, stored)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _neighbours(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows that turn together one behind the other, as llama.cpp turns a Llama's."""
    halves = weight.reshape(-1, 2, head_dim // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
