"""ConvAI2's perplexity of a word, which compares models with different tokenizers.

A model of sub-words says how likely a word's first token is. Words that begin with the same token
share its probability in the proportion of how often they occur, and what all words of the
vocabulary get is scaled to 1:

    P(word | text) = softmax(logits)[first token] * (count + 5) / (sum of count + 5 over the words
                     with that first token), divided by the same summed over the vocabulary

Since the shares of the words with one first token add up to 1, that last sum is the probability of
all first tokens, and one softmax over these tokens does both.

    words and counts: tea 5, teapot 1, the 9       logits after "i like": tea 2.0, the 1.0, ing 3.0
    first tokens: tea, the                         their softmax: 0.73, 0.27
    P(tea) = 0.73 * 10 / 16    P(teapot) = 0.73 * 6 / 16    P(the) = 0.27

The predecessor's script did the same for OpenAI GPT. For GPT-2, whose tokens carry the space before
them, it looked up every word without: a word has another first token here where it begins a reply.

Sources: ConvAI2 (Dinan et al. 2019, arXiv 1902.00098), its script eval_ppl; TransferTransfo (Wolf
et al. 2019, arXiv 1901.08149) for the split of a first token's probability.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from convai_fast.data.batches import DialogueBatches, SharedBatch
from convai_fast.dialogue.dialogue import Dialogue, Utterance
from convai_fast.dialogue.encoding import encode_in
from convai_fast.dialogue.layout import Surroundings
from convai_fast.errors import UserError
from convai_fast.evaluation.scoring import (
    Rows,
    computing_in,
    fetch_values,
    lm_logits,
    score,
    track,
)
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.model.layers import to_device

SMOOTHING = 5  # added to every count

_ALONE = Surroundings()
_AFTER_SPACE = Surroundings(before=".", leading=" ")


class WordScores(NamedTuple):
    """Of one reply: the negative log-likelihood in nats of each word that the vocabulary has, and
    how many words it does not have."""

    word_nlls: list[float]
    num_unknown: int


def split_words(text: str) -> list[str]:
    """Words and the marks . , ; : ! ? of `text`, in lower case.

    Example:
        >>> split_words("Hi there, I'm Ann!")
        ['hi', 'there', ',', "i'm", 'ann', '!']
    """
    return re.sub(r"([.,;:!?])", r" \1 ", text.lower()).split()


def count_words(dialogues: Iterable[Dialogue]) -> Counter[str]:
    """How often each word occurs in what is said in `dialogues`, their personas included.

    What is said is counted once a dialogue: the first history, then each turn that is answered and
    the true reply. Distractors were not said.
    """
    counts: Counter[str] = Counter()
    for dialogue in dialogues:
        texts = list(dialogue.personality)
        for number, utterance in enumerate(dialogue.utterances):
            texts += utterance.history if number == 0 else utterance.history[-1:]
            texts.append(utterance.candidates[-1])
        counts.update(chain.from_iterable(map(split_words, texts)))
    return counts


class WordVocabulary:
    """Words, their tokens, and their shares of their first tokens' probability.

    Words have other tokens where they begin a reply than after a space.

    Args:
        counts: how often each word occurs; one that the tokenizer has no token for is left out.
        tokenizer: the model's.
        surroundings: of a reply in the model's layout.

    Attributes:
        first_tokens: two int64 [num_first_tokens], of the vocabulary's words as they begin a reply,
            and as they stand after a space.
    """

    def __init__(
        self,
        counts: Mapping[str, int],
        tokenizer: PreTrainedTokenizerFast,
        surroundings: Surroundings = _ALONE,
    ) -> None:
        self._tokenizer = tokenizer
        self._surroundings = replace(surroundings, trailing=""), _AFTER_SPACE
        self._token_ids: tuple[dict[str, list[int]], ...] = ({}, {})
        self._tokenise(counts)
        self.first_tokens: list[Tensor] = []
        self._shares: list[dict[str, tuple[int, float]]] = []
        for token_ids in self._token_ids:
            first = {word: token_ids[word][0] for word in counts if token_ids[word]}
            sizes: Counter[int] = Counter()
            for word, token in first.items():
                sizes[token] += counts[word] + SMOOTHING
            self.first_tokens.append(torch.tensor(list(sizes), dtype=torch.int64))
            group = {token: i for i, token in enumerate(sizes)}
            self._shares.append(
                {
                    word: (group[token], math.log((counts[word] + SMOOTHING) / sizes[token]))
                    for word, token in first.items()
                }
            )

    def token_ids(self, words: Sequence[str]) -> list[list[int]]:
        """Token ids of each word of a reply, whether the vocabulary has it or not."""
        self._tokenise(words)
        return [self._token_ids[i > 0][word] for i, word in enumerate(words)]

    def share(self, word: str, after_space: bool) -> tuple[int, float] | None:
        """Where the word's first token stands in `first_tokens`, and the natural logarithm of the
        word's share of its probability; None if the vocabulary does not have the word."""
        return self._shares[after_space].get(word)

    def _tokenise(self, words: Iterable[str]) -> None:
        new = sorted(set(words) - self._token_ids[0].keys())
        for token_ids, surroundings in zip(self._token_ids, self._surroundings, strict=True):
            ids = encode_in(self._tokenizer, new, surroundings)
            token_ids.update(zip(new, ids, strict=True))


