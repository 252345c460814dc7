import pytest
import torch

from convai_fast.generation.cache import KVCache
from convai_fast.model import Transformer, TransformerConfig


@pytest.fixture(params=["openai-gpt", "gpt2"])
def model(request):
    torch.manual_seed(0)
    sizes = dict(vocab_size=101, n_positions=32, n_embd=32, n_layer=3, n_head=4)
    config = TransformerConfig.from_transformers({"model_type": request.param, **sizes})
    model = Transformer(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def ids():
    return torch.randint(0, 101, (2, 3, 21), generator=torch.Generator().manual_seed(0))


def run_in_chunks(model, ids, cache, chunks):
    input_ids, segments = ids[0], ids[1]
    hidden, start = [], cache.length
    for chunk in chunks:
        part = slice(start, start + chunk)
        hidden.append(model(input_ids[:, part], segments[:, part], kv_cache=cache))
        start += chunk
    return torch.cat(hidden, dim=1)


@pytest.mark.parametrize(
    "chunks",
    [[1] * 21, [21], [20, 1], [9, 1, 1, 10], [1, 20], [5, 7, 9]],
    ids=["token-by-token", "whole", "prefill+1", "mixed", "1+rest", "chunks"],
)
@torch.no_grad()
def test_cached_chunks_equal_the_whole_sequence(model, ids, chunks):
    cache = KVCache(model.config, batch_size=3, max_length=21)
    hidden = run_in_chunks(model, ids, cache, chunks)
    torch.testing.assert_close(hidden, model(ids[0], ids[1]), rtol=1e-4, atol=1e-5)
    assert cache.length == 21


@torch.no_grad()
def test_truncating_goes_back_to_an_earlier_state(model, ids):
    cache = KVCache(model.config, batch_size=3, max_length=30)
    run_in_chunks(model, (ids + 1) % 101, cache, [21])
    cache.reset()
    assert cache.length == 0
    run_in_chunks(model, ids, cache, [12])
    run_in_chunks(model, (ids + 1) % 101, cache, [9])
    cache.truncate(12)
    hidden = run_in_chunks(model, ids, cache, [4, 5])
    torch.testing.assert_close(hidden, model(ids[0], ids[1])[:, 12:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_bfloat16_cache_serves_bfloat16_autocast(model, ids):
    cache = KVCache(model.config, batch_size=3, max_length=21, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = run_in_chunks(model, ids, cache, [10, 1, 10])
        whole = model(ids[0], ids[1])
    exact = model(ids[0], ids[1])
    assert (hidden - exact).norm() <= 2 * (whole - exact).norm()


def test_update_returns_views_of_all_positions_so_far(model):
    cache = KVCache(model.config, batch_size=2, max_length=8)
    key, value = torch.randn(2, 2, 4, 3, 8)
    keys, values = cache.update(1, key, value)
    assert torch.equal(keys, key)
    assert torch.equal(values, value)
    assert cache.length == 0  # until every layer has stored its own
    cache.advance(3)
    keys, _ = cache.update(1, key, value)
    assert torch.equal(keys, torch.cat([key, key], dim=2))
    assert keys.data_ptr() == cache.keys[1].data_ptr()


@torch.no_grad()
def test_what_does_not_fit_is_refused_with_both_numbers(model, ids):
    cache = KVCache(model.config, batch_size=3, max_length=8)
    run_in_chunks(model, ids, cache, [7])
    with pytest.raises(ValueError, match="9 tokens do not fit a cache made for 8"):
        run_in_chunks(model, ids, cache, [2])
    with pytest.raises(ValueError, match="made for 3 rows, not for 1"):
        model(ids[0, :1, :1], kv_cache=cache)
    with pytest.raises(ValueError, match="cannot truncate to 8 tokens: the cache holds 7"):
        cache.truncate(8)


@torch.no_grad()
def test_cached_tokens_count_against_the_positions(model):
    cache = KVCache(model.config, batch_size=1, max_length=64)
    model(torch.zeros(1, 30, dtype=torch.int64), kv_cache=cache)
    with pytest.raises(ValueError, match="33 tokens, but the model has only 32 positions"):
        model(torch.zeros(1, 3, dtype=torch.int64), kv_cache=cache)
