"""Ranking of candidate replies with the multiple-choice head."""

from collections.abc import Sequence

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
    lengths = torch.tensor([len(input_ids) for input_ids, _, _ in sequences])
    padded = torch.full((2, len(sequences), int(lengths.max())), special_ids.pad)
    for row, (input_ids, token_type_ids, _) in enumerate(sequences):
        padded[:, row, : len(input_ids)] = torch.tensor([input_ids, token_type_ids])

    device = next(model.parameters()).device
    input_ids, token_type_ids = padded[:, None].to(device)
    output = model(
        input_ids,
        token_type_ids=token_type_ids,
        mc_token_ids=(lengths - 1)[None].to(device),
        return_logits=False,
    )
    return output.mc_logits[0].float().log_softmax(-1)
