"""`convai-fast benchmark`: what it prints and writes, and what it refuses."""

import json

from convai_fast.cli.main import main

LEAST = ["--seconds", "0", "--precision", "fp32"]


def test_a_table_a_file_and_a_picture_come_of_ones_own_dialogues(model, files, tmp_path, capsys):
    report, plots = tmp_path / "figures.json", tmp_path / "plots"
    arguments = ["--model", model, "--data", str(files / "dialogues.json"), *LEAST]
    arguments += ["--output", str(report), "--plots", str(plots)]
    assert main(["benchmark", *arguments]) == 0
    printed = capsys.readouterr().out
    content = json.loads(report.read_text())
    names = [each["workload"] for each in content["figures"]]
    assert [name.split()[0] for name in names] == ["replies", "reply", "ranking", "training"]
    assert all(name in printed for name in names)
    for each in content["figures"]:
        assert 0 < each["least"] <= each["ratio"] <= each["most"]
        assert len(each["pairs"]["convai_fast"]) == len(each["pairs"]["transformers"]) == 2
    assert content["machine"].keys() >= {"device", "processor", "threads", "precision"}
    assert content["versions"].keys() >= {"convai-fast", "torch", "transformers"}
    assert [path.name for path in plots.iterdir()] == ["speed.png"]
    assert printed.endswith(f"\nwritten: {report}, {plots / 'speed.png'}\n")
    assert main(["benchmark", *arguments]) == 2
    assert f"{report} is already there" in capsys.readouterr().err


def test_mistakes_are_refused_before_anything_is_measured(model, capsys):
    assert main(["benchmark", "--model", model, "--seconds", "-1"]) == 2
    assert "--seconds must be at least 0" in capsys.readouterr().err
    assert main(["benchmark", "--model", model, "--precision", "fp16", "--device", "cpu"]) == 2
    assert "--precision fp16 needs a CUDA device" in capsys.readouterr().err
    assert main(["benchmark", *LEAST]) == 2
    assert "--model is missing" in capsys.readouterr().err
