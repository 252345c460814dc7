"""The dialogues, tokenizers and models that parts share, made without a network.

Dialogues are those of the built-in world and weights are random; models have the published sizes.
"""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.gpu.notes import Setting
from convai_fast.data.batches import DialogueBatches, Layout
from convai_fast.data.build_store import build_store
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.data.store import DialogueStore
from convai_fast.dialogue.dialogue import Dialogue
from convai_fast.dialogue.new_tokenizer import train_tokenizer
from convai_fast.model.config import TransformerConfig
from convai_fast.model.double_heads import DoubleHeadsModel

VOCAB_SIZES = {"openai-gpt": 40_483, "gpt2": 50_262}  # with the five special tokens
TINY = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 1100}
_CLASSES = {
    "openai-gpt": transformers.OpenAIGPTDoubleHeadsModel,
    "gpt2": transformers.GPT2DoubleHeadsModel,
}


@cache
def dialogues(smoke: bool) -> dict[str, list[Dialogue]]:
    """The built-in world, of 3 to 5 persona sentences, up to 5 turns and 20 candidates."""
    return builtin_dialogues(*((12, 6) if smoke else (400, 60)))


@cache
def tokenizer(smoke: bool, size: int = 0) -> PreTrainedTokenizerFast:
    """Of the dialogues' words; filled up to `size` tokens, as a model of that size needs it."""
    made = train_tokenizer(dialogues(smoke)["train"])
    made.add_tokens([f"<filler {i}>" for i in range(size - len(made))])
    return made


def store(setting: Setting) -> DialogueStore:
    """The dialogues as token ids, in a folder that stays for as long as the process."""
    folder = Path(tempfile.mkdtemp()) / "store"
    return build_store(dialogues(setting.smoke), tokenizer(setting.smoke), folder)


def batches(
    opened: DialogueStore, split: str, layout: Layout, setting: Setting, **sizes: int
) -> DialogueBatches:
    """The same examples in the same order in both layouts."""
    return DialogueBatches(
        opened,
        split,
        layout=layout,
        max_history=2,
        max_length=512,
        shuffle=True,
        pin_memory=setting.is_gpu,
        **sizes,
    )


def model(architecture: str, setting: Setting) -> DoubleHeadsModel:
    """OpenAI GPT 117M or GPT-2 124M on the device, with random weights, in eval mode."""
    torch.manual_seed(0)
    shape = TINY if setting.smoke else {"vocab_size": VOCAB_SIZES[architecture]}
    config = TransformerConfig.from_transformers({"model_type": architecture, **shape})
    with setting.device:
        made = DoubleHeadsModel(config).eval()
    made.head_is_new = False  # how it ranks does not matter, only how fast
    return made


def twin(ours: DoubleHeadsModel, architecture: str, **settings: Any) -> PreTrainedModel:
    """transformers' double-heads class with the same weights, on the same device.

    OpenAI GPT has eager attention there and no other; GPT-2 has torch's (SDPA).
    """
    if architecture == "gpt2":
        settings["attn_implementation"] = "sdpa"
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = _CLASSES[architecture].from_pretrained(folder, **settings)
    return theirs.to(ours.transformer.token_embedding.weight.device).eval()


def language_model(ours: DoubleHeadsModel, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' class that writes, with the same weights in `dtype`, on the same device."""
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return theirs.to(ours.transformer.token_embedding.weight.device).eval()


def without_vocabulary(theirs: PreTrainedModel) -> PreTrainedModel:
    """Its logits are then the hidden states: what a careful user of the ranking head would do."""
    theirs.lm_head = nn.Identity()
    return theirs
