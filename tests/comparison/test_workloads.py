"""The same work in both ways: what a figure compares."""

import pytest
import torch
import transformers

from convai_fast.comparison import plain
from convai_fast.comparison.workloads import Comparison
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.dialogue.tokenizer import load_tokenizer, special_ids
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Request
from convai_fast.loading import load
from tests.helpers.bulk_files import save_model
from tests.helpers.model_peers import make_peer
from tests.helpers.reply_peers import both_models
from tests.helpers.small_tokenizers import save_model_of_letters


@pytest.fixture(scope="module", params=["gpt2", "openai-gpt", "qwen3"])
def comparison(request, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "gpt2":
        save_model(folder, tokenizer)
    elif request.param == "openai-gpt":
        save_model_of_letters(folder)
    else:
        settings = dict(
            vocab_size=len(tokenizer), max_position_embeddings=64, speaker_segments=True
        )
        make_peer(request.param, **settings).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    dialogues = builtin_dialogues(num_train=1, num_valid=0)["train"]
    model, own = load(folder)
    return Comparison(model, own, dialogues, max_history=1, precision="fp32", seconds=0)


def test_every_workload_runs_both_ways_and_leaves_the_weights_as_they_are(
    comparison, no_measured_speed
):
    before = {name: weight.clone() for name, weight in comparison.model.state_dict().items()}
    names = []
    for workload in comparison.workloads():
        names.append(workload.name)
        ours, theirs = workload.ours.run(1), workload.theirs.run(1)
        if workload.name.startswith("ranking"):
            assert ours == pytest.approx(theirs, abs=1e-4)
            assert len(ours) == 20
        if workload.name.startswith("repl"):
            has_cache = comparison.model.config.family != "openai-gpt"
            assert (workload.ours.amount == workload.theirs.amount) == has_cache
            assert ("has no cache" in workload.note) == (not has_cache)
    count = min(32, len(comparison.turns))
    assert names[:2] == [f"replies to {count} prompts", "reply to one prompt"]
    assert names[2:] == ["ranking 20 candidates", "training step"]
    after = comparison.model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_transformers_writes_the_same_greedy_replies(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ours = both_models("gpt2", tmp_path, len(tokenizer)).ours
    writer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    params = SamplingParams(max_length=8, min_length=8, no_sample=True)
    prompts, own = [[5, 6, 7], [9, 10, 11, 12, 13]], special_ids(tokenizer).speaker1
    segments = [[1, 2, own], [1, 1, 2, 2, own]]
    requests = [
        Request(input_ids=ids, token_type_ids=types, params=params)
        for ids, types in zip(prompts, segments, strict=True)
    ]
    replies = GenerationEngine(ours, tokenizer).generate(requests)
    theirs = plain.generate(writer, prompts, 8, segments=segments)
    assert [reply.token_ids for [reply] in replies] == theirs
