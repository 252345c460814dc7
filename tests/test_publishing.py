"""A model as others get it: what the card says, what is uploaded, and that no folder is told."""

import json
import os
from types import SimpleNamespace

import pytest
import yaml

from convai_fast import DoubleHeadsModel, TransformerConfig, load
from convai_fast.cli.main import main
from convai_fast.data.trained_with import TrainedSource, TrainedWith
from convai_fast.training.checkpoints import TrainingState
from convai_fast.training.options import TrainOptions
from convai_fast.training.progress import Progress
from convai_fast.training.run_folder import RunFolder

FIGURES = {"nll": 2.0, "ppl": 7.389, "mc_loss": 0.5, "hits@1": 0.8125}


@pytest.fixture(scope="module")
def model(tokenizer):
    shape = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    return DoubleHeadsModel(
        TransformerConfig.from_transformers({**shape, "vocab_size": len(tokenizer)})
    )


@pytest.fixture
def run(model, tokenizer, tmp_path):
    """A run folder with one checkpoint."""
    data = tmp_path / "private" / "dialogues.json"
    reader = f"{tmp_path}/private/mine.py:read"
    options = TrainOptions(
        output=str(tmp_path / "run"),
        model=str(tmp_path / "private" / "gpt2-folder"),
        dataset_path=str(data),
        reader=reader,
        lr=1e-3,
        report_to="none",
    )

    def write_model(folder):
        model.save_pretrained(folder, tokenizer)
        source = TrainedSource(str(data), reader, 1.0, ())
        TrainedWith(2, 20, 0.1, 42, (source,), (source,)).write(folder)

    folder = RunFolder(options)
    state = TrainingState({}, Progress(step=1200), {}, {}, {}, [], None)
    figures = {"step": 1200, "num_examples": 64, "num_tokens": 900, **FIGURES}
    folder.save(write_model, {"step": 1200}, state, best=True)
    folder.save(write_model, figures, state, best=True)  # once it is evaluated
    folder.close()
    return folder.path


@pytest.fixture
def hub(monkeypatch):
    """The Hub, which keeps what is uploaded; `is_public` says what it has already."""
    hub = SimpleNamespace(files={}, made=[], is_public=False, fails=False)

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            if hub.fails:
                raise ConnectionError("no route to host")
            hub.made.append((repo_id, private))
            return f"https://huggingface.co/{repo_id}"

        def model_info(self, repo_id):
            return SimpleNamespace(private=not hub.is_public)

        def upload_folder(self, repo_id, folder_path, commit_message):
            hub.files = {path.name: path.read_bytes() for path in folder_path.iterdir()}

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return hub


def push(*arguments):
    return main(["push", *map(str, arguments)])


def head_of(card):
    return yaml.safe_load(card.split("---")[1])


def test_a_checkpoint_has_a_card_of_its_run(run):
    card = (run / "best" / "README.md").read_text()
    assert head_of(card) == {
        "pipeline_tag": "text-generation",
        "tags": ["dialogue", "transfertransfo"],
    }
    assert "\n# license: " in card.split("---")[1]
    assert "gpt2 with 1 layers of width 16" in card
    assert "Data: `dialogues.json`." in card
    assert "Base model: `gpt2-folder`." in card
    assert "up to 5 turns" in card
    assert "| `lr` | 0.001 |" in card and "| `n_epochs` | 3 |" in card
    assert "After 1,200 steps, over 64 examples" in card
    assert "| 7.39 | 81.2% | 2.000 |" in card


def test_a_base_model_of_the_hub_is_linked(run, monkeypatch):
    from convai_fast.model import card

    options = run / "options.yaml"
    values = {**yaml.safe_load(options.read_text()), "model": "openai-community/gpt2"}
    options.write_text(yaml.safe_dump(values))
    monkeypatch.setattr(card, "is_cached", lambda name: name == "openai-community/gpt2")
    assert head_of(card.model_card(run / "best"))["base_model"] == "openai-community/gpt2"
    options.write_text(yaml.safe_dump({**values, "from_scratch": True}))
    text = card.model_card(run / "best")
    assert "base_model" not in head_of(text) and "none, from random weights" in text


def test_push_uploads_a_model_that_tells_no_folder(run, hub, tmp_path, capsys):
    output = tmp_path / "uploaded"
    assert push("--model", run, "--repo", "me/mine", "--private", "--output", output) == 0
    assert capsys.readouterr().out.endswith("uploaded to https://huggingface.co/me/mine\n")
    assert hub.made == [("me/mine", True)]
    assert {path.name: path.read_bytes() for path in output.iterdir()} == hub.files
    assert not {"training_state.pt", "metrics.json"} & hub.files.keys()
    for name, content in hub.files.items():
        assert os.fsencode(tmp_path) not in content, name
    trained = json.loads(hub.files["trained_with.json"])
    assert trained["sources"][0]["path"] == "dialogues.json"
    assert trained["sources"][0]["reader"] == "mine.py:read"
    assert b'load("me/mine")' in hub.files["README.md"] and b"OWNER" not in hub.files["README.md"]
    load(output)


def test_a_card_that_was_written_by_hand_is_kept(run, hub):
    (run / "best" / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    assert push("--model", run, "--repo", "me/mine") == 0
    assert hub.files["README.md"] == b"---\nlicense: mit\n---\nMine.\n"


def test_without_a_repository_nothing_is_uploaded(run, hub, tmp_path):
    assert push("--model", run, "--output", tmp_path / "new") == 0
    assert hub.made == []
    assert "OWNER/NAME" in (tmp_path / "new" / "README.md").read_text()


def test_a_public_repository_is_left_alone_by_what_is_private(run, hub, capsys):
    hub.is_public = True
    assert push("--model", run, "--repo", "me/mine", "--private") == 2
    assert "me/mine is there and public, so nothing was uploaded" in capsys.readouterr().err
    assert hub.files == {}
    assert push("--model", run, "--repo", "me/mine") == 0


def test_what_cannot_be_pushed_is_one_sentence(run, hub, tmp_path, capsys):
    hub.fails = True
    for arguments, sentence in (
        (["--repo", "me/mine"], "me/mine cannot be uploaded .* (no route to host); log in"),
        (["--repo", "mine"], "--repo must be a name such as me/my-model, not mine"),
        (["--output", run], f"{run} is there already"),
        ([], "--repo is missing: give a name such as me/my-model"),
    ):
        assert push("--model", run, *arguments) == 2
        error = capsys.readouterr().err
        assert all(part in error for part in sentence.split(" .* ")), error
    assert not (tmp_path / "new").exists()


def test_a_model_is_pushed_from_python_with_a_card(model, tokenizer, hub):
    address = model.push_to_hub("me/mine", tokenizer)
    assert address == "https://huggingface.co/me/mine"
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= hub.files.keys()
    assert b"# me/mine\n" in hub.files["README.md"]
    model.push_to_hub("me/mine", tokenizer, card="Mine.")
    assert hub.files["README.md"] == b"Mine."
