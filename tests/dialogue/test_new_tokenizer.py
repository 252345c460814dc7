"""A tokenizer trained on dialogues."""

import pytest
from transformers import AutoTokenizer

from convai_fast.data.builtin import builtin_dialogues
from convai_fast.dialogue.encoding import encode
from convai_fast.dialogue.format import SPECIAL_TOKENS
from convai_fast.dialogue.new_tokenizer import train_tokenizer
from convai_fast.dialogue.tokenizer import add_special_tokens, special_ids


@pytest.fixture(scope="module")
def splits():
    return builtin_dialogues(num_train=400, num_valid=100)


@pytest.fixture(scope="module")
def tokenizer(splits):
    return train_tokenizer(splits["train"])


def test_the_tokenizer_is_the_same_for_the_same_dialogues(splits, tokenizer):
    again = train_tokenizer(splits["train"])
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize(
    "text",
    ["i live in oslo", "hi, i am anna", "  Two  spaces. ", "naïve — 猫 🙂\n", "<eos> is text"],
)
def test_any_text_decodes_to_itself(tokenizer, text):
    [ids] = encode(tokenizer, [text])
    assert tokenizer.decode(ids) == text


def test_the_tokenizer_has_the_special_tokens_and_nothing_beyond_its_size(splits, tokenizer):
    assert len(set(special_ids(tokenizer))) == len(SPECIAL_TOKENS)
    assert add_special_tokens(tokenizer) == 0
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert named == ("<bos>", "<eos>", "<pad>")
    assert len(tokenizer) <= 1000
    small = train_tokenizer(splits["valid"], vocab_size=300)
    assert len(small) == 300 == max(small.get_vocab().values()) + 1


def test_a_vocabulary_without_room_for_the_bytes_is_refused(splits):
    with pytest.raises(ValueError, match="at least 261"):
        train_tokenizer(splits["valid"], vocab_size=100)


def test_autotokenizer_loads_what_was_saved(tokenizer, tmp_path, splits):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [text for d in splits["valid"][:20] for text in d.utterances[-1].history]
    assert encode(loaded, texts) == encode(tokenizer, texts)
    assert special_ids(loaded) == special_ids(tokenizer)
    assert len(loaded) == len(tokenizer)
