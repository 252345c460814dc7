"""Whether a trained model may rank: only where its multiple-choice head has learnt something."""

import dataclasses

import pytest
import torch

from convai_fast.model.config import TransformerConfig
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.training import loop, step
from convai_fast.training.options import TrainOptions
from tests.helpers.killed_runs import die_at, in_a_process

LEARNS_NOTHING = [{"mc_coef": 0.0}, {"num_candidates": 1}, {"lr": 0.0}, {"n_epochs": 0}]
LORA = {"lora_r": 4, "from_scratch": False}


@pytest.fixture
def short(run_options, tmp_path):
    """Options of a run of two steps."""
    return dataclasses.replace(run_options, max_steps=2, output=str(tmp_path / "run"))


@pytest.fixture
def plain(tokenizer, tmp_path):
    """A folder with a model whose multiple-choice head is new."""
    shape = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256}
    config = TransformerConfig.from_transformers({**shape, "vocab_size": len(tokenizer)})
    torch.manual_seed(0)
    DoubleHeadsModel(config).save_pretrained(tmp_path / "plain", tokenizer)
    return str(tmp_path / "plain")


def head_is_new_after(options):
    run = loop.train(options, lambda _: None).run
    return DoubleHeadsModel.from_pretrained(run / "last").head_is_new


def test_a_head_that_was_trained_is_not_new(short):
    assert not head_is_new_after(short)


@pytest.mark.parametrize("change", LEARNS_NOTHING, ids=str)
def test_a_head_that_had_nothing_to_learn_from_is_still_new(short, change):
    short.save_every = 0
    assert head_is_new_after(dataclasses.replace(short, **change))


def test_a_run_that_goes_on_does_not_take_its_new_head_for_a_trained_one(short):
    short.mc_coef = 0.0
    assert head_is_new_after(short)
    assert head_is_new_after(TrainOptions(resume=short.output, max_steps=4))


def test_training_without_the_head_leaves_a_trained_one_trained(short, tmp_path):
    loop.train(short, lambda _: None)
    again = dataclasses.replace(
        short, model=short.output, from_scratch=False, mc_coef=0.0, output=f"{tmp_path}/again"
    )
    assert not head_is_new_after(again)


@pytest.mark.parametrize("merge_lora", [False, True])
@pytest.mark.parametrize("mc_coef", [0.0, 1.0])
def test_lora_over_a_model_whose_head_is_new(short, plain, merge_lora, mc_coef):
    options = dataclasses.replace(
        short, model=plain, merge_lora=merge_lora, mc_coef=mc_coef, **LORA
    )
    assert head_is_new_after(options) == (mc_coef == 0)
    assert head_is_new_after(TrainOptions(resume=short.output, max_steps=4)) == (mc_coef == 0)


@pytest.mark.parametrize("merge_lora", [False, True])
def test_a_model_that_lora_continues_with_knows_that_its_head_was_trained(short, plain, merge_lora):
    # Killed in the step after the checkpoint: what is in memory then is what was saved.
    options = dataclasses.replace(
        short, model=plain, merge_lora=merge_lora, max_steps=4, save_every=2, **LORA
    )
    process = in_a_process(options, lambda: die_at(step, "combined_loss", 8))
    process.join()
    start = loop.start_or_continue(
        dataclasses.replace(options, resume=options.output), lambda _: None
    )
    assert start.state.progress.step == 2
    assert not start.model.head_is_new
