"""`--shard` of the commands `generate` and `rank`: parts whose files make up that of one run."""

import dataclasses
import json
import signal

import pytest

from convai_fast.cli.main import main
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.generation.engine import GenerationEngine
from tests.helpers.bulk_files import files, write_lines

# A good one, one that an earlier part has, those without ids, blank lines, and only bad ones.
REQUESTS = [{"id": "a"}, {"history": ["hi"]}, "", "oops", {"id": "a"}, {"id": 2}, "bad", "bad"]
REQUESTS += [{"id": "b", "history": ["hello !"]}, {}]


def run(command, model, folder, *options):
    """The files that a command writes: its answers, and its bad lines."""
    folder.mkdir()
    arguments = ["--model", model, "--output", folder / "answers", *options]
    assert main([command, *map(str, arguments)]) == 0
    return [
        (folder / name).read_bytes() if (folder / name).exists() else b""
        for name in ("answers", "answers.errors.jsonl")
    ]


@pytest.mark.parametrize("count", [2, 5, 12])
@pytest.mark.parametrize("command", ["generate", "rank"])
def test_the_files_of_all_parts_one_after_another_are_those_of_one_run(
    model, tmp_path, command, count
):
    more = {"candidates": ["yes .", "no ."]} if command == "rank" else {}
    lines = [line if isinstance(line, str) else line | more for line in REQUESTS]
    given = ["--input", write_lines(tmp_path / "requests.jsonl", *lines)]
    parts = [
        run(command, model, tmp_path / f"{part}", *given, "--shard", f"{part}/{count}")
        for part in range(1, count + 1)
    ]
    whole = run(command, model, tmp_path / "whole", *given)
    assert [b"".join(files) for files in zip(*parts, strict=True)] == whole
    assert all((tmp_path / f"{part}" / "answers").exists() for part in range(1, count + 1))


@pytest.mark.parametrize("command", ["generate", "rank"])
def test_the_turns_of_a_dataset_are_cut_as_well(model, tmp_path, command):
    dialogues = builtin_dialogues(num_train=1, num_valid=2)
    data = {s: [dataclasses.asdict(d) for d in ds] for s, ds in dialogues.items()}
    (tmp_path / "data.json").write_text(json.dumps(data))
    given = ["--data", tmp_path / "data.json"]
    parts = [
        run(command, model, tmp_path / f"{part}", *given, "--shard", f"{part}/3")[0]
        for part in (1, 2, 3)
    ]
    assert min(part.count(b"\n") for part in parts) >= 1
    assert b"".join(parts) == run(command, model, tmp_path / "whole", *given)[0]


def test_a_part_that_is_stopped_is_continued_and_no_other_part_continues_it(
    generate, tmp_path, monkeypatch, capsys
):
    requests = [{"id": f"{number}"} for number in range(9)]
    serve = GenerationEngine.serve

    def stopping(self, requests, on_failure):
        monkeypatch.setattr(GenerationEngine, "serve", serve)
        yield next(serve(self, requests, on_failure))
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(GenerationEngine, "serve", stopping)
    assert generate("--shard", "2/3", requests=requests) == 130
    assert "stopped: 1 of 3 requests are answered" in capsys.readouterr().err
    for other in (["--shard", "3/3"], []):
        assert generate(*other, requests=requests) == 2
        assert ".partial was begun with another shard: " in capsys.readouterr().err
    assert generate("--shard", "2/3", requests=requests) == 0
    assert "(and those to 1 requests before)" in capsys.readouterr().out
    answered = (tmp_path / "replies.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in answered] == ["3", "4", "5"]


@pytest.mark.parametrize("shard", ["0/4", "5/4", "x", "1/", "-1/4", "1/2/3", "", "٣/٤"])
def test_a_part_that_there_is_not_is_one_sentence(generate, tmp_path, capsys, shard):
    assert generate("--shard", shard, requests=[{"id": "a"}]) == 2
    assert capsys.readouterr().err == (
        f"convai-fast generate: --shard is {shard!r}, but must be a part of so many, from 1/16 to "
        "16/16\n"
    )
    assert files(tmp_path) == ["requests.jsonl"]
