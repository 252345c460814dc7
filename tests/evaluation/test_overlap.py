import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convai_fast.evaluation.overlap import bleu, distinct, f1, mean_length, normalize

WORDS = ["a", "an", "the", "The", "tea", "tea,", "green", "don't", "it's", "¿qué?", "-", "i"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)


def slow_normalize(text):
    """Character by character, word by word."""
    spaced = "".join(" " if c in string.punctuation else c for c in text.lower())
    return [word for word in spaced.split() if word not in ("a", "an", "the")]


def slow_f1(reply, references):
    best = 0.0
    for reference in references:
        words, left = slow_normalize(reply), slow_normalize(reference)
        num_words, num_left, common = len(words), len(left), 0
        for word in words:
            if word in left:
                left.remove(word)
                common += 1
        if common:
            precision, recall = common / num_words, common / num_left
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_f1_is_that_of_counting_word_by_word(reply, references):
    assert f1(reply, references) == pytest.approx(slow_f1(reply, references), abs=1e-12)


def test_every_punctuation_mark_of_the_definition_separates_words():
    marks = r"""!"#$%&()*+,-./:;<=>?@[]\^`{|}~_'"""
    assert sorted(marks) == sorted(string.punctuation)
    assert normalize(f"x{'x'.join(marks)}x") == " ".join(["x"] * (len(marks) + 1))


def test_articles_go_as_words_only():
    assert normalize("An Another the-theme a b A") == "another theme b"


def test_f1_of_a_worked_example():
    # i, green, tea of [i like green tea] and [i drink green tea green]: P 3/4, R 3/5.
    assert f1("I like the green tea.", ["i drink green tea green"]) == pytest.approx(2 / 3)


def test_f1_is_1_for_the_same_words_in_any_order_and_0_without_overlap():
    assert f1("tea the green!", ["GREEN TEA"]) == 1
    assert f1("yes", ["no"]) == f1("", ["no"]) == f1("the", ["the"]) == 0


def test_f1_takes_the_closest_reference():
    assert f1("green tea", ["no", "green tea", "tea"]) == 1


def test_bleu_is_sacrebleus_and_says_so():
    replies = ["the cat sat on the mat", "i like green tea a lot"]
    score, signature = bleu(replies, replies)
    assert score == pytest.approx(100)
    assert "tok:13a" in signature
    # Brevity penalty exp(1 - 6/5) times the mean of the precisions 5/5, 4/4, 3/3, 2/2.
    score, _ = bleu(["the cat sat on the"], ["the cat sat on the mat"])
    assert score == pytest.approx(100 * 2.718281828 ** (1 - 6 / 5))


def test_distinct_counts_ngrams_over_all_replies():
    replies = ["i like tea", "I like cats", ""]
    assert distinct(replies, 1) == pytest.approx(4 / 6)
    assert distinct(replies, 2) == pytest.approx(3 / 4)  # i like, like tea, like cats


def test_ngrams_do_not_reach_from_one_reply_into_the_next():
    assert distinct(["a b", "c d"], 2) == 1.0
    assert distinct(["a", "b"], 2) == 0.0


def test_mean_length_is_in_words():
    assert mean_length(["i like tea", "", "no !"]) == pytest.approx(5 / 3)
