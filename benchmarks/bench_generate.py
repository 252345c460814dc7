"""Replies in bulk: the engine beside transformers' `generate`; `bench_peers.py` has the others.

python -m pytest benchmarks/bench_generate.py --benchmark-only -k "gpt2 and batch"
"""

import statistics
import time
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from benchmarks import shapes
from benchmarks.peers import Drawing, transformers
from benchmarks.timing import memory_bandwidth, record, seconds_per_call
from convai_fast import GenerationEngine
from convai_fast.comparison.measure import ratios
from convai_fast.generation.request import build_prompt
from convai_fast.loading import layout_for

ROUNDS = {"one": 5, "batch": 3, "many": 1, "real": 2}
DRAWING = Drawing(temperature=0.7, top_p=0.9)


def peers_of(architecture, shape, prompts, model, tokenizer, folder):
    """Name -> (what writes `new_tokens` after every prompt, how many it writes)."""
    model.save_pretrained(folder / "model", tokenizer)
    AutoModelForCausalLM.from_pretrained(folder / "model").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    threads = torch.get_num_threads()
    ids = [list(prompt.input_ids) for prompt in prompts]
    segments = [list(prompt.token_type_ids) for prompt in prompts]
    # OpenAI GPT has no cache there: 4 tokens instead of 32, which flatters it, and still take long.
    new_tokens = shape.new_tokens if architecture == "gpt2" else 4
    formats = ["float32"]
    if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        formats.append("bfloat16")  # elsewhere emulated
    ways = {}
    for kind in formats:
        peer = transformers.Peer(folder, kind, threads)
        write = partial(peer.generate, ids, new_tokens, DRAWING, segments)
        ways[f"transformers {kind}"] = (write, new_tokens * len(prompts))
    return ways


def floor_seconds(model, shape, prompts):
    """The time of the matrix products alone, or of reading the weights, whichever is longer."""
    x, w = torch.randn(1024, 768), torch.randn(3072, 768)
    flops_rate = 2 * x.shape[0] * w.numel() / seconds_per_call(lambda: x @ w.T, 0.2)
    head = model.transformer.token_embedding.weight.numel()
    body = sum(p.numel() for block in model.transformer.blocks for p in block.parameters())
    prompt_tokens = sum(len(prompt.input_ids) for prompt in prompts)
    prefill = 2 * (body * prompt_tokens + head * len(prompts)) / flops_rate
    step = max(
        2 * (body + head) * len(prompts) / flops_rate, 4 * (body + head) / memory_bandwidth()
    )
    return prefill + step * (shape.new_tokens - 1)


def where_time_goes(engine, requests):
    """Shares of the wall time: matrix products, attention, sampling, other torch, the rest."""
    forget(engine)
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        engine.generate(requests)
    wall = time.perf_counter() - started
    parts = {"matrix products": 0.0, "attention": 0.0, "sampling": 0.0, "other torch": 0.0}
    names = {
        "convai_fast::decoder_step": "matrix products",  # without the attention within
        "convai_fast::packed_linear": "matrix products",
        "convai_fast::attention": "attention",
        "convai_fast::sample": "sampling",
    }
    for event in profiler.key_averages():
        parts[names.get(event.key, "other torch")] += event.self_cpu_time_total / 1e6
    parts["Python and the rest"] = max(0.0, wall - sum(parts.values()))
    return {name: seconds / wall for name, seconds in parts.items()}


def forget(engine):
    """Let no prompt be found in the cache of an earlier run."""
    engine.clear_prefixes()


@pytest.mark.parametrize("workload", shapes.GENERATE_SHAPES)
@pytest.mark.parametrize("architecture", ["openai-gpt", "gpt2"])
def test_generate(benchmark, architecture, workload, tmp_path, say):
    shape = shapes.GENERATE_SHAPES[workload]
    model, tokenizer = shapes.model_and_tokenizer(architecture)
    name, requests = shapes.generate_requests(shape)
    prompts = [
        build_prompt(
            r, tokenizer, layout_for(tokenizer, model.config), model.config.vocab_size, 480
        )
        for r in requests
    ]
    engines = {
        kind: GenerationEngine(model, tokenizer, max_batch_size=64, weights=kind)
        for kind in ("float32", "bfloat16", "int8")
    }

    def ours(engine):
        forget(engine)
        engine.generate(requests)

    num_tokens = shape.new_tokens * shape.num_prompts
    ways = {
        kind: (lambda engine=engine: ours(engine), num_tokens) for kind, engine in engines.items()
    }
    ways |= peers_of(architecture, shape, prompts, model, tokenizer, tmp_path)
    times = {way: [] for way in ways}  # seconds a token
    for function, _ in ways.values():
        function()
    for _ in range(ROUNDS[workload]):
        for way, (function, count) in ways.items():
            started = time.perf_counter()
            function()
            times[way].append((time.perf_counter() - started) / count)
    benchmark.pedantic(ways["float32"][0], rounds=1)

    floor = floor_seconds(model, shape, prompts)
    lines = [f"\n{architecture}, {shape} ({name}); tokens/s, and float32 against it:"]
    figures = {"floor_tokens_per_s": round(num_tokens / floor, 1)}
    for way, seconds in times.items():
        speed = 1 / statistics.median(seconds)
        median, least, most = ratios(times, "float32", way)
        figures[way] = round(speed, 1)
        lines.append(f"  {way:<40} {speed:8.1f}   {median:6.2f} x ({least:.2f}-{most:.2f})")
    lines.append(f"  float32's floor (matrix products alone)  {num_tokens / floor:8.1f}")
    for kind, engine in engines.items():
        shares = where_time_goes(engine, requests)
        figures[f"{kind}_shares"] = {part: round(share, 3) for part, share in shares.items()}
        lines.append(
            f"  {kind}: " + ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
        )
    record("generate", f"{architecture}, {shape}, {name}", figures)
    say("\n".join(lines))
