"""Each backend's cache: a pass over new tokens equals one over all."""

import numpy as np
import pytest
import torch

from convai_fast.generation.backends import CpuBackend, CudaBackend, TorchBackend
from convai_fast.generation.scheduler import Copy, Step
from convai_fast.model import DoubleHeadsModel, TransformerConfig


@pytest.fixture(params=["openai-gpt", "gpt2"])
def model(request):
    torch.manual_seed(0)
    sizes = dict(vocab_size=101, n_positions=96, n_embd=32, n_layer=3, n_head=4)
    config = TransformerConfig.from_transformers({"model_type": request.param, **sizes})
    model = DoubleHeadsModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(params=[CpuBackend, CudaBackend, TorchBackend])
def make(request, model):
    """A function that makes a backend with room for sequences of so many tokens."""

    def make(num_slots, capacity):
        backend = request.param(model, num_slots)
        backend.allocate(capacity)
        return backend

    return make


def sequence(length, seed=0):
    """Token ids and segment ids."""
    return torch.randint(0, 101, (2, length), generator=torch.Generator().manual_seed(seed))


def run(backend, parts):
    """Add `parts`, {slot: (sequence, begin, end)}, in one pass; each one's last hidden state."""
    pieces = [whole[:, begin:end] for whole, begin, end in parts.values()]
    ids, segments = torch.cat(pieces, 1)
    slots, past = np.array([*parts], np.int64), np.array([part[1] for part in parts.values()])
    offsets = np.cumsum([0, *(piece.shape[1] for piece in pieces)])
    step = Step([], [], slots, past.astype(np.int64), offsets, ids.numpy(), segments.numpy())
    hidden = backend.forward(step)
    assert torch.equal(backend.forward(step), hidden)  # computed once more
    return hidden


def last(model, sequence, end):
    """The last hidden state of its first `end` tokens."""
    ids, segments = sequence[:, None, :end]
    return model.transformer(ids, segments)[0, -1]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "chunks",
    [[1] * 21, [21], [20, 1], [9, 1, 1, 10], [1, 20], [15, 1, 1, 4], [5, 7, 9]],
    ids=str,
)
@torch.inference_mode()
def test_cached_chunks_equal_the_whole_sequence(model, make, chunks):
    backend = make(2, 21)
    tokens, end = sequence(21), 0
    for chunk in chunks:
        (hidden,) = run(backend, {1: (tokens, end, end + chunk)})
        end += chunk
        close(hidden, last(model, tokens, end))


@torch.inference_mode()
def test_sequences_of_different_lengths_share_a_pass_in_any_order_of_slots(model, make):
    backend = make(4, 40)
    a, b, c = (sequence(length, seed) for seed, length in enumerate([40, 17, 3]))
    first = run(backend, {3: (a, 0, 16), 0: (b, 0, 5)})
    second = run(backend, {0: (b, 5, 17), 2: (c, 0, 3), 3: (a, 16, 40)})
    close(first, torch.stack([last(model, a, 16), last(model, b, 5)]))
    close(second, torch.stack([last(model, b, 17), last(model, c, 3), last(model, a, 40)]))


@pytest.mark.parametrize("shared", [1, 15, 16, 17, 40])
@torch.inference_mode()
def test_a_sequence_that_begins_alike_copies_what_it_shares(model, make, shared):
    backend = make(3, 64)
    old = sequence(40)
    new = torch.cat([old[:, :shared], sequence(9, seed=1)], 1)
    run(backend, {0: (old, 0, 40)})
    run(backend, {2: (sequence(50, seed=2), 0, 50)})  # what the slot held before
    backend.copy_prefix(Copy(0, 2, shared))
    (hidden,) = run(backend, {2: (new, shared, shared + 9)})
    close(hidden, last(model, new, shared + 9))
    longer = torch.cat([old, sequence(4, seed=3)], 1)
    (more,) = run(backend, {0: (longer, 40, 44)})  # the source is as it was
    close(more, last(model, longer, 44))


@torch.inference_mode()
def test_a_sequence_may_take_over_the_slot_of_what_it_goes_on_from(model, make):
    backend = make(1, 64)
    tokens = sequence(40)
    run(backend, {0: (tokens, 0, 30)})
    (hidden,) = run(backend, {0: (tokens, 20, 40)})
    close(hidden, last(model, tokens, 40))


@torch.inference_mode()
def test_allocating_more_keeps_what_the_slots_hold(model, make):
    backend = make(2, 64)
    a, b = sequence(90), sequence(30, seed=1)
    run(backend, {0: (a, 0, 50), 1: (b, 0, 17)})
    backend.allocate(20)  # less than there is
    backend.allocate(90)
    hidden = run(backend, {0: (a, 50, 90), 1: (b, 17, 30)})
    close(hidden, torch.stack([last(model, a, 90), last(model, b, 30)]))


@torch.inference_mode()
def test_what_does_not_fit_a_slot_is_refused(model):
    backend = CpuBackend(model, 2)
    backend.allocate(64)
    run(backend, {0: (sequence(60), 0, 60)})
    with pytest.raises((IndexError, RuntimeError)):
        run(backend, {0: (sequence(65), 60, 65)})
