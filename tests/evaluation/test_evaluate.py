import copy
import math

import pytest
import torch

from convai_fast.dialogue.dialogue import Dialogue, Utterance
from convai_fast.dialogue.encoding import encode
from convai_fast.dialogue.sequence import build_input_from_segments
from convai_fast.errors import UserError
from convai_fast.evaluation.evaluate import METRICS, evaluate, perplexity
from convai_fast.evaluation.overlap import bleu, distinct, f1, mean_length
from convai_fast.evaluation.ranking import hits_at, rank_of_true
from convai_fast.generation.params import SamplingParams


def examples_of(dialogues, max_history):
    """Persona, history as the model sees it, and candidates of every example, in order."""
    for dialogue in dialogues:
        for utterance in dialogue.utterances:
            history = utterance.history[-(2 * max_history + 1) :]
            yield dialogue.personality, history, utterance.candidates


def slow_scores(models, persona, history, candidates):
    """The multiple-choice logit of each candidate and the log-probabilities of the last one's
    tokens, of transformers' class, one candidate at a time."""
    encoded = [encode(models.tokenizer, texts) for texts in (persona, history, candidates)]
    mc_logits = []
    for reply in encoded[2]:
        instance = build_input_from_segments(*encoded[:2], reply, models.tokenizer)
        input_ids = torch.tensor([[instance["input_ids"]]])
        with torch.no_grad():
            output = models.theirs(
                input_ids=input_ids,
                token_type_ids=torch.tensor([[instance["token_type_ids"]]]),
                mc_token_ids=torch.tensor([[input_ids.shape[-1] - 1]]),
            )
        mc_logits.append(output.mc_logits.item())
    log_probs = output.logits[0, 0].log_softmax(-1)[:-1]
    log_probs = log_probs.gather(1, input_ids[0, 0, 1:, None]).squeeze(1)
    return mc_logits, log_probs[-(len(encoded[2][-1]) + 1) :].tolist()


def test_hits_and_ppl_are_those_of_transformers_class(models, dialogues):
    dialogues["valid"][0].utterances[1].candidates[:5] = []  # ragged counts
    result = evaluate(
        models.ours,
        models.tokenizer,
        dialogues,
        metrics=["hits@1", "hits@3", "ppl"],
        max_history=1,
        batch_size=4,
    )
    ranks, nll, eos_nll, num_tokens = [], 0.0, 0.0, 0
    for example, parts in zip(result.examples, examples_of(dialogues["valid"], 1), strict=True):
        mc_logits, log_probs = slow_scores(models, *parts)
        order = sorted(range(len(mc_logits)), key=lambda i: -mc_logits[i])
        ranks.append(1 + order.index(len(mc_logits) - 1))
        assert (example.rank, example.num_candidates) == (ranks[-1], len(parts[2]))
        assert example.nll == pytest.approx(-sum(log_probs), rel=1e-4)
        assert example.eos_nll == pytest.approx(-log_probs[-1], rel=1e-4)
        nll -= sum(log_probs)
        eos_nll -= log_probs[-1]
        num_tokens += len(log_probs)
    n = len(ranks)
    assert len(set(ranks)) > 3  # or the comparison says little
    assert result.metrics["hits@1"] == ranks.count(1) / n
    assert result.metrics["hits@3"] == sum(rank <= 3 for rank in ranks) / n
    assert result.metrics["ppl"] == pytest.approx(math.exp(nll / num_tokens), rel=1e-4)
    without = math.exp((nll - eos_nll) / (num_tokens - n))
    assert result.metrics["ppl_without_eos"] == pytest.approx(without, rel=1e-4)
    assert result.counts["tokens"] == num_tokens


