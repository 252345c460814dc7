"""Batches that are made on a device: what the host is told of them without looking."""

import pytest
import torch

from convai_fast.data.build_store import build_store
from convai_fast.errors import UserError
from tests.helpers.batches import make_batches
from tests.helpers.layouts import AROUND, random_layout


@pytest.fixture(scope="module", params=["classic", 1])
def any_store(request, store, dialogues, tokenizer, tmp_path_factory):
    if request.param == "classic":
        return store
    layout = random_layout(request.param, max_token=200, known=AROUND)
    return build_store(dialogues, tokenizer, tmp_path_factory.mktemp("chat") / "store", layout)


@pytest.mark.parametrize("num_candidates", [1, 3, 0])
@pytest.mark.parametrize("max_length", [12, 30, 512])
def test_they_are_those_that_are_made_on_the_host(any_store, num_candidates, max_length):
    store, max_length = any_store, max(max_length, any_store.layout.empty_prompt + 2)
    settings = {
        "layout": "shared",
        "num_candidates": num_candidates,
        "max_length": max_length,
        "personality_permutations": 3,
        "shuffle": True,
    }
    there = make_batches(store, device=torch.device("cpu"), **settings)
    for ours, expected in zip(there, make_batches(store, **settings), strict=True):
        assert ours.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(ours[name], tensor), name


def test_what_the_host_must_know_stays_there(store):
    batches = make_batches(store, layout="shared", device=torch.device("meta"))
    kept = {name for name, tensor in batches[0].items() if tensor.device.type == "cpu"}
    assert kept == {"branch_ids", "offsets", "label_positions", "mc_labels"}


def test_the_padded_layout_is_refused(store):
    with pytest.raises(UserError, match="on a device in the layout shared alone"):
        make_batches(store, layout="padded", device=torch.device("cpu"))
