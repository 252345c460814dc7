"""Ranking of candidate replies with the multiple-choice head."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from convai_fast.data.tokenizer import SpecialIds
from convai_fast.generation.request import fit_prefix
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.ops.reference import build_sequence


@torch.inference_mode()
def rank_candidates(
    model: DoubleHeadsModel,
    special_ids: SpecialIds,
    persona: Sequence[Sequence[int]],
    history: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[int]],
) -> Tensor:
    """Log-probability of each candidate being the true reply, by the multiple-choice head.

    Every candidate is scored at its `<eos>` after the same persona and history, of which, where
    they leave no room for the longest candidate, what `fit_prefix` cuts is left out; a candidate
    too long by itself loses its end. The model is put in eval mode.

    Args:
        persona: token ids of each sentence.
        history: token ids of each turn, oldest first; empty to rank openings.
        candidates: token ids of each candidate, of any lengths.

    Returns:
        float32 [num_candidates] on the model's device, log-softmax over the candidates.

    Raises:
        ValueError: there are no candidates.

    Source: the multiple-choice head of TransferTransfo (arXiv 1901.08149).
    """
    if not candidates:
        raise ValueError("rank_candidates: there are no candidates")
    model.eval()
    n_positions = model.config.n_positions
    longest_reply = n_positions - 3  # beside <bos>, <speaker1> and <eos>
    candidates = [candidate[:longest_reply] for candidate in candidates]
    room = n_positions - max(map(len, candidates)) - 2
    persona, history = fit_prefix(persona, history, room)

    sequences = [build_sequence(persona, history, reply, special_ids) for reply in candidates]
    prefix = len(sequences[0][0]) - len(candidates[0]) - 2
    own_lengths = [len(input_ids) - prefix for input_ids, _, _ in sequences]
    # The prefix stands before the first candidate's own part, and before no other's.
    starts = [0] + [prefix] * (len(sequences) - 1)
    rows = [
        (ids[start:], segments[start:], list(range(start, len(ids))))
        for start, (ids, segments, _) in zip(starts, sequences, strict=True)
    ]
    device = next(model.parameters()).device
    columns = [
        torch.tensor(list(chain(*column)), device=device) for column in zip(*rows, strict=True)
    ]
    branch_ids = torch.arange(len(candidates) + 1).repeat_interleave(
        torch.tensor([prefix, *own_lengths])
    )
    mc_token_ids = prefix + torch.tensor(own_lengths).cumsum(0) - 1
    output = model(
        *columns,
        mc_token_ids=mc_token_ids[None].to(device),
        return_logits=False,
        branch_ids=branch_ids.to(device),
        offsets=torch.tensor([0, len(branch_ids)]),
    )
    return output.mc_logits[0].float().log_softmax(-1)
