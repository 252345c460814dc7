"""The pages of docs/ and README.md: what they show runs, and what they name is there."""

import dataclasses
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

import convai_fast
from benchmarks import figures
from convai_fast.cli.main import main
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.data.readers import load_dialogues
from convai_fast.model.config import TransformerConfig
from convai_fast.model.double_heads import DoubleHeadsModel
from tests.helpers.pages import PAGES, ROOT, fences, run_page

pytestmark = pytest.mark.usefixtures("no_measured_speed")

FORMATS = ROOT / "docs" / "data-formats"
# docs/custom-dataset.md has a test file of its own.
RUN = [page for page in PAGES if any(f.language in ("sh", "python") for f in fences(page))]
RUN = [page for page in RUN if page.name != "custom-dataset.md"]


@pytest.fixture(scope="module")
def stand_ins(tokenizer, tmp_path_factory):
    """What the commands of the pages name: dialogues, a tiny model, and runs of it."""
    folder = tmp_path_factory.mktemp("stand-ins")
    dialogues = builtin_dialogues(num_train=6, num_valid=1)
    text = json.dumps({s: [dataclasses.asdict(d) for d in ds] for s, ds in dialogues.items()})
    config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256}
    shape = TransformerConfig.from_transformers({**config, "vocab_size": len(tokenizer)})
    DoubleHeadsModel(shape).save_pretrained(folder / "gpt2-folder", tokenizer)
    (folder / "dialogues.json").write_text(text, encoding="utf-8")
    shutil.copytree(FORMATS, folder, dirs_exist_ok=True, ignore=no_caches_nor("dialogues.json"))
    os.chdir(folder)
    train = "train --data dialogues.json --model gpt2-folder --max_steps 2 --log_every 1"
    assert main([*train.split(), "--output", "runs/mine"]) == 0
    shutil.copytree("runs/mine", "runs/demo", symlinks=True)
    shutil.copy("dialogues.json", "runs/demo")
    return folder


@pytest.fixture
def folder(stand_ins, tmp_path, monkeypatch):
    """A working directory with the stand-ins."""
    folder = tmp_path / "work"
    shutil.copytree(stand_ins, folder, symlinks=True)
    monkeypatch.chdir(folder)
    yield folder
    sys.modules.pop("my_reader", None)


def no_caches_nor(*names):
    return shutil.ignore_patterns("__*", *names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_fence_says_whether_it_runs(page):
    assert [fence for fence in fences(page) if not fence.is_known] == []


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_what_a_page_shows_runs(page, folder):
    run_page(page)


def test_every_file_of_a_format_is_shown_and_read(monkeypatch):
    monkeypatch.chdir(FORMATS)
    shown = {f.title: f.body for f in fences(FORMATS.with_suffix(".md")) if f.title}
    files = {path.name for path in FORMATS.glob("*.*")}
    assert {name: Path(name).read_text(encoding="utf-8") for name in files} == shown
    for name in files - {"my_reader.py"}:
        reader = "my_reader.py:load" if name == "questions.txt" else "auto"
        splits = load_dialogues(name, reader)
        assert splits["train"] and splits["valid"], name


def test_tables_and_pictures_of_figures_are_those_of_the_file():
    found = json.loads((figures.FOLDER / "figures.json").read_text(encoding="utf-8"))
    page = figures.PAGE.read_text(encoding="utf-8")
    assert figures.with_tables(page, found) == page
    assert set(re.findall(r"<!-- table: (\w+) -->", page)) == found["tables"].keys()
    for name in found["pictures"]:
        path = figures.FOLDER / f"{name}.svg"
        assert path.read_text(encoding="utf-8") == figures.picture(name, found)


def test_the_figures_of_the_readme_are_those_of_the_page_of_figures():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("## Why")[1].split("\n## ")[0]
    cells = re.findall(r"\| ([\d.]+) (?:x|s|us|tokens/s)\b", table)
    assert len(cells) > 15
    assert set(cells) <= set(re.findall(r"[\d.]+", figures.PAGE.read_text(encoding="utf-8")))


def test_the_sentences_of_troubleshooting_are_those_of_the_library():
    files = [*(ROOT / "convai_fast").rglob("*.py"), ROOT / "setup.py"]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    source = re.sub(r'"\s*f?"', "", source)  # texts that go on in the next line
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    sentences = re.findall(r"\*\*`(.*?)`", page, re.DOTALL)
    assert len(sentences) > 15
    for sentence in sentences:
        parts = re.split(r"…|<\w+>|[\d,]+|\b(?:nan|inf)\b", " ".join(sentence.split()))
        for part in (part.strip(" ,:.") for part in parts):
            assert part in source, sentence


def test_every_public_name_is_in_the_reference_and_in_the_readme():
    named = re.findall(r"^::: convai_fast\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.M)
    assert sorted(named) == convai_fast.__all__
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("| public names |")[1]
    listed = re.findall(r"`(\w+)`", table.split("\n## ")[0])
    assert sorted(listed) == convai_fast.__all__


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere():
    navigation = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    pages = {page.name for page in PAGES if page.parent.name == "docs"}
    assert sorted(navigation) == sorted(pages | {"contributing.md"})
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
