"""`collate` and `collate_shared`, a row at a time."""

import torch
from torch import Tensor

from convai_fast.dialogue.format import IGNORED
from convai_fast.dialogue.layout import build_sequence
from convai_fast.ops.plan import read_plan


def collate(
    tokens: Tensor,
    utterance_offsets: Tensor,
    persona_ids: Tensor,
    history_ids: Tensor,
    candidate_ids: Tensor,
    plan: Tensor,
    layout: Tensor,
    num_candidates: int,
    seq_len: int,
    pin_memory: bool = False,
) -> tuple[Tensor, ...]:
    """See `convai_fast.ops.collate`."""
    tables = (tokens, utterance_offsets, persona_ids, history_ids, candidate_ids)
    own, rows = read_plan(*tables, plan, layout, seq_len)
    batch, pad = len(plan), own.pad
    input_ids = torch.full((batch, num_candidates, seq_len), pad)
    token_type_ids = torch.full((batch, num_candidates, seq_len), pad)
    labels = torch.full((batch, num_candidates, seq_len), IGNORED)
    mc_token_ids = torch.full((batch, num_candidates), -1)

    for row, (persona, history, candidates, is_cut) in enumerate(rows):
        for j, reply in enumerate(candidates):
            ids, segments, reply_labels = build_sequence(persona, history, reply, own)
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
    layout: Tensor,
    num_candidates: int,
    offsets: Tensor,
    num_tokens: int,
    max_length: int,
    pin_memory: bool = False,
) -> tuple[Tensor, ...]:
    """See `convai_fast.ops.collate_shared`."""
    columns: list[list[int]] = [[], [], [], [], []]  # the five outputs [num_tokens]
    mc_token_ids = torch.full((len(plan), num_candidates), -1)
    tables = (tokens, utterance_offsets, persona_ids, history_ids, candidate_ids)
    own, rows = read_plan(*tables, plan, layout, max_length)
    for row, (persona, history, candidates, is_cut) in enumerate(rows):
        prefix, segments, _ = build_sequence(persona, history, [], own, with_eos=False)
        length = len(prefix) - 1  # without the token that begins every branch
        ignored = [IGNORED] * length
        parts = [(prefix[:length], segments[:length], range(length), [0] * length, ignored)]
        for j, reply in enumerate(candidates):
            sequence = build_sequence(persona, history, reply, own)
            ids, segments, labels = (column[length:] for column in sequence)
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
