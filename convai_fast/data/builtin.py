"""The built-in world: generated dialogues whose true reply follows from persona and history."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from convai_fast.data import builtin_world as world
from convai_fast.data.builtin_world import TOPICS, Exchange, Topic
from convai_fast.dialogue.dialogue import Dialogue, Utterance

NUM_CANDIDATES = 20
MAX_TURNS = 6

# Of the 19 distractors. Contradictions answer the question with another value, so only the persona
# (or what the partner said) tells them from the truth; own facts are true of the persona but answer
# another question, so only the history does.
_NUM_CONTRADICTIONS = 10
_NUM_OWN_FACTS = 5
# Training with few candidates takes the last ones, so the hard distractors tend to stand there.
_CONTRADICTION_LATE = 0.7

_TOPIC = {topic.name: topic for topic in TOPICS}


def builtin_dialogues(
    num_train: int = 2000, num_valid: int = 200, seed: int = 42
) -> dict[str, list[Dialogue]]:
    """Generate the two splits of the built-in world, `{"train": [...], "valid": [...]}`.

    A dialogue has 3 to 5 persona sentences and 3 to 6 utterances with 20 candidates each. Whatever
    a reply depends on is in the persona or the last three turns (`max_history=1`), and of the
    candidates only the true reply, the last, fits both.

    The same seed gives the same dialogues; the validation split does not depend on `num_train`.
    No combination of facts is in both splits, but every value is meant to occur in both.
    """
    held_out = set()
    splits: dict[str, list[Dialogue]] = {"train": [], "valid": []}
    for split, count in (("valid", num_valid), ("train", num_train)):
        rng = random.Random(f"{seed} {split}")
        while len(splits[split]) < count:
            person = _Person(rng)
            facts = frozenset(person.facts.items())
            if split == "valid":
                held_out.add(facts)
            elif facts in held_out:
                continue
            splits[split].append(person.dialogue())
    return splits


@dataclass(slots=True)
class _Turn:
    """What the partner says, the true reply, and at least 10 replies to it that are wrong."""

    partner: str
    reply: str
    contradictions: list[str]
    group: str


class _Person:
    """Somebody with facts, who is asked about them by a partner."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        topics = rng.sample(TOPICS, rng.randint(3, 5))
        self.facts = {topic.name: rng.choice(topic.values) for topic in topics}
        self.relatives = world.MEN
        if self.facts.get("family") in world.FEMALE_RELATIVES:
            self.relatives = world.WOMEN
        self.relative = rng.choice(self.relatives)
        self.partner = rng.choice(
            [name for name in world.WOMEN + world.MEN if name != self.relative]
        )
        self.pets = self._draw_pets(can_have_two=len(topics) < 5)
        self.personality: list[str] = []
        for topic in topics:
            if topic.name != "pet":
                self._state(topic, self.facts[topic.name], self.relative)
        for kind, name in self.pets:
            self._state(_TOPIC["pet"], kind, name)
        rng.shuffle(self.personality)

    def _draw_pets(self, can_have_two: bool) -> list[tuple[str, str]]:
        """Kind and name of each pet."""
        if "pet" not in self.facts:
            return []
        first = self.facts["pet"]
        second = self.rng.choice([kind for kind in _TOPIC["pet"].values if kind != first])
        names = self.rng.sample(world.PET_NAMES, 2)
        two = can_have_two and self.rng.random() < 0.3
        return list(zip((first, second), names, strict=True))[: 2 if two else 1]

    def _state(self, topic: Topic, value: str, name: str) -> None:
        self.personality.append(self.rng.choice(topic.persona).format(v=value, name=name))

    def dialogue(self) -> Dialogue:
        """Talk about every fact in turn."""
        blocks = [self._talk_about(_TOPIC[name]) for name in self.facts]
        if self.rng.random() < 0.3:
            blocks.append([self._news()])
        self.rng.shuffle(blocks)
        # The name must still be in sight when it is asked for, so it comes with a lone question.
        single = next((block for block in blocks if len(block) == 1), None)
        if single and self.rng.random() < 0.4:
            blocks.remove(single)
            opening = f"{world.INTRODUCTION.format(v=self.partner)}, {single[0].partner}"
            single[0].partner = opening
            recall = self._ask(
                world.PARTNER_NAME, world.WOMEN + world.MEN, self.partner, "name", [self.relative]
            )
            blocks.insert(0, [*single, recall])
        else:
            first = blocks[0][0]
            first.partner = f"{self.rng.choice(world.GREETINGS)}, {first.partner}"

        history: list[str] = []
        utterances = []
        for turn in [turn for block in blocks for turn in block][:MAX_TURNS]:
            react = history and self.rng.random() < 0.2
            reaction = f"{self.rng.choice(world.REACTIONS)}, " if react else ""
            history.append(reaction + turn.partner)
            utterances.append(Utterance(list(history), self._candidates(turn)))
            history.append(turn.reply)
        return Dialogue(self.personality, utterances)

    def _talk_about(self, topic: Topic) -> list[_Turn]:
        """The question about a topic, and what can only follow it."""
        if len(self.pets) == 2 and topic.name == "pet":
            return self._two_pets()
        value = self.facts[topic.name]
        if self.rng.random() < 0.2:
            told = self.rng.choice([other for other in topic.values if other != value])
            question = f"{topic.told.format(v=told)}, {self.rng.choice(world.RETURNS)}"
            turns = [
                self._ask(
                    [(question, topic.told)], topic.values, value, topic.group, [told],
                    forms=[reply for _, reply in topic.exchanges],
                )
            ]  # fmt: skip
            if topic.recall:
                turns.append(self._ask(topic.recall, topic.values, told, topic.group, [value]))
        else:
            turns = [self._ask(topic.exchanges, topic.values, value, topic.group)]
        if topic.name == "pet":
            turns.append(self._ask(world.ITS_NAME, world.PET_NAMES, self.pets[0][1], topic.group))
        elif topic.name == "family":
            female = value in world.FEMALE_RELATIVES
            exchanges = world.HER_NAME if female else world.HIS_NAME
            turns.append(
                self._ask(exchanges, self.relatives, self.relative, topic.group, [self.partner])
            )
        return turns

    def _two_pets(self) -> list[_Turn]:
        pets = self.rng.sample(self.pets, 2)
        turns = []
        for exchanges, (kind, name), (_, other) in zip(
            (world.FIRST_PET, world.OTHER_PET), pets, reversed(pets), strict=True
        ):
            asked = [
                (question.replace("{pet}", kind), reply.replace("{pet}", kind))
                for question, reply in exchanges
            ]
            turns.append(self._ask(asked, world.PET_NAMES, name, "pet", [other]))
        # To tell again of the first pet is no answer about the other.
        turns[1].contradictions.insert(0, turns[0].reply)
        return turns

    def _news(self) -> _Turn:
        topic = _TOPIC[self.rng.choice(sorted(world.NEWS))]
        own = [self.facts[topic.name]] if topic.name in self.facts else []
        value = self.rng.choice([other for other in topic.values if other not in own])
        return self._ask(world.NEWS[topic.name], topic.values, value, topic.group, own)

    def _ask(
        self,
        exchanges: Sequence[Exchange],
        values: Sequence[str],
        value: str,
        group: str,
        tempting: Sequence[str] = (),
        forms: Sequence[str] = (),
    ) -> _Turn:
        """A question whose true answer is `value`; `tempting` wrong values are always offered.

        `forms` are the ways to answer, by default those of `exchanges`.
        """
        question, reply = self.rng.choice(exchanges)
        wrong = [other for other in values if other != value]
        self.rng.shuffle(wrong)
        wrong.sort(key=lambda other: other not in tempting)
        others = sorted({*(forms or (form for _, form in exchanges))} - {reply})
        texts = [form.format(v=other) for form in (reply, *others) for other in wrong]
        return _Turn(question.format(v=value), reply.format(v=value), texts, group)

    def _candidates(self, turn: _Turn) -> list[str]:
        """19 distractors and the true reply."""
        rng = self.rng
        contradictions = turn.contradictions[:_NUM_CONTRADICTIONS]
        own_facts = [
            reply.format(v=self.facts[topic.name])
            for topic in TOPICS
            if topic.name in self.facts and topic.group != turn.group
            for reply in sorted({reply for _, reply in topic.exchanges})
        ]
        off_topic = rng.sample(own_facts, min(len(own_facts), _NUM_OWN_FACTS))
        elsewhere = [topic for topic in TOPICS if topic.group != turn.group]
        while len(off_topic) + len(contradictions) < NUM_CANDIDATES - 1:
            topic = rng.choice(elsewhere)
            text = rng.choice(topic.exchanges)[1].format(v=rng.choice(topic.values))
            if text not in off_topic:
                off_topic.append(text)
        rng.shuffle(contradictions)
        rng.shuffle(off_topic)
        distractors = []  # from the last to the first
        while contradictions or off_topic:
            hard = contradictions and (not off_topic or rng.random() < _CONTRADICTION_LATE)
            distractors.append((contradictions if hard else off_topic).pop())
        return [*reversed(distractors), turn.reply]
