import json


def load(path: str) -> list[dict]:
    """Read pairs of prompt and response, nested by source."""
    with open(path, encoding="utf-8") as file:
        sources = json.load(file)["yesands"]
    return [
        {"utterances": [{"history": [pair["p"]], "candidates": [pair["r"]]}]}
        for pairs in sources.values()
        for pair in pairs
    ]
