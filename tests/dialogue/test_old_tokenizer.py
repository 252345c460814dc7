"""Tokenizers of the old libraries: ids come from their own files, or there is no tokenizer."""

import json

import pytest
from transformers import GPT2Tokenizer, OpenAIGPTTokenizer

from convai_fast.dialogue.tokenizer import load_tokenizer, read_tokenizer, special_ids
from convai_fast.errors import UserError
from tests.helpers.old_checkpoints import SPECIAL, write_old_checkpoint

GPT2_SIZE = 259


@pytest.fixture
def folder(tmp_path):
    write_old_checkpoint(tmp_path / "old", "pytorch-transformers", "gpt2")
    return tmp_path / "old"


@pytest.mark.parametrize(
    ("name", "its_class"), [("openai-gpt", OpenAIGPTTokenizer), ("gpt2", GPT2Tokenizer)]
)
def test_text_has_the_ids_of_transformers_own_class(shared_dir, name, its_class):
    path = shared_dir / "tokenizers" / name
    ours, theirs = read_tokenizer(path), its_class.from_pretrained(path)
    text = "Hello  there, I don't — “really” — like café 😀 !"
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)
    assert ours.get_vocab() == theirs.get_vocab()


def test_tokens_beside_the_five_keep_their_ids(folder):
    ids = {
        "<mood>": 264,
        **{t: GPT2_SIZE + i for i, t in enumerate(SPECIAL["pytorch-transformers"])},
    }
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.convert_tokens_to_ids("<mood>") == 264
    assert len(tokenizer) == 265


def test_a_token_of_the_vocabulary_may_be_named_again(folder):
    ids = json.loads((folder / "added_tokens.json").read_text()) | {"<|endoftext|>": GPT2_SIZE - 1}
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    assert special_ids(load_tokenizer(folder)).bos == ids["<bos>"]


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        ({"<bos>": 0}, "must number its tokens from 259 on"),
        ({"<bos>": 259, "<eos>": 261}, "must number its tokens from 259 on"),
        ({"<bos>": 259, "<eos>": 259}, "must number its tokens from 259 on"),
        ({"<bos>": True}, "the id of '<bos>' must be a whole number, not True"),
        ({"!": 259}, "gives '!' the id 259, but vocab.json 0"),
        ({"": 259}, "has other ids than they say"),
        ({"<bos>": 259, "<pad>": 260}, "the ids of <bos>, <pad> but not of <eos>, <speaker1>,"),
    ],
)
def test_ids_that_contradict_each_other_are_refused(folder, ids, sentence):
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    with pytest.raises(UserError, match=sentence):
        load_tokenizer(folder)


def test_two_files_of_special_tokens_are_refused(folder):
    (folder / "special_tokens.txt").write_text("<bos>\n")
    with pytest.raises(UserError, match=r"both special_tokens.txt and added_tokens.json"):
        load_tokenizer(folder)


def test_a_special_token_on_two_lines_is_refused(folder):
    (folder / "added_tokens.json").unlink()
    (folder / "special_tokens.txt").write_text("<bos>\n<eos>\n<bos>\n")
    with pytest.raises(UserError, match=r"special_tokens.txt names a token twice"):
        load_tokenizer(folder)


def test_a_vocabulary_that_shifts_the_special_tokens_is_refused(folder):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    del vocabulary["<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(UserError, match="must number its tokens from 258 on"):
        load_tokenizer(folder)
    ids = json.loads((folder / "added_tokens.json").read_text())
    (folder / "added_tokens.json").write_text(json.dumps({t: i - 1 for t, i in ids.items()}))
    with pytest.raises(UserError, match=r"vocab.json lacks <\|endoftext\|>"):
        load_tokenizer(folder)


def test_a_vocabulary_trained_by_itself_gets_the_unknown_token_of_its_class(folder):
    (folder / "added_tokens.json").unlink()
    vocabulary = json.loads((folder / "vocab.json").read_text())
    del vocabulary["<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 258
    assert special_ids(tokenizer).bos == 259
