"""The keys and values that the cache holds: a pass over new tokens equals one over all."""

import numpy as np
import pytest
import torch

from convai_fast.generation.cache import CacheStep, KVCache
from convai_fast.generation.scheduler import Copy, Step
from convai_fast.model import Transformer, TransformerConfig


@pytest.fixture(params=["openai-gpt", "gpt2"])
def model(request):
    torch.manual_seed(0)
    sizes = dict(vocab_size=101, n_positions=96, n_embd=32, n_layer=3, n_head=4)
    config = TransformerConfig.from_transformers({"model_type": request.param, **sizes})
    model = Transformer(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def sequence(length, seed=0):
    """Token ids and segment ids."""
    return torch.randint(0, 101, (2, length), generator=torch.Generator().manual_seed(seed))


def run(model, cache, parts):
    """Add `parts`, {slot: (sequence, begin, end)}, in one pass; the hidden states of each."""
    pieces = [whole[:, begin:end] for whole, begin, end in parts.values()]
    ids, segments = torch.cat(pieces, 1) if pieces else torch.zeros(2, 0, dtype=torch.int64)
    slots, past = np.array([*parts], np.int64), np.array([part[1] for part in parts.values()])
    counts = np.array([piece.shape[1] for piece in pieces], np.int64)
    step = Step([], [], slots, past.astype(np.int64), counts, ids.numpy(), segments.numpy())
    hidden = model(ids[None], segments[None], kv_cache=CacheStep(cache, step))[0]
    return hidden.split(counts.tolist())


def whole(model, ids, segments):
    return model(ids[None], segments[None])[0]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "chunks",
    [[1] * 21, [21], [20, 1], [9, 1, 1, 10], [1, 20], [15, 1, 1, 4], [5, 7, 9]],
    ids=str,
)
@torch.no_grad()
def test_cached_chunks_equal_the_whole_sequence(model, chunks):
    cache = KVCache(model.config, num_slots=2, capacity=21)
    tokens, end, hidden = sequence(21), 0, []
    for chunk in chunks:
        hidden += run(model, cache, {1: (tokens, end, end + chunk)})
        end += chunk
    close(torch.cat(hidden), whole(model, *tokens))


@torch.no_grad()
def test_sequences_of_different_lengths_share_a_pass_in_any_order_of_slots(model):
    cache = KVCache(model.config, num_slots=4, capacity=40)
    a, b, c = (sequence(length, seed) for seed, length in enumerate([40, 17, 3]))
    first = run(model, cache, {3: (a, 0, 16), 0: (b, 0, 5)})
    second = run(model, cache, {0: (b, 5, 17), 2: (c, 0, 3), 3: (a, 16, 40)})
    close(torch.cat([first[0], second[2]]), whole(model, *a))
    close(torch.cat([first[1], second[0]]), whole(model, *b))
    close(second[1], whole(model, *c))


@pytest.mark.parametrize("shared", [1, 15, 16, 17, 40])
@torch.no_grad()
def test_a_sequence_that_begins_alike_copies_what_it_shares(model, shared):
    cache = KVCache(model.config, num_slots=3, capacity=64)
    old = sequence(40)
    new = torch.cat([old[:, :shared], sequence(9, seed=1)], 1)
    run(model, cache, {0: (old, 0, 40)})
    run(model, cache, {2: (sequence(50, seed=2), 0, 50)})  # what the slot held before
    cache.copy(Copy(0, 2, shared))
    (hidden,) = run(model, cache, {2: (new, shared, shared + 9)})
    close(hidden, whole(model, *new)[shared:])
    longer = torch.cat([old, sequence(4, seed=3)], 1)
    (more,) = run(model, cache, {0: (longer, 40, 44)})  # the source is as it was
    close(more, whole(model, *longer)[40:])


@torch.no_grad()
def test_a_sequence_may_take_over_the_slot_of_what_it_goes_on_from(model):
    cache = KVCache(model.config, num_slots=1, capacity=64)
    tokens = sequence(40)
    run(model, cache, {0: (tokens, 0, 30)})
    (hidden,) = run(model, cache, {0: (tokens, 20, 40)})
    close(hidden, whole(model, *tokens)[20:])


@torch.no_grad()
def test_reserve_keeps_what_the_slots_hold(model):
    cache = KVCache(model.config, num_slots=2, capacity=20)
    a, b = sequence(90), sequence(30, seed=1)
    run(model, cache, {0: (a, 0, 50), 1: (b, 0, 17)})
    capacity = cache.capacity
    cache.reserve(capacity)
    assert cache.capacity == capacity
    cache.reserve(90)
    assert cache.capacity >= 90
    hidden = run(model, cache, {0: (a, 50, 90), 1: (b, 17, 30)})
    close(hidden[0], whole(model, *a)[50:])
    close(hidden[1], whole(model, *b)[17:])


@torch.no_grad()
def test_what_does_not_fit_a_slot_is_refused(model):
    cache = KVCache(model.config, num_slots=2, capacity=64)
    run(model, cache, {0: (sequence(60), 0, 60)})
    with pytest.raises((IndexError, RuntimeError)):
        run(model, cache, {0: (sequence(65), 60, 65)})


@torch.no_grad()
def test_a_pass_of_no_sequences_has_no_tokens(model):
    assert run(model, KVCache(model.config, num_slots=1, capacity=8), {}) == ()
