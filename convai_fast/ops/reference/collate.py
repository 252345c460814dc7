"""`collate` and `collate_shared`, a row at a time."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from convai_fast.dialogue.format import IGNORED, build_sequence


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
) -> tuple[Tensor, ...]:
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
) -> tuple[Tensor, ...]:
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
