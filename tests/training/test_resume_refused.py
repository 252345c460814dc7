"""What cannot continue is refused in one sentence, and stays as it is."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from convai_fast.cli.main import main
from convai_fast.errors import UserError
from convai_fast.model.config import TransformerConfig
from convai_fast.model.double_heads import DoubleHeadsModel
from convai_fast.training import checkpoints, loop
from convai_fast.training.evaluation import MetricSums
from convai_fast.training.options import TrainOptions
from convai_fast.training.resume import check_identity, identity_of
from convai_fast.training.resume import resume_command as resume_command_of
from tests.helpers.killed_runs import chosen, tree


def test_a_link_that_was_copied_as_a_folder_is_one_sentence(killed, undisturbed):
    checkpoint, last = (killed / "last").resolve(), killed / "last"
    last.unlink()
    shutil.copytree(checkpoint, last)
    before = tree(killed)
    with pytest.raises(UserError, match=r"last is a folder, but was a link .*: move it away"):
        loop.train(TrainOptions(resume=str(killed)), lambda _: None)
    assert tree(killed) == before
    shutil.rmtree(killed / "checkpoints")
    with pytest.raises(UserError, match=r"make it .*checkpoints/step-…, with the step in"):
        loop.train(TrainOptions(resume=str(killed)), lambda _: None)
    assert last.is_dir()


def test_records_stay_where_the_checkpoint_was_not_copied(killed):
    shutil.rmtree(killed / "checkpoints")
    before = tree(killed)
    with pytest.raises(UserError, match=r"last names a checkpoint that is not there: get check"):
        loop.train(TrainOptions(resume=str(killed)), lambda _: None)
    assert tree(killed) == before


def test_options_given_anew_may_not_contradict_the_run(killed, capsys):
    assert main(["train", "--resume", str(killed), "--train-batch-size=2", "--lr", "0.01"]) == 0
    before = (killed / "options.yaml").read_text()
    # 6.25e-05 is the default: what is named counts, were it as the default.
    assert main(["train", "--resume", str(killed), "--lr", "6.25e-05"]) == 2
    message = capsys.readouterr().err
    assert "--lr 6.25e-05 contradicts the run" in message
    assert "which has 0.01" in message
    config = killed.parent / "config.yaml"
    config.write_text("lr: 0.02")
    assert main(["train", "--resume", str(killed), "--config", str(config)]) == 2
    assert "--lr 0.02 contradicts the run" in capsys.readouterr().err
    assert main(["train", "--resume", str(killed), "--config", f"{killed}/options.yaml"]) == 0
    assert main(["train", "--resume", str(killed), "--output", "elsewhere"]) == 2
    assert (killed / "options.yaml").read_text() == before


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path, **values):
    read = yaml.safe_load if path.suffix == ".yaml" else json.loads
    path.write_text(json.dumps({**read(path.read_text()), **values}))  # JSON is YAML, too


def foreign_format(path):
    torch.save({**torch.load(path), "format": 99}, path)


@pytest.mark.parametrize(
    ("damage", "file", "says"),
    [
        (cut_short, "last/training_state.pt", "training_state.pt is damaged or of another version"),
        (flip, "last/training_state.pt", "training_state.pt is damaged or of another version"),
        (Path.unlink, "last/training_state.pt", "there is no .*training_state.pt, without which"),
        (foreign_format, "last/training_state.pt", "not written by this version of convai-fast"),
        (cut_short, "last/model.safetensors", "is not the file that was saved"),
        (flip, "last/model.safetensors", "is not the file that was saved"),
        (cut_short, "metrics.jsonl", "has lost records that were saved"),
        (Path.unlink, "options.yaml", "is not a run folder"),
        (lambda p: p.write_text("lr: ["), "options.yaml", "options.yaml, line 1: this is not YAML"),
        (lambda p: edit(p, num_candidates=3), "options.yaml", "with another `num_candidates`"),
        (lambda p: edit(p, lr="high"), "options.yaml", "lr must be a number, not 'high'"),
        (lambda p: edit(p, n_head=4), "last/config.json", r"another model shape \(config.json\)"),
    ],
)
def test_what_cannot_continue_is_one_sentence_and_stays_as_it_is(killed, damage, file, says):
    damage(killed / file)
    before = {p: p.read_bytes() for p in sorted(killed.rglob("*")) if p.is_file()}
    with pytest.raises(UserError, match=says) as raised:
        loop.train(TrainOptions(resume=str(killed), n_epochs=4), lambda _: None)
    assert "\n" not in str(raised.value)
    assert before == {p: p.read_bytes() for p in sorted(killed.rglob("*")) if p.is_file()}


def test_weights_damaged_before_their_step_was_evaluated_are_not_blessed(
    run_options, tmp_path, monkeypatch
):
    run, compute = tmp_path / "run", MetricSums.compute

    def damage_and_compute(*args):
        flip(run / "last" / "model.safetensors")
        return compute(*args)

    monkeypatch.setattr(MetricSums, "compute", damage_and_compute)
    options = {"output": str(run), "max_steps": 2, "eval_before_start": False}
    loop.train(dataclasses.replace(run_options, **options), lambda _: None)
    with pytest.raises(UserError, match="is not the file that was saved"):
        loop.train(TrainOptions(resume=str(run), max_steps=4), lambda _: None)


def test_other_dialogues_are_refused(killed, data_file, tmp_path):
    data = json.loads(data_file.read_text())
    data["train"][0]["utterances"][0]["candidates"][-1] = "something else"
    (tmp_path / "other.json").write_text(json.dumps(data))
    options = TrainOptions(resume=str(killed), dataset_path=str(tmp_path / "other.json"))
    with pytest.raises(UserError, match="another set of dialogues"):
        loop.train(options, lambda _: None)


def test_a_damaged_checkpoint_names_the_newest_of_the_older_ones_by_number(tmp_path):
    for number in (999_998, 999_999, 1_000_000):
        (tmp_path / "run" / "checkpoints" / f"step-{number:06d}").mkdir(parents=True)
    with pytest.raises(UserError, match="ln -sfn checkpoints/step-999999 "):
        checkpoints.read_training_state(tmp_path / "run" / "checkpoints" / "step-1000000")
    with pytest.raises(UserError) as raised:
        checkpoints.read_training_state(tmp_path / "run" / "checkpoints" / "step-999998")
    assert "ln -sfn" not in str(raised.value)


MODULE = "def load(path):\n    import json\n    return json.load(open(path))\n"


@pytest.fixture
def run_with_a_reader(run_options, tmp_path, monkeypatch):
    """A run that was stopped after a step, whose dialogues a function of the user's reads."""
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    options = dataclasses.replace(run_options, reader="mine:load", output="runs/a", max_steps=1)
    loop.train(options, lambda _: None)
    Path("runs/a/last/metrics.json").write_text('{"finished": false}')
    yield options
    sys.modules.pop("mine", None)


