"""Stores of any texts and layouts, and the arguments with which `collate` reads them."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from convai_fast import _native, ops
from convai_fast.dialogue.format import SpecialIds
from convai_fast.dialogue.layout import Place, build_sequence, classic, sentence_place
from convai_fast.ops.plan import class_of_places, classes_of, layout_numbers, pieces_of
from tests.helpers.layouts import layouts

SPECIAL = SpecialIds(1, 2, 3, 4, 0)
CLASSIC = classic(SPECIAL)
NAMES = ("input_ids", "token_type_ids", "labels", "mc_token_ids")
SHARED_NAMES = (*NAMES[:2], "position_ids", "branch_ids", *NAMES[2:])

needs_kernel = pytest.mark.skipif(_native.host is None, reason="nothing is compiled here")


def make_arguments(texts, rows, seq_len, dtype=torch.uint16, layout=CLASSIC):
    """`texts`: the tokens of each text, those in the layout's first class, its second and so on.

    `rows`: (persona ids, rotation, kept, history ids, candidate ids), one an example, and where
    they begin within a turn, how many of its tokens are left out.
    """
    utterances = [*texts, *pieces_of(layout)]
    offsets = np.cumsum([0, *map(len, utterances)])
    tokens = [token for utterance in utterances for token in utterance]
    tables, plan = ([], [], []), []
    for persona, rotation, kept, history, candidates, *skip in rows:
        columns = []
        for table, ids in zip(tables, (persona, history, candidates), strict=True):
            columns += [len(table), len(ids)]
            table += ids
        plan.append([*columns[:2], rotation, kept, *columns[2:4], *(skip or [0]), *columns[4:]])
    persona_ids, history_ids, candidate_ids = (torch.tensor(t, dtype=torch.int32) for t in tables)
    return {
        "tokens": torch.tensor(tokens, dtype=torch.int64).to(dtype),
        "utterance_offsets": torch.tensor(offsets),
        "persona_ids": persona_ids,
        "history_ids": history_ids,
        "candidate_ids": candidate_ids,
        "plan": torch.tensor(plan, dtype=torch.int64).reshape(len(rows), len(ops.PLAN_COLUMNS)),
        "layout": layout_numbers(layout, len(texts) // len(classes_of(layout))),
        "num_candidates": max((len(row[4]) for row in rows), default=0),
        "seq_len": seq_len,
    }


def sequences_of(texts, rows, layout):
    """Of each row its prefix, and its candidates' sequences, by `build_sequence`."""
    count = len(texts) // len(classes_of(layout))
    of_place = class_of_places(layout)

    def ids(text, place):
        return texts[text + of_place[place] * count]

    for persona, rotation, kept, history, candidates, *skip in rows:
        order = (persona[len(persona) - rotation :] + persona[: len(persona) - rotation])[:kept]
        sentences = [ids(text, sentence_place(i, kept)) for i, text in enumerate(order)]
        places = layout.places_of_turns(len(history), has_persona=kept > 0)
        turns = [ids(text, place) for text, place in zip(history, places, strict=True)]
        turns[:1] = [turn[sum(skip) :] for turn in turns[:1]]
        prefix, *_ = build_sequence(sentences, turns, [], layout, with_eos=False)
        replies = (ids(text, Place.REPLY) for text in candidates)
        yield prefix[:-1], [build_sequence(sentences, turns, r, layout) for r in replies]


def needed_length(texts, rows, layout=CLASSIC):
    """The padded length at which no reply is cut."""
    lengths = [0]
    for prefix, candidates in sequences_of(texts, rows, layout):
        lengths += [len(prefix) + 2, *(len(ids) for ids, *_ in candidates)]
    return max(lengths)


@st.composite
def stores(draw, max_token=50_262):
    """Texts in each class of a layout, rows, and the layout."""
    layout = draw(st.just(CLASSIC) | layouts)
    count, num_classes = draw(st.integers(1, 8)), len(classes_of(layout))
    tokens = st.lists(st.integers(5, max_token), max_size=12)
    texts = [draw(tokens) for _ in range(count * num_classes)]
    ids = st.integers(0, count - 1)
    rows = []
    for _ in range(draw(st.integers(0, 4))):
        persona = draw(st.lists(ids, max_size=5))
        rotation = draw(st.integers(0, max(0, len(persona) - 1)))
        kept = draw(st.integers(0, len(persona)))
        history = draw(st.lists(ids, max_size=6))
        skip = 0
        if history:
            place = layout.places_of_turns(len(history), has_persona=kept > 0)[0]
            first = history[0] + class_of_places(layout)[place] * count
            skip = draw(st.integers(0, len(texts[first])))
        rows.append((persona, rotation, kept, history, draw(st.lists(ids, max_size=5)), skip))
    return texts, rows, layout


def make_shared(texts, rows, max_length, dtype=torch.uint16, layout=CLASSIC):
    """The arguments of `collate_shared` for the same rows, each given the room that it needs."""
    arguments = make_arguments(texts, rows, 0, dtype, layout)
    del arguments["seq_len"]
    sizes = [0]
    for prefix, candidates in sequences_of(texts, rows, layout):
        room = max_length - len(prefix)
        sizes.append(len(prefix) + sum(min(len(ids) - len(prefix), room) for ids, *_ in candidates))
    offsets = torch.from_numpy(np.cumsum(sizes, dtype=np.int64))
    return arguments | {
        "offsets": offsets,
        "num_tokens": int(offsets[-1]),
        "max_length": max_length,
    }


def on(gpu, arguments):
    """The store's arrays are on a GPU; all else stays with the host."""
    names = ("tokens", "utterance_offsets", "persona_ids", "history_ids", "candidate_ids")
    return arguments | {name: arguments[name].to(gpu) for name in names}


def assert_equal(actual, expected):
    names = NAMES if len(actual) == len(NAMES) else SHARED_NAMES
    for name, a, b in zip(names, actual, expected, strict=True):
        assert a.dtype == torch.int64, name
        assert torch.equal(a, b), name
