"""Every operator in plain Python and PyTorch: the specification, written to be read.

The compiled kernels are tested against these functions, which also serve where nothing is compiled.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from convai_fast.dialogue.format import IGNORED, build_sequence

# --- collate ----------------------------------------------------------------------------------


def _segments_of_plan(
    tokens: Tensor,
    utterance_offsets: Tensor,
    persona_ids: Tensor,
    history_ids: Tensor,
    candidate_ids: Tensor,
    plan: Tensor,
    max_length: int,
) -> Iterator[tuple[list[list[int]], list[list[int]], list[list[int]], bool]]:
    """Persona, history and candidates of each row, and whether the true reply lost its end, since
    what is too long is cut to fit `max_length`."""
    bounds = utterance_offsets.tolist()
    arena = tokens.cpu().to(torch.int64)

    def utterances(table: Tensor, first: int, count: int) -> list[list[int]]:
        ids = table[first : first + count].tolist()
        return [arena[bounds[i] : bounds[i + 1]].tolist() for i in ids]

    for row, columns in enumerate(plan.tolist()):
        first, count, rotation, kept, *rest = columns
        history_range, skipped, candidate_range = rest[:2], rest[2], rest[3:]
        persona = utterances(persona_ids, first, count)
        # A rotation moves the last sentence to the front: [a, b, c] by 1 is [c, a, b].
        persona = [*persona[count - rotation :], *persona[: count - rotation]][:kept]
        history = utterances(history_ids, *history_range)
        history[:1] = [turn[skipped:] for turn in history[:1]]
        candidates = utterances(candidate_ids, *candidate_range)
        prefix_length = 1 + sum(map(len, persona)) + sum(1 + len(turn) for turn in history)
        room = max_length - prefix_length - 2  # beside <speaker1> and <eos>
        if candidates and room < 0:
            raise ValueError(f"collate: row {row} does not fit max_length {max_length}")
        is_cut = bool(candidates) and len(candidates[-1]) > room
        yield persona, history, [reply[:room] for reply in candidates], is_cut


def collate(
    tokens: Tensor,
    utterance_offsets: Tensor,
    persona_ids: Tensor,
    history_ids: Tensor,
    candidate_ids: Tensor,
    plan: Tensor,
    special_ids: Sequence[int],
    num_candidates: int,
    seq_len: int,
    pin_memory: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `convai_fast.ops.collate`."""
    batch, pad = len(plan), special_ids[4]
    input_ids = torch.full((batch, num_candidates, seq_len), pad)
    token_type_ids = torch.full((batch, num_candidates, seq_len), pad)
    labels = torch.full((batch, num_candidates, seq_len), IGNORED)
    mc_token_ids = torch.full((batch, num_candidates), -1)

    tables = (tokens, utterance_offsets, persona_ids, history_ids, candidate_ids)
    rows = _segments_of_plan(*tables, plan, seq_len)
    for row, (persona, history, candidates, is_cut) in enumerate(rows):
        for j, reply in enumerate(candidates):
            ids, segments, reply_labels = build_sequence(persona, history, reply, special_ids)
            input_ids[row, j, : len(ids)] = torch.tensor(ids)
            token_type_ids[row, j, : len(ids)] = torch.tensor(segments)
            if is_cut:
                reply_labels[-1] = IGNORED  # it does not end where it was cut
            if j == len(candidates) - 1:  # the true reply is the last one
                labels[row, j, : len(ids)] = torch.tensor(reply_labels)
            mc_token_ids[row, j] = len(ids) - 1

    outputs = (input_ids, token_type_ids, labels, mc_token_ids)
    return _to_device(outputs, tokens.device, pin_memory)


