"""LoRA: what is trained, what is saved, and that everybody who loads it gets the same model."""

import dataclasses
import errno
import json
import resource
import shutil
import signal
import sys

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2DoubleHeadsModel, OpenAIGPTDoubleHeadsModel

from convai_fast.cli.main import main
from convai_fast.dialogue.tokenizer import special_ids
from convai_fast.errors import UserError
from convai_fast.loading import load
from convai_fast.model import double_heads, families
from convai_fast.model.config import TransformerConfig
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.training import checkpoints, loop, lora, step
from convai_fast.training.options import TrainOptions
from tests.helpers.killed_runs import assert_equal_runs, die_at, in_a_process
from tests.helpers.old_checkpoints import pack

PEERS = {
    "gpt2": GPT2DoubleHeadsModel,
    "openai-gpt": OpenAIGPTDoubleHeadsModel,
    "llama": families.FAMILIES["llama"].peer_class(),
}
SHAPES = {
    "llama": dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
}


@pytest.fixture(params=PEERS)
def base(request, tokenizer, tmp_path):
    """A small model with weights that knows none of the special tokens, as a folder."""
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}
    shape = SHAPES.get(request.param, shape)
    config = {"model_type": request.param, "vocab_size": len(tokenizer) - 5, **shape}
    model = DoubleHeadsModel(TransformerConfig.from_transformers(config))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def lora_options(options, base, data_file):
    return dataclasses.replace(
        options,
        model=str(base),
        dataset_path=str(data_file),
        lora_r=4,
        lora_dropout=0.1,
        lr=1e-2,
        n_epochs=1,
        save_every=2,
    )


def train(options):
    return loop.train(options, lambda _: None).run


