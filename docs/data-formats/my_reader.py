from collections.abc import Iterator


def load(path: str) -> Iterator[dict]:
    """Read a question and an answer a line, with `->` between them."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            question, answer = line.split("->")
            yield {"utterances": [{"history": [question], "candidates": [answer.strip()]}]}
