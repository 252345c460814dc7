"""What the options that say "auto" become."""

import torch

from convai_fast.hardware import resolve_precision


def test_auto_takes_no_bf16_that_the_gpu_emulates(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert resolve_precision("auto", torch.device("cuda")) == torch.float32
