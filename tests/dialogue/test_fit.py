"""What is cut from a dialogue that is too long: the rule, and that everybody follows it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convai_fast import GenerationEngine, Request, SamplingParams
from convai_fast.data.batches import DialogueBatches
from convai_fast.data.build_store import build_store
from convai_fast.dialogue.dialogue import Dialogue, Utterance
from convai_fast.dialogue.encoding import encode
from convai_fast.dialogue.fit import Fit, fit
from convai_fast.dialogue.format import SpecialIds
from convai_fast.dialogue.layout import classic
from convai_fast.generation.ranking import rank_candidates
from convai_fast.model.config import TransformerConfig
from tests.helpers.decoder_steps import recorded_steps
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


def prefix_in_training(dialogue, tokenizer, folder, layout):
    store = build_store({"train": [dialogue]}, tokenizer, folder)
    options = {"batch_size": 1, "num_candidates": 0, "max_history": 1000}
    batches = DialogueBatches(store, "train", max_length=MAX_LENGTH, layout=layout, **options)
    batch = batches[0]
    in_prefix = slice(0, int(batch["mc_token_ids"][0, -1]) - REPLY_LENGTH - 1)  # the longest reply
    if layout == "shared":
        in_prefix = batch["branch_ids"] == 0
    return [batch[name].flatten()[in_prefix].tolist() for name in ("input_ids", "token_type_ids")]


def prefix_in_ranking(dialogue, tokenizer, model):
    [utterance] = dialogue.utterances
    parts = (dialogue.personality, utterance.history, utterance.candidates)
    read = []
    hook = model.transformer.register_forward_pre_hook(
        lambda _, args: read.extend([*args[:2], args[2].branch_ids])
    )
    layout = GenerationEngine(model, tokenizer).layout
    rank_candidates(model, layout, *(encode(tokenizer, part) for part in parts))
    hook.remove()
    input_ids, token_type_ids, branch_ids = read
    # The candidates share their <speaker1>, too.
    return [ids[branch_ids == 0][:-1].tolist() for ids in (input_ids, token_type_ids)]


def prefix_in_generation(dialogue, tokenizer, model):
    # A reply of n tokens has <eos>, too, and the prompt has its <speaker1>.
    request = Request(
        persona=dialogue.personality,
        history=dialogue.utterances[0].history,
        params=SamplingParams(max_length=REPLY_LENGTH + 1, no_sample=True),
    )
    with recorded_steps(lambda *ids: ids) as read:
        GenerationEngine(model, tokenizer).generate([request])
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
    model, tokenizer, words, tmp_path, persona, history, num_tokens
):
    dialogue = Dialogue(
        [words(7 * i, length) for i, length in enumerate(persona)],
        [
            Utterance(
                [words(3 * i, length) for i, length in enumerate(history)],
                [words(11, 2), words(13, REPLY_LENGTH)],
            )
        ],
    )
    expected = prefix_in_training(dialogue, tokenizer, tmp_path / "padded", "padded")
    assert len(expected[0]) == num_tokens
    assert prefix_in_training(dialogue, tokenizer, tmp_path / "shared", "shared") == expected
    assert prefix_in_ranking(dialogue, tokenizer, model) == expected
    assert prefix_in_generation(dialogue, tokenizer, model) == expected
