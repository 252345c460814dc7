"""What a model gives to true replies and their candidates: one forward pass for many examples."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from convai_fast.data.batches import DialogueBatches, SharedBatch
from convai_fast.data.gathered import CANDIDATE_COUNT
from convai_fast.hardware import cpu_multiplies_bf16
from convai_fast.model.context import Branches, key_index
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.model.layers import fetch, to_device
from convai_fast.model.packed import for_inference, throughput
from convai_fast.terminal import progress_bar

T = TypeVar("T")

_LOGIT_ROWS = 512  # of vocabulary logits that exist at a time: 100 MB for GPT-2


class Rows(NamedTuple):
    """What the body of a model reads of a batch in the shared-prefix layout; see `SharedBatch`."""

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    branch_ids: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, batch: SharedBatch) -> "Rows":
        """Those of `batch`."""
        return cls(
            batch["input_ids"],
            batch["token_type_ids"],
            batch["position_ids"],
            batch["branch_ids"],
            batch["offsets"],
        )


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
    parts: list[Tensor] = []  # of each batch its multiple-choice logits, then its tokens' nlls
    widths: list[int] = []  # candidates of each example of a batch, those that are not there too
    with computing_in(model, dtype) as model:
        for i in track(range(len(batches)), "scoring", "batch", len(batches)):
            batch = batches.shared(i)
            ends, labelled = batch["mc_token_ids"], batch["label_positions"]
            shared, place = share_speaker(Rows.of(batch))
            mc_logits, hidden = score(
                model,
                shared,
                ends=torch.where(ends < 0, -1, place[ends]) if ranks else None,
                wanted=place[labelled - 1] if tokens else None,  # each predicts the token after it
            )
            widths.append(ends.shape[1])
            if ranks:
                parts.append(mc_logits.flatten())
            if tokens:
                targets = to_device(batch["labels"][labelled], hidden.device)
                parts += [
                    F.cross_entropy(logits, targets[part], reduction="none")
                    for part, logits in lm_logits(model, hidden)
                ]
    values, index, scores = iter(fetch_values(parts)), batches.index, {}
    for i, width in enumerate(widths):
        rows = batches.rows_of(i).tolist()
        of_candidates = [list(islice(values, width if ranks else 0)) for _ in rows]
        for row, logits in zip(rows, of_candidates, strict=True):
            nlls = list(islice(values, int(index.num_labels[row]) if tokens else 0))
            num_tokens = len(nlls) - (not index.is_cut[row])  # the last one's is <eos>
            count = int(index.plan[row, CANDIDATE_COUNT])
            scores[row] = Scores(logits[:count], nlls[:num_tokens], nlls[num_tokens:])
    return scores


def fetch_values(parts: Sequence[Tensor]) -> list[float]:
    """All numbers of tensors on a device, after a single wait for it.

    A pass over many batches fetches once, at its end: if the host waited for a batch, the device
    would have nothing to do while the next one is made.
    """
    return fetch(torch.cat([*parts]))[0].tolist() if parts else []


def track(items: Iterable[T], what: str, unit: str, total: int) -> Iterable[T]:
    """`items`, with a progress bar that says what is done with them."""
    return progress_bar(items, desc=what, total=total, leave=False, unit=unit)


@contextmanager
def computing_in(model: DoubleHeadsModel, dtype: torch.dtype) -> Iterator[DoubleHeadsModel]:
    """A copy of `model` for inference, with its products in `dtype` under autocast.

    On a CPU the layers of its blocks are packed, in float32 where the CPU multiplies bfloat16 more
    slowly; `model` itself is put in eval mode.
    """
    model.eval()
    weight = model.transformer.token_embedding.weight
    packing = None
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        is_slow = dtype == torch.bfloat16 and not cpu_multiplies_bf16()
        packing = throughput(torch.float32 if is_slow else dtype)
    twin = for_inference(model, weight.dtype, packing, model.config.activation)
    with torch.autocast(weight.device.type, dtype, enabled=dtype != torch.float32):
        yield twin


def share_speaker(batch: Rows) -> tuple[Rows, Tensor]:
    """`batch` with the token before each candidate in the prefix, and where each token went.

    It is, as `<speaker1>` here, the same token after the same tokens in every branch, so it is
    computed once::

        <bos> … <speaker1> no <eos> <speaker1> hi <eos>      branch_ids 0 … 1 1 1 2 2 2
        <bos> … <speaker1> no <eos> hi <eos>                 branch_ids 0 … 0 1 1 2 2

    Returns:
        the new rows; and int64 [num_tokens], for each token of `batch` its place in them.
    """
    branch_ids, offsets = batch.branch_ids, batch.offsets
    is_speaker = (branch_ids > 0) & (branch_ids != branch_ids.roll(1))  # a row begins with branch 0
    kept = ~is_speaker | (branch_ids == 1)
    ends = kept.cumsum(0)
    rows = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
    speaker_of_row = ends[is_speaker & kept] - 1
    place = torch.where(kept, ends - 1, speaker_of_row[rows])
    shared = Rows(
        batch.input_ids[kept],
        batch.token_type_ids[kept],
        batch.position_ids[kept],
        branch_ids.masked_fill(is_speaker, 0)[kept],
        torch.cat([offsets.new_zeros(1), ends])[offsets],
    )
    return shared, place


def score(
    model: DoubleHeadsModel,
    rows: Rows,
    *,
    ends: Tensor | None = None,
    wanted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`DoubleHeadsModel.score` of rows on the CPU, on the model's device."""
    device = next(model.parameters()).device
    input_ids, token_type_ids, position_ids, branch_ids = (to_device(x, device) for x in rows[:4])
    index = key_index(rows.offsets, rows.branch_ids, device, with_gradient=False)
    context = Branches(rows.offsets, branch_ids, position_ids, index)
    ends, wanted = (x if x is None else to_device(x, device) for x in (ends, wanted))
    return model.score(input_ids, token_type_ids, context, ends, wanted)


def lm_logits(model: DoubleHeadsModel, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield part after part of the rows of `hidden` with their vocabulary logits, in float32."""
    for first in range(0, len(hidden), _LOGIT_ROWS):
        part = slice(first, first + _LOGIT_ROWS)
        yield part, model.lm_logits(hidden[part]).float()
