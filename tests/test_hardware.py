"""What the options that say "auto" become."""

import pytest
import torch

from convai_fast.errors import UserError
from convai_fast.hardware import resolve_device, resolve_precision


def test_auto_takes_no_bf16_that_the_gpu_emulates(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert resolve_precision("auto", torch.device("cuda")) == torch.float32


@pytest.mark.parametrize(("name", "current"), [("cuda:1", [1]), ("cuda", []), ("cpu", [])])
def test_one_of_several_gpus_becomes_the_current_one(name, current, monkeypatch):
    made_current = []
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made_current.append(device.index))
    assert resolve_device(name) == torch.device(name)
    assert made_current == current


@pytest.mark.parametrize("name", ["meta", "cuda:99", "toaster"])
def test_a_device_on_which_nothing_can_be_computed_is_one_sentence(name):
    with pytest.raises(UserError, match=f"device {name} is not available here: use cpu or auto"):
        resolve_device(name)
