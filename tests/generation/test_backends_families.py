"""Replies of models with rotary positions, which every backend turns queries and keys by."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from convai_fast.dialogue.tokenizer import special_ids
from convai_fast.generation.backends import CpuBackend, CudaBackend, TorchBackend
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.scheduler import Step
from convai_fast.model import DoubleHeadsModel
from tests.helpers.model_peers import ROTARY, make_peer
from tests.helpers.reply_peers import prompt_of

GREEDY = SamplingParams(no_sample=True, max_length=8, min_length=4)


@pytest.mark.parametrize("name", ROTARY)
def test_greedy_replies_are_those_of_transformers_generate(
    name, tokenizer, ask, tmp_path, monkeypatch
):
    shape = dict(vocab_size=len(tokenizer), max_position_embeddings=400)
    if name == "mistral":
        shape |= dict(sliding_window=400)
    peer = make_peer(name, noise=0.2, **shape)
    peer.save_pretrained(tmp_path)
    model, special = DoubleHeadsModel.from_pretrained(tmp_path), special_ids(tokenizer)
    causal = AutoModelForCausalLM.from_pretrained(tmp_path)

    def generate(request):
        input_ids = torch.tensor([prompt_of(request, tokenizer, 400)[0]])
        ids = causal.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            max_new_tokens=GREEDY.max_length,
            min_new_tokens=GREEDY.min_length,
            eos_token_id=list(special),
            pad_token_id=special.pad,
        )
        reply = ids[0, input_ids.shape[1] :].tolist()
        return reply[:-1] if reply[-1] in special else reply

    requests = [ask(number, GREEDY, turns=3 + 2 * number) for number in range(3)]
    expected = [generate(request) for request in requests]
    assert len({tuple(reply) for reply in expected}) > 1
    for kind in (CpuBackend, CudaBackend, TorchBackend):
        monkeypatch.setattr("convai_fast.generation.engine.make_backend", kind)
        engine = GenerationEngine(model, tokenizer, max_batch_size=3, weights="float32")
        replies = [reply.token_ids for [reply] in engine.generate(requests)]
        assert replies == expected, kind


@torch.inference_mode()
def test_far_positions_are_turned_as_in_the_model(tmp_path):
    make_peer("llama-3.1", max_position_embeddings=2400).save_pretrained(tmp_path)
    model = DoubleHeadsModel.from_pretrained(tmp_path)
    ids = torch.randint(0, 101, (2400,), generator=torch.Generator().manual_seed(0)).numpy()
    backend, hidden = CpuBackend(model, 1, "float32"), None
    backend.allocate(2400)
    for begin, end in ((0, 2390), (2390, 2400)):
        places = np.zeros(1, np.int64), np.array([begin]), np.array([0, end - begin])
        hidden = backend.forward(Step([], [], *places, ids[begin:end], ids[begin:end]))
    expected = model(torch.from_numpy(ids)[None]).logits[:, -1]
    torch.testing.assert_close(backend.logits(hidden), expected, rtol=1e-4, atol=1e-4)
