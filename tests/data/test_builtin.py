"""The built-in world: one right reply, for reasons of persona and history."""

import re
from functools import cache

import pytest

from convai_fast.data import builtin_world as world
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.dialogue.encoding import encode
from convai_fast.dialogue.new_tokenizer import train_tokenizer

TOPICS = {topic.name: topic for topic in world.TOPICS}
NAMES = world.WOMEN + world.MEN


@pytest.fixture(scope="module")
def splits():
    return builtin_dialogues(num_train=400, num_valid=100)


@pytest.fixture(scope="module")
def turns(splits):
    return [(d, u) for dialogues in splits.values() for d in dialogues for u in d.utterances]


@pytest.fixture(scope="module")
def tokenizer(splits):
    return train_tokenizer(splits["train"])


def match(form, text, **values):
    """The slots of `text` if it is `form` filled in, where a slot takes one of its values."""
    pattern = re.escape(form)
    for slot, allowed in values.items():
        pattern = pattern.replace(re.escape("{" + slot + "}"), f"(?P<{slot}>{'|'.join(allowed)})")
    found = re.fullmatch(pattern, text)
    return found and found.groupdict()


@cache
def fact_of(sentence):
    """(topic, value, name or None), read back from one sentence of a persona."""
    readings = {
        (topic.name, slots["v"], slots.get("name"))
        for topic in world.TOPICS
        for form in topic.persona
        if (slots := match(form, sentence, v=topic.values, name=world.PET_NAMES + NAMES))
    }
    assert len(readings) == 1, sentence
    return readings.pop()


def facts_of(personality):
    """{topic: [(value, name or None), ...]}"""
    facts = {}
    for topic, *fact in map(fact_of, personality):
        facts.setdefault(topic, []).append(tuple(fact))
    return facts


def question_of(utterance):
    """What the partner says, without greeting, introduction or reaction."""
    text = utterance.history[-1]
    for opener in (*world.GREETINGS, *world.REACTIONS):
        if text.startswith(opener + ", "):
            text = text.removeprefix(opener + ", ")
            break
    return re.sub(rf"^(hi, )?i am ({'|'.join(NAMES)}), ", "", text)


def fill(exchanges, value, pet=""):
    return {reply.format(v=value, pet=pet) for _, reply in exchanges}


def asked(exchanges, question, pet=""):
    return any(q.replace("{pet}", pet) == question for q, _ in exchanges)


def right_replies(personality, history, question):
    """(every reply that is right, where the deciding value stands), judged from the text alone."""
    facts, before = facts_of(personality), history[:-1]
    for topic in world.TOPICS:
        tells = [match(topic.told + ", " + r, question, v=topic.values) for r in world.RETURNS]
        if topic.name in facts and (asked(topic.exchanges, question) or any(tells)):
            return fill(topic.exchanges, facts[topic.name][0][0]) | {
                topic.told.format(v=facts[topic.name][0][0])
            }
        if asked(topic.recall, question):
            said = re.search(topic.told.format(v=f"({'|'.join(topic.values)})"), before[-2])
            return fill(topic.recall, said[1])
    for topic, exchanges in world.NEWS.items():
        for news, _ in exchanges:
            if slots := match(news, question, v=TOPICS[topic].values):
                return fill(exchanges, slots["v"])
    for exchanges, topic in (
        (world.ITS_NAME, "pet"),
        (world.HER_NAME, "family"),
        (world.HIS_NAME, "family"),
    ):
        if asked(exchanges, question):
            assert any(facts[topic][0][0] in reply for reply in before[-1:])
            return fill(exchanges, facts[topic][0][1])
    if asked(world.PARTNER_NAME, question):
        name = re.match(rf"hi, i am ({'|'.join(NAMES)}), ", before[-2])[1]
        return fill(world.PARTNER_NAME, name)
    for kind, name in facts.get("pet", []):
        if asked(world.FIRST_PET, question, kind):
            return fill(world.FIRST_PET, name, kind)
        if asked(world.OTHER_PET, question) and kind not in before[-1].split():
            return fill(world.OTHER_PET, name, kind)
    raise AssertionError(f"nobody knows what is asked by {question!r}")


def test_the_same_seed_gives_the_same_dialogues_and_another_seed_others(splits):
    assert builtin_dialogues(num_train=400, num_valid=100) == splits
    assert builtin_dialogues(num_train=400, num_valid=100, seed=7) != splits


def test_the_validation_split_does_not_depend_on_how_much_training_data_there_is(splits):
    assert builtin_dialogues(num_train=3, num_valid=100)["valid"] == splits["valid"]


def test_the_shape_of_a_dialogue(splits):
    assert {split: len(dialogues) for split, dialogues in splits.items()} == {
        "train": 400,
        "valid": 100,
    }
    for dialogue in splits["train"] + splits["valid"]:
        assert 3 <= len(dialogue.personality) <= 5
        assert 3 <= len(dialogue.utterances) <= 6
        for i, utterance in enumerate(dialogue.utterances):
            assert len(utterance.history) == 2 * i + 1
            assert len(set(utterance.candidates)) == len(utterance.candidates) == 20


