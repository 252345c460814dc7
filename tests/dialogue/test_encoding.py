"""Text into token ids, whatever the tokenizer was used for before."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import AutoTokenizer

from convai_fast.dialogue.encoding import encode, encode_in, tokenizer_fingerprint
from convai_fast.dialogue.format import SPECIAL_TOKENS
from convai_fast.dialogue.layout import Surroundings
from convai_fast.dialogue.tokenizer import load_tokenizer
from convai_fast.errors import UserError

TEXTS = ["hello , what is your favourite drink ? i like tea and cocoa .", "hi"]


def test_truncation_and_padding_of_an_earlier_use_change_nothing(tokenizer, tmp_path):
    expected, fingerprint = encode(tokenizer, TEXTS), tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    used = AutoTokenizer.from_pretrained(tmp_path)
    used(TEXTS, truncation=True, max_length=6, padding=True)
    assert encode(used, TEXTS) == expected
    used.save_pretrained(tmp_path)
    assert "max_length" in (tmp_path / "tokenizer.json").read_text()
    loaded = load_tokenizer(tmp_path)
    assert encode(loaded, TEXTS) == expected
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(used) == fingerprint
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] is None


def test_dropout_of_the_file_is_off(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert encode(load_tokenizer(tmp_path), TEXTS) == encode(tokenizer, TEXTS)


def test_tokens_added_since_are_known(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    own = AutoTokenizer.from_pretrained(tmp_path)
    encode(own, TEXTS)
    own.add_tokens(["cocoa"])
    assert own.convert_tokens_to_ids("cocoa") in encode(own, TEXTS)[0]


def test_no_thread_makes_words_into_special_tokens(tokenizer):
    """Nor is the user's own tokenizer changed while we encode."""
    special = set(tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)))
    text = "say <eos> now <speaker1>"

    def work(_):
        ids = encode(tokenizer, [text] * 20)
        assert not tokenizer.backend_tokenizer.encode_special_tokens
        return not any(special & set(each) for each in ids)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))


def test_what_stands_around_a_text_changes_its_tokens(tokenizer):
    [joined] = encode(tokenizer, ["tea\n"])
    assert (
        encode_in(tokenizer, ["tea", " tea"], Surroundings(trailing="\n", trims=True))
        == [joined] * 2
    )
    [after_space] = encode(tokenizer, [" like"])
    assert encode_in(tokenizer, ["like"], Surroundings(before="i", leading=" ")) == [after_space]
    assert encode_in(tokenizer, ["ike"], Surroundings(before=" l")) == encode(tokenizer, ["ike"])
    assert encode_in(tokenizer, TEXTS, Surroundings()) == encode(tokenizer, TEXTS)


def test_half_a_character_is_named(tokenizer):
    with pytest.raises(UserError, match="half of a surrogate pair"):
        encode(tokenizer, ["fine", "broken \ud83d"])


def test_code_of_a_tokenizer_folder_never_runs(tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "Evil"
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    try:
        load_tokenizer(tmp_path)
    except UserError as error:
        assert "\n" not in str(error)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_without_a_fast_version_is_told(tmp_path):
    config = {"tokenizer_class": "CTRLTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "vocab.json").write_text(json.dumps({"<unk>": 0, "a</w>": 1}))
    (tmp_path / "merges.txt").write_text("#version\n")
    with pytest.raises(UserError, match=r"no fast version|cannot load a tokenizer"):
        load_tokenizer(tmp_path)
