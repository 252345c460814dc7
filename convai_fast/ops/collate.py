"""`collate` and `collate_shared`: a batch in either layout, straight from the store's arrays."""

import torch
from torch import Tensor

from convai_fast.ops import reference
from convai_fast.ops.schemas import library

library.impl("collate", reference.collate, "CompositeExplicitAutograd")
library.impl("collate_shared", reference.collate_shared, "CompositeExplicitAutograd")


@torch.library.register_fake("convai_fast::collate")
def _fake_collate(
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
    def empty(*shape: int) -> Tensor:
        return tokens.new_empty(shape, dtype=torch.int64)

    shape = (plan.shape[0], num_candidates)
    sequences = [empty(*shape, seq_len) for _ in range(3)]
    return *sequences, empty(*shape)


@torch.library.register_fake("convai_fast::collate_shared")
def _fake_collate_shared(
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
    def empty(*shape: int) -> Tensor:
        return tokens.new_empty(shape, dtype=torch.int64)

    columns = [empty(num_tokens) for _ in range(5)]
    return *columns, empty(plan.shape[0], num_candidates)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Build a padded batch of candidates from a `DialogueStore`'s arrays and a plan.

    Args:
        tokens: uint16 or int32 [num_tokens], all utterances one after another.
        utterance_offsets: int64 [num_utterances + 1], where each utterance begins in `tokens`.
        persona_ids: int32, text ids of persona sentences.
        history_ids: int32, text ids of history turns.
        candidate_ids: int32, text ids of candidates.
        plan: int64 [batch, 9] on the CPU, a row an example, columns as in `PLAN_COLUMNS`.
        layout: int64 [24] on the CPU, what stands around texts, and where in `tokens` they and it
            are; see `LAYOUT_NUMBERS`.
        num_candidates: candidates of the output, at least those of every row.
        seq_len: length of the padded sequences, at least that of the longest prefix + 2. A reply
            that does not fit is cut to what fits before eos, which then has no label.
        pin_memory: put the outputs of a CPU collation in page-locked memory, for CUDA transfers.

    Returns:
        input_ids, token_type_ids: int64 [batch, num_candidates, seq_len], padded with pad.
        labels: int64 [batch, num_candidates, seq_len]: the true reply and, unless it was cut, eos;
            else -100.
        mc_token_ids: int64 [batch, num_candidates], position of the last token, -1 where an example
            has no such candidate.
        All on the device of `tokens`.

    Raises:
        ValueError, IndexError or RuntimeError: a prefix does not fit `seq_len`, or an index of the
            plan lies outside the store.

    The sequence is that of `convai_fast.dialogue.layout.build_sequence`.
    """
    return torch.ops.convai_fast.collate(
        tokens,
        utterance_offsets,
        persona_ids,
        history_ids,
        candidate_ids,
        plan,
        layout,
        num_candidates,
        seq_len,
        pin_memory,
    )


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Build a batch in which all candidates of an example share one copy of what precedes them.

    An example is all that stands before the last token of `reply_open`, the prefix, followed by
    that token, reply and eos of every candidate; examples follow one another without padding. With
    a prefix of two tokens and candidates [5] and [6, 7]:

        input_ids      p p  s  5 eos  s  6  7 eos
        position_ids   0 1  2  3   4  2  3  4   5
        branch_ids     0 0  1  1   1  2  2  2   2
        labels         . .  .  .   .  .  6  7 eos

    A token sees those before it in its example's prefix and in its own branch, so that each
    candidate is computed as if it stood alone; the prefix sees no candidate.

    Args:
        tokens … num_candidates, pin_memory: as for `collate`.
        offsets: int64 [batch + 1] on the CPU, where each example begins in the output.
        num_tokens: the last of `offsets`.
        max_length: positions of the model; a reply that does not fit with its prefix is cut.

    Returns:
        input_ids, token_type_ids: int64 [num_tokens].
        position_ids: int64 [num_tokens], which continue from the prefix in every branch.
        branch_ids: int64 [num_tokens], 0 on the prefix, j + 1 on candidate j.
        labels: int64 [num_tokens]: the true reply and, unless it was cut, eos; else -100.
        mc_token_ids: int64 [batch, num_candidates], which of the num_tokens is a candidate's last,
            -1 where an example has no such candidate.
        All on the device of `tokens`.

    Raises:
        ValueError, IndexError or RuntimeError: an example is not as long as its offsets say, a
            prefix does not fit `max_length`, or an index of the plan lies outside the store.
    """
    return torch.ops.convai_fast.collate_shared(
        tokens,
        utterance_offsets,
        persona_ids,
        history_ids,
        candidate_ids,
        plan,
        layout,
        num_candidates,
        offsets,
        num_tokens,
        max_length,
        pin_memory,
    )
