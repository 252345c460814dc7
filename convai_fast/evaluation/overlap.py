"""What written replies have in common with the true ones, and with one another."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise

_PUNCTUATION = re.compile(r"""[!"#$%&()*+,\-./:;<=>?@\[\]\\^`{|}~_']""")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize(text: str) -> str:
    """`text` as ConvAI2 compares it: the words alone, in lower case, without articles.

    Each of the characters !"#$%&()*+,-./:;<=>?@[]\\^`{|}~_' becomes a space, then so does each of
    the words a, an, the.

    Source: the answer normalisation of SQuAD (Rajpurkar et al. 2016), as ParlAI has it.

    Example:
        >>> normalize("I've  got A cat, the old one!")
        'i ve got cat old one'
    """
    return " ".join(_ARTICLES.sub(" ", _PUNCTUATION.sub(" ", text.lower())).split())


def f1(reply: str, references: Sequence[str]) -> float:
    """F1 of the normalised words of `reply`, for the reference that it comes closest to.

    Words in common are counted as often as they occur in both. With their number as a share of the
    reply's words, P, and of the reference's, R, it is 2PR / (P + R), and 0 where there are none.

    Source: ConvAI2 (Dinan et al. 2019, arXiv 1902.00098).

    Raises ValueError when there are no references.

    Example:
        >>> f1("i like the green tea", ["I like tea.", "No."])  # P = 3/4, R = 3/3
        0.8571428571428571
    """
    words = normalize(reply).split()
    return max(_f1(words, normalize(reference).split()) for reference in references)


def _f1(words: list[str], reference: list[str]) -> float:
    overlap = (Counter(words) & Counter(reference)).total()
    if not overlap:
        return 0.0
    precision, recall = overlap / len(words), overlap / len(reference)
    return 2 * precision * recall / (precision + recall)


def bleu(replies: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """BLEU of all replies together, in percent, and sacrebleu's signature, which says what it is.

    `references` holds one for each reply. Upper and lower case differ.

    Sources: Papineni et al. 2002; sacrebleu, Post 2018 (arXiv 1804.08771), with its defaults: up
    to 4-grams, the tokenizer 13a, exponential smoothing.
    """
    from sacrebleu.metrics import BLEU

    # Without `force` it warns of spaces before the last mark, which these texts do have.
    metric = BLEU(force=True)
    score = metric.corpus_score(list(replies), [list(references)]).score
    return score, metric.get_signature().format()


def distinct(replies: Sequence[str], n: int) -> float:
    """Distinct-n: different n-grams in all replies together, as a share of their n-grams.

    Words are separated by white space, and case is ignored; n is 1 or 2. 0 without n-grams.

    Source: Li et al. 2016 (arXiv 1510.03055), who divide by the number of words for both n.

    Example:
        >>> distinct(["i like tea", "i like cats"], 1)  # i, like, tea, cats of 6
        0.6666666666666666
    """
    texts = [reply.lower().split() for reply in replies]
    grams = list(chain.from_iterable(texts if n == 1 else map(pairwise, texts)))
    return len(set(grams)) / len(grams) if grams else 0.0


def mean_length(replies: Sequence[str]) -> float:
    """Mean number of words in a reply, separated by white space; 0 without replies."""
    return sum(len(reply.split()) for reply in replies) / max(len(replies), 1)
