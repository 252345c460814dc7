"""Training has the losses that a plain loop over transformers has, step by step.

The figures at a larger size, and with dropout, are those of `python -m benchmarks.learning`.
"""

import json
import sys

import pytest
import torch
import transformers

from benchmarks.plain_loop import train_plainly
from convai_fast.data.build_store import build_store
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.model.config import TransformerConfig
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.training.loop import Trainer

PEERS = {
    "openai-gpt": transformers.OpenAIGPTDoubleHeadsModel,
    "gpt2": transformers.GPT2DoubleHeadsModel,
}
SHAPE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
NO_DROPOUT = dict.fromkeys(
    ("embd_pdrop", "attn_pdrop", "resid_pdrop", "summary_first_dropout"), 0.0
)


@pytest.fixture(scope="module")
def store(tokenizer, tmp_path_factory):
    dialogues = builtin_dialogues(num_train=31, num_valid=2)
    return build_store(dialogues, tokenizer, tmp_path_factory.mktemp("learning") / "store")


@pytest.fixture
def options(options):
    options.n_epochs, options.gradient_accumulation_steps, options.max_history = 9, 2, 1
    options.lr, options.warmup_steps, options.valid_examples = 3e-3, 5, 1
    return options


class Curves:
    """Losses of both heads, float32 [steps, 2], always from the same weights on."""

    def __init__(self, architecture, options, tokenizer, store, folder):
        config = {"model_type": architecture, "vocab_size": len(tokenizer), **SHAPE, **NO_DROPOUT}
        torch.manual_seed(0)
        model = DoubleHeadsModel(TransformerConfig.from_transformers(config))
        self.start, self.peer = folder / "start", PEERS[architecture]
        model.save_pretrained(self.start, tokenizer)
        self.options, self.tokenizer, self.store, self.folder = options, tokenizer, store, folder

    def ours(self, precision):
        self.options.output = str(self.folder / precision)
        run = self._trainer(precision).run().run
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return torch.tensor([[x["lm_loss"], x["mc_loss"]] for x in lines if x["split"] == "train"])

    def plain(self, precision):
        batches = self._trainer(precision).batches
        # The last step of an epoch is smaller.
        assert len(batches) % self.options.gradient_accumulation_steps
        batches.layout = "padded"  # the same batches, as transformers takes them
        peer = self.peer.from_pretrained(self.start)
        return train_plainly(peer, batches, self.options, self.options.max_steps)

    def _trainer(self, precision):
        self.options.precision = precision
        model = DoubleHeadsModel.from_pretrained(self.start)
        return Trainer(self.options, model, self.tokenizer, self.store, lambda _: None)


@pytest.mark.parametrize(("architecture", "num_candidates"), [("openai-gpt", 2), ("gpt2", 3)])
def test_float32_training_has_the_losses_of_a_plain_loop_at_every_step(
    options, tokenizer, store, tmp_path, architecture, num_candidates
):
    options.num_candidates, options.max_steps = num_candidates, 60
    curves = Curves(architecture, options, tokenizer, store, tmp_path)
    ours, plain = curves.ours("fp32"), curves.plain("fp32")
    # Where little is learnt, curves agree whatever the weights.
    assert plain[-5:, 0].mean() < plain[0, 0] - 1
    assert (ours - plain).abs().max() < 1e-4


@pytest.mark.parametrize(("architecture", "multiplies"), [("openai-gpt", True), ("gpt2", False)])
def test_bf16_training_strays_from_float32_no_further_than_a_plain_loop_in_bf16(
    options, tokenizer, store, tmp_path, monkeypatch, architecture, multiplies
):
    monkeypatch.setattr(sys.modules["convai_fast.ops.linear"], "_CPU_MULTIPLIES_BF16", multiplies)
    options.max_steps = 16
    curves = Curves(architecture, options, tokenizer, store, tmp_path)
    exact, ours, plain = curves.ours("fp32"), curves.ours("bf16"), curves.plain("bf16")

    def strays(curve):
        return (curve - exact).square().mean(0).sqrt()

    assert (strays(ours) > 2e-6).all()  # it is bf16 indeed
    assert (strays(ours) < 2 * strays(plain)).all()
