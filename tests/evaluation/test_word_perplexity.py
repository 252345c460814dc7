import math
import tempfile
from collections import Counter, defaultdict
from itertools import chain

import pytest
import torch

from convai_fast.data.batches import DialogueBatches
from convai_fast.data.build_store import build_store
from convai_fast.data.readers import load_dialogues
from convai_fast.dialogue.chat_template import layout_of
from convai_fast.dialogue.dialogue import Dialogue, Utterance
from convai_fast.dialogue.encoding import encode, encode_in
from convai_fast.dialogue.layout import Place, Surroundings
from convai_fast.dialogue.sequence import build_input_from_segments
from convai_fast.dialogue.tokenizer import load_tokenizer
from convai_fast.errors import UserError
from convai_fast.evaluation.evaluate import evaluate
from convai_fast.evaluation.word_perplexity import (
    WordScores,
    WordVocabulary,
    count_words,
    score_words,
    split_words,
    with_separate_words,
)
from tests.helpers.chat_tokenizers import CHAT_MODELS, chat_tokenizer
from tests.helpers.small_tokenizers import openai_gpt_tokenizer


def slow_word_nlls(model, tokenizer, counts, persona, history, reply):
    """One forward pass of transformers' class a word, as the challenge's script asked for it."""
    words, nlls = split_words(reply), []
    for number, word in enumerate(words):
        if word not in counts:
            continue
        before = " ".join(words[:number])
        [partial] = encode(tokenizer, [before])
        instance = build_input_from_segments(
            encode(tokenizer, persona),
            encode(tokenizer, history),
            partial,
            tokenizer,
            with_eos=False,
        )
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([instance["input_ids"]]),
                token_type_ids=torch.tensor([instance["token_type_ids"]]),
            ).logits
        probs = logits[0, -1].double().softmax(0)
        words_of_token = defaultdict(dict)
        for each, count in counts.items():
            [tokens] = encode(tokenizer, [each if number == 0 else f" {each}"])
            words_of_token[tokens[0]][each] = count + 5
        dist = {
            each: probs[token].item() * count / sum(group.values())
            for token, group in words_of_token.items()
            for each, count in group.items()
        }
        nlls.append(-math.log(dist[word] / sum(dist.values())))
    return nlls


def test_words_are_lower_case_and_marks_stand_alone():
    assert split_words("Hi there,I'm Ann...ok?") == [
        "hi", "there", ",", "i'm", "ann", ".", ".", ".", "ok", "?",
    ]  # fmt: skip


def test_what_is_said_counts_once_and_distractors_do_not():
    dialogue = Dialogue(
        ["I am Ann."],
        [
            Utterance(["hello", "hi ann", "how so"], ["no", "fine"]),
            Utterance(["hello", "hi ann", "how so", "fine", "great"], ["never", "bye"]),
        ],
    )
    expected = ["i", "am", "ann", ".", "hello", "hi", "ann", "how", "so", "fine", "great", "bye"]
    assert count_words([dialogue]) == Counter(expected)


def test_words_with_one_first_token_share_its_probability_by_their_counts():
    vocabulary = WordVocabulary({"like": 5, "lit": 1, "the": 9}, openai_gpt_tokenizer())
    for after_space in (False, True):
        like, lit, the = (vocabulary.share(w, after_space) for w in ("like", "lit", "the"))
        assert like == (lit[0], pytest.approx(math.log(10 / 16)))
        assert lit[1] == pytest.approx(math.log(6 / 16))
        assert the[0] != lit[0]
        assert the[1] == 0
        assert vocabulary.share("li", after_space) is None


def test_a_gpt2_word_has_another_first_token_after_a_space(tokenizer):
    vocabulary = WordVocabulary({"tea": 1, "work": 1}, tokenizer)
    beginning, later = (vocabulary.first_tokens[i].tolist() for i in (0, 1))
    assert beginning == [encode(tokenizer, [word])[0][0] for word in ("tea", "work")]
    assert later == [encode(tokenizer, [f" {word}"])[0][0] for word in ("tea", "work")]
    assert set(beginning).isdisjoint(later)


def test_word_ppl_is_that_of_a_forward_pass_for_every_word(models, dialogues):
    counts = count_words(d for split in dialogues.values() for d in split)
    result = evaluate(
        models.ours,
        models.tokenizer,
        dialogues,
        metrics=["word_ppl"],
        max_history=1,
        max_examples=9,
    )
    nlls = []
    for example in result.examples:
        _, number, turn = example.id.split("/")
        dialogue = dialogues["valid"][int(number)]
        utterance = dialogue.utterances[int(turn)]
        expected = slow_word_nlls(
            models.theirs,
            models.tokenizer,
            counts,
            dialogue.personality,
            utterance.history[-3:],
            utterance.candidates[-1],
        )
        assert example.word_nll == pytest.approx(sum(expected), rel=1e-4)
        assert (example.num_words, example.num_unknown_words) == (len(expected), 0)
        nlls += expected
    assert result.metrics["word_ppl"] == pytest.approx(math.exp(sum(nlls) / len(nlls)), rel=1e-4)
    assert result.counts["words"] == len(nlls)


