"""A tokenizer of one's own, for a model that begins from nothing."""

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Tokenizer

from convai_fast.dialogue.dialogue import Dialogue
from convai_fast.dialogue.format import SPECIAL_TOKENS


def train_tokenizer(dialogues: Iterable[Dialogue], vocab_size: int = 1000) -> GPT2Tokenizer:
    """Train a byte-level BPE tokenizer on what is said in `dialogues`, as GPT-2's class.

    It has at most `vocab_size` tokens: the 256 bytes, the merges, and the five special tokens,
    which come last. Any text decodes to itself, and the same dialogues give the same tokenizer.

    Raises ValueError when `vocab_size` has no room for the bytes and special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(SPECIAL_TOKENS):
        raise ValueError(
            f"vocab_size must be at least {len(alphabet) + len(SPECIAL_TOKENS)}, not {vocab_size}"
        )
    texts = [text for dialogue in dialogues for text in _said(dialogue)]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    bpe = json.loads(backend.to_str())["model"]

    merges: Any = [tuple(merge) for merge in bpe["merges"]]  # the annotation there knows no pairs

    bos, eos, speaker1, speaker2, pad = SPECIAL_TOKENS
    return GPT2Tokenizer(
        vocab=bpe["vocab"],
        merges=merges,
        # Bytes leave nothing unknown, but the class would add a token of its own.
        unk_token=eos,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        extra_special_tokens=[speaker1, speaker2],
    )


def _said(dialogue: Dialogue) -> Iterable[str]:
    """Every sentence of a dialogue once; distractors are only other people's replies."""
    yield from dialogue.personality
    for utterance in dialogue.utterances:
        yield utterance.history[-1]
        yield utterance.candidates[-1]
