"""What only a part of the library needs comes with an extra, which one sentence asks for."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

import convai_fast
from convai_fast.cli.main import main
from convai_fast.errors import UserError
from convai_fast.evaluation.evaluate import check_metrics
from convai_fast.extras import EXTRA_OF
from convai_fast.training.options import TrainOptions

PACKAGE = Path(convai_fast.__file__).parent
# Imported once their packages are known to be there.
LAZY = {PACKAGE / "evaluation" / "plots.py", PACKAGE / "bulk" / "ray.py"} | {
    PACKAGE / "serving" / f"{name}.py" for name in ("app", "metrics", "page")
}


@pytest.fixture
def absent(monkeypatch, request):
    monkeypatch.setitem(sys.modules, request.param, None)


@pytest.mark.parametrize("absent", ["tensorboard"], indirect=True)
def test_training_asks_for_its_extra_before_it_begins(absent, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments in (["train", "--data", "none.json"], ["demo"]):
        assert main(arguments) == 2
        sentence = (
            "recording a run in tensorboard needs tensorboard: pip install 'convai-fast[train]'"
        )
        assert capsys.readouterr().err == f"convai-fast {arguments[0]}: {sentence}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("absent", ["tensorboard"], indirect=True)
def test_what_is_recorded_nowhere_else_asks_for_no_tensorboard(absent):
    TrainOptions(report_to="none").check()


@pytest.mark.parametrize("absent", ["wandb"], indirect=True)
def test_only_who_names_wandb_is_asked_for_it(absent):
    TrainOptions().check()
    with pytest.raises(UserError, match=r"recording a run in wandb needs wandb: .*\[report\]"):
        TrainOptions(report_to=["wandb"]).check()


@pytest.mark.parametrize("absent", ["peft"], indirect=True)
def test_only_lora_asks_for_peft(absent):
    TrainOptions().check()
    with pytest.raises(UserError, match=r"`lora_r` needs peft: .*\[lora\]"):
        TrainOptions(lora_r=4).check()


@pytest.mark.parametrize("absent", ["sacrebleu"], indirect=True)
def test_only_bleu_asks_for_the_extra_of_evaluation(absent):
    check_metrics(["hits@1", "f1"])
    with pytest.raises(UserError, match=r"bleu among `metrics` needs sacrebleu: .*\[eval\]"):
        check_metrics(["hits@1", "bleu"])


@pytest.mark.parametrize("absent", ["ray"], indirect=True)
def test_only_a_cluster_asks_for_ray(absent, capsys):
    assert main(["generate", "--model", "m", "--input", "i", "--output", "o", "--ray"]) == 2
    sentence = "--ray needs ray: pip install 'convai-fast[ray]'"
    assert capsys.readouterr().err == f"convai-fast generate: {sentence}\n"


def test_every_package_is_in_its_extra():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    for package, extra in EXTRA_OF.items():
        wanted = project["project"]["optional-dependencies"][extra]
        names = [re.match(r"[\w-]+", line)[0] for line in wanted]
        assert package in [name.replace("-", "_") for name in names]


def test_none_of_them_is_imported_before_it_is_needed():
    for path in set(PACKAGE.rglob("*.py")) - LAZY:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not EXTRA_OF.keys() & {part for name in names for part in name.split(".")}, path
