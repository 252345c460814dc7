"""The phrase tables of the built-in world: what its people are, are asked, and answer.

Everything said in the world is a sentence of this file with its slots filled; `{v}` takes the
value that matters. A question stands beside the reply that mirrors its words, so that a reply
follows from who is asked and how, and word overlap (F1) means something. The style is that of a
chat: lower case, no punctuation at the end.

Few values and short sentences are on purpose: a small model learns to look a value up in the
persona only after it has met that value many times.
"""

from dataclasses import dataclass

Exchange = tuple[str, str]  # a question, and the reply that mirrors it


@dataclass(frozen=True, slots=True)
class Topic:
    """Something a person can be asked about.

    Attributes:
        values: what the fact can be; a person has one of them.
        persona: ways to state it in a persona; `{name}` is a pet's or relative's name.
        exchanges: ways to ask for it and to answer.
        told: how the partner says the same of themselves before asking back.
        recall: how the partner asks later what they told; empty where nobody would.
        group: topics of one group lend each other no distractors, for they might pass as answers.
    """

    name: str
    values: tuple[str, ...]
    persona: tuple[str, ...]
    exchanges: tuple[Exchange, ...]
    told: str
    group: str
    recall: tuple[Exchange, ...] = ()


TOPICS = (
    Topic(
        name="job",
        values=("baker", "doctor", "farmer", "nurse", "pilot", "teacher"),
        persona=("i am a {v}", "i work as a {v}", "i earn my living as a {v}"),
        exchanges=(
            ("what is your job", "i am a {v}"),
            ("what do you do for a living", "i work as a {v}"),
            ("what kind of work do you do", "i work as a {v}"),
        ),
        told="i am a {v}",
        group="job",
        recall=(
            ("do you remember my job", "you are a {v}"),
            ("what was my job again", "you work as a {v}"),
        ),
    ),
    Topic(
        name="city",
        values=("boston", "london", "oslo", "paris", "rome", "tokyo"),
        persona=("i live in {v}", "my home is in {v}", "i have a small flat in {v}"),
        exchanges=(
            ("which city do you live in", "i live in {v}"),
            ("where do you live", "i live in {v}"),
            ("where is your home", "my home is in {v}"),
        ),
        told="i live in {v}",
        group="home",
        recall=(
            ("do you remember where i live", "you live in {v}"),
            ("where was my home again", "your home is in {v}"),
        ),
    ),
    Topic(
        name="family",
        values=("aunt", "brother", "father", "mother", "sister", "uncle"),
        persona=("i live with my {v} {name}", "i share my house with my {v} {name}"),
        exchanges=(
            ("who do you live with", "i live with my {v}"),
            ("do you live alone", "no, i live with my {v}"),
        ),
        told="i live with my {v}",
        group="home",
    ),
    Topic(
        name="food",
        values=("cheese", "curry", "pasta", "pizza", "soup", "sushi"),
        persona=("my favourite food is {v}", "i love to eat {v}", "i could eat {v} every day"),
        exchanges=(
            ("what is your favourite food", "my favourite food is {v}"),
            ("what do you like to eat", "i love to eat {v}"),
            ("what should i cook for you", "i love to eat {v}"),
        ),
        told="i love to eat {v}",
        group="table",
    ),
    Topic(
        name="drink",
        values=("cocoa", "coffee", "lemonade", "milk", "tea", "water"),
        persona=("my favourite drink is {v}", "i drink a lot of {v}", "i always order {v}"),
        exchanges=(
            ("what is your favourite drink", "my favourite drink is {v}"),
            ("what do you like to drink", "i drink a lot of {v}"),
        ),
        told="i drink a lot of {v}",
        group="table",
    ),
    Topic(
        name="colour",
        values=("blue", "green", "grey", "purple", "red", "yellow"),
        persona=("my favourite colour is {v}", "i like to wear {v}", "all my clothes are {v}"),
        exchanges=(
            ("what is your favourite colour", "my favourite colour is {v}"),
            ("which colour do you like best", "i like {v} best"),
        ),
        told="i like {v} best",
        group="colour",
    ),
    Topic(
        name="hobby",
        values=("cycling", "dancing", "fishing", "hiking", "painting", "sailing"),
        persona=("my hobby is {v}", "i spend my weekends {v}", "i go {v} in my free time"),
        exchanges=(
            ("do you have a hobby", "my hobby is {v}"),
            ("what do you do at the weekend", "i spend my weekends {v}"),
            ("what do you do for fun", "i spend my weekends {v}"),
        ),
        told="my hobby is {v}",
        group="hobby",
    ),
    Topic(
        name="pet",
        values=("cat", "dog", "horse", "parrot", "rabbit", "turtle"),
        persona=("i have a {v} called {name}", "my {v} is called {name}"),
        exchanges=(
            ("what kind of pet do you have", "i have a {v}"),
            ("do you have any pets", "yes, i have a {v}"),
        ),
        told="i have a {v}",
        group="pet",
    ),
)

PET_NAMES = ("coco", "daisy", "luna", "max", "milo", "rocky")
WOMEN = ("anna", "clara", "emma", "grace", "julia", "maria")
MEN = ("ben", "david", "frank", "henry", "leo", "tom")
FEMALE_RELATIVES = frozenset({"aunt", "mother", "sister"})

# Asked right after the pet or the relative came up: who "it", "she" or "he" is, the history says.
ITS_NAME = (
    ("what is it called", "it is called {v}"),
    ("does it have a name", "its name is {v}"),
)
HER_NAME = (
    ("what is her name", "her name is {v}"),
    ("what is she called", "she is called {v}"),
)
HIS_NAME = (
    ("what is his name", "his name is {v}"),
    ("what is he called", "he is called {v}"),
)

# Of two pets the first is asked about by kind, the second only as the other one.
FIRST_PET = (
    ("what is your {pet} called", "my {pet} is called {v}"),
    ("does your {pet} have a name", "the name of my {pet} is {v}"),
)
OTHER_PET = (
    ("and what about the other one", "my {pet} is called {v}"),
    ("and the name of the other one", "the name of my {pet} is {v}"),
)

INTRODUCTION = "hi, i am {v}"
PARTNER_NAME = (
    ("what was my name again", "your name is {v}"),
    ("do you remember my name", "yes, you are {v}"),
)

# The partner's news by the topic of its value, which the reply takes up.
NEWS = {
    "city": (
        ("i am flying to {v} tomorrow, wish me luck", "have a safe trip to {v}"),
        ("i am going to {v} for a week", "have a good time in {v}"),
    ),
    "food": (
        ("i am making {v} tonight, do you want some", "yes, i would love some {v}"),
        ("there is {v} left, would you finish it", "yes, i will finish the {v}"),
    ),
    "job": (
        ("i start as a {v} on monday, wish me luck", "you will be a great {v}"),
        ("they want me to become a {v}", "good luck as a {v}"),
    ),
}

GREETINGS = ("hi", "hello", "good morning")
REACTIONS = ("oh nice", "i see", "great")
RETURNS = ("and you", "what about you")