def collate_shared(
    tokens: Tensor,
    utterance_offsets: Tensor,
    persona_ids: Tensor,
    history_ids: Tensor,
    candidate_ids: Tensor,
    plan: Tensor,
    special_ids: Sequence[int],
    num_candidates: int,
    offsets: Tensor,
    num_tokens: int,
    max_length: int,
    pin_memory: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `convai_fast.ops.collate_shared`."""
    columns: list[list[int]] = [[], [], [], [], []]  # the five outputs [num_tokens]
    mc_token_ids = torch.full((len(plan), num_candidates), -1)
    tables = (tokens, utterance_offsets, persona_ids, history_ids, candidate_ids)
    rows = _segments_of_plan(*tables, plan, max_length)
    for row, (persona, history, candidates, is_cut) in enumerate(rows):
        prefix, segments, _ = build_sequence(persona, history, [], special_ids, with_eos=False)
        length = len(prefix) - 1  # without <speaker1>, which begins every branch
        ignored = [IGNORED] * length
        parts = [(prefix[:length], segments[:length], range(length), [0] * length, ignored)]
        for j, reply in enumerate(candidates):
            ids, segments, labels = build_sequence([], [], reply, special_ids)
            ids, segments, labels = ids[1:], segments[1:], labels[1:]  # without <bos>
            if is_cut:
                labels[-1] = IGNORED  # it does not end where it was cut
            if j < len(candidates) - 1:  # the true reply is the last one
                labels = [IGNORED] * len(ids)
            positions = range(length, length + len(ids))
            parts.append((ids, segments, positions, [j + 1] * len(ids), labels))
        for part in parts:
            for column, values in zip(columns, part, strict=True):
                column.extend(values)
            if part is not parts[0]:
                mc_token_ids[row, part[3][0] - 1] = len(columns[0]) - 1
        if len(columns[0]) != int(offsets[row + 1]):
            raise ValueError(f"collate: row {row} does not fit its place in the output")

    outputs = (*(torch.tensor(column, dtype=torch.int64) for column in columns), mc_token_ids)
    return _to_device(outputs, tokens.device, pin_memory)


def _to_device(
    outputs: tuple[Tensor, ...], device: torch.device, pin_memory: bool
) -> tuple[Tensor, ...]:
    if pin_memory and torch.cuda.is_available():
        return tuple(output.pin_memory() for output in outputs)
    return tuple(output.to(device) for output in outputs)


# --- sample -----------------------------------------------------------------------------------

_MASK32 = 0xFFFFFFFF


def philox_words(seeds: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The four 32-bit words of Philox 4x32-10, for key `seeds` and counter `low + 2**64 * high`.

    All are int64 tensors, broadcast to one shape; the result is int64 in [0, 2**32), [4, *shape].
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    seeds, low, high = torch.broadcast_tensors(seeds, low, high)
    key = [seeds & _MASK32, (seeds >> 32) & _MASK32]
    counter = [low & _MASK32, (low >> 32) & _MASK32, high & _MASK32, (high >> 32) & _MASK32]
    for _ in range(10):
        # int64 products wrap modulo 2**64, so that both halves come out right after masking.
        product0, product1 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        high0, high1 = (product0 >> 32) & _MASK32, (product1 >> 32) & _MASK32
        counter = [
            high1 ^ counter[1] ^ key[0],
            product1 & _MASK32,
            high0 ^ counter[3] ^ key[1],
            product0 & _MASK32,
        ]
        key = [(key[0] + 0x9E3779B9) & _MASK32, (key[1] + 0xBB67AE85) & _MASK32]
    return torch.stack(counter)


def philox(seeds: Tensor, steps: Tensor) -> Tensor:
    """The first word for key `seeds` and counter `steps`, both int64 of one shape."""
    return philox_words(seeds, steps, torch.zeros_like(steps))[0]


def filter_probabilities(z: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Probabilities (float64, [batch, vocab_size], not renormalised) of the tokens that are kept.

    `z` holds logits already divided by the temperature; the filters are [batch].
    """
    vocab_size = z.shape[-1]
    ranked = z.sort(dim=-1, descending=True, stable=True)

    k = torch.where((top_k <= 0) | (top_k > vocab_size), vocab_size, top_k)
    kth_largest = ranked.values.gather(-1, (k - 1)[:, None])
    z = torch.where(z < kth_largest, -torch.inf, z)
    probabilities = z.double().softmax(-1)

    in_order = probabilities.gather(-1, ranked.indices)
    mass_before = in_order.cumsum(-1) - in_order
    off = (top_p <= 0) | (top_p >= 1)
    keep_in_order = off[:, None] | (mass_before < top_p[:, None].double())
    keep = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, ranked.indices, keep_in_order)

    largest = probabilities.max(-1, keepdim=True).values
    keep &= probabilities >= min_p.clamp(max=1)[:, None].double() * largest
    return torch.where(keep, probabilities, 0.0)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    steps: Tensor,
    return_logprobs: bool,
) -> tuple[Tensor, Tensor]:
    """See `convai_fast.ops.sample`."""
    batch, vocab_size = logits.shape
    logits = logits.float()
    if batch == 0:
        return seeds.new_zeros(0), logits.new_zeros(0)
    largest = logits.max(-1, keepdim=True).values
    can_be_drawn = largest.isfinite()
    logits = torch.where(can_be_drawn, logits, 0.0)
    largest = torch.where(can_be_drawn, largest, 0.0)

    greedy = temperature == 0
    # Relative to the largest, so that no temperature, however small, overflows.
    z = (logits - largest) / torch.where(greedy, 1.0, temperature)[:, None]
    kept = filter_probabilities(z, top_k, top_p, min_p)
    cumulative = kept.cumsum(-1)
    uniform = philox(seeds, steps).double() * 2.0**-32
    drawn = (cumulative > uniform[:, None] * cumulative[:, -1:]).int().argmax(-1)

    indices = torch.arange(vocab_size, device=logits.device)
    first_largest = torch.where(logits == largest, indices, vocab_size).min(-1).values
    chosen = torch.where(greedy, first_largest, drawn)[:, None]
    token_ids = torch.where(can_be_drawn, chosen, -1).squeeze(-1)
    if not return_logprobs:
        return token_ids, logits.new_zeros(0)
    logprobs = logits.log_softmax(-1).gather(-1, chosen)
    return token_ids, torch.where(can_be_drawn, logprobs, torch.nan).squeeze(-1)


