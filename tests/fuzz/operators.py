"""Broken arguments for the compiled operators: they compute what the reference does, or refuse.

What they must never do, reading or writing outside of what they were given, is seen where they are
built with AddressSanitizer: `make sanitize`.
"""

import functools
import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convai_fast.data.index import index_examples, index_examples_reference
from convai_fast.data.store import DialogueStore, SplitTables
from convai_fast.errors import UserError
from convai_fast.ops import reference
from convai_fast.ops.dropout import check_probability
from convai_fast.ops.plan import layout_numbers
from tests.fuzz.arguments import MAKERS, Arguments

MUTATIONS_PER_BASE = 16
COMPARED = 31  # one in so many is compared with the reference, and all that are not mutated

WITH_A_CACHE = ("cached_attention", "decoder_step")
OF_CUDA_ALONE = ("key_ids", "cu_queries", "cu_keys", "max_queries", "max_keys")
REFUSALS = (ValueError, TypeError, IndexError, RuntimeError, NotImplementedError)
ODD_INTEGERS = (-1, 0, 1, 2, 7, 15, 16, 17, 2**31 - 1, 2**31, 2**60, 2**63 - 1, -(2**63))
ODD_SIZES = (-1, 0, 1, 2, 3, 17, 300, 2**60, -(2**63))  # not such as could be allocated
ODD_FLOATS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 3e38, -1.0, 0.5, 1.0)
DTYPES = (torch.int64, torch.int32, torch.uint16, torch.uint8, torch.int8, torch.float32)
DTYPES += (torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.complex64)


# ---- mutations ----------------------------------------------------------------------------------


def odd_values(tensor: Tensor) -> tuple[float, ...]:
    if tensor.is_floating_point() or tensor.is_complex():
        return ODD_FLOATS
    if tensor.dtype == torch.bool:
        return 0, 1
    bits = torch.iinfo(tensor.dtype)
    return tuple(value for value in ODD_INTEGERS if bits.min <= value <= bits.max)


def mutate_values(rng: random.Random, tensor: Tensor) -> Tensor:
    """One of the values is another, or all are."""
    if tensor.numel() == 0 or tensor.dtype == torch.uint16:
        return tensor
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    flat, at, kind = tensor.view(-1), rng.randrange(tensor.numel()), rng.randrange(3)
    if kind == 0 and not tensor.is_floating_point() and abs(int(flat[at])) < 100:
        flat[at] = int(flat[at]) + rng.choice([-1, 1, 16])
    else:
        # 3e38 is infinite in float16.
        value = torch.tensor(rng.choice(odd_values(tensor))).to(tensor.dtype)
        flat[slice(None) if kind == 1 else at] = value
    return tensor


def mutate_tensor(rng: random.Random, tensor: Tensor, only_values: bool) -> Tensor:
    """Other values, another shape, another type, or the same values laid out otherwise."""
    kind = rng.randrange(10)
    if kind <= 3 or tensor.dim() == 0:
        return mutate_values(rng, tensor)
    if kind == 4:
        dim = rng.randrange(tensor.dim())
        return tensor.narrow(dim, 0, max(0, tensor.shape[dim] - rng.choice([1, 2, 100])))
    if kind == 5:
        return torch.cat([tensor, tensor[:1]], 0)
    if only_values:
        return tensor
    if kind == 6:
        return tensor.to(rng.choice(DTYPES))
    if kind == 7:
        return rng.choice(
            [tensor[None], tensor.flatten(), tensor[..., None], tensor.movedim(0, -1)]
        )
    if kind == 8:
        return torch.stack([tensor, tensor], -1)[..., 0]  # strides of 2
    flat = tensor.flatten()
    return torch.cat([flat[:1], flat])[min(1, len(flat)) :].view(tensor.shape)  # not aligned


def mutate(rng: random.Random, name: str, arguments: Arguments) -> Arguments:
    """The arguments with at most two of them changed."""
    arguments = dict(arguments)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 2])):
        argument = rng.choice(list(arguments))
        value = arguments[argument]
        if argument in ("scales", "bias", "seed") and rng.random() < 0.1:
            arguments[argument] = None
        elif isinstance(value, Tensor):
            # The arrays of a store have the type that they should: it is what opens them.
            arguments[argument] = mutate_tensor(rng, value, only_values=name == "index")
        elif isinstance(value, bool):
            arguments[argument] = not value
        elif isinstance(value, int):
            arguments[argument] = rng.choice([*ODD_SIZES, value - 1, value + 1])
        elif isinstance(value, float):
            arguments[argument] = rng.choice(ODD_FLOATS)
        elif isinstance(value, str):
            arguments[argument] = rng.choice(["relu", "tanh", ""])
        elif argument == "weights":
            at, count = rng.randrange(len(value)), rng.choice([0, 1, 1, 1, 2])
            part = value[at]
            if isinstance(part, Tensor) and rng.random() < 0.8:
                part = mutate_tensor(rng, part, only_values=False)
            else:
                part = rng.choice([None, *value])
            arguments[argument] = [*value[:at], *[part] * count, *value[at + 1 :]]
        elif isinstance(value, list):
            kept = value[: rng.randrange(6)]
            arguments[argument] = kept + rng.choices(ODD_INTEGERS, k=rng.choice([0, 1, 5]))
    return arguments


