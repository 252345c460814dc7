"""Good arguments for each compiled operator, small and of many shapes."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convai_fast import ops
from convai_fast.dialogue.layout import Layout, build_sequence
from convai_fast.ops.plan import classes_of, layout_numbers, pieces_of, read_plan
from tests.helpers.layouts import random_layout

Rng = np.random.Generator
Arguments = dict[str, Any]


def partition(rng: Rng, parts: int, most: int) -> np.ndarray:
    """int64 [parts + 1], offsets of so many parts of at most `most` elements."""
    return np.cumsum(np.r_[0, rng.integers(0, most + 1, parts)])


def make_texts(rng: Rng) -> tuple[Layout, int, np.ndarray]:
    """A layout, how many texts there are, and the offsets of their utterances."""
    layout, num_texts = random_layout(int(rng.integers(10**6))), int(rng.integers(1, 7))
    lengths = rng.integers(0, 13, num_texts * len(classes_of(layout)))
    return layout, num_texts, np.cumsum(np.r_[0, lengths, [*map(len, pieces_of(layout))]])


def make_index(rng: Rng) -> Arguments:
    layout, texts, offsets = make_texts(rng)
    dialogues, examples = rng.integers(1, 6, 2)
    persona, candidates = (
        partition(rng, dialogues, 4),
        partition(rng, examples, 4),
    )
    turns = int(rng.integers(1, 9))
    first = rng.integers(0, turns, examples)

    def ids(count: int) -> Tensor:
        return torch.from_numpy(rng.integers(0, texts, count, dtype=np.int32))

    return {
        "tokens": torch.zeros(offsets[-1], dtype=torch.int32),
        "utterance_offsets": torch.from_numpy(offsets),
        "layout": layout,
        "text_offsets": torch.zeros(texts + 1, dtype=torch.int64),
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
        "max_length": layout.empty_prompt + int(rng.integers(1, 60)),
        "personality_permutations": int(rng.integers(1, 4)),
    }


def make_collate(rng: Rng) -> Arguments:
    layout, texts, offsets = make_texts(rng)
    batch = int(rng.integers(0, 4))
    plan = np.zeros((batch, len(ops.PLAN_COLUMNS)), np.int64)
    ends = [0, 0, 0]
    for row in plan:
        counts = rng.integers(0, 5, 3)
        rotation, kept = rng.integers(0, max(1, counts[0])), rng.integers(0, counts[0] + 1)
        row[:4] = ends[0], counts[0], rotation, kept
        row[4:] = ends[1], counts[1], 0, ends[2], counts[2]
        ends = [end + int(count) for end, count in zip(ends, counts, strict=True)]
    tables = [rng.integers(0, texts, end, dtype=np.int32) for end in ends]
    dtype = np.uint16 if rng.random() < 0.5 else np.int32
    arguments = {
        "tokens": torch.from_numpy(rng.integers(5, 50_000, offsets[-1]).astype(dtype)),
        "utterance_offsets": torch.from_numpy(offsets),
        "persona_ids": torch.from_numpy(tables[0]),
        "history_ids": torch.from_numpy(tables[1]),
        "candidate_ids": torch.from_numpy(tables[2]),
        "plan": torch.from_numpy(plan),
        "layout": layout_numbers(layout, texts),
        "num_candidates": int(max(plan[:, 8], default=0)) + int(rng.integers(0, 2)),
    }
    # Room for the longest prefix, but not for every reply.
    longest = max((prefix for prefix, _ in lengths_of(arguments)), default=0)
    return arguments | {"seq_len": longest + int(rng.integers(2, 16))}


def lengths_of(arguments: Arguments) -> Iterator[tuple[int, list[int]]]:
    """Tokens of each row's prefix, and of its candidates' replies."""
    given = [arguments[f"{name}_ids"] for name in ("persona", "history", "candidate")]
    given = [arguments["tokens"], arguments["utterance_offsets"], *given, arguments["plan"]]
    layout, rows = read_plan(*given, arguments["layout"], max_length=10**9)
    for row in rows:
        prompt, *_ = build_sequence(row.persona, row.history, [], layout, with_eos=False)
        yield len(prompt) - 1, [*map(len, row.candidates)]


def make_collate_shared(rng: Rng) -> Arguments:
    arguments = make_collate(rng)
    room = arguments.pop("seq_len")
    sizes = [0]
    for prefix, replies in lengths_of(arguments):
        sizes.append(prefix + sum(min(reply, max(0, room - prefix - 2)) + 2 for reply in replies))
    offsets = np.cumsum(sizes).astype(np.int64)
    arguments |= {"offsets": torch.from_numpy(offsets), "num_tokens": int(offsets[-1])}
    return arguments | {"max_length": room}


def make_sample(rng: Rng) -> Arguments:
    batch, vocab_size = int(rng.integers(0, 4)), int(rng.choice([1, 2, 15, 17, 64, 65, 1019, 2100]))
    logits = torch.from_numpy(rng.normal(0, 4, (batch, vocab_size)).astype(np.float32))
    if rng.random() < 0.3:
        logits = logits.round()  # ties

    def each(values: Any) -> Tensor:
        return torch.from_numpy(np.array(rng.choice(values, rng.choice([1, batch]))))

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
    dtype = [torch.float32, torch.bfloat16, torch.int8][rng.integers(3)]
    weight = torch.from_numpy(rng.normal(0, 1, (out_features, in_features)).astype(np.float32))
    packed = ops.pack_weight(weight, dtype)

    def floats(*shape: int) -> Tensor:
        return torch.from_numpy(rng.normal(0, 1, shape).astype(np.float32))

    return {
        "x": floats(rows, in_features),
        "weight": packed.data,
        "scales": packed.scales,
        "column_sums": packed.column_sums,
        "bias": floats(out_features) if rng.random() < 0.7 else None,
        "out_features": out_features,
        "activation": [None, "gelu_new", "gelu", "relu", "silu"][rng.integers(5)],
    }


def make_linear_of(rng: Rng) -> Arguments:
    """What the forward and the backward pass have in common."""
    rows, in_features, out_features = (int(rng.integers(0, most)) for most in (80, 40, 70))
    dtype = [torch.float32, torch.bfloat16, torch.float16, torch.float64][rng.integers(4)]
    return {
        "x": torch.from_numpy(rng.normal(0, 1, (rows, in_features))).to(dtype),
        "weight": torch.from_numpy(rng.normal(0, 1, (out_features, in_features))).float(),
        "in_float32": bool(rng.integers(2)),
    }


def make_linear(rng: Rng) -> Arguments:
    arguments = make_linear_of(rng)
    bias = torch.from_numpy(rng.normal(0, 1, len(arguments["weight"]))).float()
    return arguments | {"bias": bias if rng.random() < 0.7 else None}


def make_linear_backward(rng: Rng) -> Arguments:
    arguments = make_linear_of(rng)
    x, weight = arguments["x"], arguments["weight"]
    grad = torch.from_numpy(rng.normal(0, 1, (len(x), len(weight)))).to(x.dtype)
    return {"grad": grad, **arguments, "wanted": [bool(rng.integers(2)) for _ in range(3)]}


def make_heads(rng: Rng, tokens: int, num_kv_heads: int, head_dim: int) -> dict[str, Tensor]:
    """q, k and v, apart or side by side in one tensor."""
    sizes = (num_kv_heads * int(rng.integers(1, 4)), num_kv_heads, num_kv_heads)
    qkv = torch.from_numpy(rng.normal(0, 1, (tokens, sum(sizes), head_dim)).astype(np.float32))
    parts = qkv.split(sizes, dim=1)
    if rng.random() < 0.5:
        parts = [part.contiguous() for part in parts]
    return dict(zip("qkv", parts, strict=True))


def make_cached_attention(rng: Rng) -> Arguments:
    slots, num_kv_heads = (int(n) for n in rng.integers(1, 4, 2))
    head_dim, capacity = int(rng.choice([1, 3, 8, 16, 20])), int(rng.choice([64, 128]))
    runs = int(rng.integers(0, slots + 1))
    new = rng.integers(0, 6, runs)
    dtype = [torch.float32, torch.bfloat16][rng.integers(2)]
    keys, values = ops.make_cache(
        slots, num_kv_heads, capacity=capacity, head_dim=head_dim, dtype=dtype
    )
    for cache in (keys, values):
        cache.copy_(torch.from_numpy(rng.normal(0, 1, cache.shape).astype(np.float32)))
    return {
        **make_heads(rng, int(new.sum()), num_kv_heads, head_dim),
        "keys": keys,
        "values": values,
        "slots": torch.from_numpy(rng.permutation(slots)[:runs]),
        "offsets": torch.from_numpy(np.cumsum(np.r_[0, new])),
        "lengths": torch.from_numpy(rng.integers(0, capacity - 5, runs)),
    }


def make_decoder_step(rng: Rng) -> Arguments:
    """A decoder of one or two layers, of any kind, in any format, and a step on it."""
    num_kv_heads, group, layers = (int(n) for n in rng.integers(1, 3, 3))
    head_dim, n_inner = int(rng.choice([2, 4, 10])), int(rng.choice([3, 17, 70]))
    num_heads, vocab, capacity, slots = num_kv_heads * group, 13, 64, 3
    n_embd = int(rng.choice([num_heads * head_dim, 6, 33]))
    dtype = [torch.float32, torch.bfloat16, torch.int8][rng.integers(3)]
    rms, rope = bool(rng.integers(2)), bool(rng.integers(2))
    sequences = int(rng.integers(1, slots + 1))
    new = rng.integers(1, 6, sequences)

    def floats(*shape: int) -> Tensor:
        return torch.from_numpy(rng.normal(0, 0.3, shape).astype(np.float32))

    def maybe(*shape: int) -> Tensor | None:
        return floats(*shape) if rng.integers(2) else None

    def linear(in_features: int, out_features: int) -> list[Tensor | None]:
        packed = [
            ops.pack_weight(floats(out_features, in_features), dtype)[:3] for _ in range(layers)
        ]
        stacks = [
            None if each[0] is None else torch.stack(each) for each in zip(*packed, strict=True)
        ]
        return [*stacks, maybe(layers, out_features)]

    weights = [floats(vocab, n_embd), None if rope else floats(capacity, n_embd)]
    weights.append(floats(head_dim // 2) if rope else None)
    weights += [floats(n_embd), maybe(n_embd)] if rng.integers(2) else [None, None]
    for _ in range(2):
        weights += [floats(layers, n_embd), maybe(layers, n_embd)]
    weights += [floats(layers, head_dim) for _ in range(2)] if rng.integers(2) else [None] * 2
    weights += linear(n_embd, (num_heads + 2 * num_kv_heads) * head_dim)
    weights += linear(num_heads * head_dim, n_embd)
    weights += linear(n_embd, n_inner) if rng.integers(2) else [None] * 4
    weights += linear(n_embd, n_inner) + linear(n_inner, n_embd)
    kept = torch.float32 if dtype == torch.float32 else torch.bfloat16
    keys, values = ops.make_cache(
        *(layers, slots, num_kv_heads), capacity=capacity, head_dim=head_dim, dtype=kept
    )
    for cache in (keys, values):
        cache.copy_(torch.from_numpy(rng.normal(0, 1, cache.shape).astype(np.float32)))

    def ids() -> Tensor:
        return torch.from_numpy(rng.integers(0, vocab, int(new.sum())))

    return {
        "input_ids": ids(),
        "token_type_ids": ids() if rng.integers(2) else None,
        "slots": torch.from_numpy(rng.permutation(slots)[:sequences]),
        "offsets": torch.from_numpy(np.cumsum(np.r_[0, new])),
        "lengths": torch.from_numpy(rng.integers(0, capacity - 5, sequences)),
        "keys": keys,
        "values": values,
        "weights": weights,
        "num_heads": num_heads,
        "head_dim": head_dim,
        "n_inner": n_inner,
        "pre_norm": bool(rng.integers(2)),
        "rms_norm": rms,
        "norm_eps": 1e-3,
        "activation": ["gelu_new", "gelu", "relu", "silu"][rng.integers(4)],
        "rope_scale": float(rng.choice([1.0, 1.3])),
    }


def make_branch_attention_of(rng: Rng) -> Arguments:
    """What the forward and the backward pass have in common."""
    head_dim = int(rng.choice([1, 3, 8, 16, 20]))
    rows = [
        np.repeat(np.cumsum(rng.integers(0, 2, segments)), rng.integers(0, 20, segments))
        for segments in rng.integers(1, 5, rng.integers(0, 4))
    ]
    sizes = [len(row) for row in rows]
    parts = make_heads(rng, sum(sizes), int(rng.integers(1, 4)), head_dim)
    dtype = [torch.float32, torch.bfloat16, torch.float16, torch.float64][rng.integers(4)]
    return {
        **{name: part.to(dtype) for name, part in parts.items()},
        "offsets": torch.from_numpy(np.cumsum([0, *sizes]).astype(np.int64)),
        "branch_ids": torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *rows])),
        "dropout_p": float(rng.choice([0, 0, 0.3])),
        "seed": torch.tensor(int(rng.integers(2**63))),
    }


def make_branch_attention(rng: Rng) -> Arguments:
    arguments = make_branch_attention_of(rng)
    names = ("key_ids", "cu_queries", "cu_keys", "max_queries", "max_keys")
    index = (None, None, None, 0, 0)  # which a CPU does not read
    if rng.random() < 0.5:
        index = ops.index_keys(arguments["offsets"], arguments["branch_ids"])
    return arguments | dict(zip(names, index, strict=True))


def make_branch_attention_backward(rng: Rng) -> Arguments:
    arguments = make_branch_attention_of(rng)
    out, logsumexp = torch.ops.convai_fast.branch_attention(
        **arguments, key_ids=None, cu_queries=None, cu_keys=None, max_queries=0, max_keys=0
    )
    grad = torch.from_numpy(rng.normal(0, 1, tuple(out.shape)).astype(np.float32)).to(out.dtype)
    return {"grad_out": grad, "out": out, "logsumexp": logsumexp, **arguments}


def make_gelu_backward(rng: Rng) -> Arguments:
    x, grad = torch.from_numpy(rng.normal(0, 3, (2, int(rng.integers(0, 300)))))
    dtype = [torch.float32, torch.bfloat16, torch.float16, torch.float64][rng.integers(4)]
    return {"grad": grad.to(dtype), "x": x.to(dtype)}


def make_gelu(rng: Rng) -> Arguments:
    return {"x": make_gelu_backward(rng)["x"]}


def make_swiglu_backward(rng: Rng) -> Arguments:
    arguments = make_gelu_backward(rng)
    return {"grad": arguments["grad"], "gate": arguments["x"], "up": arguments["x"].flip(0)}


def make_swiglu(rng: Rng) -> Arguments:
    arguments = make_swiglu_backward(rng)
    return {"gate": arguments["gate"], "up": arguments["up"]}


def make_rms_norm_backward(rng: Rng) -> Arguments:
    rows, size = int(rng.integers(0, 300)), int(rng.integers(1, 70))
    x, grad = torch.from_numpy(rng.normal(0, 1, (2, rows, size)).astype(np.float32))
    kinds = [torch.float32, torch.bfloat16]
    weight = torch.from_numpy(rng.normal(1, 0.5, size).astype(np.float32))
    x, grad = x.to(kinds[rng.integers(2)]), grad.to(kinds[rng.integers(2)])
    return {"grad": grad, "x": x, "weight": weight, "eps": 1e-3}


def make_rms_norm(rng: Rng) -> Arguments:
    arguments = make_rms_norm_backward(rng)
    dtype = arguments.pop("grad").dtype
    return arguments | {"dtype": dtype}


def make_rotate(rng: Rng) -> Arguments:
    tokens, heads, half = (int(n) for n in rng.integers(1, (40, 5, 40)))
    x = torch.from_numpy(rng.normal(0, 1, (tokens, heads, 2 * half)).astype(np.float32))
    angles = torch.from_numpy(rng.uniform(0, 9, (tokens, half)).astype(np.float32))
    dtype = [torch.float32, torch.bfloat16][rng.integers(2)]
    return {"x": x.to(dtype), "cosines": angles.cos(), "sines": angles.sin()}


def make_dropout(rng: Rng) -> Arguments:
    x = torch.from_numpy(rng.normal(0, 1, int(rng.integers(0, 300))).astype(np.float32))
    p, seed = float(rng.choice([0.1, 0.5, 0.9])), torch.tensor(int(rng.integers(2**63)))
    dtype = [torch.float32, torch.bfloat16, torch.float16, torch.float64][rng.integers(4)]
    return {"x": x.to(dtype), "p": p, "seed": seed}


MAKERS: dict[str, Callable[[Rng], Arguments]] = {
    "index": make_index,
    "collate": make_collate,
    "collate_shared": make_collate_shared,
    "sample": make_sample,
    "packed_linear": make_packed_linear,
    "linear": make_linear,
    "linear_backward": make_linear_backward,
    "cached_attention": make_cached_attention,
    "decoder_step": make_decoder_step,
    "branch_attention": make_branch_attention,
    "branch_attention_backward": make_branch_attention_backward,
    "gelu": make_gelu,
    "gelu_backward": make_gelu_backward,
    "swiglu": make_swiglu,
    "swiglu_backward": make_swiglu_backward,
    "rms_norm": make_rms_norm,
    "rms_norm_backward": make_rms_norm_backward,
    "rotate": make_rotate,
    "dropout": make_dropout,
}
