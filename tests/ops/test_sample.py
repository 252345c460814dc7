"""The sampling operator's definition, on its reference."""

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from convai_fast import ops
from convai_fast.ops import reference

VOCAB_SIZES = [1, 2, 17, 1019, 40_483]


def kept(logits, top_k=0, top_p=1.0, min_p=0.0):
    rows = len(logits)
    probabilities = reference.filter_probabilities(
        logits,
        torch.full((rows,), top_k),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
    )
    return probabilities > 0


def test_philox_gives_the_published_test_vectors():
    ones = -1  # all 64 bits set
    words = reference.philox(torch.tensor([0, ones]), torch.tensor([0, ones]))
    assert words[0].item() == 0x6627E8D5
    # Salmon et al. set all four counter words; here the upper two are 0, so that only the first
    # vector is published. The second row pins the wrap-around of 64-bit products.
    assert 0 <= words[1].item() < 2**32


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_temperature_zero_takes_the_first_largest(vocab_size):
    logits = torch.randn(5, vocab_size)
    logits[:, vocab_size // 2 :] = logits.max() + 1  # ties
    token_ids, _ = ops.sample(logits, temperature=0.0)
    assert token_ids.tolist() == [vocab_size // 2] * 5


@pytest.mark.parametrize("vocab_size", [17, 1019])
@pytest.mark.parametrize("top_k", [1, 5, 10_000])
def test_top_k_keeps_what_transformers_keeps_ties_included(vocab_size, top_k):
    logits = torch.randn(20, vocab_size).round(decimals=1)  # many ties
    expected = TopKLogitsWarper(top_k)(None, logits.clone()) > -torch.inf
    assert torch.equal(kept(logits, top_k=top_k), expected)


@pytest.mark.parametrize("vocab_size", [17, 1019])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(vocab_size, top_p):
    logits = 3 * torch.randn(50, vocab_size, dtype=torch.float64)
    expected = TopPLogitsWarper(top_p)(None, logits.clone()) > -torch.inf
    assert torch.equal(kept(logits, top_p=top_p), expected)


@pytest.mark.parametrize("min_p", [0.01, 0.2, 1.0])
def test_min_p_keeps_what_transformers_keeps(min_p):
    logits = 3 * torch.randn(50, 1019, dtype=torch.float64)
    expected = MinPLogitsWarper(min_p)(None, logits.clone()) > -torch.inf
    assert torch.equal(kept(logits, min_p=min_p), expected)


def test_draws_follow_the_filtered_distribution():
    logits, draws = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0]), 100_000
    token_ids, _ = ops.sample(
        logits.expand(draws, -1), temperature=0.7, top_p=0.95, seeds=7, steps=torch.arange(draws)
    )
    scores = TopPLogitsWarper(0.95)(None, TemperatureLogitsWarper(0.7)(None, logits[None].clone()))
    expected = draws * scores.softmax(-1)[0]
    observed = token_ids.bincount(minlength=6)
    alive = expected > 0
    assert observed[~alive].sum() == 0
    chi_square = ((observed - expected)[alive] ** 2 / expected[alive]).sum().item()
    assert chi_square < 25  # far beyond the 99.99th percentile at up to 5 degrees of freedom


def test_a_row_depends_on_its_own_seed_and_step_alone():
    logits, seeds, steps = torch.randn(8, 1019), torch.arange(8), torch.arange(8) * 3
    together, _ = ops.sample(logits, top_p=0.9, seeds=seeds, steps=steps)
    order = torch.randperm(8)
    shuffled, _ = ops.sample(logits[order], top_p=0.9, seeds=seeds[order], steps=steps[order])
    assert torch.equal(shuffled, together[order])
    alone, _ = ops.sample(logits[3:4], top_p=0.9, seeds=3, steps=9)
    assert alone.item() == together[3].item()


def test_logprobs_are_those_of_the_unfiltered_logits():
    logits = torch.randn(4, 50)
    token_ids, logprobs = ops.sample(logits, temperature=0.5, top_k=3, return_logprobs=True)
    assert torch.allclose(logprobs, logits.log_softmax(-1)[range(4), token_ids])


@pytest.mark.parametrize("bad", [-torch.inf, torch.nan, torch.inf])
def test_a_row_that_leaves_nothing_to_draw_gives_no_token(bad):
    logits = torch.zeros(3, 9)
    logits[1] = bad
    for settings in ({}, {"temperature": 0}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1}):
        token_ids, logprobs = ops.sample(logits, return_logprobs=True, **settings)
        assert (token_ids == -1).tolist() == logprobs.isnan().tolist() == [False, True, False]
        expected, _ = ops.sample(logits[[0, 2]], **settings)
        assert torch.equal(token_ids[[0, 2]], expected)  # the others as if it were not there


def test_a_tiny_temperature_is_nearly_greedy_not_an_overflow():
    token_ids, _ = ops.sample(torch.tensor([[1.0, 2.0, 50.0]]), temperature=1e-39)
    assert token_ids.item() == 2


def test_one_allowed_token_is_always_drawn():
    logits = torch.full((6, 40), -torch.inf)
    logits[:, 23] = -5.0
    token_ids, _ = ops.sample(logits, temperature=1.3, top_p=0.5, seeds=torch.arange(6))
    assert token_ids.tolist() == [23] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_not_written_to_whatever_their_stride(dtype):
    logits = torch.randn(50, 6).to(dtype).t()
    before = logits.clone()
    token_ids, _ = ops.sample(logits, top_k=4, top_p=0.8, min_p=0.01)
    assert torch.equal(logits, before)
    assert torch.equal(token_ids, ops.sample(before.contiguous(), top_k=4, top_p=0.8)[0])


def test_no_rows_give_no_tokens():
    token_ids, logprobs = ops.sample(torch.zeros(0, 9), return_logprobs=True)
    assert token_ids.shape == logprobs.shape == (0,)


def test_one_value_stands_for_all_rows():
    logits = torch.randn(5, 40)
    values = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "seeds": 3, "steps": 2}
    expected, _ = ops.sample(logits, **{name: torch.tensor([x] * 5) for name, x in values.items()})
    for one in (values, {name: torch.tensor(x) for name, x in values.items()}):
        assert torch.equal(ops.sample(logits, **one)[0], expected)
    with pytest.raises((ValueError, RuntimeError)):
        ops.sample(logits, top_k=torch.tensor([3, 3]))


def test_a_value_that_was_given_once_has_not_changed_later():
    logits = torch.randn(3, 40)
    expected, _ = ops.sample(logits, temperature=0.123, top_p=0.9, seeds=4)
    with torch.inference_mode():
        assert torch.equal(ops.sample(logits, temperature=0.123, top_p=0.9, seeds=4)[0], expected)
    fake = torch._subclasses.FakeTensorMode()
    with fake:
        ops.sample(fake.from_tensor(logits), temperature=0.124, top_p=0.9)
    ops.sample(logits, temperature=0.124, top_p=0.9)
    compiled = torch.compile(ops.sample, backend="eager", fullgraph=True)
    token_ids, _ = compiled(logits, temperature=0.123, top_p=0.9, seeds=4)
    assert torch.equal(token_ids, expected)


def test_opcheck_passes():
    rows = torch.ones(2)
    torch.library.opcheck(
        torch.ops.convai_fast.sample.default,
        (torch.randn(2, 9), rows, rows.long(), rows, rows * 0, rows.long(), rows.long(), True),
    )
