"""Checkpoints: what transformers wrote is read, and what is written it reads."""

import json
import logging
import sys

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from convai_fast.errors import UserError
from convai_fast.model import DoubleHeadsModel, TransformerConfig
from tests.helpers.checkpoint_edits import as_bin, assert_same_weights, edit_weights
from tests.helpers.model_peers import PEERS, make_batch, make_peer


def test_weights_survive_a_round_trip_through_transformers(architecture, folder, tmp_path):
    model = DoubleHeadsModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "ours")
    peer, report = PEERS[architecture][1].from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values()), report
    assert_same_weights(peer, PEERS[architecture][1].from_pretrained(folder))

    peer.save_pretrained(tmp_path / "back")
    back = DoubleHeadsModel.from_pretrained(tmp_path / "back")
    assert_same_weights(back, model)
    assert back.config == model.config


def test_a_model_is_read_without_the_compiler_of_torch(folder, monkeypatch):
    # To import it takes a second, and a command that reads a model needs two.
    for name in ("torch._dynamo", "torch.fx.experimental.symbolic_shapes"):
        monkeypatch.setitem(sys.modules, name, None)
    assert DoubleHeadsModel.from_pretrained(folder)


def test_transformers_loads_what_we_save_without_a_warning(architecture, folder, tmp_path, caplog):
    DoubleHeadsModel.from_pretrained(folder).save_pretrained(tmp_path / "ours")
    transformers.utils.logging.warning_once.cache_clear()
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            peer = PEERS[architecture][1].from_pretrained(tmp_path / "ours")
    finally:
        transformers.utils.logging.disable_propagation()
    assert not caplog.records
    assert peer.dtype == torch.float32
    inputs = make_batch(101).inputs
    model = DoubleHeadsModel.from_pretrained(folder)
    torch.testing.assert_close(model(**inputs).loss, peer(**inputs).loss)


def test_a_new_model_is_saved_and_loaded(architecture, tmp_path):
    shape = dict(vocab_size=101, n_embd=32, n_layer=2, n_head=4)
    config = TransformerConfig.from_transformers({"model_type": architecture, **shape})
    model = DoubleHeadsModel(config)
    model.save_pretrained(tmp_path / "new" / "nested")
    saved = DoubleHeadsModel.from_pretrained(tmp_path / "new" / "nested")
    assert_same_weights(saved, model)
    assert saved.config == config


def test_a_head_that_nobody_has_trained_is_new_when_it_is_loaded_again(architecture, tmp_path):
    shape = dict(vocab_size=101, n_embd=32, n_layer=2, n_head=4)
    config = TransformerConfig.from_transformers({"model_type": architecture, **shape})
    model = DoubleHeadsModel(config)
    assert model.head_is_new
    model.save_pretrained(tmp_path / "new")
    again = DoubleHeadsModel.from_pretrained(tmp_path / "new")
    assert again.head_is_new
    again.save_pretrained(tmp_path / "again")
    assert DoubleHeadsModel.from_pretrained(tmp_path / "again").head_is_new
    again.head_is_new = False
    again.save_pretrained(tmp_path / "again")
    assert not DoubleHeadsModel.from_pretrained(tmp_path / "again").head_is_new


def test_a_new_head_that_transformers_has_saved_counts_as_trained(architecture, tmp_path):
    # It may have trained it: who loads a model there does not know what is remembered here.
    shape = dict(vocab_size=101, n_embd=32, n_layer=2, n_head=4)
    config = TransformerConfig.from_transformers({"model_type": architecture, **shape})
    DoubleHeadsModel(config).save_pretrained(tmp_path / "new")
    peer, report = PEERS[architecture][1].from_pretrained(
        tmp_path / "new", output_loading_info=True
    )
    assert not any(report.values()), report
    peer.save_pretrained(tmp_path / "theirs")
    assert not DoubleHeadsModel.from_pretrained(tmp_path / "theirs").head_is_new


