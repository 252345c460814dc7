"""`sample` on a GPU against its reference on the CPU, to within the rounding of a float32 `exp`.

Its kernel runs in an emulator, too, with fewer and shorter rows.
"""

from itertools import cycle, islice, product

import pytest
import torch

from convai_fast import ops
from convai_fast.ops import reference
from tests.helpers.emulator import EmulatedGpu, kernels, on_gpus, unneeded_barriers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The last is too long for one block's memory.
VOCAB_SIZES = [1, 17, 1019, 40_483, 50_262, 131_072]
SMALL_VOCAB_SIZES = [1, 17, 1019, 5003]
ROUNDING = 2e-6  # of a row's mass: what sums of float32 `exp`s may differ by, several times over

# temperature, top_k, top_p, min_p
SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 0, 0.9, 0.0),
    (0.7, 50, 0.9, 0.0),
    (0.0, 0, 1.0, 0.0),
    (1.3, 40, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 0, 1.0, 0.05),
    (1.5, 0, 0.999, 0.01),
    (0.3, 10**6, 0.2, 1.0),
    (1.0, 3000, 1e-6, 0.0),
    (1e-39, 0, 0.5, 0.0),
]


def parameters(rows, first=0):
    """One setting a row, beginning at the given one, and a seed and a step of its own."""
    settings = list(islice(cycle(SETTINGS), first, first + rows))
    temperature, top_k, top_p, min_p = zip(*settings, strict=True)
    return {
        "temperature": torch.tensor(temperature),
        "top_k": torch.tensor(top_k),
        "top_p": torch.tensor(top_p),
        "min_p": torch.tensor(min_p),
        "seeds": torch.arange(rows) * 7919 - 3,
        "steps": torch.arange(rows) * 10**10 + first,
    }


