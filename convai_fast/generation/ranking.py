"""Ranking of candidate replies with the multiple-choice head."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from convai_fast.data.readers.fields import is_blank
from convai_fast.dialogue.layout import Layout, Place
from convai_fast.dialogue.prompt import Prompt, fit_prompt
from convai_fast.errors import UserError
from convai_fast.generation.detokenizer import Detokenizer
from convai_fast.generation.request import Request, Texts, build_prompt, token_ids_of
from convai_fast.model.context import Branches, key_index
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.model.layers import fetch, to_device

NEEDS_HEAD = "candidates are ranked with"  # the multiple-choice head; see `check_ranking`


@dataclass(frozen=True, slots=True)
class RankedCandidate:
    """A candidate reply and what the multiple-choice head gives it.

    Attributes:
        index: its place among the candidates as they were given, from 0.
        text: as it was given, or that of its token ids.
        score: its multiple-choice logit.
        probability: of being the true reply, if one of the candidates is: softmax of their scores.
    """

    index: int
    text: str
    score: float
    probability: float


def rank(
    model: DoubleHeadsModel,
    tokenizer: PreTrainedTokenizerFast,
    layout: Layout,
    request: Request,
    candidates: Texts,
) -> list[RankedCandidate]:
    """See `GenerationEngine.rank`."""
    vocab_size = model.config.vocab_size
    places = [Place.REPLY] * len(candidates)
    given = token_ids_of(candidates, "candidates", tokenizer, vocab_size, places, layout)
    if not given:
        raise UserError("there are no candidates to rank: give at least one")
    for i, candidate in enumerate(candidates):
        if isinstance(candidate, str) and is_blank(candidate):
            raise UserError(f"candidates[{i}] of the request is blank: leave it out")
    model.check_ranking(NEEDS_HEAD)
    room = _room(given, model)
    if request.input_ids is not None:  # which are not cut
        room = max(room, layout.empty_prompt)
    prompt = build_prompt(request, tokenizer, layout, vocab_size, room)
    (scores,) = fetch(_score(model, layout, prompt, given))
    probabilities = scores.softmax(-1).tolist()
    detokenizer = Detokenizer(tokenizer)
    ranked = [
        RankedCandidate(
            i,
            candidate if isinstance(candidate, str) else detokenizer.text(given[i]),
            score,
            probabilities[i],
        )
        for i, (candidate, score) in enumerate(zip(candidates, scores.tolist(), strict=True))
    ]
    if any(math.isnan(each.score) for each in ranked):
        raise UserError(
            "candidates cannot be ranked, since their scores are no numbers: the model's weights "
            "are damaged"
        )
    return sorted(ranked, key=lambda each: -each.score)


def rank_candidates(
    model: DoubleHeadsModel,
    layout: Layout,
    persona: Sequence[Sequence[int]],
    history: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[int]],
) -> Tensor:
    """Log-probability of each candidate being the true reply, by the multiple-choice head.

    Every candidate is scored at the token that ends it, after the same persona and history, of
    which, where they leave no room for the longest candidate, what `fit` cuts is left out; a
    candidate too long by itself loses its end. The model is put in eval mode.
    `GenerationEngine.rank` does the same with texts.

    Args:
        layout: the model's; see `layout_for`.
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
    model.check_ranking(NEEDS_HEAD)
    prompt = fit_prompt(persona, history, layout, _room(candidates, model))
    return _score(model, layout, prompt, candidates).log_softmax(-1)


def _room(candidates: Sequence[Sequence[int]], model: DoubleHeadsModel) -> int:
    """What the longest candidate and the token that ends it leave the prompt."""
    return model.config.n_positions - max(map(len, candidates)) - 1


@torch.inference_mode()
def _score(
    model: DoubleHeadsModel,
    layout: Layout,
    prompt: Prompt,
    candidates: Sequence[Sequence[int]],
) -> Tensor:
    """Multiple-choice logits, float32 [num_candidates]; the prompt is computed once for all, and a
    candidate that is too long after it loses its end."""
    model.eval()
    input_ids, token_type_ids = list(prompt.input_ids), list(prompt.token_type_ids)
    start = len(input_ids)
    position_ids, branch_ids, ends = list(range(start)), [0] * start, []
    longest = model.config.n_positions - start - 1  # beside the token that ends it
    for branch, candidate in enumerate((each[:longest] for each in candidates), start=1):
        count = len(candidate) + 1
        input_ids += [*candidate, layout.eos]
        token_type_ids += [layout.speaker1] * count
        position_ids += range(start, start + count)
        branch_ids += [branch] * count
        ends.append(len(input_ids) - 1)
    device = model.transformer.token_embedding.weight.device
    offsets, branches = torch.tensor([0, len(input_ids)]), torch.tensor(branch_ids)
    index = key_index(offsets, branches, device, with_gradient=False)
    tokens, segments, positions, branches, last = (
        to_device(torch.as_tensor(x), device)
        for x in (input_ids, token_type_ids, position_ids, branches, ends)
    )
    context = Branches(offsets, branches, positions, index)
    mc_logits, _ = model.score(tokens, segments, context, last)
    return mc_logits
