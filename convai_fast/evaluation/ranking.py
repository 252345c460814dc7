"""Ranking of candidate replies with the multiple-choice head."""

from collections.abc import Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from convai_fast import ops
from convai_fast.dialogue.fit import fit
from convai_fast.dialogue.format import SpecialIds
from convai_fast.evaluation.overlap import normalize
from convai_fast.evaluation.scoring import Rows, score
from convai_fast.model.double_heads import DoubleHeadsModel


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
    they leave no room for the longest candidate, what `fit` cuts is left out; a candidate too long
    by itself loses its end. The model is put in eval mode.

    Args:
        persona: token ids of each sentence.
        history: token ids of each turn, oldest first; empty to rank openings.
        candidates: token ids of each candidate, of any lengths.

    Returns:
        float32 [num_candidates] on the model's device, log-softmax over the candidates.

    Raises:
        ValueError: there are no candidates.
        UserError: the multiple-choice head has learnt nothing.

    Source: the multiple-choice head of TransferTransfo (arXiv 1901.08149).
    """
    if not candidates:
        raise ValueError("rank_candidates: there are no candidates")
    model.check_ranking("candidates are ranked with")
    model.eval()
    n_positions = model.config.n_positions
    longest_reply = n_positions - 3  # beside <bos>, <speaker1> and <eos>
    candidates = [candidate[:longest_reply] for candidate in candidates]
    room = n_positions - max(map(len, candidates)) - 2
    kept = fit([*map(len, persona)], [*map(len, history)], room)

    utterances = [*persona, *history, *candidates]
    ids = torch.arange(len(utterances), dtype=torch.int32)
    counts = [len(persona), len(history), len(candidates)]
    lengths = [len(utterance) for utterance in utterances]
    # The columns of ops.PLAN_COLUMNS, of persona, history and candidates.
    plan = [0, len(persona), 0, kept.num_sentences]
    plan += [len(history) - kept.num_turns, kept.num_turns, kept.num_skipped_tokens]
    plan += [0, len(candidates)]
    num_tokens = kept.num_tokens + sum(len(c) + 2 for c in candidates)  # <speaker1> and <eos>
    offsets = torch.tensor([0, num_tokens])
    persona_ids, history_ids, candidate_ids = ids.split(counts)
    input_ids, token_type_ids, position_ids, branch_ids, _, ends = ops.collate_shared(
        torch.tensor(list(chain(*utterances)), dtype=torch.int32),
        torch.tensor([0, *accumulate(lengths)]),
        persona_ids,
        history_ids,
        candidate_ids,
        torch.tensor([plan]),
        special_ids,
        len(candidates),
        offsets,
        num_tokens,
        n_positions,
    )
    rows = Rows(input_ids, token_type_ids, position_ids, branch_ids, offsets)
    mc_logits, _ = score(model, rows, ends=ends)
    return mc_logits[0].float().log_softmax(-1)


def rank_of_true(mc_logits: Sequence[float], candidates: Sequence[str]) -> int:
    """The place, from 1, of the true reply among its candidates by their multiple-choice logits.

    The true reply is the last candidate. One that equals it but for what `normalize` takes away
    counts as it; others with the same logit come before it.

    Source: hits@k of ConvAI2 (Dinan et al. 2019, arXiv 1902.00098), which compares texts so.

    Example:
        >>> rank_of_true([2.0, 3.0, 0.5, 1.0], ["no", "yes", "no idea", "No!"])  # "no" is it, too
        2
    """
    texts = [normalize(candidate) for candidate in candidates]
    is_true = [text == texts[-1] for text in texts]
    best = max(logit for logit, true in zip(mc_logits, is_true, strict=True) if true)
    before = [logit >= best for logit, true in zip(mc_logits, is_true, strict=True) if not true]
    return 1 + sum(before)


def hits_at(k: int, ranks: Sequence[int]) -> float:
    """hits@k: the share of examples whose true reply is among the k best of its candidates.

    `ranks` are those of `rank_of_true`.
    """
    return sum(rank <= k for rank in ranks) / len(ranks)
