"""What is cut from a dialogue that is too long: the rule, and that everybody follows it."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convai_fast import GenerationEngine, Request, SamplingParams
from convai_fast.data.batches import DialogueBatches
from convai_fast.data.build_store import build_store
from convai_fast.dialogue.dialogue import Dialogue, Utterance
from convai_fast.dialogue.encoding import encode, encode_at
from convai_fast.dialogue.fit import Fit, fit
from convai_fast.dialogue.format import SpecialIds
from convai_fast.dialogue.layout import Place, classic
from convai_fast.dialogue.tokenizer import special_ids
from convai_fast.model.config import TransformerConfig
from convai_fast.model.families.family import Family
from tests.helpers.decoder_steps import recorded_steps
from tests.helpers.layouts import AROUND, random_layout
from tests.helpers.random_models import model_that_ranks

SENTENCES, TURNS = [2, 1], [2, 1, 3]
CLASSIC = classic(SpecialIds(1, 2, 3, 4, 0))


@pytest.mark.parametrize(
    ("room", "kept"),
    [
        (14, (2, 3, 0, 13)),
        (13, (2, 3, 0, 13)),  # fits exactly
        (12, (2, 2, 0, 10)),  # the oldest turn goes first
        (9, (2, 1, 0, 8)),  # down to the one that is answered
        (7, (1, 1, 0, 7)),  # then persona sentences, from the end
        (6, (0, 1, 0, 5)),
        (4, (0, 1, 1, 4)),  # then the beginning of the turn that is answered
        (3, (0, 1, 2, 3)),
        (2, (0, 0, 0, 1)),  # a speaker who says nothing is left out
        (1, (0, 0, 0, 1)),
        (-5, (0, 0, 0, 1)),  # beside a reply that alone is too long
    ],
)
def test_the_oldest_turns_go_first_then_persona_then_the_beginning_of_the_question(room, kept):
    assert fit(SENTENCES, TURNS, CLASSIC, room) == Fit(*kept)


def test_an_empty_turn_stays_where_there_is_room_for_its_speaker():
    assert fit([1], [0], CLASSIC, 3) == Fit(1, 1, 0, 3)
    assert fit([1], [0], CLASSIC, 2) == Fit(0, 1, 0, 2)
    assert fit([1], [0], CLASSIC, 1) == Fit(0, 0, 0, 1)


def test_without_history_only_persona_is_cut():
    assert fit([2, 2], [], CLASSIC, 4) == Fit(1, 0, 0, 3)


# Three sentences and three turns; what stands around them, and what they are in other places, is of
# lengths that no other sum has.
CHAT = replace(
    CLASSIC,
    begin=(1,) * 2,
    persona_open=(1,) * 10,
    persona_close=(1,) * 20,
    no_persona=(1,) * 7,
    turn_open=((1,) * 100, (1,) * 200),
    turn_close=((1,) * 1_000, (1,) * 2_000),
    reply_open=(1,) * 6,
)
FRAME = 2 + 5  # begin, and all but the last token of reply_open
ELSEWHERE = {
    Place.ONLY_SENTENCE: [11, 11, 11],
    Place.FIRST_SENTENCE: [12, 12, 12],
    Place.LAST_SENTENCE: [14, 14, 14],
    Place.PERSONA_TURN: [61, 62, 63],
}


def steps_of(layout, *kept):
    """What is kept step by step, as less and less room is left, which each fills."""
    for (*_, num_tokens), less in pairwise(kept):
        assert fit([18] * 3, [50, 51, 52], layout, num_tokens - 1, ELSEWHERE) == Fit(*less)
    return fit([18] * 3, [50, 51, 52], layout, 10_000, ELSEWHERE) == Fit(*kept[0])


def test_what_stands_around_texts_is_counted():
    answered, persona = 52 + 2_200, FRAME + 30
    assert steps_of(
        CHAT,
        (3, 3, 0, persona + (12 + 18 + 14) + (50 + 2_200) + (51 + 1_100) + answered),
        (3, 2, 0, persona + (12 + 18 + 14) + (51 + 1_100) + answered),
        (3, 1, 0, persona + (12 + 18 + 14) + answered),
        (2, 1, 0, persona + (12 + 14) + answered),
        (1, 1, 0, persona + 11 + answered),
        (0, 1, 0, FRAME + 7 + answered),
        (0, 1, 1, FRAME + 7 + answered - 1),
    )
    assert fit([18], [52], CHAT, FRAME + 7 + 2_201) == Fit(0, 1, 51, FRAME + 7 + 2_201)
    assert fit([18], [52], CHAT, FRAME + 7 + 2_200) == Fit(0, 0, 0, FRAME + 7)


def test_the_first_sentence_stays_where_what_stands_instead_is_no_shorter():
    """As a template's own system message, which nobody wants instead of a part of the persona."""
    answered, persona = 52 + 2_200, FRAME + 30
    layout = replace(CHAT, no_persona=(1,) * 41)  # a sentence alone: 10 + 11 + 20
    assert steps_of(
        layout,
        (3, 3, 0, persona + (12 + 18 + 14) + (50 + 2_200) + (51 + 1_100) + answered),
        (3, 2, 0, persona + (12 + 18 + 14) + (51 + 1_100) + answered),
        (3, 1, 0, persona + (12 + 18 + 14) + answered),
        (2, 1, 0, persona + (12 + 14) + answered),
        (1, 1, 0, persona + 11 + answered),
        (1, 1, 1, persona + 11 + answered - 1),
    )
    tight = persona + 11 + 2_200
    assert fit([18], [52], layout, tight + 1, ELSEWHERE) == Fit(1, 1, 51, tight + 1)
    assert fit([18], [52], layout, tight, ELSEWHERE) == Fit(1, 0, 0, persona + 11)
    shorter = replace(CHAT, no_persona=(1,) * 40)
    assert fit([18], [52], shorter, tight + 1, ELSEWHERE) == Fit(0, 1, 50, tight + 1)


