import random

import pytest

from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.request import Request
from tests.helpers.decoder_steps import recorded_steps
from tests.helpers.reply_peers import both_models

WORDS = [
    "i",
    "you",
    "like",
    "have",
    "a",
    "the",
    "cat",
    "dog",
    "tea",
    "work",
    "run",
    "old",
    "do",
    "what",
]


@pytest.fixture(scope="session", params=["openai-gpt", "gpt2"])
def models(request, tokenizer, tmp_path_factory):
    return both_models(request.param, tmp_path_factory.mktemp("model"), len(tokenizer))


@pytest.fixture(scope="session")
def model(tokenizer, tmp_path_factory):
    return both_models("gpt2", tmp_path_factory.mktemp("model"), len(tokenizer)).ours


@pytest.fixture
def engine(model, tokenizer):
    return GenerationEngine(model, tokenizer)


@pytest.fixture
def computed():
    """The number of tokens in each step from here on: what the decoder computes."""
    with recorded_steps(lambda input_ids, _: input_ids.numel()) as counts:
        yield counts


@pytest.fixture(scope="session")
def ask():
    """A function that makes a request out of random words, always the same for a number."""

    def ask(number, params, turns=3, sentences=2):
        rng = random.Random(number)

        def say(most):
            return " ".join(rng.choices(WORDS, k=rng.randint(2, most))) + " ."

        return Request(
            persona=[say(4) for _ in range(sentences)],
            history=[say(6) for _ in range(turns)],
            params=params,
        )

    return ask