# --- packed_linear and cached_attention --------------------------------------------------------

PANEL = 16  # columns that lie side by side in packed weights and in the cache's keys


def packed_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    gelu: bool,
) -> Tensor:
    """See `convai_fast.ops.packed_linear`."""
    if scales is not None:  # [panels, pairs, 16, 2] -> [panels, in_features, 16]
        weight = weight.transpose(2, 3).flatten(1, 2)[:, : x.shape[-1]]
    weight = weight.float().transpose(1, 2).flatten(0, 1)[:out_features]
    if scales is None:
        out = F.linear(x, weight, bias)
    else:
        largest_step = min(32767, max(1, 2**31 // (127 * max(1, x.shape[-1])) - 1))
        x_scales = F.pad(x.abs(), (0, 1)).amax(-1, keepdim=True) / largest_step  # of none, 0
        steps = (x / x_scales.clamp(min=torch.finfo(torch.float32).tiny)).round()
        sums = (steps.double() @ weight.double().T).float()  # exact: below 2**31
        out = sums * (x_scales * scales)
        out = out if bias is None else out + bias
    return F.gelu(out, approximate="tanh") if gelu else out


def cached_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, slots: Tensor, offsets: Tensor, lengths: Tensor
) -> Tensor:
    """See `convai_fast.ops.cached_attention`."""
    num_heads, head_dim = keys.shape[1], keys.shape[3]
    query, key, value = qkv.view(len(qkv), 3, num_heads, head_dim).unbind(1)
    out = torch.empty_like(query)
    bounds = offsets.tolist()
    for i, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        rows = slice(bounds[i], bounds[i + 1])
        end = length + bounds[i + 1] - bounds[i]
        positions = torch.arange(length, end, device=qkv.device)
        keys[slot, :, positions // PANEL, :, positions % PANEL] = key[rows].to(keys.dtype)
        values[slot, :, length:end, :head_dim] = value[rows].transpose(0, 1).to(values.dtype)
        past_keys = keys[slot].transpose(-1, -2).flatten(1, 2)[:, :end].to(qkv.dtype)
        past_values = values[slot, :, :end, :head_dim].to(qkv.dtype)
        # True where a new token (a row of the mask) may look: at itself and before.
        mask = torch.arange(end, device=qkv.device) <= positions[:, None]
        out[rows] = F.scaled_dot_product_attention(
            query[rows].transpose(0, 1), past_keys, past_values, attn_mask=mask
        ).transpose(0, 1)
    return out.flatten(1)


# --- dropout and branch_attention --------------------------------------------------------------


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """See `convai_fast.ops.dropout`."""
    # 64 elements draw the four words of 16 blocks, word after word.
    element = torch.arange(x.numel(), device=x.device)
    block, word = element // 64 * 16 + element % 16, element // 16 % 4
    words = philox_words(seed.to(x.device), block, torch.zeros_like(block))
    kept = words.gather(0, word[None]).view(x.shape) >= int(p * 2**32)
    return torch.where(kept, x.float() * (1 / (1 - p)), 0.0).to(x.dtype)


def _rows_of_branches(
    offsets: Tensor, branch_ids: Tensor, num_heads: int, dropout_p: float, seed: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor | float]]:
    """The tokens of each row, who sees whom [n, n], and the weights' factors [num_heads, n, n]."""
    device = branch_ids.device
    for first, end in pairwise(offsets.tolist()):
        branch = branch_ids[first:end]
        place = torch.arange(end - first, device=device)
        visible = (place <= place[:, None]) & ((branch == 0) | (branch == branch[:, None]))
        factors: Tensor | float = 1.0
        if dropout_p > 0:
            # Where each token's segment (the prefix or a branch) begins, and its place therein.
            begins = torch.searchsorted(branch, branch)
            place = place - begins
            # Four queries of a segment share the four words of a key's block.
            query = (first + begins + place // 4 * 4)[:, None] * num_heads
            query = query + torch.arange(num_heads, device=device)[:, None, None]
            is_prefix = (branch != branch[:, None]).long()
            words = philox_words(seed.to(device), place, 2 * query + is_prefix)
            word = (place % 4)[:, None].expand(words.shape[1:])
            kept = words.gather(0, word[None])[0] >= int(dropout_p * 2**32)
            factors = kept / (1 - dropout_p)
        yield slice(first, end), visible, factors


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[n, num_heads * head_dim] to float32 [num_heads, n, head_dim]."""
    return x.float().unflatten(1, (num_heads, -1)).transpose(0, 1)


def branch_attention(
    qkv: Tensor,
    offsets: Tensor,
    branch_ids: Tensor,
    num_heads: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `convai_fast.ops.branch_attention`; the second result is each query's log-sum-exp."""
    out = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
    logsumexp = qkv.new_empty(num_heads, len(qkv), dtype=torch.float32)
    rows = _rows_of_branches(offsets, branch_ids, num_heads, dropout_p, seed)
    with torch.autocast(qkv.device.type, enabled=False):
        for row, visible, factors in rows:
            query, key, value = (_heads(part, num_heads) for part in qkv[row].chunk(3, dim=1))
            scores = query @ key.mT / query.shape[-1] ** 0.5
            scores = scores.masked_fill(~visible, -torch.inf)
            logsumexp[:, row] = scores.logsumexp(-1)
            weights = scores.softmax(-1) * factors
            out[row] = (weights @ value).transpose(0, 1).flatten(1).to(out.dtype)
    return out, logsumexp


def branch_attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    offsets: Tensor,
    branch_ids: Tensor,
    num_heads: int,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """The gradient of `qkv` where that of `branch_attention`'s first result is `grad_out`."""
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    rows = _rows_of_branches(offsets, branch_ids, num_heads, dropout_p, seed)
    with torch.autocast(qkv.device.type, enabled=False):
        for row, visible, factors in rows:
            query, key, value = (_heads(part, num_heads) for part in qkv[row].chunk(3, dim=1))
            scale = query.shape[-1] ** -0.5
            scores = query @ key.mT * scale
            weights = (scores - logsumexp[:, row, None]).exp().masked_fill(~visible, 0)
            grad = _heads(grad_out[row], num_heads)
            grad_value = (weights * factors).mT @ grad
            mean = (grad * _heads(out[row], num_heads)).sum(-1, keepdim=True)
            grad_scores = weights * (grad @ value.mT * factors - mean)
            grads = torch.cat(
                [grad_scores @ key * scale, grad_scores.mT @ query * scale, grad_value]
            )
            grad_qkv[row] = grads.transpose(0, 1).flatten(1).to(qkv.dtype)
    return grad_qkv
