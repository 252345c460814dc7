import numpy as np
import pytest
import torch

from convai_fast.generation.cache import KVCache
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
    """Token ids, segment ids and keys."""
    ids = torch.randint(0, 101, (2, length), generator=torch.Generator().manual_seed(seed))
    return ids[0], ids[1], (ids[0] + 101 * ids[1]).numpy()


def run(model, cache, parts):
    """Add `parts`, {slot: (sequence, begin, end)}, in one pass; the hidden states of each."""
    pieces = [[each[begin:end] for each in whole] for whole, begin, end in parts.values()]
    step = cache.extend(list(parts), [keys for _, _, keys in pieces])
    ids, segments = (torch.cat([piece[i] for piece in pieces])[None] for i in (0, 1))
    hidden = model(ids, segments, kv_cache=step)[0]
    assert step.last.tolist() == [n - 1 for n in np.cumsum([len(p[0]) for p in pieces])]
    return hidden.split([len(piece[0]) for piece in pieces])


def whole(model, ids, segments, _):
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
    assert cache.lengths.tolist() == [0, 21]


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
    new = [
        torch.cat([torch.as_tensor(o[:shared]), torch.as_tensor(n)[:9]])
        for o, n in zip(old, sequence(9, seed=1), strict=True)
    ]
    new[2] = new[2].numpy()
    run(model, cache, {0: (old, 0, 40)})
    run(model, cache, {2: (sequence(50, seed=2), 0, 50)})  # what the slot held before
    assert cache.shared_lengths(new[2]).tolist() == [shared, 0, 0]
    cache.begin(2, new[2], source=0, shared=shared)
    (hidden,) = run(model, cache, {2: (new, shared, shared + 9)})
    close(hidden, whole(model, *new)[shared:])
    (more,) = run(model, cache, {0: (sequence(4, seed=3), 0, 4)})  # the source is as it was
    ids, segments = (
        torch.cat([o, n]) for o, n in zip(old[:2], sequence(4, seed=3)[:2], strict=True)
    )
    close(more, whole(model, ids, segments, None)[40:])


@torch.no_grad()
def test_a_sequence_may_take_over_the_slot_of_what_it_goes_on_from(model):
    cache = KVCache(model.config, num_slots=1, capacity=64)
    tokens = sequence(40)
    run(model, cache, {0: (tokens, 0, 30)})
    cache.begin(0, tokens[2], source=0, shared=20)
    assert cache.lengths.tolist() == [20]
    (hidden,) = run(model, cache, {0: (tokens, 20, 40)})
    close(hidden, whole(model, *tokens)[20:])


def test_what_a_slot_shares_ends_at_the_first_other_token():
    config = TransformerConfig.from_transformers({"model_type": "gpt2", "n_layer": 1})
    cache = KVCache(config, num_slots=4, capacity=8)
    for slot, tokens in enumerate([[1, 2, 3], [1, 9, 3, 4], [5]]):
        cache.extend([slot], [np.array(tokens)])
    assert cache.shared_lengths(np.array([1, 2, 3, 4])).tolist() == [3, 1, 0, 0]
    assert cache.shared_lengths(np.array([1, 2])).tolist() == [2, 1, 0, 0]
    cache.begin(3, np.array([1, 2, 3, 4]), source=0, shared=3)
    # Promised tokens count, those that the slot held before do not.
    assert cache.shared_lengths(np.array([1, 2, 3, 4])).tolist() == [3, 1, 0, 4]
    assert cache.lengths.tolist() == [3, 4, 1, 3]
    cache.begin(1, np.array([7]), source=2, shared=0)
    assert cache.shared_lengths(np.array([1, 9, 3, 4])).tolist() == [1, 0, 0, 1]


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
    assert cache.shared_lengths(a[2]).tolist() == [50, 0]
    hidden = run(model, cache, {0: (a, 50, 90), 1: (b, 17, 30)})
    close(hidden[0], whole(model, *a)[50:])
    close(hidden[1], whole(model, *b)[17:])


@torch.no_grad()
def test_what_does_not_fit_a_slot_is_refused_with_both_numbers(model):
    cache = KVCache(model.config, num_slots=2, capacity=64)
    run(model, cache, {0: (sequence(60), 0, 60)})
    with pytest.raises(ValueError, match="65 tokens do not fit a slot made for 64"):
        cache.extend([1, 0], [np.arange(3), np.arange(5)])
    assert cache.lengths.tolist() == [60, 0]


def test_a_pass_of_no_sequences_has_no_tokens(model):
    cache = KVCache(model.config, num_slots=1, capacity=8)
    assert cache.extend([], []).position_ids.tolist() == []