def make_logits(rows, vocab_size, dtype, first=0):
    """Rows of every kind: spread, flat, all equal, few values (many ties), mostly -inf."""
    generator = torch.Generator().manual_seed(rows * vocab_size + first)
    logits = 3 * torch.randn(rows, vocab_size, generator=generator)
    kind = (torch.arange(rows) + first) % 5
    logits[kind == 1] /= 30
    logits[kind == 2] = -2.5
    logits[kind == 3] = logits[kind == 3].round()
    dead = torch.rand(rows, vocab_size, generator=generator) < 0.99
    dead[:, vocab_size // 2] = False
    logits[(kind == 4)[:, None] & dead] = -torch.inf
    return logits.to(dtype)


def on(gpu, given):
    return {name: value.to(gpu) for name, value in given.items()}


def assert_draws_are_right(token_ids, logits, given):
    """Each token is the reference's, or next to it by no more than rounding can explain.

    Rounding may move top-p's and min-p's edges, so that what is kept lies between what a slightly
    stricter and a slightly looser filter keep, and with it the interval of cumulative mass in which
    u * mass draws this very token.  Top-k and temperature 0 compare exact numbers: no allowance.
    """
    logits = logits.cpu().float()
    given = {name: value.cpu() for name, value in given.items()}
    temperature, top_p, min_p = given["temperature"], given["top_p"], given["min_p"]
    rows = torch.arange(len(logits))
    token_ids = token_ids.cpu()

    largest = logits.max(-1).values
    greedy = temperature == 0
    first_largest = (logits == largest[:, None]).int().argmax(-1)
    assert torch.equal(token_ids[greedy], first_largest[greedy])

    z = (logits - largest[:, None]) / torch.where(greedy, 1.0, temperature)[:, None]

    def filtered(slack):
        on = (top_p > 0) & (top_p < 1)
        # Never off: that would undo what a filter just short of 1 cuts.
        p = torch.where(on, (top_p.double() + slack).clamp(1e-12, 1 - 1e-12), top_p.double())
        at_least = (min_p.double() * (1 - slack)).clamp(max=1.0)
        kept = reference.filter_probabilities(z, given["top_k"], p, at_least)
        return kept[rows, token_ids], kept.cumsum(-1)

    (strict, strict_until), (loose, loose_until) = filtered(-ROUNDING), filtered(ROUNDING)
    u = reference.philox(given["seeds"], given["steps"]).double() * 2.0**-32
    begins = strict_until[rows, token_ids] - strict
    ends = loose_until[rows, token_ids]
    right = (loose > 0) & (begins - ROUNDING <= u * loose_until[:, -1])
    right &= u * strict_until[:, -1] <= ends + ROUNDING
    wrong = (~right & ~greedy).nonzero().flatten().tolist()
    assert not wrong, f"rows {wrong} drew {token_ids[wrong].tolist()}"


@pytest.mark.parametrize("dtype", DTYPES)
@on_gpus(
    "vocab_size rows",
    cuda=product(VOCAB_SIZES, [1, 3, 33, 300]),
    emulator=product(SMALL_VOCAB_SIZES, [4, 11]),
)
def test_draws_agree_with_the_reference(gpu, dtype, vocab_size, rows):
    rows = min(rows, 10**7 // vocab_size)  # the reference sorts, in float64
    for first in range(0, len(SETTINGS), rows):
        logits, given = make_logits(rows, vocab_size, dtype, first), parameters(rows, first)
        token_ids, _ = ops.sample(logits.to(gpu), **on(gpu, given))
        assert_draws_are_right(token_ids, logits, given)


@pytest.mark.parametrize("top_k", [0, 3, 200, 10**6])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
@on_gpus("rows", cuda=[(64,)], emulator=[(6,)])
def test_ties_are_kept_by_the_rules(gpu, rows, top_k, top_p):
    values = torch.tensor([2.0, 1.5, 1.0, -1.0, -torch.inf])
    generator = torch.Generator().manual_seed(0)
    logits = values[torch.randint(5, (rows, 1019), generator=generator)]
    given = parameters(rows) | {
        "temperature": torch.full((rows,), 0.8),
        "top_k": torch.full((rows,), top_k),
        "top_p": torch.full((rows,), top_p),
        "min_p": torch.zeros(rows),
    }
    token_ids, _ = ops.sample(logits.to(gpu), **on(gpu, given))
    assert_draws_are_right(token_ids, logits, given)


@pytest.mark.parametrize("dtype", DTYPES)
@on_gpus("rows", cuda=[(33,)], emulator=[(6,)])
def test_any_strides_and_expanded_parameters_give_the_same_draws(gpu, rows, dtype):
    logits, seeds = make_logits(rows, 1019, dtype).to(gpu), torch.arange(rows, device=gpu)
    expected, _ = ops.sample(logits, temperature=0.9, top_k=200, top_p=0.8, min_p=0.01, seeds=seeds)
    wide = torch.full((rows, 2 * 1019 + 5), torch.nan, dtype=dtype, device=gpu)
    wide[:, 3 : 3 + 2 * 1019 : 2] = logits
    full = {
        "temperature": torch.full((rows, 3), 0.9, device=gpu)[:, 1],
        "top_k": torch.full((rows,), 200, device=gpu),
        "top_p": torch.full((2 * rows,), 0.8, device=gpu)[::2],
        "min_p": torch.full((rows,), 0.01, device=gpu),
    }
    for same in (wide[:, 3 : 3 + 2 * 1019 : 2], logits.t().contiguous().t()):
        before = same.clone()
        assert torch.equal(ops.sample(same, **full, seeds=seeds)[0], expected)
        assert torch.equal(same, before)


@on_gpus(
    "vocab_size batch", cuda=product(VOCAB_SIZES, [150]), emulator=product(SMALL_VOCAB_SIZES, [12])
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_draws_the_same_token_alone_and_in_any_batch(gpu, vocab_size, batch, dtype):
    """Which also compares one block a row with clusters of several sizes: no sum is rounded."""
    logits, given = make_logits(batch, vocab_size, dtype).to(gpu), on(gpu, parameters(batch))
    together, _ = ops.sample(logits, **given)
    for count in (1, 2, 5, 30):
        rows = slice(batch // 3, batch // 3 + count)
        token_ids, _ = ops.sample(logits[rows], **{name: x[rows] for name, x in given.items()})
        assert torch.equal(token_ids, together[rows])


@on_gpus("vocab_size", cuda=product(VOCAB_SIZES), emulator=product(SMALL_VOCAB_SIZES))
@pytest.mark.parametrize("dtype", DTYPES)
def test_logprobs_are_those_of_the_unfiltered_logits(gpu, vocab_size, dtype):
    logits, given = make_logits(12, vocab_size, dtype), on(gpu, parameters(12))
    token_ids, logprobs = ops.sample(logits.to(gpu), **given, return_logprobs=True)
    expected = logits.double().log_softmax(-1)[torch.arange(12), token_ids.cpu()]
    assert torch.allclose(logprobs.cpu().double(), expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(token_ids, ops.sample(logits.to(gpu), **given)[0])


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [2, 33, 300])
def test_a_captured_graph_draws_anew_from_what_its_tensors_hold(rows):
    logits, given = make_logits(rows, 40_483, torch.bfloat16).cuda(), on("cuda", parameters(rows))
    ops.sample(logits, **given)  # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token_ids, logprobs = ops.sample(logits, **given, return_logprobs=True)
    for _ in range(3):
        given["seeds"] += 11
        given["steps"] += 1
        logits.copy_(logits.roll(1, 1))
        graph.replay()
        expected_ids, expected_logprobs = ops.sample(logits, **given, return_logprobs=True)
        assert torch.equal(token_ids, expected_ids)
        assert torch.equal(logprobs, expected_logprobs)


@pytest.mark.cuda
def test_draws_follow_the_filtered_distribution():
    logits, draws = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0], device="cuda"), 100_000
    steps = torch.arange(draws, device="cuda")
    token_ids, _ = ops.sample(logits.expand(draws, -1), top_k=5, top_p=0.95, seeds=7, steps=steps)
    # Of the five largest, the mass before the last is 0.967, so that four are kept.
    expected = draws * logits[:4].softmax(-1)
    observed = token_ids.bincount(minlength=6)
    assert observed[4:].sum() == 0
    chi_square = ((observed[:4] - expected) ** 2 / expected).sum().item()
    assert chi_square < 22  # beyond the 99.99th percentile at 3 degrees of freedom


@pytest.mark.parametrize("bad", [-torch.inf, torch.nan, torch.inf])
@on_gpus("vocab_size", cuda=[(9,), (50_262,)], emulator=[(9,), (5003,)])
def test_a_row_that_leaves_nothing_to_draw_gives_no_token(gpu, bad, vocab_size):
    logits = torch.zeros(3, vocab_size, device=gpu)
    logits[1, -1] = bad
    logits[1] = logits[1] if bad > 0 or bad != bad else bad
    token_ids, logprobs = ops.sample(logits, return_logprobs=True)
    assert (token_ids == -1).tolist() == logprobs.isnan().tolist() == [False, True, False]


@pytest.mark.cuda
def test_no_rows_give_no_tokens():
    token_ids, logprobs = ops.sample(torch.zeros(0, 9, device="cuda"), return_logprobs=True)
    assert token_ids.shape == logprobs.shape == (0,)


@pytest.mark.cuda
def test_opcheck_passes():
    rows = torch.ones(2, device="cuda")
    logits = torch.randn(2, 9, device="cuda")
    torch.library.opcheck(
        torch.ops.convai_fast.sample.default,
        (logits, rows, rows.long(), rows, rows * 0, rows.long(), rows.long(), True),
    )


def test_the_emulator_notices_each_barrier_that_is_removed():
    """So that one that went missing would be noticed, which is luck on a GPU."""
    logits = [make_logits(len(SETTINGS), vocab_size, torch.float32) for vocab_size in (17, 1019)]
    logits.append(torch.full((24, 1019), -torch.inf))

    def draw():
        with EmulatedGpu():
            return [ops.sample(x, **parameters(len(x)), return_logprobs=True) for x in logits]

    def check():
        torch.testing.assert_close(draw(), expected, rtol=0, atol=0, equal_nan=True)

    expected = draw()
    assert len(kernels("sample").barriers) > 5
    assert unneeded_barriers("sample", check) == []