# ---- calls --------------------------------------------------------------------------------------


def call_index(arguments: Arguments) -> tuple[Any, ...]:
    """What a store with these tables is cut to, if its own checks let it pass."""
    arguments = dict(arguments)
    names = SplitTables.__dataclass_fields__
    tables = SplitTables(**{name: arguments.pop(name) for name in names})
    store = SimpleNamespace(
        folder="store",
        layout=arguments.pop("layout"),
        tokens=arguments.pop("tokens"),
        utterance_offsets=arguments.pop("utterance_offsets"),
        texts=torch.empty(0, dtype=torch.uint8),
        text_offsets=arguments.pop("text_offsets"),
        splits={"train": tables},
    )
    DialogueStore._check(store)
    store.layout_numbers = layout_numbers(store.layout, len(store.text_offsets) - 1)
    index = index_examples(store, "train", **arguments)
    sizes = (index.padded_lengths, index.shared_lengths, index.num_labels, index.is_cut)
    return index.plan, np.stack((*sizes, index.prefix_lengths), 1), tuple(index.cuts)


def reference_of(name: str, arguments: Arguments) -> tuple[Any, ...]:
    if name != "index":
        if name == "branch_attention":
            arguments = {each: arguments[each] for each in arguments if each not in OF_CUDA_ALONE}
        result = getattr(reference, name)(**arguments)
        return result if isinstance(result, tuple) else (result,)
    names = "utterance_offsets persona_offsets persona_ids history_ids dialogue history_first"
    names += " history_count candidate_offsets candidate_ids"
    arrays = [arguments[each].numpy() for each in names.split()]
    numbers = layout_numbers(arguments["layout"], len(arguments["text_offsets"]) - 1)
    turns = 2 * arguments["max_history"] + 1
    options = [arguments[each] for each in ("num_candidates", "max_length")]
    options += [arguments["personality_permutations"]]
    return index_examples_reference(*arrays, numbers.numpy(), turns, *options)


def assert_same(ours: Any, expected: Any) -> None:
    if not isinstance(ours, Tensor):
        assert np.array_equal(ours, expected)
    elif not ours.is_floating_point():
        assert torch.equal(ours, expected)
    else:
        tolerance = 1e-3 if ours.dtype == torch.float32 else 3e-2
        largest = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance * largest)


def is_ordinary(arguments: Arguments) -> bool:
    """Whether floating-point sums over the arguments are what they are in any order."""
    return all(
        bool((value.abs() < 1e4).all())
        for value in arguments.values()
        if isinstance(value, Tensor) and value.is_floating_point()
    )


def fuzzer(folder: Path) -> Callable[[int], str]:
    """What calls an operator with the arguments of a number, and tells how that ended."""

    @functools.lru_cache(maxsize=1)
    def base(number: int) -> tuple[str, Arguments]:
        rng = np.random.default_rng(number)
        name = list(MAKERS)[number % len(MAKERS)]
        return name, MAKERS[name](rng)

    def call(number: int) -> str:
        name, good = base(number // MUTATIONS_PER_BASE)
        arguments = mutate(random.Random(number), name, good)
        is_good = all(arguments[each] is value for each, value in good.items())
        if name in WITH_A_CACHE:  # which is written to
            arguments |= {each: arguments[each].clone() for each in ("keys", "values")}
        is_compared = is_good or number % COMPARED == 0
        if name == "decoder_step":  # where sums that round the other way grow from layer to layer
            is_compared &= arguments["keys"].dtype == torch.float32
        before = {}
        if is_compared:
            before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        try:
            check_probability(name, arguments.get("p", arguments.get("dropout_p", 0.0)))
            if name == "index":
                results = call_index(arguments)
            else:
                results = getattr(torch.ops.convai_fast, name)(**arguments)
        except (*REFUSALS, UserError) as error:
            assert "INTERNAL ASSERT" not in str(error), error
            assert not is_good, f"{name} refuses what is right: {error}"
            return f"{name} refused"
        if is_compared and is_ordinary(before):
            results = results if isinstance(results, tuple) else (results,)
            expected = reference_of(name, before)
            if name in WITH_A_CACHE:
                results += arguments["keys"], arguments["values"]
                expected += before["keys"], before["values"]
            for ours, theirs in zip(results, expected, strict=True):
                assert_same(ours, theirs)
        return f"{name} computed"

    return call
