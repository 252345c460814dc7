"""The compiled `sample` against its reference: token for token, but where rounding decides."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from convai_fast import _native
from convai_fast.ops import reference

pytestmark = pytest.mark.skipif(_native.host is None, reason="nothing is compiled here")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCAB_SIZES = [1, 2, 17, 1019, 40_483, 50_262]
FILTERS = [
    {},
    {"top_p": 0.9},
    {"top_k": 50},
    {"top_k": 50, "top_p": 0.9},
    {"min_p": 0.05},
    {"top_p": 0.95, "min_p": 0.01},
    {"top_k": 3000, "top_p": 0.5, "min_p": 0.001},
    {"temperature": 0.0},
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def arguments(logits, temperature=0.7, top_k=0, top_p=1.0, min_p=0.0, seed=0):
    """What the operator takes, each parameter a number or one a row; a seed and a step a row."""
    rows = len(logits)

    def per_row(value, dtype):
        return torch.as_tensor(value, dtype=dtype).expand(rows)

    return (
        logits,
        per_row(temperature, torch.float32),
        per_row(top_k, torch.int64),
        per_row(top_p, torch.float32),
        per_row(min_p, torch.float32),
        torch.arange(rows) + seed,
        torch.arange(rows) * 5,
        False,
    )


def kernel(*inputs):
    return torch.ops.convai_fast.sample(*inputs)[0]


# The kernel's sums are float32 within chunks of 512 and its exponential is good to two units in the
# last place, so that a share of the mass is known to about 1e-6.
ROUNDING = 2e-6


def explains(inputs, row, token):
    """Whether rounding explains that the kernel drew `token` where the reference drew another.

    Tokens are in doubt that are kept with top_p or min_p moved by ROUNDING one way, and not with
    them moved the other way. `token` is explained if it may be kept and the target, u times the
    kept mass, may fall on it whatever becomes of those in doubt, give or take ROUNDING of the mass.
    """
    logits, temperature, top_k, top_p, min_p, seeds, steps, _ = (
        value[row : row + 1] if isinstance(value, torch.Tensor) else value for value in inputs
    )
    logits = logits.float()
    z = (logits - logits.max()) / temperature[:, None]
    uniform = reference.philox(seeds, steps).item() * 2.0**-32

    def weights(sign):
        has_top_p = 0 < top_p.item() < 1
        moved = (top_p + sign * ROUNDING).clamp(min=1e-30) if has_top_p else top_p
        return reference.filter_probabilities(z, top_k, moved, min_p * (1 - sign * ROUNDING))[0]

    possible, certain = weights(+1), weights(-1)
    if possible[token] == 0:
        return False
    in_doubt = possible - certain
    in_doubt[token], certain[token] = 0, possible[token]
    # Where the token's share of the mass begins, relative to the target.
    begin = (certain[:token].sum() - uniform * certain.sum()).item()
    lowest = begin - uniform * in_doubt[token:].sum().item()
    highest = begin + (1 - uniform) * in_doubt[:token].sum().item()
    room = ROUNDING * possible.sum().item()
    return lowest <= room and highest + possible[token].item() >= -room


def compare(inputs, actual):
    """`actual` is what the reference draws. Returns in how many rows rounding decided."""
    expected, _ = reference.sample(*inputs)
    assert actual.dtype == torch.int64
    assert actual.shape == expected.shape
    different = (actual != expected).nonzero().flatten().tolist()
    for row in different:
        assert explains(inputs, row, actual[row].item()), (row, actual[row], expected[row])
    return len(different)


def check(*inputs):
    return compare(inputs, kernel(*inputs))


def test_rounding_does_not_explain_a_wrong_token():
    inputs = arguments(torch.randn(8, 17), top_p=0.9)
    for row, right in enumerate(reference.sample(*inputs)[0].tolist()):
        assert [i for i in range(17) if explains(inputs, row, i)] == [right]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_the_kernel_draws_what_the_reference_draws(vocab_size, dtype):
    rows = 33 if vocab_size < 10_000 else 2
    decided_by_rounding = 0
    for i, filters in enumerate(FILTERS):
        for scale in (0.0, 1e-6, 1.0, 6.0):
            logits = (scale * torch.randn(rows, vocab_size)).to(dtype)
            decided_by_rounding += check(*arguments(logits, **filters, seed=100 * i))
    assert decided_by_rounding <= 2


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 33])
def test_any_number_of_rows(rows):
    for filters in FILTERS:
        check(*arguments(torch.randn(rows, 1019), **filters))


FLOATS = st.one_of(
    st.floats(-30, 30, width=16),
    st.sampled_from([0.0, -0.0, 1.0, 5.0, -torch.inf, -torch.inf, 60_000.0, -60_000.0, 1e-7]),
)


@st.composite
def rows_and_filters(draw):
    """Logits with ties, masks and extremes, repeated into rows of up to some thousand tokens."""
    pattern = draw(st.lists(FLOATS, min_size=1, max_size=24))
    if max(pattern) == -torch.inf:
        pattern.append(0.0)
    row = torch.tensor(pattern).repeat(draw(st.sampled_from([1, 1, 3, 30, 400])))
    if draw(st.booleans()):
        row = row + draw(st.sampled_from([1e-6, 1e-3, 1.0])) * torch.linspace(1, 0, len(row))
    logits = torch.stack([row, row.flip(0), row.roll(1)]).to(draw(st.sampled_from(DTYPES)))
    return arguments(
        logits,
        temperature=draw(st.sampled_from([0.0, 1e-39, 0.01, 0.7, 1.0, 3.0, 1e6])),
        top_k=draw(st.sampled_from([-1, 0, 1, 2, 5, 50, 1000, 10**6])),
        top_p=draw(st.sampled_from([0.0, 1e-9, 0.1, 0.5, 0.9, 0.999, 1.0, 2.0])),
        min_p=draw(st.sampled_from([0.0, 1e-6, 0.05, 0.5, 1.0])),
        seed=draw(st.integers(0, 2**62)),
    )


@settings(max_examples=400, deadline=None)
@given(rows_and_filters())
def test_the_kernel_draws_what_the_reference_draws_from_anything(inputs):
    check(*inputs)


def test_parameters_may_differ_from_row_to_row():
    logits = 3 * torch.randn(64, 1019)
    filters = {
        "temperature": torch.rand(64).round(decimals=1),
        "top_k": torch.randint(-2, 60, (64,)),
        "top_p": 1.2 * torch.rand(64),
        "min_p": 0.2 * torch.rand(64),
    }
    assert check(*arguments(logits, **filters)) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_any_stride(dtype):
    logits = torch.randn(1019, 12).to(dtype)
    for view in (logits.t(), logits.t()[::2, 3:], logits.t()[:, ::3], logits[:1].expand(5, 12)):
        for filters in FILTERS:
            inputs = arguments(view, **filters)
            expected = kernel(view.contiguous(), *inputs[1:])
            assert torch.equal(kernel(*inputs), expected)
            check(*inputs)


def test_half_precision_numbers_are_read_exactly():
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    for dtype in (torch.float16, torch.bfloat16):
        values = every.view(dtype)
        values = values[values.isfinite()]
        logits = torch.stack([values, torch.zeros_like(values)], 1)
        greedy = arguments(logits, temperature=0.0)
        assert torch.equal(kernel(*greedy), (values < 0).long())
        # The log-probability of token 0 against that of a zero tells its value.
        token_ids, logprobs = torch.ops.convai_fast.sample(*greedy[:-1], True)
        expected = logits.float().log_softmax(-1).gather(1, token_ids[:, None])[:, 0]
        assert torch.allclose(logprobs, expected, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("bad", [-torch.inf, torch.nan, torch.inf])
@pytest.mark.parametrize("vocab_size", [1, 70, 1019])
def test_rows_that_leave_nothing_to_draw_give_no_token_and_touch_no_other(bad, vocab_size):
    logits = torch.zeros(40, vocab_size)
    logits[[31, 38]] = bad
    for filters in FILTERS:
        inputs = arguments(logits, **filters)[:-1]
        expected, expected_logprobs = reference.sample(*inputs, True)
        token_ids, logprobs = torch.ops.convai_fast.sample(*inputs, True)
        assert torch.equal(token_ids, expected)
        assert (token_ids == -1).nonzero().flatten().tolist() == [31, 38]
        torch.testing.assert_close(logprobs, expected_logprobs, equal_nan=True)


@pytest.mark.parametrize("place", [0, 7, 63, 64, 1018])
def test_one_nan_or_inf_spoils_its_row_wherever_it_is(place):
    for bad in (torch.nan, torch.inf):
        logits = torch.randn(2, 1019)
        logits[1, place] = bad
        assert (kernel(*arguments(logits)) == -1).tolist() == [False, True]


def test_one_allowed_token_and_one_enormous_logit_are_drawn():
    for vocab_size in (40, 40_483):
        masked = torch.full((4, vocab_size), -torch.inf)
        masked[:, 23] = -5.0
        enormous = torch.randn(4, vocab_size)
        enormous[:, 23] = 1e30
        for logits in (masked, enormous):
            for filters in FILTERS:
                assert kernel(*arguments(logits, **filters)).tolist() == [23] * 4


@pytest.mark.parametrize("value", [-1.0, torch.nan])
def test_a_temperature_that_means_nothing_is_refused(value):
    with pytest.raises(ValueError, match="temperature of row 1"):
        kernel(*arguments(torch.zeros(2, 9), temperature=torch.tensor([1.0, value])))


@pytest.mark.parametrize("vocab_size", [1019, 50_262])
def test_neither_threads_nor_the_batch_change_a_row(vocab_size):
    threads = torch.get_num_threads()
    rows = 33 if vocab_size < 10_000 else 4
    logits = torch.randn(rows, vocab_size).to(torch.bfloat16)
    try:
        for filters in FILTERS:
            inputs = (*arguments(logits, **filters)[:-1], True)
            torch.set_num_threads(1)
            together = torch.ops.convai_fast.sample(*inputs)
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                for result, expected in zip(
                    torch.ops.convai_fast.sample(*inputs), together, strict=True
                ):
                    assert torch.equal(result, expected)
                for i in range(rows):
                    one = (v[i : i + 1] for v in inputs[:-1])
                    alone = torch.ops.convai_fast.sample(*one, True)
                    assert [v.item() for v in alone] == [v[i].item() for v in together]
    finally:
        torch.set_num_threads(threads)


def warped(logits, temperature=0.7, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities by transformers' warpers, in float64."""
    scores = TemperatureLogitsWarper(temperature)(None, logits.double())
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores.softmax(-1)