def test_bf16_ranks_nearly_as_float32_does(models, dialogues):
    def run(dtype):
        return evaluate(
            models.ours, models.tokenizer, dialogues, metrics=["hits@1", "ppl"], dtype=dtype
        )

    exact, rounded = run(torch.float32), run(torch.bfloat16)
    assert rounded.metrics["ppl"] == pytest.approx(exact.metrics["ppl"], rel=0.05)
    pairs = list(zip(exact.examples, rounded.examples, strict=True))
    assert sum(abs(a.rank - b.rank) for a, b in pairs) < len(pairs)  # of 20 places


def test_a_candidate_that_equals_the_true_reply_counts_as_it():
    candidates = ["I like the tea!", "no", "i like tea"]
    assert rank_of_true([3.0, 2.0, 1.0], candidates) == 1
    assert rank_of_true([1.0, 2.0, 3.0], candidates) == 1
    assert rank_of_true([1.0, 2.0, 0.0], candidates) == 2


def test_ties_count_against_the_model():
    assert rank_of_true([1.0, 1.0, 1.0], ["a", "b", "c"]) == 3
    assert hits_at(1, [1, 2, 1, 3]) == 0.5
    assert hits_at(2, [1, 2, 1, 3]) == 0.75


def test_fewer_candidates_than_k_are_an_error_that_names_the_example(models, dialogues):
    dialogues["valid"][1].utterances[2].candidates[:16] = []
    with pytest.raises(UserError, match=r"hits@5 needs 5 candidates, and valid/1/2 .* has 4"):
        evaluate(models.ours, models.tokenizer, dialogues, metrics=["hits@1", "hits@5"])
    for utterance in (u for dialogue in dialogues["valid"] for u in dialogue.utterances):
        utterance.candidates[:-1] = []
    with pytest.raises(UserError, match="hits@1 needs distractors"):
        evaluate(models.ours, models.tokenizer, dialogues, metrics=["hits@1"])


def test_what_a_true_reply_costs_does_not_depend_on_its_distractors(models):
    # A distractor so long that it leaves no room for the history.
    utterance = Utterance(["do you like tea ?"], ["tea " * 250, "yes , i do ."])
    dialogues = {"valid": [Dialogue(["i like tea ."], [utterance])]}
    alone = evaluate(models.ours, models.tokenizer, dialogues, metrics=["ppl"])
    both = evaluate(models.ours, models.tokenizer, dialogues, metrics=["hits@1", "ppl"])
    assert both.counts["history cut for ranking"] == 1
    assert both.metrics["ppl"] == alone.metrics["ppl"]
    assert both.examples[0].rank is not None


def test_a_reply_that_was_cut_has_no_end_to_be_scored(models):
    utterances = [Utterance(["do you like tea ?"], [reply]) for reply in ("tea " * 300, "yes .")]
    dialogues = {"valid": [Dialogue([], utterances)]}
    result = evaluate(models.ours, models.tokenizer, dialogues, metrics=["ppl"], batch_size=2)
    cut, whole = result.examples
    assert (cut.num_tokens, cut.eos_nll) == (192 - 3, 0)  # beside <bos>, <speaker1> and <eos>
    assert 0 < whole.eos_nll < whole.nll
    nll = cut.nll + whole.nll - whole.eos_nll
    without = math.exp(nll / (cut.num_tokens + whole.num_tokens - 1))
    assert result.metrics["ppl_without_eos"] == pytest.approx(without)
    [tokens] = encode(models.tokenizer, ["tea " * 300])
    instance = build_input_from_segments([], [], tokens[: 192 - 3], models.tokenizer)
    with torch.no_grad():
        logits = models.theirs(
            input_ids=torch.tensor([[instance["input_ids"]]]),
            token_type_ids=torch.tensor([[instance["token_type_ids"]]]),
            mc_token_ids=torch.tensor([[191]]),
        ).logits[0, 0]
    log_probs = logits.log_softmax(-1)[1:-2].gather(1, torch.tensor(tokens[:189])[:, None])
    assert cut.nll == pytest.approx(-log_probs.sum().item(), rel=1e-4)


