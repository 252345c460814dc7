import pytest
from parity import PEERS

from convai_fast.model import DoubleHeadsModel


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
