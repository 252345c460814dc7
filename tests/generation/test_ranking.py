import copy
import math

import pytest
import torch
import transformers

from convai_fast.dialogue.encoding import encode
from convai_fast.dialogue.format import SpecialIds
from convai_fast.dialogue.layout import build_sequence, classic
from convai_fast.errors import UserError
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.ranking import rank_candidates
from convai_fast.generation.request import Request, build_prompt
from convai_fast.model import DoubleHeadsModel
from tests.helpers.meta import META, NothingWaits

SPECIAL = SpecialIds(bos=3, eos=7, speaker1=59, speaker2=11, pad=50)
LAYOUT = classic(SPECIAL)
SHAPE = dict(vocab_size=60, n_positions=40, n_embd=32, n_layer=2, n_head=4)
PERSONA = [[1, 2, 4], [5, 6]]
HISTORY = [[8, 9], [10, 12, 13], [14]]
CANDIDATES = [[15, 16], [17], [18, 19, 20, 21, 22, 23], []]


@pytest.fixture(scope="module", params=["openai-gpt", "gpt2"])
def models(request, tmp_path_factory):
    """The same random weights as transformers' class and as ours."""
    torch.manual_seed(0)
    if request.param == "gpt2":
        config = transformers.GPT2Config(
            **SHAPE, bos_token_id=SPECIAL.bos, eos_token_id=SPECIAL.eos
        )
        theirs = transformers.GPT2DoubleHeadsModel(config)
    else:
        theirs = transformers.OpenAIGPTDoubleHeadsModel(transformers.OpenAIGPTConfig(**SHAPE))
    # Fresh weights are so small that all candidates score nearly the same.
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.4)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs.eval(), DoubleHeadsModel.from_pretrained(folder)


def scores_of_transformers(theirs, persona, history, candidates):
    """One candidate at a time, so that nothing needs padding."""
    logits = []
    for candidate in candidates:
        input_ids, token_type_ids, _ = build_sequence(persona, history, candidate, LAYOUT)
        with torch.no_grad():
            output = theirs(
                input_ids=torch.tensor([[input_ids]]),
                token_type_ids=torch.tensor([[token_type_ids]]),
                mc_token_ids=torch.tensor([[len(input_ids) - 1]]),
            )
        logits.append(output.mc_logits.flatten())
    return torch.cat(logits).log_softmax(-1)


@pytest.mark.parametrize("history", [HISTORY, HISTORY[:2], []])
def test_scores_are_those_of_transformers_multiple_choice_head(models, history):
    theirs, ours = models
    scores = rank_candidates(ours, LAYOUT, PERSONA, history, CANDIDATES)
    expected = scores_of_transformers(theirs, PERSONA, history, CANDIDATES)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.05  # or the comparison says little


def test_a_long_candidate_shortens_what_stands_before_all_of_them(models):
    theirs, ours = models
    candidates = [[15, 16], [17] * 30]
    scores = rank_candidates(ours, LAYOUT, PERSONA, HISTORY, candidates)
    # 40 positions less 30 tokens, <speaker1> and <eos> leave 8: <bos>, persona and last turn.
    expected = scores_of_transformers(theirs, PERSONA, HISTORY[-1:], candidates)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("num_tokens", "persona", "history"),
    [(31, PERSONA[:1], [[14]]), (35, [], [[14]]), (36, [], [])],
)
def test_what_a_candidate_leaves_no_room_for_goes_in_order(models, num_tokens, persona, history):
    theirs, ours = models
    candidates = [[15, 16], [17] * num_tokens]
    scores = rank_candidates(ours, LAYOUT, PERSONA, HISTORY, candidates)
    expected = scores_of_transformers(theirs, persona, history, candidates)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_of_a_turn_too_long_its_end_is_answered(models):
    theirs, ours = models
    turn = [*range(20, 50)] * 2
    candidates = [[15, 16], [17]]
    scores = rank_candidates(ours, LAYOUT, PERSONA, [[8], turn], candidates)
    # 40 positions less <bos>, the turn's speaker, <speaker1>, 2 tokens and <eos>.
    expected = scores_of_transformers(theirs, [], [turn[-34:]], candidates)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_a_candidate_too_long_by_itself_loses_its_end(models):
    theirs, ours = models
    scores = rank_candidates(ours, LAYOUT, PERSONA, HISTORY, [[15, 16], [17] * 100])
    expected = scores_of_transformers(theirs, [], [], [[15, 16], [17] * 37])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_a_model_in_training_mode_ranks_without_dropout(models):
    _, ours = models
    expected = rank_candidates(ours, LAYOUT, PERSONA, HISTORY, CANDIDATES)
    ours.train()
    assert torch.equal(rank_candidates(ours, LAYOUT, PERSONA, HISTORY, CANDIDATES), expected)