def test_a_stored_reader_that_is_code_runs_only_when_it_is_given_again(run_with_a_reader, capsys):
    options = run_with_a_reader
    sys.modules.pop("mine")
    before = tree(Path("runs"))
    for given in ([], ["--reader", "auto"], ["--reader", "other:load"]):
        assert main(["train", "--resume", "runs/a", *given]) == 2
        assert "the reader mine:load, which is code: give --reader mine:load again" in (
            capsys.readouterr().err
        )
    with pytest.raises(UserError, match="which is code"):
        loop.train(TrainOptions(resume="runs/a"), lambda _: None)
    assert "mine" not in sys.modules
    assert tree(Path("runs")) == before
    auto = dataclasses.replace(options, resume="auto", output="")
    assert chosen(auto) == "runs/a"
    assert chosen(dataclasses.replace(auto, reader="auto")) == ""
    assert main(["train", "--resume", "runs/a", "--max_steps", "2", "--reader", "mine:load"]) == 0
    assert "mine" in sys.modules


def test_the_command_that_continues_names_a_reader_that_is_code(run_options):
    options = dataclasses.replace(run_options, reader="mine:load")
    command = "convai-fast train --resume 'my runs/a' --reader mine:load"
    assert resume_command_of(options, Path("my runs/a")) == command
    assert resume_command_of(run_options, Path("a")) == "convai-fast train --resume a"


def test_an_option_that_is_newer_than_a_checkpoint_was_as_it_is_by_default(
    options, tokenizer, store
):
    config = {"model_type": "gpt2", "vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 1}
    config = TransformerConfig.from_transformers({**config, "n_head": 2, "n_positions": 256})
    run = loop.Trainer(options, DoubleHeadsModel(config), tokenizer, store, lambda _: None)
    saved = identity_of(run)
    del saved["`train_batch_tokens`"]
    check_identity(run, saved)
    options.train_batch_tokens = 600
    with pytest.raises(UserError, match="another `train_batch_tokens` than there is now"):
        check_identity(run, saved)