def a_batch(tokenizer):
    ids = torch.randint(len(tokenizer), (2, 3, 20), generator=torch.Generator().manual_seed(1))
    segments = torch.tensor(list(special_ids(tokenizer))[2:4])[torch.arange(20) // 10]
    return {
        "input_ids": ids,
        "token_type_ids": segments.expand_as(ids),
        "mc_token_ids": torch.full((2, 3), 19),
    }


def test_adapter_merged_weights_and_peft_are_one_model(lora_options, base, tokenizer, tmp_path):
    run = train(lora_options)
    assert {p.name for p in (run / "best").glob("*.safetensors")} == {"adapter_model.safetensors"}
    ours, _ = load(str(run / "best"))
    merged = train(dataclasses.replace(lora_options, merge_lora=True, output=f"{tmp_path}/merged"))
    kind = PEERS[ours.config.family]
    over = kind.from_pretrained(base)
    over.resize_token_embeddings(len(tokenizer))
    over_base = PeftModel.from_pretrained(over, run / "best")
    # peft does not see that OpenAI GPT's head is tied to the embedding, for the special tokens.
    tied = slice(0, len(tokenizer) - 5) if kind is OpenAIGPTDoubleHeadsModel else slice(None)
    batch = a_batch(tokenizer)
    for peer, tokens in ((kind.from_pretrained(merged / "best"), slice(None)), (over_base, tied)):
        with torch.no_grad():
            output, expected = ours(**batch), peer.eval()(**batch)
        logits = output.logits[..., tokens], expected.logits[..., tokens]
        torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(output.mc_logits, expected.mc_logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_layers_heads_and_special_tokens_are_trained_and_nothing_else(
    lora_options, base, tokenizer
):
    run = train(lora_options)
    model = DoubleHeadsModel.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    before = model.state_dict()
    after = DoubleHeadsModel.from_pretrained(run / "last").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    embeddings = {"transformer.token_embedding.weight", "lm_head"} & before.keys()
    linear = ("qkv.weight", "out.weight", "gate.weight", "up.weight", "down.weight")
    assert changed - {"multiple_choice_head.bias"} == {
        "multiple_choice_head.weight",
        *embeddings,
        *(name for name in before if name.endswith(linear)),
    }
    for name in embeddings:
        rows = (before[name] != after[name]).any(dim=1).nonzero().flatten().tolist()
        assert rows == sorted(special_ids(tokenizer))


@pytest.mark.parametrize("base", ["gpt2", "llama"], indirect=True)
def test_an_adapter_that_peft_wrote_changes_what_it_names_alone(base, tokenizer, tmp_path):
    model = DoubleHeadsModel.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    model.head_is_new = False
    model.save_pretrained(base, tokenizer)
    targets = ["q_proj", "v_proj"] if base_is_llama(base) else ["c_fc"]
    over = AutoModelForCausalLM.from_pretrained(base)
    over = get_peft_model(over, LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    for parameter in over.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    over.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    adapted, _ = load(tmp_path / "adapter")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = over(input_ids=ids).logits
        torch.testing.assert_close(adapted(ids).logits, expected, atol=1e-5, rtol=1e-4)
    assert not adapted.head_is_new  # which is the base model's
    part = "attention.qkv.weight" if base_is_llama(base) else "mlp.up.weight"
    before, after = model.state_dict(), adapted.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(part)}


def base_is_llama(base):
    return json.loads((base / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("merge_lora", [False, True])
@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
def test_a_killed_run_continues_bit_for_bit(lora_options, tmp_path, merge_lora):
    options = dataclasses.replace(lora_options, merge_lora=merge_lora)
    undisturbed = train(dataclasses.replace(options, output=f"{tmp_path}/undisturbed"))
    process = in_a_process(options, lambda: die_at(step, "combined_loss", 8))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    run = train(TrainOptions(resume=options.output))
    assert_equal_runs(run, undisturbed)


@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
def test_an_adapter_that_cannot_be_written_is_one_sentence(lora_options):
    train(dataclasses.replace(lora_options, max_steps=1))  # leaves the cache of dialogues
    shutil.rmtree(lora_options.output)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match=r"step 2 cannot be saved .*File too large") as raised:
            train(lora_options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "make room" not in str(raised.value)
    assert str(raised.value).endswith("begin again with `resume`")


@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
def test_an_adapter_of_another_scale_is_refused(lora_options):
    run = train(dataclasses.replace(lora_options, max_steps=1))
    path = run / "last" / "adapter_config.json"
    settings = json.loads(path.read_text())
    for change in (
        {"use_rslora": True},
        {"rank_pattern": {"c_fc": 2}},
        {"alpha_pattern": {"x": 2}},
    ):
        path.write_text(json.dumps(settings | change))
        with pytest.raises(UserError, match=f"sets {next(iter(change))}, which is unknown"):
            DoubleHeadsModel.from_pretrained(run / "last")


@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
def test_another_base_model_is_refused(lora_options, base, tokenizer):
    run = train(dataclasses.replace(lora_options, max_steps=1))
    model = DoubleHeadsModel.from_pretrained(base)
    with torch.no_grad():
        model.transformer.blocks[0].mlp.up.weight[0, 0] += 1
    model.save_pretrained(base)
    with pytest.raises(UserError, match="with another base model"):
        train(TrainOptions(resume=str(run), max_steps=2))
    (run / "last" / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"the adapter in .* cannot be applied"):
        DoubleHeadsModel.from_pretrained(run / "last")


@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
def test_without_peft_there_is_one_sentence(lora_options, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    arguments = ["--model", lora_options.model, "--data", *lora_options.dataset_path]
    arguments += ["--dataset_cache", lora_options.dataset_cache, "--output", str(tmp_path / "run")]
    assert main(["train", *arguments, "--lora_r", "4"]) == 2
    assert "--lora_r needs peft: pip install 'convai-fast[lora]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"from_scratch": True}, "`lora_r` adapts trained weights"),
        ({"lora_r": 0, "merge_lora": True}, "nothing to merge"),
        ({"lora_alpha": 0.0}, "`lora_alpha` must be above 0"),
        ({"lora_dropout": 1.0}, "`lora_dropout` must be below 1"),
    ],
)
def test_options_that_make_no_sense(change, says):
    with pytest.raises(UserError, match=says):
        TrainOptions(**{"lora_r": 4, **change}).check()


def test_the_state_of_a_run_with_an_adapter_is_small(tokenizer, lora_options):
    run = train(dataclasses.replace(lora_options, max_steps=1))
    state = torch.load(run / "last" / checkpoints.STATE_FILE)
    assert not any("base_layer" in name for name in state["adapter"])
    assert len(state["optimizer"]["state"]) == len(state["adapter"])


@pytest.fixture
def run_over_a_run(options, data_file, lora_options, base, tmp_path):
    """Options of LoRA over the best checkpoint of another run, and what that other run was."""
    plain = dataclasses.replace(
        options, model=str(base), dataset_path=str(data_file), output=f"{tmp_path}/plain"
    )
    train(dataclasses.replace(plain, max_steps=1, n_epochs=4))
    return dataclasses.replace(lora_options, model=f"{tmp_path}/plain/best"), plain


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
def test_an_adapter_outlives_the_checkpoint_it_was_trained_on(
    run_over_a_run, tokenizer, tmp_path, monkeypatch, links
):
    options, plain = run_over_a_run
    if not links:
        monkeypatch.setattr(lora.os, "link", fail_to_link)
    old = (tmp_path / "plain" / "best").resolve()
    run = train(dataclasses.replace(options, max_steps=2))
    weights = run / "base" / "model.safetensors"
    assert weights.samefile(old / weights.name) == links
    assert {p.name for p in run.iterdir() if p.name.startswith(".")} == set()
    expected = load(str(run / "last"))[0].state_dict()
    train(TrainOptions(resume=plain.output, max_steps=9, n_epochs=4, patience=0))
    shutil.rmtree(plain.output)
    assert not old.exists()
    assert_same(load(str(run / "last"))[0].state_dict(), expected)
    assert_same(load(str(run))[0].state_dict(), expected)
    over = GPT2DoubleHeadsModel.from_pretrained(
        json.loads((run / "last" / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    over.resize_token_embeddings(len(tokenizer))
    PeftModel.from_pretrained(over, run / "last")
    moved = run.rename(tmp_path / "moved")
    assert_same(load(str(moved / "last"))[0].state_dict(), expected)
    train(TrainOptions(resume=str(moved), max_steps=4))
    assert json.loads((moved / "last" / "metrics.json").read_text())["step"] == 4


def fail_to_link(*args):
    raise OSError(errno.EXDEV, "another file system")


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
def test_a_run_folder_as_base_is_named_by_its_checkpoint(run_over_a_run, tmp_path):
    options, plain = run_over_a_run
    run = train(dataclasses.replace(options, model=plain.output, max_steps=2))
    named = json.loads((run / "last" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(run / "base")
    assert yaml.safe_load((run / "options.yaml").read_text())["model"] == plain.output


@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
def test_a_base_model_that_is_not_there_or_no_model_is_one_sentence(lora_options, base, tmp_path):
    run = train(dataclasses.replace(lora_options, max_steps=2))
    adapter, path = run / "last", run / "last" / "adapter_config.json"
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="last is a LoRA adapter, whose base model cannot"):
        load(str(adapter))
    settings = json.loads(path.read_text())
    for named in (adapter, adapter.resolve()):
        path.write_text(json.dumps(settings | {"base_model_name_or_path": str(named)}))
        with pytest.raises(UserError, match=r"is a LoRA adapter, and so is .*, its base model"):
            load(str(adapter))
    pack(adapter, tmp_path / "adapter.tar.gz")
    named = str(tmp_path / "adapter.tar.gz")
    path.write_text(json.dumps(settings | {"base_model_name_or_path": named}))
    with pytest.raises(UserError, match=r"and so is .*adapter\.tar\.gz, its base model"):
        load(str(adapter))
    named = "../../../elsewhere"
    path.write_text(json.dumps(settings | {"base_model_name_or_path": named}))
    load(str(adapter))


@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
def test_lora_over_an_adapter_says_to_merge_it_first(lora_options, tmp_path, capsys):
    run = train(dataclasses.replace(lora_options, max_steps=2))
    again = dataclasses.replace(lora_options, model=str(run), output=f"{tmp_path}/again")
    with pytest.raises(
        UserError, match=rf"merge it .* `convai-fast convert --model {run} --output NEW`"
    ):
        train(again)
    assert main(["convert", "--model", str(run), "--output", f"{tmp_path}/merged"]) == 0
    train(dataclasses.replace(again, model=f"{tmp_path}/merged", max_steps=1))


@pytest.mark.parametrize("base", ["gpt2", "llama"], indirect=True)
def test_convert_merges_an_adapter(lora_options, base, tokenizer, tmp_path, capsys):
    run = train(lora_options)
    assert main(["convert", "--model", str(run / "best"), "--output", f"{tmp_path}/new"]) == 0
    printed = capsys.readouterr().out
    assert f"merged          adapter of rank 4 into {base}\n" in printed
    assert "added           nothing\n" in printed
    assert "checked         logits differ" in printed
    files = {p.name for p in (tmp_path / "new").iterdir()}
    assert "model.safetensors" in files and "adapter_config.json" not in files
    merged, _ = load(f"{tmp_path}/new")
    assert_same(merged.state_dict(), load(str(run / "best"))[0].state_dict())
    kind = PEERS[merged.config.family]
    over = kind.from_pretrained(base)
    over.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        peer = kind.from_pretrained(tmp_path / "new")(**a_batch(tokenizer))
        expected = PeftModel.from_pretrained(over, run / "best").eval()(**a_batch(tokenizer))
    torch.testing.assert_close(peer.logits, expected.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(peer.mc_logits, expected.mc_logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
def test_info_describes_an_adapter_or_refuses_it_as_load_does(lora_options, base, capsys):
    folder = train(dataclasses.replace(lora_options, max_steps=1)) / "last"
    assert main(["info", "--model", str(folder)]) == 0
    assert f"adapter          of rank 4 into {base}\n" in capsys.readouterr().out
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    content = json.loads(settings.read_text())

    def said_by(command):
        assert main([command, "--model", str(folder)]) == 2
        return capsys.readouterr().err.replace(command, "COMMAND", 1)

    for change in ({"r": None}, {"use_rslora": True}):
        changed = {name: v for name, v in (content | change).items() if v is not None}
        settings.write_text(json.dumps(changed))
        assert said_by("info") == said_by("interact")
    settings.write_text(json.dumps(content))
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    assert said_by("info") == said_by("interact")
    weights.unlink()
    assert said_by("info") == said_by("interact")


@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
def test_an_adapter_merged_wrongly_fails_the_check(lora_options, tmp_path, capsys, monkeypatch):
    run = train(dataclasses.replace(lora_options, max_steps=2))
    merge = double_heads.adapter.merge_adapter

    def wrong(folder, config, parameters):
        changed = merge(folder, config, parameters)
        parameters["transformer.blocks.0.mlp.up.weight"].data.mul_(2)
        return changed

    monkeypatch.setattr(double_heads.adapter, "merge_adapter", wrong)
    assert main(["convert", "--model", str(run), "--output", f"{tmp_path}/new"]) == 2
    assert "so nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
