"""OpenVINO GenAI's continuous batching, and how a model becomes what it reads."""

import shutil
from pathlib import Path

import nncf
import numpy as np
import openvino as ov
import openvino_genai as genai
import openvino_tokenizers
import torch
from openvino import opset13 as ops
from openvino._offline_transformations import apply_make_stateful_transformation
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

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
    """A model with keys and values as inputs and outputs, in the form that OpenVINO recognises."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        beam_idx: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, ...]:
        key_positions = torch.arange(attention_mask.shape[1])
        is_past = key_positions <= position_ids[:, None, :, None]
        mask = is_past & (attention_mask[:, None, None, :] > 0)
        cache = DynamicCache()
        for key, value in past:
            layer = DynamicLayer()
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = (part.index_select(0, beam_idx) for part in (key, value))
            cache.layers.append(layer)
        logits = self.model(
            input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache
        ).logits
        present = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        return logits, *present


@torch.no_grad()
def convert(folder: Path, out: Path) -> None:
    """Write the model of `folder` with a state for keys and values, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    layer = (torch.zeros(2, heads, 5, width), torch.zeros(2, heads, 5, width))
    example = {
        "input_ids": torch.zeros(2, 3, dtype=torch.int64),
        "attention_mask": torch.ones(2, 8, dtype=torch.int64),
        "position_ids": torch.arange(5, 8).expand(2, 3),
        "beam_idx": torch.arange(2, dtype=torch.int32),
        "past": [layer] * config.num_hidden_layers,
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
