"""The device "meta" in place of a GPU: it has no values, so that whoever asks for one raises."""

import importlib
from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from convai_fast.model import context

META = torch.device("meta")


class NothingWaits(TorchDispatchMode):
    """Within, what would have the host wait for a GPU raises: a copy from ordinary memory too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        is_from_host = any(x.device.type == "cpu" and x.dim() for x in given)
        is_on_device = any(x.device == META for x in given + made)
        is_asked_not_to_wait = kwargs.get("non_blocking", False)
        if func.namespace == "aten" and is_from_host and is_on_device and not is_asked_not_to_wait:
            raise AssertionError(f"{func} copies from the CPU, and waits for it")
        return out


def stand_in_for_a_gpu(monkeypatch, module):
    """Have autocast, fused AdamW and what is computed for all parameters at once take "meta", and
    `module`, which asks for an index of keys, have one there."""
    optimizer = importlib.import_module("torch.optim.optimizer")
    foreach, clip_grad = torch.utils._foreach_utils, torch.nn.utils.clip_grad
    for owner, name, value in (
        (torch, "autocast", lambda *_, **__: nullcontext()),
        (optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta"]),
        (foreach, "_device_has_foreach_support", lambda _: True),
        (clip_grad, "_device_has_foreach_support", lambda _: True),
        (context, "to_device", lambda x, _: x.to(META, non_blocking=True)),
        (module, "key_index", on_cuda(context.key_index)),
    ):
        monkeypatch.setattr(owner, name, value)


def on_cuda(key_index):
    def index(offsets, branch_ids, device, **settings):
        assert device == META
        return key_index(offsets, branch_ids, torch.device("cuda"), **settings)

    return index


def fetched_once(monkeypatch, module):
    """Replace `module.fetch`; the list of what was fetched, zeros on the CPU, one item a call."""
    calls = []

    def fetch(*tensors):
        assert all(x.device == META for x in tensors)
        calls.append([torch.zeros(x.shape, dtype=x.dtype) for x in tensors])
        return calls[-1]

    monkeypatch.setattr(module, "fetch", fetch)
    return calls
