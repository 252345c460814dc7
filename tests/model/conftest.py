"""Models of both architectures: transformers' checkpoints, and ours with the same weights."""

import pytest

from convai_fast.model import DoubleHeadsModel
from tests.helpers.model_peers import PEERS, make_peer


@pytest.fixture(params=list(PEERS))
def architecture(request):
    return request.param


@pytest.fixture
def to_ours(tmp_path):
    """A function that gives our model with the weights of transformers'."""

    def convert(peer):
        peer.save_pretrained(tmp_path / "peer")
        return DoubleHeadsModel.from_pretrained(tmp_path / "peer")

    return convert


@pytest.fixture
def folder(architecture, tmp_path):
    """A checkpoint that transformers wrote."""
    make_peer(architecture).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def gpt2_folder(tmp_path):
    make_peer("gpt2").save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"
