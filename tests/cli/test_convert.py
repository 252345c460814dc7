"""`convai-fast convert`: what it writes, what it says, and that it writes nothing otherwise."""

import json
import os

import pytest
import torch
import transformers

from convai_fast.cli.main import main
from convai_fast.dialogue.format import SPECIAL_TOKENS
from convai_fast.dialogue.tokenizer import load_tokenizer, special_ids
from convai_fast.errors import UserError
from convai_fast.loading import load
from convai_fast.model import DoubleHeadsModel
from tests.helpers.model_peers import make_peer
from tests.helpers.old_checkpoints import (
    ARCHITECTURES,
    LAYOUTS,
    SPECIAL,
    pack,
    write_old_checkpoint,
)


@pytest.fixture
def old(tmp_path):
    """A GPT of pytorch-pretrained-bert."""
    write_old_checkpoint(tmp_path / "old", LAYOUTS[0], "openai-gpt")
    return tmp_path / "old"


def convert(old, new):
    return main(["convert", "--model", str(old), "--output", str(new)])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_own_classes_load_what_was_converted(tmp_path, layout, architecture):
    expected = write_old_checkpoint(tmp_path / "old", layout, architecture)
    assert convert(tmp_path / "old", tmp_path / "new") == 0
    peer, report = type(expected).from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(report.values()), report
    for name, weight in expected.state_dict().items():
        assert torch.equal(peer.state_dict()[name], weight), name

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    size = len(tokenizer) - len(SPECIAL_TOKENS)
    assert tokenizer.convert_tokens_to_ids(SPECIAL[layout]) == list(range(size, size + 5))
    assert tokenizer.bos_token_id == special_ids(load_tokenizer(tmp_path / "old")).bos
    assert tokenizer("the cat").input_ids == load_tokenizer(tmp_path / "old")("the cat").input_ids


def test_rows_of_no_token_are_dropped_where_a_family_has_such_rows(tokenizer, tmp_path, capsys):
    peer = make_peer("llama-3.1", vocab_size=len(tokenizer) + 7)
    peer.save_pretrained(tmp_path / "old")
    tokenizer.save_pretrained(tmp_path / "old")
    assert convert(tmp_path / "old", tmp_path / "new") == 0
    unused = "model.embed_tokens.weight: the last 7 rows, which belong to no token"
    assert f"dropped         {unused}\n" in capsys.readouterr().out
    told = []
    for folder in ("old", "new"):
        model, _ = load(tmp_path / folder, resize=True, report=told.append)
        weights = (model.lm_head, model.transformer.token_embedding.weight)
        for ours, name in zip(weights, ("lm_head", "model.embed_tokens"), strict=True):
            theirs = peer.get_parameter(f"{name}.weight")
            assert torch.equal(ours, theirs[: len(tokenizer)])
    assert told == ["embedding: 7 rows of no token dropped"]


def test_a_model_with_segments_is_compared_with_them(tokenizer, tmp_path):
    peer = make_peer("llama-3.1", vocab_size=len(tokenizer), speaker_segments=True)
    peer.save_pretrained(tmp_path / "old")
    tokenizer.save_pretrained(tmp_path / "old")
    assert convert(tmp_path / "old", tmp_path / "new") == 0
    assert DoubleHeadsModel.from_pretrained(tmp_path / "new").config.segments


def test_the_report_accounts_for_everything(old, tmp_path, capsys):
    (old / "model_training_args.bin").write_bytes(b"")
    pack(old, tmp_path / "old.tar.gz")
    assert convert(tmp_path / "old.tar.gz", tmp_path / "new") == 0
    *lines, checked, written = capsys.readouterr().out.splitlines()
    assert lines == [
        "read            layout of pytorch-pretrained-bert 0.6: openai-gpt, 2 layers of width 8, "
        "32 positions",
        "mapped          28 tensors, 2 renamed",
        "                multiple_choice_head.linear.weight -> multiple_choice_head.summary.weight",
        "                multiple_choice_head.linear.bias -> multiple_choice_head.summary.bias",
        "dropped         transformer.h.N.attn.bias: the causal mask, which is computed (2 layers)",
        "dropped         lm_head.decoder.weight: the token embedding once more, to which the head "
        "is tied",
        "added           nothing",
        "ignored         run/model_training_args.bin",
        "tokens          60, as many as the embedding has rows",
        "special tokens  <bos> 55, <eos> 56, <speaker1> 57, <speaker2> 58, <pad> 59",
    ]
    assert checked.startswith("checked         logits differ from those of the source by ")
    assert written == f"written         {tmp_path / 'new'}"


