import json
import logging
import pickle
import shlex
import subprocess
import sys

import pytest
import torch
import transformers
from parity import PEERS, make_batch, make_peer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from convai_fast.errors import UserError
from convai_fast.model import DoubleHeadsModel, TransformerConfig


@pytest.fixture
def folder(architecture, tmp_path):
    """A checkpoint that transformers wrote."""
    make_peer(architecture).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def gpt2_folder(tmp_path):
    make_peer("gpt2").save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def as_bin(folder, tensors=None):
    tensors = load_file(folder / "model.safetensors") if tensors is None else tensors
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def assert_same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


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
    subprocess.run([sys.executable, "-c", command], check=True)
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
