"""hits@k: the place of the true reply among its candidates."""

from collections.abc import Sequence

from convai_fast.evaluation.overlap import normalize


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
