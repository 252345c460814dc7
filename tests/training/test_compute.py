"""Where and how a model computes, as far as it can be told without a GPU."""

import dataclasses
import os

import pytest
import torch
from safetensors.torch import load_file

from convai_fast.training.compute import repeatable
from convai_fast.training.loop import train


@pytest.mark.parametrize(
    ("device", "enabled", "expected"),
    [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)],
)
def test_a_gpu_takes_kernels_that_repeat_themselves_while_it_is_asked_to(
    device, enabled, expected, monkeypatch
):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with repeatable(torch.device(device), enabled):
        assert torch.are_deterministic_algorithms_enabled() == expected
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == expected
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_repeats_itself_bit_for_bit(run_options, tmp_path):
    weights = []
    for name in ("a", "b"):
        options = dataclasses.replace(
            run_options, device="cuda", precision="auto", deterministic=True, max_steps=6
        )
        options.output = str(tmp_path / name)
        train(options, lambda _: None)
        weights.append(load_file(tmp_path / name / "last" / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
