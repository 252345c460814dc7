"""How a reply is drawn: what is said of it."""

from dataclasses import fields

import pytest

from convai_fast.generation.params import SamplingParams


@pytest.mark.parametrize("name", [field.name for field in fields(SamplingParams)])
def test_help_tells_of_every_field(name):
    assert f"\n        {name}: " in SamplingParams.__doc__