def test_the_history_is_what_was_asked_and_truly_replied_before(splits):
    for dialogue in splits["train"]:
        for earlier, later in zip(dialogue.utterances, dialogue.utterances[1:], strict=False):
            assert later.history[:-1] == [*earlier.history, earlier.candidates[-1]]


def test_of_all_candidates_only_the_true_reply_is_right(turns):
    for dialogue, utterance in turns:
        right = right_replies(dialogue.personality, utterance.history, question_of(utterance))
        assert utterance.candidates[-1] in right, (dialogue.personality, utterance.history)
        assert not right & set(utterance.candidates[:-1]), utterance


def test_what_a_reply_says_stands_in_the_persona_or_the_last_three_turns(turns):
    values = {v for topic in world.TOPICS for v in topic.values} | {*NAMES, *world.PET_NAMES}
    for dialogue, utterance in turns:
        seen = set(re.findall(r"\w+", " ".join([*dialogue.personality, *utterance.history[-3:]])))
        said = values & set(re.findall(r"\w+", utterance.candidates[-1]))
        assert said and said <= seen


def test_half_of_the_distractors_differ_from_the_truth_only_in_value(turns):
    # So without the persona (or what the partner said) at most 1 in about 11 can be told apart.
    values = {v for topic in world.TOPICS for v in topic.values} | {*NAMES, *world.PET_NAMES}
    for dialogue, utterance in turns:
        right = right_replies(dialogue.personality, utterance.history, question_of(utterance))
        forms = {" ".join("*" if w in values else w for w in text.split()) for text in right}
        blanked = [
            " ".join("*" if w in values else w for w in text.split())
            for text in utterance.candidates[:-1]
        ]
        assert sum(text in forms for text in blanked) >= 9


def test_some_distractors_are_true_of_the_persona_but_answer_another_question(turns):
    for dialogue, utterance in turns:
        facts = facts_of(dialogue.personality)
        true_of_persona = {
            text
            for name, fact in facts.items()
            for text in fill(TOPICS[name].exchanges, fact[0][0])
        }
        assert len(true_of_persona & set(utterance.candidates[:-1])) >= 1


def test_neither_history_nor_persona_alone_finds_the_true_reply(turns):
    values = {v for topic in world.TOPICS for v in topic.values} | {*NAMES, *world.PET_NAMES}
    without_question = without_values = 0.0
    for dialogue, utterance in turns:
        seen = set(re.findall(r"\w+", " ".join([*dialogue.personality, *utterance.history[-3:]])))
        blank = [
            " ".join("*" if w in values else w for w in c.split()) for c in utterance.candidates
        ]
        supported = [c for c in utterance.candidates if values & set(c.split()) <= seen]
        without_question += 1 / len(supported)
        without_values += 1 / blank.count(blank[-1])
    # What a perfect ranker would reach that only compares words, or only sees what is asked.
    assert without_question / len(turns) < 0.4
    assert without_values / len(turns) < 0.25


def test_the_splits_share_values_but_no_combination_of_facts(splits):
    def facts(split):
        # Which of two pets was drawn first, as the fact, the sentences do not tell.
        return {
            frozenset(
                (topic, fact)
                for topic, known in facts_of(d.personality).items()
                for fact, _ in known
            )
            for d in splits[split]
            if len(facts_of(d.personality).get("pet", [])) < 2
        }

    def words(split):
        return {w for d in splits[split] for s in d.personality for w in s.split()}

    assert not facts("train") & facts("valid")
    assert words("valid") <= words("train")


def test_every_kind_of_question_occurs(turns):
    questions = {question_of(utterance) for _, utterance in turns}
    follow_ups = world.ITS_NAME + world.HER_NAME + world.HIS_NAME + world.PARTNER_NAME
    recalls = [exchange for topic in world.TOPICS for exchange in topic.recall]
    for question, _ in (*follow_ups, *recalls, *world.OTHER_PET):
        assert question in questions
    for topic in world.TOPICS:
        for question, _ in topic.exchanges:
            assert question in questions


def test_how_topics_are_told_is_also_how_they_are_answered():
    # Otherwise the wrong replies to "i am a baker, and you" would look different from the right.
    for topic in world.TOPICS:
        assert topic.told in {reply for _, reply in topic.exchanges}
        assert len({reply for _, reply in topic.exchanges}) >= 2


def test_sequences_are_short(splits, tokenizer):
    for dialogue in splits["train"]:
        for utterance in dialogue.utterances:
            texts = dialogue.personality + utterance.history[-3:]
            assert sum(map(len, encode(tokenizer, texts))) <= 100
