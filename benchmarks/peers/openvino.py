"""OpenVINO GenAI's continuous batching, and how a GPT-2 becomes what it reads."""

import shutil
from pathlib import Path

import nncf
import numpy as np
import openvino as ov
import openvino_genai as genai
import openvino_tokenizers
import torch
import torch.nn.functional as F
from openvino import opset13 as ops
from openvino._offline_transformations import apply_make_stateful_transformation
from torch import Tensor, nn
from transformers import AutoTokenizer, GPT2LMHeadModel

from benchmarks.peers import Drawing, converted


class Peer:
    """All prompts in one step; weights of int8 are symmetric, a scale for each output channel.

    "bfloat16" is the float32 model with the hint to compute in bfloat16, as is what "int8" leaves
    in floating point. Keys and values are kept in 8 bits, as by default.
    """

    package = "openvino-genai"

    def __init__(self, folder: Path, number_format: str, num_threads: int) -> None:
        path = converted(folder, "openvino", lambda out: convert(folder, out))
        if number_format == "int8":
            path = converted(
                folder, "openvino-int8", lambda out: quantize(folder / "openvino", out)
            )
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 2  # GB
        scheduler.max_num_batched_tokens = 4096
        scheduler.enable_prefix_caching = False
        settings = {
            "INFERENCE_NUM_THREADS": num_threads,
            "INFERENCE_PRECISION_HINT": "f32" if number_format == "float32" else "bf16",
        }
        self.pipeline = genai.ContinuousBatchingPipeline(str(path), scheduler, "CPU", settings)

    def generate(
        self, prompts: list[list[int]], new_tokens: int, drawing: Drawing
    ) -> list[list[int]]:
        config = genai.GenerationConfig(
            max_new_tokens=new_tokens, min_new_tokens=new_tokens, ignore_eos=True
        )
        if not drawing.is_greedy:
            config.do_sample = True
            config.temperature = drawing.temperature
            config.top_k = drawing.top_k
            config.top_p = drawing.top_p
        inputs = [ov.Tensor(np.array([prompt])) for prompt in prompts]
        replies = self.pipeline.generate(inputs, [config] * len(prompts))
        return [reply.m_generation_ids[0] for reply in replies]


class _WithCache(nn.Module):
    """GPT-2 with keys and values as inputs and outputs, in the form that OpenVINO recognises."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        super().__init__()
        self.body, self.head, self.num_heads = model.transformer, model.lm_head, model.config.n_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        beam_idx: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, ...]:
        hidden = self.body.wte(input_ids) + self.body.wpe(position_ids)
        key_positions = torch.arange(attention_mask.shape[1])
        is_past = key_positions <= position_ids[:, None, :, None]
        mask = is_past & (attention_mask[:, None, None, :] > 0)
        present = []
        for block, (past_key, past_value) in zip(self.body.h, past, strict=True):
            query, key, value = (
                part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                for part in block.attn.c_attn(block.ln_1(hidden)).chunk(3, -1)
            )
            key = torch.cat([past_key.index_select(0, beam_idx), key], 2)
            value = torch.cat([past_value.index_select(0, beam_idx), value], 2)
            present += [key, value]
            attended = F.scaled_dot_product_attention(query, key, value, mask)
            hidden = hidden + block.attn.c_proj(attended.transpose(1, 2).flatten(2))
            hidden = hidden + block.mlp(block.ln_2(hidden))
        return self.head(self.body.ln_f(hidden)), *present


@torch.no_grad()
def convert(folder: Path, out: Path) -> None:
    """Write the model of `folder` with a state for keys and values, and its tokenizer."""
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    heads, width = model.config.n_head, model.config.n_embd // model.config.n_head
    layer = (torch.zeros(2, heads, 5, width), torch.zeros(2, heads, 5, width))
    example = {
        "input_ids": torch.zeros(2, 3, dtype=torch.int64),
        "attention_mask": torch.ones(2, 8, dtype=torch.int64),
        "position_ids": torch.arange(5, 8).expand(2, 3),
        "beam_idx": torch.arange(2, dtype=torch.int32),
        "past": [layer] * model.config.n_layer,
    }
    graph = ov.convert_model(_WithCache(model), example_input=example)

    *inputs, beam_idx = graph.inputs[:4]
    for port, name in zip(graph.inputs[:4], example, strict=False):
        port.set_names({name})
    for port in inputs:
        port.node.set_partial_shape(ov.PartialShape([-1, -1]))
    beam_idx.node.set_partial_shape(ov.PartialShape([-1]))
    graph.outputs[0].set_names({"logits"})
    states = {}
    for i, (past, present) in enumerate(zip(graph.inputs[4:], graph.outputs[1:], strict=True)):
        past.set_names({f"past.{i}"})
        present.set_names({f"present.{i}"})
        past.node.set_partial_shape(ov.PartialShape([-1, heads, -1, width]))
        states[f"past.{i}"] = f"present.{i}"
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, states)

    # Continuous batching looks for states that begin empty.
    rows = ops.gather(ops.shape_of(graph.input("input_ids")), ops.constant([0]), ops.constant(0))
    shape = ops.concat([rows, ops.constant(np.array([heads, 0, width]))], 0)
    empty = ops.broadcast(ops.constant(np.float32(0)), shape)
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([empty])
    graph.validate_nodes_and_infer_types()
    ov.save_model(graph, out / "openvino_model.xml", compress_to_fp16=False)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    pair = openvino_tokenizers.convert_tokenizer(tokenizer, with_detokenizer=True)
    for part, name in zip(pair, ("tokenizer", "detokenizer"), strict=True):
        ov.save_model(part, out / f"openvino_{name}.xml")
    shutil.copy(folder / "config.json", out)


def quantize(folder: Path, out: Path) -> None:
    """Write the converted model of `folder` with int8 weights."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    graph = ov.Core().read_model(folder / "openvino_model.xml")
    graph = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
    ov.save_model(graph, out / "openvino_model.xml", compress_to_fp16=False)
