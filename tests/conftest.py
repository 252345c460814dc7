"""Fixtures shared by all tests."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

# No more than torch is imported here: the operators' tests also run where there is nothing else.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHARED = Path(__file__).parents[1].parent / "shared"

# A shell that starts the tests in the background has them ignore Ctrl-C, and their children too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tensors are small here: a second thread costs more than it saves, much more on a busy machine. And
# commands that tests start would tell that others take the cores.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real dialogues, tokenizers and old checkpoints that lie beside the checkout, not in it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data in {SHARED}, which is not there")
    return SHARED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def no_measured_speed() -> Iterator[None]:
    """Training's share of the device's speed takes half a second to measure, in every run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("convai_fast.training.step.matrix_rate", lambda *_: 1.0)
        yield


@pytest.fixture(scope="session")
def tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level BPE of a few hundred tokens, trained on the built-in dialogues."""
    from convai_fast.data.builtin import builtin_dialogues
    from convai_fast.dialogue.new_tokenizer import train_tokenizer

    dialogues = builtin_dialogues(num_train=40, num_valid=4)["train"]
    return train_tokenizer(dialogues, vocab_size=400)
