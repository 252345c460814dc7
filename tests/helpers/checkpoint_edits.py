"""Changes to a checkpoint's files."""

import json

import torch
from safetensors.torch import load_file, save_file


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def as_bin(folder, tensors=None):
    tensors = load_file(folder / "model.safetensors") if tensors is None else tensors
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def assert_same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
