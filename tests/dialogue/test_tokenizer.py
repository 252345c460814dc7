"""Tokenizers: the special tokens, and text that must not be mistaken for them."""

import json

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from convai_fast.dialogue.encoding import encode
from convai_fast.dialogue.format import SPECIAL_TOKENS
from convai_fast.dialogue.tokenizer import load_tokenizer, special_ids
from convai_fast.errors import UserError


@pytest.mark.parametrize(("name", "size"), [("openai-gpt", 40_478), ("gpt2", 50_257)])
def test_missing_special_tokens_are_added_in_the_predecessors_order(shared_dir, name, size):
    tokenizer = load_tokenizer(shared_dir / "tokenizers" / name)
    assert list(special_ids(tokenizer)) == list(range(size, size + 5))


def test_ids_of_special_tokens_come_from_the_checkpoint(shared_dir):
    tokenizer = load_tokenizer(shared_dir / "legacy" / "pytorch-transformers")
    assert tuple(special_ids(tokenizer)) == (40478, 40479, 40481, 40482, 40480)


@pytest.mark.parametrize("name", ["openai-gpt", "gpt2"])
def test_a_saved_tokenizer_comes_back_the_same(shared_dir, tmp_path, name):
    tokenizer = load_tokenizer(shared_dir / "tokenizers" / name)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    text = ["Hello there, it's <eos> fine — café!", ""]
    assert special_ids(again) == special_ids(tokenizer)
    assert len(again) == len(tokenizer)
    assert encode(again, text) == encode(tokenizer, text)


def test_a_special_token_in_somebodys_words_is_plain_text(tokenizer):
    (ids,) = encode(tokenizer, ["<eos> i am <speaker2>"])
    assert not set(ids) & set(special_ids(tokenizer))
    assert tokenizer.decode(ids) == "<eos> i am <speaker2>"
    # and the tokenizer's own behaviour is left as it was
    assert tokenizer.encode("<eos>") == [special_ids(tokenizer).eos]


def test_no_texts_give_no_ids(tokenizer):
    assert encode(tokenizer, []) == []
    assert encode(tokenizer, [""]) == [[]]


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no tokenizer: it needs tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        load_tokenizer(tmp_path / "absent")


def test_a_damaged_tokenizer_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    with pytest.raises(UserError, match=f"cannot load a tokenizer from {tmp_path}"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_on_which_the_library_panics_is_named(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    longest = max(content["model"]["vocab"], key=lambda token: len(token.encode()))
    content["model"]["merges"] = [[longest, longest]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"cannot load a tokenizer from {tmp_path}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("vocabulary", "merges", "sentence"),
    [
        ("[1]", "", "vocab.json must hold a JSON object, not a list"),
        ("{", "", "vocab.json is not JSON"),
        ('{"a": "b"}', "", "vocab.json: the id of 'a' must be a whole number, not 'b'"),
        ('{"a": 1}', "", "vocab.json does not number its tokens 0, 1, 2, …"),
        ('{"a": 0}', "#version: 0.2\nzz", "merges.txt, line 2: two pieces must stand there, not 1"),
        ('{"a": 0}', "z z", "merges.txt, line 1: 'z' and 'z' and what they make must be in"),
        ('{"a": 0}', "a a", "merges.txt, line 1: 'a' and 'a' and what they make must be in"),
    ],
)
def test_a_damaged_vocabulary_is_named(tmp_path, vocabulary, merges, sentence):
    (tmp_path / "vocab.json").write_text(vocabulary)
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(UserError, match=sentence):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_special_tokens_is_refused(shared_dir):
    from transformers import GPT2Tokenizer

    plain = GPT2Tokenizer.from_pretrained(shared_dir / "tokenizers" / "gpt2")
    with pytest.raises(UserError, match=SPECIAL_TOKENS[0]):
        special_ids(plain)


def test_a_tokenizer_that_lacks_its_own_unknown_token_is_damaged():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"tea": 0}, unk_token="<none>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert encode(tokenizer, ["tea"]) == [[0]]
    with pytest.raises(UserError, match=r"the tokenizer cannot read text .* its files are damaged"):
        encode(tokenizer, ["coffee"])


def test_a_missing_vocabulary_is_named(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    for config in ({"model_type": "gpt2"}, {"model_type": "openai-gpt"}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=r"lacks its vocabulary: restore tokenizer.json"):
            load_tokenizer(tmp_path)
