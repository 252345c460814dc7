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

from convai_fast import ops
from convai_fast.data.index import index_examples, index_examples_reference
from convai_fast.data.store import DialogueStore, SplitTables
from convai_fast.errors import UserError
from convai_fast.ops import reference
from convai_fast.ops.dropout import check_probability

MUTATIONS_PER_BASE = 16
COMPARED = 31  # one in so many is compared with the reference, and all that are not mutated
SPECIAL = (1, 2, 3, 4, 0)
Rng = np.random.Generator
Arguments = dict[str, Any]

REFUSALS = (ValueError, TypeError, IndexError, RuntimeError, NotImplementedError)
ODD_INTEGERS = (-1, 0, 1, 2, 7, 15, 16, 17, 2**31 - 1, 2**31, 2**60, 2**63 - 1, -(2**63))
ODD_SIZES = (-1, 0, 1, 2, 3, 17, 300, 2**60, -(2**63))  # not such as could be allocated
ODD_FLOATS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 3e38, -1.0, 0.5, 1.0)
DTYPES = (torch.int64, torch.int32, torch.uint16, torch.uint8, torch.int8, torch.float32)
DTYPES += (torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.complex64)


# ---- good arguments -----------------------------------------------------------------------------


def partition(rng: Rng, parts: int, most: int) -> np.ndarray:
    """int64 [parts + 1], offsets of so many parts of at most `most` elements."""
    return np.cumsum(np.r_[0, rng.integers(0, most + 1, parts)])


def make_index(rng: Rng) -> Arguments:
    utterances, dialogues, examples = rng.integers(1, 6, 3)
    offsets, persona, candidates = (
        partition(rng, utterances, 12),
        partition(rng, dialogues, 4),
        partition(rng, examples, 4),
    )
    turns = int(rng.integers(1, 9))
    first = rng.integers(0, turns, examples)

    def ids(count: int) -> Tensor:
        return torch.from_numpy(rng.integers(0, utterances, count, dtype=np.int32))

    return {
        "tokens": torch.zeros(offsets[-1], dtype=torch.int32),
        "utterance_offsets": torch.from_numpy(offsets),
        "persona_ids": ids(persona[-1]),
        "persona_offsets": torch.from_numpy(persona),
        "history_ids": ids(turns),
        "dialogue": torch.from_numpy(np.sort(rng.integers(0, dialogues, examples, np.int32))),
        "history_first": torch.from_numpy(first),
        "history_count": torch.from_numpy(rng.integers(0, turns - first + 1).astype(np.int32)),
        "candidate_ids": ids(candidates[-1]),
        "candidate_offsets": torch.from_numpy(candidates),
        "max_history": int(rng.integers(0, 4)),
        "num_candidates": int(rng.integers(0, 4)),
        "max_length": int(rng.integers(3, 60)),
        "personality_permutations": int(rng.integers(1, 4)),
    }


def make_collate(rng: Rng) -> Arguments:
    utterances, batch = int(rng.integers(1, 7)), int(rng.integers(0, 4))
    offsets = partition(rng, utterances, 12)
    plan = np.zeros((batch, len(ops.PLAN_COLUMNS)), np.int64)
    ends = [0, 0, 0]
    for row in plan:
        counts = rng.integers(0, 5, 3)
        rotation, kept = rng.integers(0, max(1, counts[0])), rng.integers(0, counts[0] + 1)
        row[:4] = ends[0], counts[0], rotation, kept
        row[4:] = ends[1], counts[1], 0, ends[2], counts[2]
        ends = [end + int(count) for end, count in zip(ends, counts, strict=True)]
    tables = [rng.integers(0, utterances, end, dtype=np.int32) for end in ends]
    dtype = np.uint16 if rng.random() < 0.5 else np.int32
    return {
        "tokens": torch.from_numpy(rng.integers(5, 50_000, offsets[-1]).astype(dtype)),
        "utterance_offsets": torch.from_numpy(offsets),
        "persona_ids": torch.from_numpy(tables[0]),
        "history_ids": torch.from_numpy(tables[1]),
        "candidate_ids": torch.from_numpy(tables[2]),
        "plan": torch.from_numpy(plan),
        "special_ids": list(SPECIAL),
        "num_candidates": int(max(plan[:, 8], default=0)) + int(rng.integers(0, 2)),
        # Room for the longest prefix, but not for every reply.
        "seq_len": max(prefix_lengths(offsets, plan, tables), default=0) + int(rng.integers(2, 16)),
    }


