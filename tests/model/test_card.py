"""What the card of a chat model says; tests/test_publishing.py has what all cards say."""

import copy

import pytest

from convai_fast import GenerationEngine, Request, SamplingParams, load
from convai_fast.loading import add_segments
from convai_fast.model.card import model_card
from tests.helpers.chat_tokenizers import chat_tokenizer
from tests.helpers.model_peers import make_peer


def saved(folder, name, family, segments=False):
    """A folder as it is saved here."""
    peer = make_peer(family, vocab_size=len(chat_tokenizer(name)), initializer_range=0.3)
    peer.save_pretrained(folder)
    tokenizer = copy.deepcopy(chat_tokenizer(name))
    tokenizer.save_pretrained(folder)
    model, tokenizer = load(folder)
    if segments:
        add_segments(model, tokenizer, str)
    model.save_pretrained(folder, tokenizer)
    return model, tokenizer


@pytest.mark.parametrize(
    ("name", "family"), [("smollm2", "llama"), ("qwen3", "qwen3"), ("mistral0.3", "mistral")]
)
def test_the_code_for_transformers_writes_the_reply_that_is_written_here(
    name, family, tmp_path, capsys
):
    model, tokenizer = saved(tmp_path, name, family)
    card = model_card(tmp_path)
    assert "the persona is the system message" in card
    code = card.split("In transformers:\n\n```python\n")[1].split("```")[0]
    exec(code.replace("OWNER/NAME", str(tmp_path)), {})
    params = SamplingParams(no_sample=True, min_length=0, max_length=40)
    asked = ["hello , what do you like ?"]
    request = Request(persona=["i like tea ."], history=asked, params=params)
    [[reply]] = GenerationEngine(model, tokenizer, weights="float32").generate([request])
    assert reply.token_ids
    assert capsys.readouterr().out.strip() == reply.text.strip()


def test_code_for_transformers_is_only_where_it_computes_the_same(tmp_path):
    saved(tmp_path / "a", "smollm2", "llama", segments=True)
    card = model_card(tmp_path / "a")
    assert "chat template" in card and "who speaks" in card and "In transformers" not in card
    saved(tmp_path / "b", "smollm2", "llama")
    (tmp_path / "b" / "chat_template.jinja").unlink()
    assert "chat template" not in model_card(tmp_path / "b")
