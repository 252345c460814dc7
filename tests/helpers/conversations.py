"""Conversations in every format, what they are read as, and such as are read already."""

from convai_fast.dialogue.dialogue import Dialogue, History, Utterance

TEA_DIALOGUE = {
    "personality": ["i like tea ."],
    "utterances": [
        {"history": ["hello !"], "candidates": ["no .", "hi , some tea ?"]},
        {"history": ["hello !", "hi , some tea ?", "yes ."], "candidates": ["here you are ."]},
    ],
}
DOG_DIALOGUE = {"utterances": [{"history": ["hey"], "candidates": ["i have a dog"]}]}
PARLAI = """\
1 your persona: i like tea .
2 partner's persona: i am thirsty .
3 hello !\thi , some tea ?\t\thi , some tea ?|no .
4 yes .\there you are .
1 hey\ti have a dog
"""
CSV = """\
user 1 personas,user 2 personas,Best Generated Conversation
"I am thirsty.
","I like tea.
I am old.","User 1: Hello!
User 2: Hi, some tea?
User 1: Yes.
User 1: Please.
User 2: Here
you are."
"""
MESSAGES = {
    "messages": [
        {"role": "system", "content": "I like tea.\n\nI am old.\n"},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi, some tea?"},
        {"role": "user", "content": "Yes."},
        {"role": "user", "content": "Please."},
        {"role": "assistant", "content": "Here you are."},
    ]
}
SHAREGPT = {
    "conversations": [
        {
            "from": {"system": "system", "user": "human", "assistant": "gpt"}[m["role"]],
            "value": m["content"],
        }
        for m in MESSAGES["messages"]
    ]
}


TEA = Dialogue(
    ["i like tea ."],
    [
        Utterance(["hello !"], ["no .", "hi , some tea ?"]),
        Utterance(["hello !", "hi , some tea ?", "yes ."], ["here you are ."]),
    ],
)
TEA_WITHOUT_CANDIDATES = Dialogue(
    ["I like tea.", "I am old."],
    [
        Utterance(["Hello!"], ["Hi, some tea?"]),
        Utterance(["Hello!", "Hi, some tea?", "Yes. Please."], ["Here you are."]),
    ],
)
DOG = Dialogue([], [Utterance(["hey"], ["i have a dog"])])


def conversation(turns, persona=(), first=1):
    """What the second speaker answers, or with `first` 0 what the first does after the opening."""
    places = range(first, len(turns), 2)
    utterances = [Utterance(History(turns, i), [turns[i]]) for i in places if i > 0]
    return [Dialogue(list(persona), utterances)]


def long(*turns):
    """Turns that no two conversations have in common by chance."""
    return [f"{turn}, which is said at more length than any greeting" for turn in turns]