def prefix_lengths(offsets: np.ndarray, plan: np.ndarray, tables: list[np.ndarray]) -> list[int]:
    """Tokens of each row's <bos>, persona and history."""
    lengths, sizes = np.diff(offsets), []
    for row in plan:
        persona = np.roll(tables[0][row[0] : row[0] + row[1]], row[2])[: row[3]]
        history = tables[1][row[4] : row[4] + row[5]]
        sizes.append(int(1 + lengths[persona].sum() + (lengths[history] + 1).sum()))
    return sizes


def make_collate_shared(rng: Rng) -> Arguments:
    arguments = make_collate(rng)
    room = arguments.pop("seq_len")
    offsets, plan = arguments["utterance_offsets"].numpy(), arguments["plan"].numpy()
    ids = [arguments[f"{name}_ids"].numpy() for name in ("persona", "history", "candidate")]
    sizes = [0]
    for row, prefix in zip(plan, prefix_lengths(offsets, plan, ids), strict=True):
        replies = np.diff(offsets)[ids[2][row[7] : row[7] + row[8]]]
        sizes.append(prefix + (np.minimum(replies, max(0, room - prefix - 2)) + 2).sum())
    offsets = np.cumsum(sizes).astype(np.int64)
    arguments |= {"offsets": torch.from_numpy(offsets), "num_tokens": int(offsets[-1])}
    return arguments | {"max_length": room}


def make_sample(rng: Rng) -> Arguments:
    batch, vocab_size = int(rng.integers(0, 4)), int(rng.choice([1, 2, 15, 17, 64, 65, 1019, 2100]))
    logits = torch.from_numpy(rng.normal(0, 4, (batch, vocab_size)).astype(np.float32))
    if rng.random() < 0.3:
        logits = logits.round()  # ties

    def each(values: Any) -> Tensor:
        return torch.from_numpy(np.array(rng.choice(values, batch)))

    dtype = [torch.float32, torch.bfloat16, torch.float16][rng.integers(3)]
    return {
        "logits": logits.to(dtype),
        "temperature": each(np.float32([0, 0.5, 1, 1e-30])),
        "top_k": each([0, 1, 3, 50, 10**12]),
        "top_p": each(np.float32([0, 0.1, 0.9, 1])),
        "min_p": each(np.float32([0, 0.1, 1])),
        "seeds": torch.from_numpy(rng.integers(0, 2**63, batch)),
        "steps": torch.from_numpy(rng.integers(0, 2**63, batch)),
        "return_logprobs": bool(rng.integers(2)),
    }


