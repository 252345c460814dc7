"""The named workloads: what is measured, in one place, so that figures can be compared."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from convai_fast.data.batches import Batch, DialogueBatches, Layout
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.data.readers import load_dialogues
from convai_fast.data.store import DialogueStore
from convai_fast.dialogue.dialogue import Dialogue
from convai_fast.dialogue.format import SPECIAL_TOKENS
from convai_fast.dialogue.new_tokenizer import train_tokenizer
from convai_fast.dialogue.tokenizer import add_special_tokens, load_tokenizer
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Request
from convai_fast.model import families
from convai_fast.model.config import TransformerConfig
from convai_fast.model.double_heads import DoubleHeadsModel

SHARED = Path(__file__).parents[1].parent / "shared"


@dataclass(frozen=True)
class CollateShape:
    """A batch to collate: `batch` examples of `num_candidates` candidates."""

    batch: int
    num_candidates: int
    max_history: int = 2

    def __str__(self) -> str:
        return f"{self.batch}x{self.num_candidates}"


# A training step at 2 and 4 candidates, ranking 20, and a batch that leaves the cache.
COLLATE_SHAPES = [
    CollateShape(8, 2),
    CollateShape(8, 4),
    CollateShape(4, 20),
    CollateShape(64, 20),
]


@dataclass(frozen=True)
class BranchShape:
    """Rows of a prefix and branches, all alike, in 12 heads of 64."""

    rows: int
    prefix: int
    branches: int
    branch: int = 14

    def __str__(self) -> str:
        return f"{self.rows}x({self.prefix}+{self.branches}x{self.branch})"


# A training step with 2 candidates, and ranking 20.
BRANCH_SHAPES = [BranchShape(8, 100, 2), BranchShape(4, 110, 20)]


@dataclass(frozen=True)
class SampleShape:
    """A batch of logits to draw from: `rows` x `vocab_size`, of `kind` random or bigram."""

    rows: int
    kind: str
    vocab_size: int = 50_262  # GPT-2's and the five special tokens

    def __str__(self) -> str:
        return f"{self.rows}x{self.vocab_size}-{self.kind}"


SAMPLE_SHAPES = [SampleShape(rows, kind) for kind in ("random", "bigram") for rows in (1, 32, 256)]
SAMPLE_TEMPERATURE = 0.7
SAMPLE_FILTERS = {
    "top-p 0.9": {"top_p": 0.9},
    "top-k 50": {"top_k": 50},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
}


@dataclass(frozen=True)
class CandidatesShape:
    """Examples to train on or to rank: `batch` of them, with `num_candidates` candidates each."""

    batch: int
    num_candidates: int
    max_history: int = 2

    def __str__(self) -> str:
        return f"{self.batch} x {self.num_candidates} candidates"


TRAIN_SHAPES = {
    "2-candidates": CandidatesShape(8, 2),
    "4-candidates": CandidatesShape(8, 4),
}
RANK_SHAPE = CandidatesShape(4, 20)
# The peer's batch; ours holds as many examples at a time.
EVALUATE_SHAPE = CandidatesShape(4, 20)


@dataclass(frozen=True)
class GenerateShape:
    """Prompts to reply to: of `prompt_length` random tokens, or of real dialogues where it is 0."""

    num_prompts: int
    prompt_length: int = 128
    new_tokens: int = 32

    def __str__(self) -> str:
        length = f"{self.prompt_length} tokens" if self.prompt_length else "real dialogues"
        return f"{self.num_prompts} x {length}, {self.new_tokens} new"


GENERATE_SHAPES = {
    "one": GenerateShape(1),
    "batch": GenerateShape(32),
    "many": GenerateShape(128),
    "real": GenerateShape(64, prompt_length=0),
}

# Published sizes, for transformers' own classes to make models of.
PEER_MODELS: dict[str, PreTrainedConfig] = {
    "GPT-2 124M": GPT2Config(vocab_size=50_262),
    "SmolLM2 135M": LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "Qwen3 0.6B": Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        rms_norm_eps=1e-6,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
    ),
}


@cache
def dialogues_and_tokenizer() -> tuple[str, dict[str, list[Dialogue]], PreTrainedTokenizerFast]:
    """Synthetic-Persona-Chat with the OpenAI GPT tokenizer, or the built-in world without them.

    Returns the name of the data, to be printed beside every figure, the dialogues, and the
    tokenizer.
    """
    if SHARED.is_dir():
        dialogues = load_dialogues(SHARED / "data" / "synthetic-persona-chat")
        tokenizer = load_tokenizer(SHARED / "tokenizers" / "openai-gpt")
        return "Synthetic-Persona-Chat, 1,000 conversations", dialogues, tokenizer
    dialogues = builtin_dialogues()
    return "built-in dialogues", dialogues, train_tokenizer(dialogues["train"])


@cache
def tokenizer_of(architecture: str) -> PreTrainedTokenizerFast:
    """OpenAI GPT's or GPT-2's tokenizer, with the special tokens."""
    folder = SHARED / "tokenizers" / architecture
    if not folder.is_dir():
        pytest.skip(f"needs the tokenizer in {folder}, which is not there")
    return load_tokenizer(folder)


def byte_tokenizer(num_tokens: int) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, with the special tokens, and others that no text has."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [f"<{i}>" for i in range(len(tokens), num_tokens - len(SPECIAL_TOKENS))]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    add_special_tokens(tokenizer)
    return tokenizer


@cache
def model_and_tokenizer(architecture: str) -> tuple[DoubleHeadsModel, PreTrainedTokenizerFast]:
    """OpenAI GPT 117M or GPT-2 124M with random weights, and its tokenizer.

    Or one of `PEER_MODELS`, with OpenAI GPT's.
    """
    if architecture in PEER_MODELS:
        tokenizer, config = tokenizer_of("openai-gpt"), PEER_MODELS[architecture].to_dict()
    else:
        tokenizer = tokenizer_of(architecture)
        config = {"model_type": architecture, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    model = DoubleHeadsModel(TransformerConfig.from_transformers(config)).eval()
    model.head_is_new = False  # how it ranks does not matter, only how fast
    return model, tokenizer


def peer_class(architecture: str) -> type[PreTrainedModel]:
    """transformers' own class for both heads of such a model."""
    config = PEER_MODELS.get(architecture)
    return families.FAMILIES[config.model_type if config else architecture].peer_class()