@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 9}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9}],
    ids=str,
)
def test_100_000_draws_have_the_distribution_of_the_warpers(filters):
    # 40 tokens among 200, the others masked, so that every kept token is expected often.
    logits = torch.full((1, 200), -torch.inf)
    logits[0, torch.randperm(200)[:40]] = 2 * torch.rand(40)
    draws = 100_000
    inputs = arguments(logits.expand(draws, -1), **filters)
    probabilities = warped(logits, **filters)[0]
    observed = kernel(*inputs).bincount(minlength=200)
    kept = probabilities > 0
    assert torch.equal(observed > 0, kept)  # all that is kept is drawn, and nothing else
    expected = draws * probabilities[kept]
    assert expected.min() > 50
    chi_square = ((observed[kept] - expected) ** 2 / expected).sum().item()
    degrees = int(kept.sum()) - 1
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees) + 10  # about 1 in 100,000 exceeds it


@pytest.mark.parametrize("filters", FILTERS[:-1], ids=str)
def test_targets_all_over_the_kept_mass_draw_from_the_warpers_set(filters):
    logits = 3 * torch.randn(1, 1019)
    rows = 3000
    token_ids = kernel(*arguments(logits.expand(rows, -1), **filters))
    probabilities = warped(logits, **filters)[0]
    assert (probabilities[token_ids] > 0).all()
    likely = (probabilities > 15 / rows).nonzero().flatten()
    assert set(likely.tolist()) <= set(token_ids.tolist())