def score(models, dialogue, counts, max_length=192):
    """Scores of a dialogue's replies, with a vocabulary of `counts`."""
    with tempfile.TemporaryDirectory() as folder:
        store = build_store(
            {"valid": with_separate_words([dialogue])}, models.tokenizer, f"{folder}/store"
        )
        batches = DialogueBatches(
            store, "valid", batch_size=2, num_candidates=1, max_history=2, max_length=max_length
        )
        replies = [utterance.candidates[-1] for utterance in dialogue.utterances]
        vocabulary = WordVocabulary(counts, models.tokenizer)
        return score_words(models.ours, batches, replies, vocabulary, torch.float32)


def test_an_unknown_word_is_read_but_not_scored(models):
    counts = {"i": 3, "like": 2, "cats": 1, ".": 7}
    reply = "I like green cats, tea."
    scores = score(models, Dialogue(["i am"], [Utterance(["hello"], [reply])]), counts)
    expected = slow_word_nlls(models.theirs, models.tokenizer, counts, ["i am"], ["hello"], reply)
    assert scores[0].num_unknown == 3  # green , tea
    assert scores[0].word_nlls == pytest.approx(expected, rel=1e-4)
    assert len(expected) == 4


def test_a_reply_without_a_known_word_scores_nothing(models):
    scores = score(models, Dialogue([], [Utterance(["hello"], ["no idea"])]), {"tea": 1})
    assert scores[0] == WordScores([], 2)


def test_of_a_reply_too_long_for_the_model_the_beginning_is_scored(models):
    reply = " ".join(["tea", "work"] * 20)
    dialogue = Dialogue(["i am"], [Utterance(["hello"], [reply])])
    whole = score(models, dialogue, {"tea": 1, "work": 1})[0].word_nlls
    # Persona and history must go, too: the scores of the beginning are others.
    cut = score(models, dialogue, {"tea": 1, "work": 1}, max_length=24)[0].word_nlls
    assert len(whole) == 40
    assert 0 < len(cut) < 24


def test_every_token_that_fits_is_read(models):
    [tokens] = encode(models.tokenizer, ["tea"])
    reply = " ".join(["tea"] * 40)
    dialogue = Dialogue([], [Utterance(["hello"], [reply])])
    # Room for <bos>, <speaker1>, as many tokens and <eos>, which no word is mistaken for.
    [rest] = encode(models.tokenizer, [" tea"])
    max_length = 3 + len(tokens) + 2 * len(rest)
    assert len(score(models, dialogue, {"tea": 1}, max_length)[0].word_nlls) == 3


def test_tokens_that_join_words_are_refused(models, monkeypatch):
    monkeypatch.setattr(WordVocabulary, "token_ids", lambda self, words: [[1, 2] for _ in words])
    with pytest.raises(UserError, match="word_ppl needs a tokenizer whose tokens end where words"):
        score(models, Dialogue([], [Utterance(["hello"], ["tea tea"])]), {"tea": 1})


@pytest.mark.parametrize("architecture", ["openai-gpt", "gpt2"])
def test_words_of_real_replies_are_tokenised_as_their_texts(shared_dir, architecture):
    tokenizer = load_tokenizer(shared_dir / "tokenizers" / architecture)
    dialogues = load_dialogues(shared_dir / "data" / "synthetic-persona-chat", num_candidates=1)
    replies = [split_words(u.candidates[-1]) for d in dialogues["valid"] for u in d.utterances]
    vocabulary = WordVocabulary(Counter(chain(*replies)), tokenizer)
    joined = encode(tokenizer, [" ".join(words) for words in replies])
    for words, ids in zip(replies, joined, strict=True):
        assert list(chain(*vocabulary.token_ids(words))) == ids


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("name", CHAT_MODELS)
def test_words_have_the_tokens_that_they_have_in_a_reply(name, is_chat):
    tokenizer, words = chat_tokenizer(name), split_words("I have 2 cats (don't you?)")
    around = layout_of(tokenizer).surroundings[Place.REPLY] if is_chat else Surroundings()
    vocabulary = WordVocabulary(Counter(words), tokenizer, around)
    of_words = list(chain(*vocabulary.token_ids(words)))
    [read] = encode_in(tokenizer, [" ".join(words)], around)
    assert of_words == read[: len(of_words)]
    # The rest is the space that a template writes after a reply.
    assert tokenizer.convert_ids_to_tokens(read[len(of_words) :]) in ([], ["▁"])