def test_a_plain_language_model_is_converted_without_special_tokens(tmp_path, capsys):
    write_old_checkpoint(tmp_path / "old", LAYOUTS[0], "gpt2", plain=True)
    assert convert(tmp_path / "old", tmp_path / "new") == 0
    printed = capsys.readouterr().out
    assert "added           a multiple-choice head with random weights" in printed
    assert "special tokens  none" in printed
    assert "<bos>, <eos>, <speaker1>, <speaker2>, <pad> will be added by `train`" in printed
    model = DoubleHeadsModel.from_pretrained(tmp_path / "new")
    assert model.config.vocab_size == 259
    assert model.head_is_new
    with pytest.raises(UserError, match=r"lacks <bos>, <eos>, <speaker1>, .*: fine-tune"):
        load(str(tmp_path / "new"))


def test_todays_layout_has_nothing_to_rename(old, tmp_path, capsys):
    assert convert(old, tmp_path / "new") == 0
    assert convert(tmp_path / "new", tmp_path / "again") == 0
    printed = capsys.readouterr().out
    assert "read            layout of transformers: openai-gpt" in printed
    assert "mapped          28 tensors, none renamed" in printed
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_fail_the_check(old, tmp_path, capsys, value):
    tensors = torch.load(old / "pytorch_model.bin")
    tensors["transformer.h.0.ln_1.bias"][0] = value
    torch.save(tensors, old / "pytorch_model.bin")
    assert convert(old, tmp_path / "new") == 2
    assert "differ by nan from those of the source" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["old"]


def test_a_model_that_computes_something_else_fails_the_check(old, tmp_path, capsys, monkeypatch):
    forward = DoubleHeadsModel.forward

    def wrong(self, **inputs):
        output = forward(self, **inputs)
        output.mc_logits = output.mc_logits * 1.001
        return output

    monkeypatch.setattr(DoubleHeadsModel, "forward", wrong)
    assert convert(old, tmp_path / "new") == 2
    assert "nothing was written" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["old"]


def test_an_embedding_that_does_not_fit_the_tokenizer_is_refused(old, tmp_path, capsys):
    (old / "special_tokens.txt").unlink()
    assert convert(old, tmp_path / "new") == 2
    assert (
        "old has embeddings for 60 tokens, but its tokenizer has 55: restore"
        in capsys.readouterr().err
    )
    assert os.listdir(tmp_path) == ["old"]


def test_special_tokens_that_no_file_names_are_not_guessed(old):
    assert load(str(old))[0].config.vocab_size == 60
    (old / "special_tokens.txt").unlink()
    with pytest.raises(UserError, match="embeddings for 60 tokens, but its tokenizer has 55"):
        load(str(old))


def test_a_folder_that_is_not_empty_is_not_touched(old, tmp_path, capsys):
    new = tmp_path / "new"
    new.mkdir()
    assert convert(old, new) == 0
    files = {file.name: file.read_bytes() for file in new.iterdir()}
    assert convert(old, new) == 2
    assert "new is there already" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in new.iterdir()} == files


def test_folders_above_the_new_one_are_made(old, tmp_path):
    assert convert(old, tmp_path / "a" / "b") == 0
    assert "model.safetensors" in os.listdir(tmp_path / "a" / "b")


def test_a_place_that_cannot_be_written_is_named(old, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert convert(old, tmp_path / "file" / "new") == 2
    assert "file/new cannot be written" in capsys.readouterr().err


def test_an_adapter_that_names_no_base_is_one_sentence(old, tmp_path, capsys):
    (old / "adapter_config.json").write_text("{}")
    assert convert(old, tmp_path / "new") == 2
    assert "names no base_model_name_or_path: add it" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["old"]


def test_a_hub_id_is_downloaded_with_its_tokenizer(old, tmp_path, monkeypatch):
    asked = []

    def download(repo_id, allow_patterns):
        asked.extend(allow_patterns)
        return str(old)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert convert("someone/old-model", tmp_path / "new") == 0
    assert {"config.json", "vocab.json", "merges.txt", "special_tokens.txt"} <= set(asked)
    assert json.loads((tmp_path / "new" / "config.json").read_text())["vocab_size"] == 60
