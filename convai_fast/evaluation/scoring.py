"""What a model gives to true replies and their candidates: one forward pass for many examples."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from convai_fast.data.batches import Batch, DialogueBatches
from convai_fast.dialogue.format import IGNORED
from convai_fast.evaluation.packing import packed
from convai_fast.model.attention import Branches
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.model.layers import to_device
from convai_fast.terminal import progress_bar

T = TypeVar("T")

_LOGIT_ROWS = 512  # of vocabulary logits that exist at a time: 100 MB for GPT-2


class Scores(NamedTuple):
    """Of one example.

    Attributes:
        mc_logits: the multiple-choice logit of each candidate, the true reply last; empty if that
            head was not asked.
        token_nlls: the negative log-likelihood, in nats, of each token of the true reply; empty if
            that head was not asked.
        eos_nlls: the same of `<eos>` after it; empty, too, where the reply was cut.
    """

    mc_logits: list[float]
    token_nlls: list[float]
    eos_nlls: list[float]


@torch.inference_mode()
def score_examples(
    model: DoubleHeadsModel,
    batches: DialogueBatches,
    dtype: torch.dtype,
    *,
    ranks: bool,
    tokens: bool,
) -> dict[int, Scores]:
    """Score candidates with the multiple-choice head, to rank them, and tokens of true replies.

    Args:
        batches: in the shared-prefix layout.
        dtype: products are computed in it, under autocast.
        ranks, tokens: which of the two to do.

    Returns:
        the scores of each example, by its row in `batches.plan`.
    """
    scores = {}
    with computing_in(model, dtype):
        for i in track(range(len(batches)), "scoring", "batch", len(batches)):
            batch = batches[i]
            ends = batch["mc_token_ids"]
            labelled = (batch["labels"] != IGNORED).nonzero().squeeze(1)
            # The hidden state at a position predicts the token at the next.
            wanted = [ends.clamp(min=0).flatten()] * ranks + [labelled - 1] * tokens
            shared, place = share_speaker(batch)
            hidden = hidden_states(model, shared, place[torch.cat(wanted)])
            mc_logits, nlls, is_eos = [[]] * len(ends), [], []
            if ranks:
                chosen, hidden = hidden[: ends.numel()], hidden[ends.numel() :]
                # In bfloat16, candidates that are nearly as good would come out equal.
                with torch.autocast(chosen.device.type, enabled=False):
                    logits = model.multiple_choice_head(chosen.float()).view(ends.shape).tolist()
                counts = (ends >= 0).sum(1).tolist()
                mc_logits = [row[:count] for row, count in zip(logits, counts, strict=True)]
            if tokens:
                targets = to_device(batch["labels"][labelled], hidden.device)
                nlls = [
                    F.cross_entropy(logits, targets[part], reduction="none")
                    for part, logits in lm_logits(model, hidden)
                ]
                nlls = torch.cat(nlls).tolist()
                is_eos = (batch["labels"][labelled] == batches.store.special_ids.eos).tolist()
            first = 0
            for row, of_candidates in zip(batches.rows_of(i), mc_logits, strict=True):
                end = first + int(batches.index.num_labels[row])
                last = end - any(is_eos[first:end])
                scores[int(row)] = Scores(of_candidates, nlls[first:last], nlls[last:end])
                first = end
    return scores


def track(items: Iterable[T], what: str, unit: str, total: int) -> Iterable[T]:
    """`items`, with a progress bar that says what is done with them."""
    return progress_bar(items, desc=what, total=total, leave=False, unit=unit)


@contextmanager
def computing_in(model: DoubleHeadsModel, dtype: torch.dtype) -> Iterator[None]:
    """`model` in eval mode, with its products in `dtype` under autocast."""
    model.eval()
    device = next(model.parameters()).device.type
    with packed(model, dtype), torch.autocast(device, dtype, enabled=dtype != torch.float32):
        yield


def share_speaker(batch: Batch) -> tuple[Batch, Tensor]:
    """`batch` with the `<speaker1>` of all candidates in the prefix, and where each token went.

    It is the same token after the same tokens in every branch, so it is computed once::

        <bos> … <speaker1> no <eos> <speaker1> hi <eos>      branch_ids 0 … 1 1 1 2 2 2
        <bos> … <speaker1> no <eos> hi <eos>                 branch_ids 0 … 0 1 1 2 2

    Returns:
        the batch in the shared-prefix layout, without what only labels and heads read; and int64
        [num_tokens], for each token of `batch` its place in the new one.
    """
    branch_ids, offsets = batch["branch_ids"], batch["offsets"]
    is_speaker = (branch_ids > 0) & (branch_ids != branch_ids.roll(1))  # a row begins with branch 0
    kept = ~is_speaker | (branch_ids == 1)
    ends = kept.cumsum(0)
    rows = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
    speaker_of_row = ends[is_speaker & kept] - 1
    place = torch.where(kept, ends - 1, speaker_of_row[rows])
    shared = Batch(
        input_ids=batch["input_ids"][kept],
        token_type_ids=batch["token_type_ids"][kept],
        position_ids=batch["position_ids"][kept],
        branch_ids=branch_ids.masked_fill(is_speaker, 0)[kept],
        offsets=torch.cat([offsets.new_zeros(1), ends])[offsets],
    )
    return shared, place


def hidden_states(model: DoubleHeadsModel, batch: Batch, wanted: Tensor) -> Tensor:
    """Hidden states [num_wanted, n_embd] of the tokens `wanted`, int64 [num_wanted], of a batch in
    the shared-prefix layout."""
    device = next(model.parameters()).device
    input_ids, token_type_ids, position_ids, branch_ids, wanted = (
        to_device(tensor, device)
        for tensor in (
            batch["input_ids"],
            batch["token_type_ids"],
            batch["position_ids"],
            batch["branch_ids"],
            wanted,
        )
    )
    branches = Branches(batch["offsets"], branch_ids)
    return model.transformer(
        input_ids, token_type_ids, position_ids, branches=branches, wanted=wanted
    )


def lm_logits(model: DoubleHeadsModel, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield part after part of the rows of `hidden` with their vocabulary logits, in float32."""
    for first in range(0, len(hidden), _LOGIT_ROWS):
        part = slice(first, first + _LOGIT_ROWS)
        yield part, model.lm_logits(hidden[part]).float()