def generate_requests(shape: GenerateShape) -> tuple[str, list[Request]]:
    """What the prompts are, and a request for each, whose reply is exactly `new_tokens` long."""
    params = SamplingParams(
        max_length=shape.new_tokens, min_length=shape.new_tokens, top_p=0.9, temperature=0.7
    )
    if shape.prompt_length:
        generator = torch.Generator().manual_seed(0)
        size = (shape.num_prompts, shape.prompt_length)
        ids = torch.randint(1000, 40_000, size, generator=generator).tolist()
        return "random tokens", [Request(input_ids=row, params=params) for row in ids]
    name, dialogues, _ = dialogues_and_tokenizer()
    turns = [
        (d.personality, turn.history[-5:]) for d in dialogues["valid"] for turn in d.utterances
    ]
    return name, [
        Request(persona=persona, history=history, params=params)
        for persona, history in turns[: shape.num_prompts]
    ]


def dialogues_to_evaluate() -> list[Dialogue]:
    """About ten examples: few enough for the peer to finish in minutes."""
    _, dialogues, _ = dialogues_and_tokenizer()
    return dialogues["valid"][:1]


def batch_of_turn(batches: DialogueBatches, turn: int) -> Batch:
    """Random examples, as a shuffled epoch brings them: the same for every way and layout."""
    rng = np.random.default_rng(turn)
    return batches.collate(rng.choice(batches.num_examples, batches.batch_size, replace=False))


def open_batches(
    store_folder: str, split: str, shape: CandidatesShape, layout: Layout
) -> DialogueBatches:
    """The examples of a store in the shape that is measured."""
    return DialogueBatches(
        DialogueStore(store_folder),
        split,
        batch_size=shape.batch,
        num_candidates=shape.num_candidates,
        max_history=shape.max_history,
        max_length=512,
        layout=layout,
    )


@cache
def _dialogue_tokens() -> tuple[str, Tensor]:
    """The name of the dialogues, and the first 400,000 tokens or so of what is said in them."""
    name, dialogues, tokenizer = dialogues_and_tokenizer()
    texts = [turn.candidates[-1] for d in dialogues["train"] for turn in d.utterances][:30_000]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return name, torch.tensor([token for text in ids for token in text])


def sample_logits(shape: SampleShape) -> tuple[str, Tensor]:
    """What the logits are, and the logits.

    A bigram model stands in for a trained one: after a common word many tokens are likely, after a
    rare one few, and most of the vocabulary is unlikely throughout. Noise tells apart tokens that
    were never seen, as a network does.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape.rows, shape.vocab_size, generator=generator)
    if shape.kind == "random":
        return "normal random logits", noise
    name, tokens = _dialogue_tokens()
    unigram = (tokens.bincount(minlength=shape.vocab_size) + 0.1) / len(tokens)
    contexts = tokens[torch.randint(len(tokens) - 1, (shape.rows,), generator=generator)]
    logits = torch.empty_like(noise)
    for row, context in enumerate(contexts):
        following = tokens[1:][tokens[:-1] == context]
        bigram = following.bincount(minlength=shape.vocab_size) / len(following)
        logits[row] = (0.7 * bigram + 0.3 * unigram).log()
    return f"bigram model of {name}", logits + noise