def make_packed_linear(rng: Rng) -> Arguments:
    rows, in_features, out_features = (int(rng.integers(0, most)) for most in (9, 40, 70))
    panels = -(-out_features // reference.PANEL)
    int8 = rng.random() < 0.4
    shape = (panels, in_features, 16) if not int8 else (panels, (in_features + 1) // 2, 16, 2)
    weight = torch.from_numpy(rng.normal(0, 40, shape).astype(np.float32))
    if int8 and in_features % 2:
        weight[:, -1, :, 1] = 0
    dtype = [torch.float32, torch.bfloat16][rng.integers(2)]

    def floats(*shape: int) -> Tensor:
        return torch.from_numpy(rng.normal(0, 1, shape).astype(np.float32))

    return {
        "x": floats(rows, in_features),
        "weight": weight.clamp(-127, 127).to(torch.int8 if int8 else dtype),
        "scales": floats(out_features).abs() if int8 else None,
        "bias": floats(out_features) if rng.random() < 0.7 else None,
        "out_features": out_features,
        "gelu": bool(rng.integers(2)),
    }


def make_cached_attention(rng: Rng) -> Arguments:
    slots, heads = (int(n) for n in rng.integers(1, 4, 2))
    head_dim, capacity = int(rng.choice([1, 3, 8, 16, 20])), int(rng.choice([64, 128]))
    runs = int(rng.integers(0, slots + 1))
    new = rng.integers(0, 6, runs)
    dtype = [torch.float32, torch.bfloat16][rng.integers(2)]
    values_dim = -(-head_dim // 64) * 64

    def cache(*shape: int) -> Tensor:
        return torch.from_numpy(rng.normal(0, 1, shape).astype(np.float32)).to(dtype)

    qkv = rng.normal(0, 1, (int(new.sum()), 3 * heads * head_dim)).astype(np.float32)
    return {
        "qkv": torch.from_numpy(qkv),
        "keys": cache(slots, heads, capacity // 16, head_dim, 16),
        "values": cache(slots, heads, capacity, values_dim),
        "slots": torch.from_numpy(rng.permutation(slots)[:runs]),
        "offsets": torch.from_numpy(np.cumsum(np.r_[0, new])),
        "lengths": torch.from_numpy(rng.integers(0, capacity - 5, runs)),
    }


def make_branch_attention(rng: Rng) -> Arguments:
    heads, head_dim = int(rng.integers(1, 4)), int(rng.choice([1, 3, 8, 16, 20]))
    rows = [
        np.repeat(np.cumsum(rng.integers(0, 2, segments)), rng.integers(0, 20, segments))
        for segments in rng.integers(1, 5, rng.integers(0, 4))
    ]
    sizes = [len(row) for row in rows]
    qkv = rng.normal(0, 1, (sum(sizes), 3 * heads * head_dim)).astype(np.float32)
    return {
        "qkv": torch.from_numpy(qkv).to([torch.float32, torch.bfloat16][rng.integers(2)]),
        "offsets": torch.from_numpy(np.cumsum([0, *sizes]).astype(np.int64)),
        "branch_ids": torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *rows])),
        "num_heads": heads,
        "dropout_p": float(rng.choice([0, 0, 0.3])),
        "seed": torch.tensor(int(rng.integers(2**63))),
    }


def make_branch_attention_backward(rng: Rng) -> Arguments:
    arguments = make_branch_attention(rng)
    out, logsumexp = torch.ops.convai_fast.branch_attention(**arguments)
    grad = torch.from_numpy(rng.normal(0, 1, tuple(out.shape)).astype(np.float32)).to(out.dtype)
    return {"grad_out": grad, "out": out, "logsumexp": logsumexp, **arguments}


def make_dropout(rng: Rng) -> Arguments:
    x = torch.from_numpy(rng.normal(0, 1, int(rng.integers(0, 300))).astype(np.float32))
    p, seed = float(rng.choice([0.1, 0.5, 0.9])), torch.tensor(int(rng.integers(2**63)))
    return {"x": x.to([torch.float32, torch.bfloat16][rng.integers(2)]), "p": p, "seed": seed}


MAKERS: dict[str, Callable[[Rng], Arguments]] = {
    "index": make_index,
    "collate": make_collate,
    "collate_shared": make_collate_shared,
    "sample": make_sample,
    "packed_linear": make_packed_linear,
    "cached_attention": make_cached_attention,
    "branch_attention": make_branch_attention,
    "branch_attention_backward": make_branch_attention_backward,
    "dropout": make_dropout,
}


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
    offsets = arguments.pop("utterance_offsets")
    store = SimpleNamespace(
        folder="store",
        tokens=arguments.pop("tokens"),
        utterance_offsets=offsets,
        texts=torch.empty(int(offsets[-1]) if len(offsets) else 0, dtype=torch.uint8),
        text_offsets=offsets,
        splits={"train": tables},
    )
    DialogueStore._check(store)
    index = index_examples(store, "train", **arguments)
    sizes = np.stack([index.padded_lengths, index.shared_lengths, index.num_labels], 1)
    return index.plan, sizes, tuple(index.cuts)


def reference_of(name: str, arguments: Arguments) -> tuple[Any, ...]:
    if name != "index":
        result = getattr(reference, name)(**arguments)
        return result if isinstance(result, tuple) else (result,)
    names = "utterance_offsets persona_offsets persona_ids history_ids dialogue history_first"
    names += " history_count candidate_offsets candidate_ids"
    arrays = [arguments[each].numpy() for each in names.split()]
    turns = 2 * arguments["max_history"] + 1
    options = [arguments[each] for each in ("num_candidates", "max_length")]
    return index_examples_reference(*arrays, turns, *options, arguments["personality_permutations"])


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
        if name == "cached_attention":  # which writes to its cache
            arguments |= {each: arguments[each].clone() for each in ("keys", "values")}
        is_compared = is_good or number % COMPARED == 0
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
            if name == "cached_attention":
                results += arguments["keys"], arguments["values"]
                expected += before["keys"], before["values"]
            for ours, theirs in zip(results, expected, strict=True):
                assert_same(ours, theirs)
        return f"{name} computed"

    return call
