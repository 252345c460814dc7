"""All of ConvAI2's figures of a model, over one split of a dataset."""

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerFast

from convai_fast.data.batches import DialogueBatches, spread
from convai_fast.data.build_store import build_store
from convai_fast.data.store import DialogueStore
from convai_fast.dialogue.dialogue import Dialogue
from convai_fast.dialogue.layout import Place
from convai_fast.errors import UserError
from convai_fast.evaluation import overlap
from convai_fast.evaluation.metrics import METRICS, check_metrics
from convai_fast.evaluation.ranking import hits_at, rank_of_true
from convai_fast.evaluation.scoring import Scores, score_examples, track
from convai_fast.evaluation.word_perplexity import (
    WordVocabulary,
    count_words,
    score_words,
    with_separate_words,
)
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.identified import request_of_turn, turn_id
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import prompt_room
from convai_fast.loading import layout_for
from convai_fast.model.double_heads import DoubleHeadsModel

T = TypeVar("T")

_OF_REPLIES = {"f1", "bleu", "distinct"}
_SPLIT = "evaluated"  # in the stores that are made for an evaluation


@dataclass(slots=True)
class ExampleResult:
    """What was measured about one example; None where the metric was not asked for.

    Attributes:
        id: its split, dialogue and turn, such as valid/3/0, the same as of `generate --data`.
        turn: the turn of its dialogue, from 0.
        expected: the true reply.
        num_candidates, rank: how many candidates it has, and the true reply's place, from 1.
        nll, num_tokens: negative log-likelihood, in nats, of the true reply with its end, which a
            reply that was cut to fit the model has not; of how many tokens that is the sum.
        eos_nll: the part of its end; 0 where the reply was cut.
        word_nll, num_words: the sum over the words of the true reply that the vocabulary has, and
            their number.
        num_unknown_words: how many words it does not have.
        reply: what the model wrote.
        f1: of the reply.
    """

    id: str
    turn: int
    expected: str
    num_candidates: int | None = None
    rank: int | None = None
    nll: float | None = None
    num_tokens: int | None = None
    eos_nll: float | None = None
    word_nll: float | None = None
    num_words: int | None = None
    num_unknown_words: int | None = None
    reply: str | None = None
    f1: float | None = None


@dataclass(slots=True)
class Evaluation:
    """The figures of a model on a split.

    Attributes:
        metrics: by name, with `hits@K` and `f1` as shares of 1, `bleu` in percent, `ppl` and
            `word_ppl` as perplexities, `mean_length` in words.
        counts: what they were taken over; and, where there are such, how many examples of the
            whole split lose history, persona or the end of a reply to fit the model, by what is
            done with them: "ranking", "scoring" or "scoring words".
        bleu_signature: what sacrebleu's figure means; empty without `bleu`.
        examples: one by one, in the order of the split; left out where this is printed.
    """

    metrics: dict[str, float]
    counts: dict[str, int]
    bleu_signature: str
    examples: list[ExampleResult] = field(repr=False)


