"""What the OpenAPI document says of the addresses is so, whatever is sent to them."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.params import SamplingParams
from convai_fast.serving.app import Settings
from tests.helpers.http_server import serving

PATHS = [
    *("/v1/chat/completions", "/v1/completions"),
    *("/v1/models", "/v1/models/{name}", "/health", "/metrics"),
]


@pytest.fixture(scope="module")
def schema(model, tokenizer):
    engine = GenerationEngine(model, tokenizer)
    params = SamplingParams(max_length=4)
    with serving(engine, Settings(model="mine", params=params, max_history=0)) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")
    engine._scheduler.check_integrity()
    assert engine.num_unfinished == 0 and len(engine._scheduler.free_slots) == 64


def test_every_address_is_described(schema):
    assert {found.ok().path for found in schema.get_all_operations()} == {*PATHS}


@pytest.mark.parametrize(
    ("path", "mode"),
    [(path, GenerationMode.POSITIVE) for path in PATHS]
    + [(path, GenerationMode.NEGATIVE) for path in PATHS[:2]],  # the others take nothing
)
def test_what_is_sent_gets_an_answer_as_described(schema, path, mode):
    (operation,) = (
        each for found in schema.get_all_operations() if (each := found.ok()).path == path
    )

    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def send(case):
        # What is blank, who speaks last and how long the model is, no schema says.
        unsaid = [positive_data_acceptance] if path in PATHS[:2] else []
        case.call_and_validate(timeout=30, excluded_checks=unsaid)

    send()