def test_an_empty_turn_is_counted_where_the_partner_must_begin():
    answered, persona = 52 + 2_200, FRAME + 30
    assert steps_of(
        replace(CHAT, partner_begins=True),
        (3, 3, 0, persona + (12 + 18 + 14) + (50 + 2_200) + (51 + 1_100) + answered),
        (3, 2, 0, persona + (12 + 18 + 14) + 2_200 + (51 + 1_100) + answered),
        (3, 1, 0, persona + (12 + 18 + 14) + answered),
    )
    assert fit([18], [52], replace(CHAT, partner_begins=True), 0) == Fit(0, 0, 0, FRAME + 2_207)


def test_a_persona_takes_the_place_of_what_opens_its_turn():
    answered, persona = 52 + 2_200, FRAME + 30
    first = replace(CHAT, partner_begins=True, persona_turn="first")
    assert steps_of(
        first,
        (3, 3, 0, persona + (12 + 18 + 14) + (61 + 2_000) + (51 + 1_100) + answered),
        (3, 2, 0, persona + (12 + 18 + 14) + 2_000 + (51 + 1_100) + answered),
        (3, 1, 0, persona + (12 + 18 + 14) + (63 + 2_000)),
        (2, 1, 0, persona + (12 + 14) + (63 + 2_000)),
        (1, 1, 0, persona + 11 + (63 + 2_000)),
    )
    last = replace(first, persona_turn="last")
    assert steps_of(
        last,
        (3, 3, 0, persona + (12 + 18 + 14) + (50 + 2_200) + (51 + 1_100) + (63 + 2_000)),
        (3, 2, 0, persona + (12 + 18 + 14) + 2_200 + (51 + 1_100) + (63 + 2_000)),
        (3, 1, 0, persona + (12 + 18 + 14) + (63 + 2_000)),
    )


lengths = st.lists(st.integers(0, 9), max_size=6)


@given(lengths, lengths, st.integers(1, 60))
def test_what_is_kept_fits_and_no_more_than_needed_is_cut(sentences, turns, room):
    kept = fit(sentences, turns, CLASSIC, room)
    last_turns = turns[len(turns) - kept.num_turns :]
    num_tokens = 1 + sum(sentences[: kept.num_sentences]) + sum(last_turns) + len(last_turns)
    assert kept.num_tokens == num_tokens - kept.num_skipped_tokens <= room
    if kept.num_skipped_tokens:
        assert (kept.num_turns, kept.num_sentences, kept.num_tokens) == (1, 0, room)
        assert kept.num_skipped_tokens < turns[-1]
    elif kept.num_sentences < len(sentences):
        assert kept.num_turns <= 1
        assert kept.num_turns == 0 or num_tokens + sentences[kept.num_sentences] > room
    elif 0 < kept.num_turns < len(turns):
        assert num_tokens + 1 + turns[-kept.num_turns - 1] > room


@given(lengths, lengths, st.integers(1, 60))
def test_more_room_never_keeps_less(sentences, turns, room):
    less, more = fit(sentences, turns, CLASSIC, room), fit(sentences, turns, CLASSIC, room + 1)
    assert more.num_turns >= less.num_turns
    assert more.num_sentences >= less.num_sentences
    assert more.num_tokens >= less.num_tokens


# --- training, ranking and generation cut alike -------------------------------------------------

MAX_LENGTH, REPLY_LENGTH = 40, 6


