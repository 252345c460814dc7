"""Conversations in every format, as the tests of formats read and damage them."""

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