def test_no_candidates_are_refused(models):
    with pytest.raises(ValueError, match="no candidates"):
        rank_candidates(models[1], LAYOUT, PERSONA, HISTORY, [])


def test_a_head_that_has_learnt_nothing_ranks_nothing(models):
    model = DoubleHeadsModel(models[1].config)
    with pytest.raises(UserError, match="multiple-choice head, which this model has not learnt"):
        rank_candidates(model, LAYOUT, PERSONA, HISTORY, CANDIDATES)


# --- the engine's, of texts ---------------------------------------------------------------------

TEXTS = ["yes , i do .", "no .", "i have a dog . do you ?"]


@pytest.fixture
def question(ask):
    return ask(1, SamplingParams())


def test_the_engine_ranks_texts_as_token_ids_are_ranked(engine, question):
    parts = [encode(engine.tokenizer, each) for each in (question.persona, question.history, TEXTS)]
    expected = rank_candidates(engine.model, engine.layout, *parts)
    ranked = engine.rank(question, TEXTS)
    assert [each.index for each in ranked] == expected.argsort(descending=True).tolist()
    for each in ranked:
        assert each.text == TEXTS[each.index]
        assert each.probability == pytest.approx(expected[each.index].exp().item(), rel=1e-5)
    [first, second, _] = ranked
    difference = math.log(first.probability / second.probability)
    assert first.score - second.score == pytest.approx(difference, abs=1e-4)
    of_ids = engine.rank(Request(persona=parts[0], history=parts[1]), parts[2])
    assert of_ids == ranked


def test_a_prompt_of_token_ids_is_that_of_its_texts(engine, question):
    layout, size = engine.layout, engine.model.config.vocab_size
    prompt = build_prompt(question, engine.tokenizer, layout, size, 60)
    request = Request(input_ids=prompt.input_ids, token_type_ids=prompt.token_type_ids)
    assert engine.rank(request, TEXTS) == engine.rank(question, TEXTS)


def test_a_score_is_that_by_which_the_best_of_several_replies_is_chosen(engine, ask):
    request = ask(2, SamplingParams(max_length=12, n=4, best_of=4))
    [replies] = engine.generate([request])
    candidates = [reply.token_ids for reply in replies]
    ranked = engine.rank(request, candidates)
    assert [each.index for each in ranked] == [0, 1, 2, 3]
    for each in ranked:
        assert each.score == pytest.approx(replies[each.index].score, abs=1e-3)


@pytest.mark.parametrize(
    ("fields", "candidates", "says"),
    [
        ({}, [], "there are no candidates to rank"),
        ({}, "yes .", "candidates of the request is one text"),
        ({}, ["yes .", " "], r"candidates\[1\] of the request is blank"),
        ({}, [[1, 10_000]], "candidates of the request holds 10000"),
        ({"history": ["hi", ""]}, ["yes ."], r"history\[1\] of the request is blank"),
        ({"input_ids": [1] * 95}, ["yes ."], "95 input_ids, but beside the reply .* positions for"),
    ],
)
def test_what_cannot_be_ranked_is_refused_in_a_sentence(engine, fields, candidates, says):
    with pytest.raises(UserError, match=says):
        engine.rank(Request(**fields), candidates)


def test_the_engine_ranks_nothing_with_a_head_that_has_learnt_nothing(engine, monkeypatch):
    monkeypatch.setattr(engine.model, "head_is_new", True)
    with pytest.raises(UserError, match="multiple-choice head, which this model has not learnt"):
        engine.rank(Request(), TEXTS)


def test_damaged_weights_rank_nothing(engine, monkeypatch):
    bias = engine.model.multiple_choice_head.bias
    monkeypatch.setattr(bias, "data", torch.full((1,), float("nan")))
    with pytest.raises(UserError, match="their scores are no numbers"):
        engine.rank(Request(), TEXTS)


def test_ranking_does_not_wait_for_a_gpu_before_its_scores_are_read(models):
    model = copy.deepcopy(models[1]).to(META)
    with NothingWaits():
        scores = rank_candidates(model, LAYOUT, PERSONA, HISTORY, CANDIDATES)
    assert (scores.device, scores.shape) == (META, (len(CANDIDATES),))