def evaluate(
    model: DoubleHeadsModel,
    tokenizer: PreTrainedTokenizerFast,
    dialogues: Mapping[str, list[Dialogue]],
    *,
    split: str = "valid",
    metrics: Sequence[str] = METRICS,
    max_history: int = 2,
    max_examples: int = 0,
    batch_size: int = 16,
    dtype: torch.dtype = torch.float32,
    sampling: SamplingParams | None = None,
) -> Evaluation:
    """Measure `model` on dialogues as the ConvAI2 challenge did.

    - `hits@K`: see `rank_of_true` and `hits_at`; all candidates of an example are ranked.
    - `ppl`: exp of the mean negative log-likelihood of a token, over all tokens of all true
      replies, their ends included where they were not cut; `ppl_without_eos` leaves these out.
    - `word_ppl`: the same of a word; see `convai_fast.evaluation.word_perplexity`. The vocabulary
      is that of all splits of `dialogues`.
    - `f1`, `bleu`, `distinct` (and `mean_length`): of the replies that the model writes, see
      `convai_fast.evaluation.overlap`; `f1` is the mean over examples.

    Args:
        model: on the device to compute on; it is put in eval mode.
        tokenizer: the model's.
        dialogues: by split; the vocabulary of `word_ppl` is that of all of them.
        split: the one to measure on.
        metrics: any of the names above.
        max_history: exchanges of history the model sees, `2 * max_history + 1` turns.
        max_examples: measure on so many, spread evenly over the split; 0: on all.
        batch_size: examples that are scored at a time.
        dtype: scoring computes products in it, under autocast; replies are written in float32.
        sampling: how replies are drawn, each with a seed of its own, made of this seed and its id.

    Raises:
        UserError: an unknown metric, no examples, or for hits@K too few candidates or a
            multiple-choice head that has learnt nothing.

    Source: ConvAI2 (Dinan et al. 2019, arXiv 1902.00098).
    """
    check_metrics(metrics)
    ks = [int(name.removeprefix("hits@")) for name in metrics if name.startswith("hits@")]
    if ks:
        model.check_ranking("hits@K is about", ", or leave hits@K out of `metrics`")
    writes_replies = not _OF_REPLIES.isdisjoint(metrics)
    params = replace(sampling or SamplingParams(), n=1)
    layout = layout_for(tokenizer, model.config)
    if writes_replies:
        prompt_room(model.config.n_positions, params, layout)  # better said now than afterwards
    run = _Run(model, tokenizer, dialogues[split], split, max_history, max_examples)
    if ks:
        run.check_candidates(max(ks))

    if ks or "ppl" in metrics:
        run.score(bool(ks), "ppl" in metrics, batch_size, dtype)
    if "word_ppl" in metrics:
        said = chain.from_iterable(dialogues.values())
        of_reply = layout.surroundings[Place.REPLY]
        vocabulary = WordVocabulary(count_words(said), tokenizer, of_reply)
        run.score_words(vocabulary, batch_size, dtype)
    if writes_replies:
        run.write_replies(params)

    examples, signature = run.examples, ""
    figures: dict[str, float] = {}
    counts = {"examples": len(examples)} | run.cuts
    figures |= {f"hits@{k}": hits_at(k, measured(e.rank for e in examples)) for k in ks}
    if "ppl" in metrics:
        counts["tokens"] = sum(measured(e.num_tokens for e in examples))
        nll = sum(measured(e.nll for e in examples))
        eos_nll = sum(measured(e.eos_nll for e in examples))
        figures["ppl"] = perplexity(nll, counts["tokens"])
        figures["ppl_without_eos"] = perplexity(nll - eos_nll, counts["tokens"] - run.num_eos)
    if "word_ppl" in metrics:
        counts["words"] = sum(measured(e.num_words for e in examples))
        counts["unknown_words"] = sum(measured(e.num_unknown_words for e in examples))
        word_nll = sum(measured(e.word_nll for e in examples))
        figures["word_ppl"] = perplexity(word_nll, counts["words"])
    replies = measured(e.reply for e in examples) if writes_replies else []
    if "f1" in metrics:
        figures["f1"] = sum(measured(e.f1 for e in examples)) / len(examples)
    if "bleu" in metrics:
        figures["bleu"], signature = overlap.bleu(replies, [e.expected for e in examples])
    if "distinct" in metrics:
        figures |= {f"distinct_{n}": overlap.distinct(replies, n) for n in (1, 2)}
        figures["mean_length"] = overlap.mean_length(replies)
    return Evaluation(figures, counts, signature, examples)


def measured(values: Iterable[T | None]) -> list[T]:
    """`values` of examples, all of which were measured."""
    known = []
    for value in values:
        assert value is not None
        known.append(value)
    return known


def perplexity(nll: float, count: int) -> float:
    """exp(nll / count), `nll` being a sum over `count` tokens or words, in nats; NaN if 0 / 0."""
    if count == 0:
        return math.nan
    return math.inf if nll / count >= 700 else math.exp(nll / count)


def _finite(values: list[float], example: ExampleResult) -> list[float]:
    """`values`, unless one is no number: a rank among NaNs would be the best."""
    if not all(map(math.isfinite, values)):
        raise UserError(
            f"the model's scores of {example.id} are no numbers: its weights are damaged, or "
            "`precision` fp32 is needed"
        )
    return values