def test_figures_of_replies_are_those_of_the_replies(models, dialogues):
    params = SamplingParams(max_length=12, seed=3)
    result = evaluate(
        models.ours,
        models.tokenizer,
        dialogues,
        metrics=["f1", "bleu", "distinct"],
        sampling=params,
        max_examples=7,
    )
    replies = [example.reply for example in result.examples]
    expected = [example.expected for example in result.examples]
    assert len(set(replies)) == 7
    f1s = [f1(*pair) for pair in zip(replies, ([e] for e in expected), strict=True)]
    assert result.metrics["f1"] == pytest.approx(sum(f1s) / 7)
    assert [example.f1 for example in result.examples] == f1s
    assert (result.metrics["bleu"], result.bleu_signature) == bleu(replies, expected)
    assert result.metrics["distinct_2"] == distinct(replies, 2)
    assert result.metrics["mean_length"] == mean_length(replies)
    assert result.metrics.keys().isdisjoint({"hits@1", "ppl", "word_ppl"})


def test_no_spaces_are_tidied_away(models, dialogues, monkeypatch):
    def run():
        result = evaluate(models.ours, models.tokenizer, dialogues, metrics=["f1"])
        return [example.reply for example in result.examples]

    replies = run()
    assert any(f" {mark}" in reply for reply in replies for mark in ".,!?'")
    monkeypatch.setattr(models.tokenizer, "clean_up_tokenization_spaces", True)
    assert run() == replies


def test_max_examples_are_spread_over_the_split(models, dialogues):
    result = evaluate(models.ours, models.tokenizer, dialogues, metrics=["ppl"], max_examples=3)
    count = sum(len(dialogue.utterances) for dialogue in dialogues["valid"])
    every = evaluate(models.ours, models.tokenizer, dialogues, metrics=["ppl"]).examples
    assert [e.id for e in result.examples] == [every[i * count // 3].id for i in range(3)]
    chosen = [every[i * count // 3].nll for i in range(3)]
    assert [e.nll for e in result.examples] == pytest.approx(chosen, rel=1e-5)


def test_every_metric_has_a_figure(models, dialogues):
    result = evaluate(models.ours, models.tokenizer, dialogues, max_examples=4, metrics=METRICS)
    assert "ExampleResult" not in repr(result)
    assert list(result.metrics) == [
        "hits@1",
        "ppl",
        "ppl_without_eos",
        "word_ppl",
        "f1",
        "bleu",
        "distinct_1",
        "distinct_2",
        "mean_length",
    ]


@pytest.mark.parametrize("name", ["hits", "hits@0", "hits@", "hits@1.5", "F1", ""])
def test_what_is_no_metric_is_named(models, dialogues, name):
    with pytest.raises(UserError, match=f"there is no metric '{name}'"):
        evaluate(models.ours, models.tokenizer, dialogues, metrics=["ppl", name])


def test_an_empty_split_is_an_error(models, dialogues):
    with pytest.raises(UserError, match="valid split has no turn"):
        evaluate(models.ours, models.tokenizer, {**dialogues, "valid": []}, metrics=["ppl"])


def test_weights_that_are_no_numbers_are_no_perfect_model(models, dialogues):
    model = copy.deepcopy(models.ours)
    with torch.no_grad():
        model.transformer.token_embedding.weight.fill_(math.nan)
    for metric in ("hits@1", "ppl", "word_ppl"):
        with pytest.raises(UserError, match="scores of valid/0/0 are no numbers"):
            evaluate(model, models.tokenizer, dialogues, metrics=[metric])


def test_perplexity_of_nothing_and_of_the_impossible():
    assert math.isnan(perplexity(0.0, 0))
    assert math.isnan(perplexity(math.nan, 1))
    assert perplexity(1e9, 1) == math.inf
    assert perplexity(math.log(8) * 3, 3) == pytest.approx(8)
