"""`convai-fast demo`: from nothing to a model that talks, in about a minute."""

import dataclasses
import json
import random
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from convai_fast.cli.options.demo import DemoOptions
from convai_fast.data.build_store import build_store
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.dialogue.dialogue import Dialogue
from convai_fast.dialogue.new_tokenizer import train_tokenizer
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Request
from convai_fast.loading import layout_for
from convai_fast.model.config import TransformerConfig
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.model.transformer import Block
from convai_fast.training.loop import Trainer
from convai_fast.training.options import TrainOptions

NUM_SHOWN = 5


def run(options: DemoOptions) -> None:
    """Make the dialogues, train, evaluate, and show replies."""
    _train_options(options).check()
    dialogues = builtin_dialogues(num_train=6500, num_valid=60, seed=options.seed)
    tokenizer = train_tokenizer(dialogues["train"])
    torch.manual_seed(options.seed)
    model = DoubleHeadsModel(_model_config(tokenizer))
    prime_attention(model)
    with tempfile.TemporaryDirectory() as scratch:
        store = build_store(
            dialogues, tokenizer, Path(scratch) / "store", layout_for(tokenizer, model.config)
        )
        result = Trainer(_train_options(options), model, tokenizer, store).run()
    if result.stopped_by is not None:
        print("a demo does not go on from there: begin it anew with convai-fast demo")
        raise KeyboardInterrupt
    # Both were measured: --eval_before_start, and nothing has stopped it.
    assert result.before is not None and result.after is not None

    file = result.run / "dialogues.json"
    data = {split: [dataclasses.asdict(d) for d in ds] for split, ds in dialogues.items()}
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    _show_replies(model, tokenizer, dialogues["valid"], options.seed)
    print(
        f"\nhits@1, the true reply out of 20: {result.before.hits_at_1:.1%} before training, "
        f"{result.after.hits_at_1:.1%} after (chance: 5.0%)"
        f"\nperplexity of the true reply:     {result.before.ppl:.1f} before, "
        f"{result.after.ppl:.2f} after"
        f"\n\ntalk to it:         convai-fast interact --model {result.run / 'best'} "
        f"--data {file}"
        f"\nthe dialogues:      {file}"
    )


def _model_config(tokenizer: PreTrainedTokenizerFast) -> TransformerConfig:
    return TransformerConfig.from_transformers(
        {
            "model_type": "gpt2",
            "vocab_size": len(tokenizer),
            "n_positions": 256,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": 128,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "summary_first_dropout": 0.0,
            "initializer_range": 0.06,
        }
    )


@torch.no_grad()
def prime_attention(model: DoubleHeadsModel) -> None:
    """Let the first layer attend to equal tokens from the start, and little to positions.

    To rank a reply is to find its words in the persona, and to find equal tokens takes keys that
    resemble queries. Trained transformers have such heads; from random weights they come late, too
    late for a demo.

    Source: "Mimetic Initialization of Self-Attention Layers", Trockman and Kolter 2023
    (arXiv 2305.09828).
    """
    block, positions = model.transformer.blocks[0], model.transformer.position_embedding
    assert isinstance(block, Block) and positions is not None
    query, key, value = block.attention.qkv.weight.chunk(3)
    key.copy_(query.normal_(std=0.2))
    block.attention.out.weight.copy_(value.normal_(std=0.08).T)
    positions.weight.mul_(0.15)


def _train_options(options: DemoOptions) -> TrainOptions:
    return TrainOptions(
        model="demo",
        output=options.output,
        seed=options.seed,
        precision="fp32",
        eval_before_start=True,
        num_candidates=3,
        mc_coef=0.7,
        max_history=1,
        train_batch_size=16,
        valid_batch_size=16,
        gradient_accumulation_steps=1,
        n_epochs=1,
        lr=3e-3,
        adam_beta2=0.99,
        warmup_steps=100,
        log_every=50,
    )


def _show_replies(
    model: DoubleHeadsModel,
    tokenizer: PreTrainedTokenizerFast,
    dialogues: list[Dialogue],
    seed: int,
) -> None:
    """Print some dialogues of the validation split with the model's replies."""
    engine = GenerationEngine(model, tokenizer)
    params = SamplingParams(no_sample=True, max_length=30)
    for dialogue in random.Random(seed).sample(dialogues, NUM_SHOWN):
        print(f"\npersona: {' | '.join(dialogue.personality)}")
        shown = dialogue.utterances[:2]
        requests = [
            Request(persona=dialogue.personality, history=utterance.history[-3:], params=params)
            for utterance in shown
        ]
        for utterance, (reply,) in zip(shown, engine.generate(requests), strict=True):
            true = utterance.candidates[-1]
            verdict = "as expected" if reply.text == true else f"expected: {true}"
            print(f"  asked:   {utterance.history[-1]}\n  replied: {reply.text}   ({verdict})")