class _Run:
    """The examples of one evaluation, and what each pass over them finds out."""

    def __init__(
        self,
        model: DoubleHeadsModel,
        tokenizer: PreTrainedTokenizerFast,
        dialogues: list[Dialogue],
        split: str,
        max_history: int,
        max_examples: int,
    ) -> None:
        self.model, self.tokenizer, self.dialogues = model, tokenizer, dialogues
        self.max_history, self.max_examples = max_history, max_examples
        self.turns = [
            (number, turn)
            for number, dialogue in enumerate(dialogues)
            for turn in range(len(dialogue.utterances))
        ]
        if not self.turns:
            raise UserError(f"the {split} split has no turn to answer: choose the other `split`")
        self.rows = spread(len(self.turns), max_examples).tolist()
        self.examples = [
            ExampleResult(
                id=turn_id(split, *self.turns[row]),
                turn=self.turns[row][1],
                expected=self._candidates(row)[-1],
            )
            for row in self.rows
        ]
        self.cuts: dict[str, int] = {}
        self.num_eos = 0  # replies whose end was scored: all but those that were cut

    def _candidates(self, row: int) -> list[str]:
        number, turn = self.turns[row]
        return self.dialogues[number].utterances[turn].candidates

    def check_candidates(self, needed: int) -> None:
        """Raise UserError at the first example that has fewer candidates than `needed`, or if there
        is nothing but the true reply to choose from."""
        if all(len(self._candidates(row)) == 1 for row in self.rows):
            raise UserError(
                f"hits@{needed} needs distractors, and the examples have their true reply alone: "
                "raise `fill_candidates` to draw them from the split, or leave hits@K out of "
                "`metrics`"
            )
        for row, example in zip(self.rows, self.examples, strict=True):
            count = len(self._candidates(row))
            if count < needed:
                raise UserError(
                    f"hits@{needed} needs {needed} candidates, and {example.id} (split, dialogue "
                    f"and turn, from 0) has {count}: ask for hits@{count} at most, or raise "
                    "`fill_candidates` where distractors are drawn, or `valid_fraction`, since "
                    "they are drawn from this split alone"
                )

    def score(self, ranks: bool, tokens: bool, batch_size: int, dtype: torch.dtype) -> None:
        """Rank candidates, or tell how likely the tokens of true replies are, or both at once."""
        with tempfile.TemporaryDirectory() as folder:
            store = self._store(self.dialogues, folder)
            num_candidates, what = (0, "ranking") if ranks else (1, "scoring")
            batches = self._batches(store, batch_size, num_candidates, what)
            if ranks and tokens and any(batches.cuts):
                # A long distractor costs an example some of its history: what the true reply costs
                # must not depend on whether it is ranked, too.
                self._note(score_examples(self.model, batches, dtype, ranks=True, tokens=False))
                batches, ranks = self._batches(store, batch_size, 1, "scoring"), False
            self._note(score_examples(self.model, batches, dtype, ranks=ranks, tokens=tokens))

    def _store(self, dialogues: list[Dialogue], folder: str) -> DialogueStore:
        layout = layout_for(self.tokenizer, self.model.config)
        return build_store({_SPLIT: dialogues}, self.tokenizer, Path(folder) / "store", layout)

    def score_words(self, vocabulary: WordVocabulary, batch_size: int, dtype: torch.dtype) -> None:
        """Tell how likely the words of true replies are."""
        dialogues = with_separate_words(self.dialogues)
        replies = [self._candidates(row)[-1] for row in range(len(self.turns))]
        with tempfile.TemporaryDirectory() as folder:
            store = self._store(dialogues, folder)
            batches = self._batches(store, batch_size, 1, "scoring words")
            scores = score_words(self.model, batches, replies, vocabulary, dtype)
        for row, example in zip(self.rows, self.examples, strict=True):
            example.word_nll = math.fsum(_finite(scores[row].word_nlls, example))
            example.num_words = len(scores[row].word_nlls)
            example.num_unknown_words = scores[row].num_unknown

    def write_replies(self, params: SamplingParams) -> None:
        """Let the model reply to every example."""
        requests = []
        for row, example in zip(self.rows, self.examples, strict=True):
            number, turn = self.turns[row]
            item = request_of_turn(
                example.id, self.dialogues[number], turn, self.max_history, params
            )
            requests.append(item.request)
        engine = GenerationEngine(self.model, self.tokenizer, weights="float32")
        replies = engine.serve(requests)
        for i, (reply,) in track(replies, "writing replies", "reply", total=len(requests)):
            example = self.examples[i]
            example.reply = reply.text
            example.f1 = overlap.f1(reply.text, [example.expected])

    def _batches(
        self, store: DialogueStore, batch_size: int, num_candidates: int, what: str
    ) -> DialogueBatches:
        batches = DialogueBatches(
            store,
            _SPLIT,
            batch_size=batch_size,
            num_candidates=num_candidates,
            max_history=self.max_history,
            max_length=self.model.config.n_positions,
            max_examples=self.max_examples,
        )
        for part, count in batches.cuts._asdict().items():
            if count:
                self.cuts[f"{part} cut for {what}"] = count
        return batches

    def _note(self, scores: dict[int, Scores]) -> None:
        for row, example in zip(self.rows, self.examples, strict=True):
            mc_logits, token_nlls, eos_nlls = scores[row]
            if mc_logits:
                candidates = self._candidates(row)
                example.num_candidates = len(candidates)
                example.rank = rank_of_true(_finite(mc_logits, example), candidates)
            if nlls := token_nlls + eos_nlls:
                example.nll, example.num_tokens = math.fsum(_finite(nlls, example)), len(nlls)
                example.eos_nll = math.fsum(eos_nlls)
                self.num_eos += len(eos_nlls)
