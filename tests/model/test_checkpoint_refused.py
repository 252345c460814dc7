"""Checkpoints that are damaged, hostile or of another model: refused, and named."""

import json
import pickle
import shlex

import pytest
import torch
from safetensors.torch import load_file

from convai_fast.errors import UserError
from convai_fast.model import DoubleHeadsModel
from tests.helpers.checkpoint_edits import as_bin, assert_same_weights, edit_config, edit_weights


class Explosive:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the checkpoint was executed')",))


def test_code_in_a_bin_file_is_not_executed(gpt2_folder):
    (gpt2_folder / "model.safetensors").unlink()
    for write in (
        lambda path: torch.save({"wte.weight": Explosive()}, path),
        lambda path: path.write_bytes(pickle.dumps(Explosive(), protocol=2)),
    ):
        write(gpt2_folder / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"pytorch_model.bin .*nothing in it was executed"):
            DoubleHeadsModel.from_pretrained(gpt2_folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kept_bytes", [0, 7, 3000])
def test_a_cut_off_file_is_named(gpt2_folder, name, kept_bytes):
    if name.endswith("bin"):
        as_bin(gpt2_folder)
    path = gpt2_folder / name
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(UserError, match=f"{name} cannot be read as weights: it is damaged"):
        DoubleHeadsModel.from_pretrained(gpt2_folder)


def test_a_bin_file_of_something_else_is_refused(gpt2_folder):
    for content in ([torch.zeros(1)], {"epoch": 3}, {3: torch.zeros(1)}):
        (gpt2_folder / "model.safetensors").unlink(missing_ok=True)
        torch.save(content, gpt2_folder / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"pytorch_model.bin is not a table of named tensors"):
            DoubleHeadsModel.from_pretrained(gpt2_folder)


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (
            lambda t: {f"module.{k}": v for k, v in t.items()},
            "the prefix `module.` of DataParallel",
        ),
        (lambda t: {"model_state_dict": t, "epoch": 2}, "its 'model_state_dict' holds one, so"),
        (lambda t: {"optimizer": {"a": torch.zeros(1)}, "model": t}, "its 'model' holds one, so"),
    ],
)
def test_a_bin_file_that_wraps_the_weights_says_how_to_unwrap_them(gpt2_folder, wrap, says):
    expected = DoubleHeadsModel.from_pretrained(gpt2_folder)
    tensors = load_file(gpt2_folder / "model.safetensors")
    as_bin(gpt2_folder, wrap(tensors))
    with pytest.raises(UserError, match=says) as raised:
        DoubleHeadsModel.from_pretrained(gpt2_folder)
    command = shlex.split(str(raised.value).partition("python -c ")[2])[0]
    exec(command, {})
    assert_same_weights(DoubleHeadsModel.from_pretrained(gpt2_folder), expected)


def test_an_adapter_without_its_config_is_told(gpt2_folder):
    (gpt2_folder / "model.safetensors").rename(gpt2_folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"adapter_model.safetensors needs the adapter_config.json"):
        DoubleHeadsModel.from_pretrained(gpt2_folder)


def drop(*names):
    def change(tensors):
        for name in names:
            del tensors[name]

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda t: t.update({"score.weight": torch.ones(1)}),
            "tensors that are unknown in transformers' layout of gpt2: score.weight;",
        ),
        (
            lambda t: t.update({"transformer.h.2.ln_1.bias": torch.ones(32)}),
            "unknown in transformers' layout of gpt2: transformer.h.2.ln_1.bias;",
        ),
        (
            drop("transformer.h.1.ln_1.bias", "transformer.wpe.weight"),
            "lacks tensors .*: transformer.h.1.ln_1.bias, transformer.wpe.weight;",
        ),
        (drop("transformer.wte.weight"), "lacks tensors .*: transformer.wte.weight;"),
        (
            drop("multiple_choice_head.summary.bias"),
            "lacks tensors .*: multiple_choice_head.summary.bias;",
        ),
        (
            lambda t: t.update({"transformer.h.0.mlp.c_fc.weight": torch.ones(128, 32)}),
            r"transformer.h.0.mlp.c_fc.weight has shape \(128, 32\), but .* asks for \(32, 128\)",
        ),
        (
            lambda t: t.update({"transformer.wpe.weight": torch.ones(48, 32, dtype=torch.int8)}),
            "transformer.wpe.weight holds int8 numbers",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(101, 32)}),
            "lm_head.weight differs from the token embedding",
        ),
        (
            lambda t: t.update({"wpe.weight": torch.ones(48, 32)}),
            "transformer.wpe.weight twice, with and without",
        ),
    ],
)
def test_every_tensor_is_accounted_for(gpt2_folder, change, sentence):
    edit_weights(gpt2_folder, change)
    with pytest.raises(UserError, match=f"model.safetensors.*{sentence}"):
        DoubleHeadsModel.from_pretrained(gpt2_folder)


