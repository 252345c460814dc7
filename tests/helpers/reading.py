"""Dialogues as a reader gives them, or the one sentence that it refuses them with."""

import pytest

from convai_fast.data.readers import load_dialogues
from convai_fast.errors import UserError


def load_bare(path, reader="auto", **options):
    """What the reader alone makes of it: nothing drawn, nothing cut off."""
    return load_dialogues(path, reader, num_candidates=1, valid_fraction=0, **options)


def assert_user_error(call, parts):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    for part in parts:
        assert str(part) in message
    assert "\n" not in message


def read(path, reader="auto", **options):
    """As `load_bare`: the dialogues to train on, and what was told."""
    said = []
    return load_bare(path, reader, report=said.append, **options)["train"], said


def pairs_of(dialogues):
    """The history and the candidates of every utterance."""
    return [(list(u.history), u.candidates) for d in dialogues for u in d.utterances]
