"""`convai-fast train` as a user types it."""

import json

from convai_fast.cli.main import main


def test_a_resumed_run_ends_with_the_same_command_to_talk_to_it(files, tmp_path, capsys):
    config = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    run, data = str(tmp_path / "run"), str(files / "dialogues.json")
    new = ["--model", str(tmp_path), "--from_scratch", "--tokenizer", str(files / "tokenizer")]
    new += ["--data", data, "--output", run, "--dataset_cache", str(tmp_path / "cache")]
    new += ["--max_steps", "1"]
    ends = []
    for arguments in (new, ["--resume", run, "--max_steps", "2"]):
        assert main(["train", *arguments]) == 0
        ends.append(capsys.readouterr().out.splitlines()[-1])
    assert ends == [f"talk to it: convai-fast interact --model {run}/best --data {data}"] * 2