def test_a_long_list_of_tensors_is_cut(gpt2_folder):
    edit_weights(gpt2_folder, lambda t: t.update({f"x{i}": torch.ones(1) for i in range(20)}))
    with pytest.raises(UserError, match="x0, x1, x10, x11, x12, x13, x14, x15 and 12 more;"):
        DoubleHeadsModel.from_pretrained(gpt2_folder)


def test_a_config_of_another_size_is_an_error(gpt2_folder):
    edit_config(gpt2_folder, vocab_size=100)
    with pytest.raises(UserError, match=r"wte.weight has shape \(101, 32\), .* \(100, 32\)"):
        DoubleHeadsModel.from_pretrained(gpt2_folder)


def test_a_config_of_another_architecture_is_an_error(gpt2_folder):
    edit_config(gpt2_folder, model_type="openai-gpt")
    with pytest.raises(UserError, match="unknown in transformers' layout of openai-gpt"):
        DoubleHeadsModel.from_pretrained(gpt2_folder)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "config.json cannot be read: No such file"),
        ("{", "config.json is not JSON: "),
        ("[]", "config.json must hold a JSON object, not a list"),
        ('{"model_type": "bert"}', "config.json: model_type 'bert' is not supported"),
    ],
)
def test_a_bad_config_is_named(gpt2_folder, content, sentence):
    (gpt2_folder / "config.json").unlink()
    if content is not None:
        (gpt2_folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        DoubleHeadsModel.from_pretrained(gpt2_folder)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ({}, "index.json has no weight_map"),
        ({"weight_map": {"wte.weight": "gone.safetensors"}}, "lacks gone.safetensors, which"),
        ({"weight_map": {"wte.weight": "../x.safetensors"}}, "not in the same folder"),
    ],
)
def test_a_bad_index_of_shards_is_named(gpt2_folder, index, sentence):
    (gpt2_folder / "model.safetensors").unlink()
    (gpt2_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=sentence):
        DoubleHeadsModel.from_pretrained(gpt2_folder)


def test_a_folder_without_weights_is_named(gpt2_folder):
    (gpt2_folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no weights; it needs one of model.safetensors,"):
        DoubleHeadsModel.from_pretrained(gpt2_folder)


def test_a_path_that_is_no_folder_is_named(gpt2_folder):
    with pytest.raises(UserError, match=r"there is no folder .*/missing"):
        DoubleHeadsModel.from_pretrained(gpt2_folder / "missing")
    with pytest.raises(UserError, match=r"config.json cannot be unpacked as a tar archive"):
        DoubleHeadsModel.from_pretrained(gpt2_folder / "config.json")


def test_a_hub_id_that_cannot_be_downloaded_is_one_sentence(monkeypatch):
    def download(repo_id, allow_patterns):
        raise ConnectionError("the network is unreachable.\nmore\nlines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError) as caught:
        DoubleHeadsModel.from_pretrained("someone/some-model")
    assert str(caught.value) == (
        "there is no folder someone/some-model, and the Hugging Face hub gave no model of that "
        "name (the network is unreachable); check the name or the network, or give a folder."
    )