def test_a_loaded_model_is_in_eval_mode_and_trainable(folder):
    model = DoubleHeadsModel.from_pretrained(folder)
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_saving_over_the_folder_that_was_loaded_leaves_only_complete_files(folder):
    model = DoubleHeadsModel.from_pretrained(folder)
    with torch.no_grad():
        model.multiple_choice_head.bias.add_(1)
    files = set(folder.iterdir())
    model.save_pretrained(folder)
    assert set(folder.iterdir()) == files
    assert_same_weights(DoubleHeadsModel.from_pretrained(folder), model)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def make_tokenizer(size):
    words = ["<bos>", "<eos>", "<pad>", *(f"w{i}" for i in range(size - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def test_a_tokenizer_saved_along_is_loaded_by_transformers(architecture, folder, tmp_path):
    model = DoubleHeadsModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "ours", make_tokenizer(101))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer("w5 <eos> w7").input_ids == [8, 1, 10]
    config = PEERS[architecture][1].from_pretrained(tmp_path / "ours").config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 2)


def test_a_tokenizer_larger_than_the_embedding_is_not_saved(folder, tmp_path):
    model = DoubleHeadsModel.from_pretrained(folder)
    with pytest.raises(UserError, match="102 tokens but the model only 101"):
        model.save_pretrained(tmp_path / "ours", make_tokenizer(102))
    assert not (tmp_path / "ours").exists()


def test_a_folder_that_cannot_be_written_is_named(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be saved in .*file"):
        DoubleHeadsModel.from_pretrained(folder).save_pretrained(tmp_path / "file")


def test_shards_are_read(architecture, tmp_path):
    peer = make_peer(architecture)
    peer.save_pretrained(tmp_path / "one")
    peer.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert_same_weights(
        DoubleHeadsModel.from_pretrained(tmp_path / "many"),
        DoubleHeadsModel.from_pretrained(tmp_path / "one"),
    )


def test_a_bin_file_is_read_with_the_constants_of_older_versions(architecture, folder):
    expected = DoubleHeadsModel.from_pretrained(folder)
    tensors = dict(make_peer(architecture).state_dict())  # holds the tied weight twice
    tensors["transformer.h.0.attn.bias"] = torch.ones(48, 48, dtype=torch.uint8).tril()[None, None]
    tensors["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["transformer.position_ids"] = torch.arange(48)
    as_bin(folder, tensors)
    assert_same_weights(DoubleHeadsModel.from_pretrained(folder), expected)


def test_bin_shards_are_read(gpt2_folder):
    expected = DoubleHeadsModel.from_pretrained(gpt2_folder)
    tensors = load_file(gpt2_folder / "model.safetensors")
    (gpt2_folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.bin": names[:10], "b.bin": names[10:]}
    for file, part in halves.items():
        torch.save({name: tensors[name] for name in part}, gpt2_folder / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    index = gpt2_folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_same_weights(DoubleHeadsModel.from_pretrained(gpt2_folder), expected)


def test_a_body_without_heads_and_prefix_gets_a_new_head_and_a_warning(
    architecture, folder, caplog
):
    expected = DoubleHeadsModel.from_pretrained(folder)

    def strip(tensors):
        tensors = {k: v for k, v in tensors.items() if not k.startswith("multiple_choice_head")}
        if "lm_head.weight" in tensors:
            tensors["transformer.tokens_embed.weight"] = tensors.pop("lm_head.weight")
        return {name.removeprefix("transformer."): v for name, v in tensors.items()}

    edit_weights(folder, strip)
    with caplog.at_level(logging.WARNING):
        model = DoubleHeadsModel.from_pretrained(folder)
    assert "has no multiple-choice head" in caplog.text
    assert model.head_is_new and not expected.head_is_new
    assert_same_weights(model.transformer, expected.transformer)
    assert (model.multiple_choice_head.bias == 0).all()
    assert 0.005 < model.multiple_choice_head.weight.std() < 0.05


def test_a_language_model_that_transformers_saved_is_read(tmp_path, caplog):
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2))
    peer.save_pretrained(tmp_path)
    model = DoubleHeadsModel.from_pretrained(tmp_path)
    input_ids = torch.arange(9).view(1, 9)
    torch.testing.assert_close(model(input_ids).logits, peer.eval()(input_ids).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_read_to_float32(gpt2_folder, dtype):
    exact = DoubleHeadsModel.from_pretrained(gpt2_folder)
    edit_weights(gpt2_folder, lambda tensors: {k: v.to(dtype) for k, v in tensors.items()})
    model = DoubleHeadsModel.from_pretrained(gpt2_folder)
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, exact.state_dict()[name].to(dtype).float())


def test_a_model_can_be_loaded_and_saved_in_another_dtype(architecture, folder, tmp_path):
    model = DoubleHeadsModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.state_dict().values()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "half")
    assert PEERS[architecture][1].from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_a_hub_id_downloads_only_what_is_needed(gpt2_folder, monkeypatch):
    as_bin(gpt2_folder)
    asked = []

    def download(repo_id, allow_patterns):
        asked.append((repo_id, allow_patterns))
        return str(gpt2_folder if len(asked) == 2 else gpt2_folder.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    DoubleHeadsModel.from_pretrained("someone/some-model")
    assert [repo_id for repo_id, _ in asked] == ["someone/some-model"] * 2
    assert "model.safetensors" in asked[0][1]
    assert "pytorch_model.bin" not in asked[0][1]
    assert "pytorch_model.bin" in asked[1][1]
