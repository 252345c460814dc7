"""Checkpoints of the old libraries: the same outputs, and every tensor accounted for."""

import json
import zipfile

import numpy as np
import pytest
import torch

from convai_fast.dialogue.tokenizer import load_tokenizer, special_ids
from convai_fast.errors import UserError
from convai_fast.model import DoubleHeadsModel
from tests.helpers.old_checkpoints import ARCHITECTURES, LAYOUTS, pack, write_old_checkpoint


@pytest.fixture
def old(tmp_path):
    """A GPT of pytorch-pretrained-bert."""
    write_old_checkpoint(tmp_path / "old", LAYOUTS[0], "openai-gpt")
    return tmp_path / "old"


def edit_config(folder, **settings):
    config = json.loads((folder / "config.json").read_text()) | settings
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def edit_weights(folder, **tensors):
    path = folder / "pytorch_model.bin"
    torch.save(torch.load(path) | tensors, path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_are_those_of_the_old_library(shared_dir, tmp_path, layout, packed):
    path = shared_dir / "legacy" / layout
    expected = np.load(path / "expected_outputs.npz")
    inputs = {name: torch.from_numpy(expected[name]) for name in expected.files[:3]}
    if packed:
        path = tmp_path / "old.tar.gz"
        pack(shared_dir / "legacy" / layout, path)
    model = DoubleHeadsModel.from_pretrained(path)
    with torch.no_grad():
        output = model(**inputs)
    last = output.logits[0, torch.arange(2), inputs["mc_token_ids"][0]]
    np.testing.assert_allclose(last, expected["lm_logits_last"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(output.mc_logits, expected["mc_logits"], rtol=0, atol=1e-4)
    assert len(load_tokenizer(path)) == model.config.vocab_size


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_either_architecture_in_either_layout_computes_what_transformers_does(
    tmp_path, layout, architecture
):
    peer = write_old_checkpoint(tmp_path / "old", layout, architecture)
    model = DoubleHeadsModel.from_pretrained(tmp_path / "old")
    ids = torch.arange(40).view(1, 2, 20)
    inputs = dict(input_ids=ids, token_type_ids=ids.flip(-1), mc_token_ids=torch.tensor([[19, 7]]))
    with torch.no_grad():
        ours, theirs = model(**inputs), peer(**inputs)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.mc_logits, theirs.mc_logits, rtol=0, atol=1e-5)
    assert len(load_tokenizer(tmp_path / "old")) == model.config.vocab_size


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(n_special=4), r"tokens_embed.weight has shape \(60, 8\), but .* \(59, 8\)"),
        (dict(n_special=-1), "config.json: n_special must be a whole number from 0 on, not -1"),
        (dict(vocab_size=None), "config.json: vocab_size must be a whole number beside n_special"),
        (dict(predict_special_tokens=False), "config.json: predict_special_tokens false is not"),
        (dict(n_layer=10**6), "config.json: 1000000 layers are more than the 31 tensors"),
    ],
)
def test_a_config_that_does_not_fit_is_named(old, settings, sentence):
    edit_config(old, **settings)
    with pytest.raises(UserError, match=sentence):
        DoubleHeadsModel.from_pretrained(old)


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        ("lm_head.decoder.weight", torch.ones(60, 8), "differs from the token embedding"),
        ("lm_head.weight", torch.ones(60, 8), "holds lm_head.weight twice"),
        ("transformer.h.1.attn.bias", torch.ones(1, 1, 32, 32), "something else than the causal"),
        ("transformer.h.1.attn.bias", torch.tensor(1.0), "something else than the causal mask"),
        ("transformer.h.1.attn.masked_bias", torch.tensor(0.0), "something else than a constant"),
        ("transformer.position_ids", torch.arange(32).flip(0), "else than the numbers 0, 1, 2"),
        ("transformer.h.0.attn.mask", torch.ones(1), "tensors that are unknown .*attn.mask;"),
        ("multiple_choice_head.linear.bias", torch.ones(1).to_sparse(), "sparse, nested,"),
        ("multiple_choice_head.linear.bias", torch.ones(1, dtype=torch.cfloat), "unusual numbers"),
        ("multiple_choice_head.linear.bias", torch.ones(1, device="meta"), "sparse, nested,"),
        ("transformer.h.0.attn.bias", torch.ones(1).expand(1, 1, 10**6, 10**6), "of their own"),
    ],
)
def test_every_tensor_is_accounted_for(old, name, tensor, sentence):
    edit_weights(old, **{name: tensor})
    with pytest.raises(UserError, match=rf"pytorch_model\.bin.*{sentence}"):
        DoubleHeadsModel.from_pretrained(old)


@pytest.mark.parametrize("ending", ["pth", "pt"])
def test_a_run_that_the_predecessor_did_not_finish_says_what_to_rename(old, ending):
    (old / "pytorch_model.bin").rename(old / f"checkpoint_mymodel_12.{ending}")
    (old / f"checkpoint_mymodel_9.{ending}").write_bytes(b"")
    with pytest.raises(
        UserError, match=rf"rename its checkpoint_mymodel_12\.{ending}, .* pytorch_model.bin"
    ):
        DoubleHeadsModel.from_pretrained(old)


def test_settings_of_the_first_versions_have_their_names_of_today(old):
    edit_config(old, summary_type="token_ids", summary_dropout=0.25, model_type=None)
    assert DoubleHeadsModel.from_pretrained(old).config.summary_first_dropout == 0.25


def test_weights_that_were_compressed_are_refused(old):
    # A small file of zeros would fill the memory.
    tensors = torch.load(old / "pytorch_model.bin")
    torch.save(tensors, old / "plain.zip")
    with (
        zipfile.ZipFile(old / "plain.zip") as plain,
        zipfile.ZipFile(old / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as compressed,
    ):
        for name in plain.namelist():
            compressed.writestr(name, plain.read(name))
    with pytest.raises(UserError, match="cannot be read as weights"):
        DoubleHeadsModel.from_pretrained(old)


def test_special_tokens_have_the_ids_of_the_checkpoints_own_file(tmp_path):
    write_old_checkpoint(tmp_path / "old", "pytorch-transformers", "gpt2")
    assert tuple(special_ids(load_tokenizer(tmp_path / "old"))) == (261, 262, 263, 259, 260)