def with_separate_words(dialogues: Iterable[Dialogue]) -> list[Dialogue]:
    """`dialogues` as `score_words` reads them: the true reply is the only candidate, its words in
    lower case and with a space between them."""
    return [
        Dialogue(
            dialogue.personality,
            [
                Utterance(utterance.history, [" ".join(split_words(utterance.candidates[-1]))])
                for utterance in dialogue.utterances
            ],
        )
        for dialogue in dialogues
    ]


class _Query(NamedTuple):
    """A word to be scored."""

    row: int
    after_space: bool
    position: int  # of the token before it, among those of the batch
    group: int
    log_share: float


@torch.inference_mode()
def score_words(
    model: DoubleHeadsModel,
    batches: DialogueBatches,
    replies: Sequence[str],
    vocabulary: WordVocabulary,
    dtype: torch.dtype,
) -> dict[int, WordScores]:
    """Score each word of every true reply, given persona, history and the words before it.

    A word that the vocabulary does not have is not scored, but is read by those after it. Neither
    are the later tokens of a word, nor `<eos>`.

    Args:
        batches: of dialogues `with_separate_words`, in the shared-prefix layout.
        replies: the true reply of each row of `batches.plan`, as text.
        dtype: products are computed in it, under autocast.

    Returns:
        the scores of each example, by its row in `batches.plan`.

    Raises:
        UserError: the tokenizer has tokens that reach from one word into the next.
    """
    scores: dict[int, WordScores] = {}
    scored: list[_Query] = []
    parts: list[Tensor] = []  # the logarithms of the first tokens' probabilities, as `scored`
    with computing_in(model, dtype) as model:
        device = model.transformer.token_embedding.weight.device
        first_tokens = [to_device(tokens, device) for tokens in vocabulary.first_tokens]
        for i in track(range(len(batches)), "scoring words", "batch", len(batches)):
            batch = batches.shared(i)
            labelled = batch["label_positions"].tolist()
            eos = batches.store.layout.eos  # no word; a reply that was cut has none
            queries: list[_Query] = []
            for row in batches.rows_of(i).tolist():
                num_labels = int(batches.index.num_labels[row])
                positions, labelled = labelled[:num_labels], labelled[num_labels:]
                read = [id for id in batch["input_ids"][positions].tolist() if id != eos]
                found, unknown = _queries(row, replies[row], positions, read, vocabulary)
                queries += found
                scores[row] = WordScores([], unknown)
            queries.sort(key=lambda query: query.after_space)
            scored += queries
            parts += _log_probs(model, batch, queries, first_tokens)
    for query, log_prob in zip(scored, fetch_values(parts), strict=True):
        scores[query.row].word_nlls.append(-(log_prob + query.log_share))
    return scores


def _queries(
    row: int, reply: str, positions: list[int], read: list[int], vocabulary: WordVocabulary
) -> tuple[list[_Query], int]:
    """The words to be scored of a reply whose tokens `read` stand at `positions`, and how many
    cannot be."""
    words = split_words(reply)
    token_ids = vocabulary.token_ids(words)
    of_words = [*chain(*token_ids)]
    # Of a reply that was cut the last words are missing; a layout may add a space to a whole one.
    if any(ours != theirs for ours, theirs in zip(of_words, read, strict=False)):
        raise UserError(
            "word_ppl needs a tokenizer whose tokens end where words do, but this model's joins "
            f"words of {reply!r}: leave that metric out"
        )
    queries, unknown = [], 0
    begins = accumulate(map(len, token_ids), initial=0)
    for number, (word, begin) in enumerate(zip(words, begins, strict=False)):
        share = vocabulary.share(word, number > 0)
        if share is None:
            unknown += 1
        elif begin < len(read):  # of a reply too long for the model, only the beginning was read
            queries.append(_Query(row, number > 0, positions[begin] - 1, *share))
    return queries, unknown


def _log_probs(
    model: DoubleHeadsModel,
    batch: SharedBatch,
    queries: list[_Query],
    first_tokens: Sequence[Tensor],
) -> Iterator[Tensor]:
    """Yield, part after part, what the first tokens of a batch's words get, on the device.

    Args:
        queries: the words that begin a reply before those after a space.
        first_tokens: the vocabulary's, on the device.
    """
    positions = torch.tensor([query.position for query in queries], dtype=torch.int64)
    _, hidden = score(model, Rows.of(batch), wanted=positions)
    num_first = sum(not query.after_space for query in queries)
    parts = (queries[:num_first], hidden[:num_first]), (queries[num_first:], hidden[num_first:])
    for (part, states), tokens in zip(parts, first_tokens, strict=True):
        groups = torch.tensor([query.group for query in part], dtype=torch.int64)
        groups = to_device(groups, states.device)
        for rows, logits in lm_logits(model, states):
            log_probs = logits.index_select(1, tokens).log_softmax(-1)
            yield log_probs.gather(1, groups[rows, None]).squeeze(1)
