import pytest
import torch
from parity import PEERS

from convai_fast.model import DoubleHeadsModel


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices as small as here only wait for a second thread, seconds a step on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
