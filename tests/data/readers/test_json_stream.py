"""JSON of any size, record after record."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convai_fast.data.readers import json_stream
from convai_fast.errors import UserError

JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values),
    max_leaves=8,
)


@given(st.lists(JSON, max_size=5), st.integers(1, 7), st.sampled_from([None, 1]))
def test_elements_are_those_of_the_whole_document(values, chunk, indent):
    text = json.dumps(values, indent=indent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_CHUNK", chunk)
        patch.setattr(json_stream.JsonDocument._fill, "__defaults__", (chunk,))
        document = json_stream.JsonDocument(io.StringIO(text), "a.json")
        assert list(document.elements()) == values
        document.end()


@given(st.dictionaries(st.text(max_size=3), JSON, max_size=4), st.integers(1, 7))
def test_members_are_those_of_the_whole_document(values, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_CHUNK", chunk)
        patch.setattr(json_stream.JsonDocument._fill, "__defaults__", (chunk,))
        document = json_stream.JsonDocument(io.StringIO(json.dumps(values)), "a.json")
        assert {name: document.value() for name in document.members()} == values


@given(st.text('[]{}",: \n\\u1e', max_size=30))
def test_what_is_no_json_is_an_error_in_its_line(text):
    try:
        json.loads(text)
        return
    except (ValueError, RecursionError):
        pass
    document = json_stream.JsonDocument(io.StringIO(text), "a.json")
    with pytest.raises(UserError, match=r"a\.json, line \d+: "):
        document.value()
        document.end()