@pytest.fixture(scope="module")
def words(tokenizer):
    """A function that makes a text of so many tokens, none like its neighbour."""
    vocabulary = sorted(tokenizer.get_vocab())
    candidates = [f" {token[1:]}" for token in vocabulary if token.startswith("Ġ")]
    encoded = encode(tokenizer, candidates)
    one_token = [word for word, ids in zip(candidates, encoded, strict=True) if len(ids) == 1]
    assert len(one_token) > 8

    def text(first, count):
        return "".join(one_token[(first + i) % len(one_token)] for i in range(count))

    return text


@pytest.fixture(scope="module")
def model(tokenizer):
    config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}
    config |= {"n_positions": MAX_LENGTH, "vocab_size": len(tokenizer)}
    return model_that_ranks(TransformerConfig.from_transformers(config))


def prefix_in_training(dialogue, tokenizer, folder, kind, layout):
    store = build_store({"train": [dialogue]}, tokenizer, folder, layout)
    options = {"batch_size": 1, "num_candidates": 0, "max_history": 1000}
    batches = DialogueBatches(store, "train", max_length=MAX_LENGTH, layout=kind, **options)
    batch = batches[0]
    in_prefix = slice(0, batches.index.prefix_lengths[0])
    if kind == "shared":
        in_prefix = batch["branch_ids"] == 0
    names = ("input_ids", "token_type_ids")
    return [batch[name].flatten()[in_prefix].tolist() for name in names]


def prefix_in_ranking(request, candidates, engine):
    read = []
    hook = engine.model.transformer.register_forward_pre_hook(
        lambda _, args: read.extend([*args[:2], args[2].branch_ids])
    )
    engine.rank(request, candidates)
    hook.remove()
    input_ids, token_type_ids, branch_ids = read
    # The candidates share the token before them, too.
    return [ids[branch_ids == 0][:-1].tolist() for ids in (input_ids, token_type_ids)]


def prefix_in_generation(request, engine):
    with recorded_steps(lambda *ids: ids) as read:
        engine.generate([request])
    return [ids[:-1].tolist() for ids in read[0]]


@pytest.mark.parametrize(
    ("persona", "history", "num_tokens"),
    [
        ([5, 5], [4, 6], 23),  # nothing is too long
        ([5, 5], [50], 32),  # a long question
        ([5, 50, 5], [4, 6], 13),  # a long persona
        ([5, 5], [5] * 60, 29),  # many turns
        ([8, 9], [5, 20, 22], 32),  # turns and a sentence
        ([], [60, 60], 32),
        ([60], [], 1),
    ],
)
def test_training_ranking_and_generation_read_the_same_prefix(
    model, tokenizer, words, tmp_path, monkeypatch, persona, history, num_tokens
):
    candidates = [words(11, 2), words(13, REPLY_LENGTH)]
    dialogue = Dialogue(
        [words(7 * i, length) for i, length in enumerate(persona)],
        [Utterance([words(3 * i, length) for i, length in enumerate(history)], candidates)],
    )
    chat = random_layout(num_tokens, known=AROUND)
    with_system_message = replace(chat, no_persona=(7,) * 12)  # of the template's own
    layouts = (classic(special_ids(tokenizer)), chat, with_system_message)
    for number, layout in enumerate(layouts):
        monkeypatch.setattr(Family, "layout", lambda *_, layout=layout: layout)
        engine = GenerationEngine(model, tokenizer)
        folder = tmp_path / str(number)
        expected = prefix_in_training(dialogue, tokenizer, folder / "padded", "padded", layout)
        if number == 0:
            assert len(expected[0]) == num_tokens
        in_shared = prefix_in_training(dialogue, tokenizer, folder / "shared", "shared", layout)
        assert in_shared == expected
        [reply] = encode_at(tokenizer, candidates[1:], [Place.REPLY], layout)
        # A reply of n tokens has one that ends it, too, and the prompt has the one before it.
        params = SamplingParams(max_length=len(reply) + 1, no_sample=True)
        history = dialogue.utterances[0].history
        request = Request(persona=dialogue.personality, history=history, params=params)
        assert prefix_in_ranking(request, candidates, engine) == expected
        assert prefix_in_generation(request, engine) == expected


def test_training_and_ranking_read_the_same_where_a_reply_is_too_long(
    model, tokenizer, words, tmp_path, monkeypatch
):
    """A default persona is longer than the one that it would stand for, which therefore stays."""
    layout = replace(classic(special_ids(tokenizer)), no_persona=(7,) * 20)
    monkeypatch.setattr(Family, "layout", lambda *_: layout)
    candidates = [words(11, 2), words(13, MAX_LENGTH)]
    dialogue = Dialogue([words(7, 5)], [Utterance([words(3, 4)], candidates)])
    expected = prefix_in_training(dialogue, tokenizer, tmp_path / "store", "padded", layout)
    request = Request(persona=dialogue.personality, history=dialogue.utterances[0].history)
    assert prefix_in_ranking(request, candidates, GenerationEngine(model, tokenizer)) == expected
    assert len(expected[0]) == 1 + 5
