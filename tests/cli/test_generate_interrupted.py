"""`convai-fast generate` stopped, killed, out of space, and continued."""

import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

from convai_fast.cli.main import main
from convai_fast.generation.engine import GenerationEngine
from tests.helpers.bulk_files import LENGTH, files, read_lines, save_model, write_lines

MANY = [{"id": f"{i}", "history": ["hello !"] * (1 + i % 3)} for i in range(60)]
MANY[7] = "oops"
# One by one, so that there is a moment between any two.
ONE_BY_ONE = [*LENGTH, "--batch_size", "1"]


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    """The files of a run of MANY that nothing interrupted, by name."""
    folder = tmp_path_factory.mktemp("undisturbed")
    arguments = ["--input", write_lines(folder / "requests.jsonl", *MANY), *ONE_BY_ONE]
    output = str(folder / "replies.jsonl")
    assert main(["generate", "--model", model, "--output", output, *arguments]) == 0
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same(folder, undisturbed):
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == undisturbed


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_file(
    model, tmp_path, undisturbed, monkeypatch, capsys
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    processes = multiprocessing.get_context("forkserver")
    # All that takes long to import is imported once.
    processes.set_forkserver_preload(["convai_fast.cli.generate", "torch._dynamo"])
    arguments = ["--input", write_lines(tmp_path / "requests.jsonl", *MANY), *ONE_BY_ONE]
    output = tmp_path / "replies.jsonl"
    arguments = ["generate", "--model", model, "--output", str(output), *arguments]
    partial = tmp_path / "replies.jsonl.partial"

    def num_answered():
        return max(0, partial.read_bytes().count(b"\n") - 1) if partial.exists() else 0

    kills = 0
    for target in (1, 5, 10, 15):
        process = processes.Process(target=main, args=(arguments,))
        process.start()
        while process.is_alive() and num_answered() < target:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.02))
        answered = num_answered()
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        assert num_answered() >= answered >= target
        assert not output.exists()
    assert kills == 4
    before = num_answered()
    assert main(arguments) == 0
    assert f"(and those to {before} requests before)" in capsys.readouterr().out
    assert_same(tmp_path, undisturbed)


def interrupt_after(monkeypatch, count, how):
    """Let the next run of the command call `how` once it has written `count` replies."""
    serve = GenerationEngine.serve

    def interrupted(self, requests, on_failure):
        monkeypatch.setattr(GenerationEngine, "serve", serve)
        for number, pair in enumerate(serve(self, requests, on_failure)):
            if number == count:
                how()
            yield pair

    monkeypatch.setattr(GenerationEngine, "serve", interrupted)


def test_ctrl_c_is_code_130_and_the_next_run_continues(
    generate, tmp_path, undisturbed, monkeypatch, capsys
):
    interrupt_after(monkeypatch, 5, lambda: signal.raise_signal(signal.SIGINT))
    assert generate(*ONE_BY_ONE, requests=MANY) == 130
    partial = tmp_path / "replies.jsonl.partial"
    assert f"stopped: 5 of 60 requests are answered; the same command continues from {partial}" in (
        capsys.readouterr().err
    )
    assert files(tmp_path) == ["replies.jsonl.partial", "requests.jsonl"]
    assert generate(*ONE_BY_ONE, requests=MANY) == 0
    assert_same(tmp_path, undisturbed)


def test_sigterm_ends_a_run_like_ctrl_c_with_the_code_of_a_shell(
    generate, tmp_path, undisturbed, monkeypatch, capsys
):
    interrupt_after(monkeypatch, 5, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as exit:
        generate(*ONE_BY_ONE, requests=MANY)
    assert exit.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert "stopped: 5 of 60 requests" in capsys.readouterr().err
    assert files(tmp_path) == ["replies.jsonl.partial", "requests.jsonl"]
    assert generate(*ONE_BY_ONE, requests=MANY) == 0
    assert_same(tmp_path, undisturbed)


def test_requests_that_change_during_a_run_end_it_and_what_is_answered_stays(
    generate, replies, tmp_path, monkeypatch, capsys
):
    # More than the engine takes in advance, and longer than what is read at once.
    persona = ["i like tea ."] * 9
    many = [{"id": f"{i}", "persona": persona, "max_length": 1} for i in range(1500)]
    path = tmp_path / "requests.jsonl"

    def change():
        content = path.read_text()
        with open(path, "r+") as file:  # in its place
            file.write(content.replace('"1499"', '"abcd"'))

    interrupt_after(monkeypatch, 1, change)
    assert generate(requests=many) == 2
    assert f"{path} is not what it was when this run began (line 1500)" in capsys.readouterr().err
    answered = read_lines(tmp_path / "replies.jsonl.partial")[1:]
    assert len(answered) > 900
    assert generate(requests=many) == 0
    found = replies()
    assert list(found) == [request["id"] for request in many]
    assert all(found[line["id"]] == line["replies"] for line in answered)


def test_a_full_disk_is_one_sentence_and_costs_nothing_that_was_written(
    model, generate, tmp_path, undisturbed
):
    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    arguments = ["--input", write_lines(tmp_path / "requests.jsonl", *MANY), *ONE_BY_ONE]
    output = str(tmp_path / "replies.jsonl")
    arguments += ["--model", model, "--output", output]
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "convai_fast", "generate", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        preexec_fn=limit_file_size,
    )
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1] == (
        f"convai-fast generate: cannot write {output}.partial: File too large; what is there so "
        f"far is kept in {output}.partial, and the same command continues from there"
    )
    assert files(tmp_path) == ["replies.jsonl.partial", "requests.jsonl"]
    assert (tmp_path / "replies.jsonl.partial").stat().st_size == 3000
    assert generate(*ONE_BY_ONE, requests=MANY) == 0
    assert_same(tmp_path, undisturbed)


def test_what_was_begun_with_other_options_requests_or_weights_is_not_continued(
    generate, tmp_path, monkeypatch, capsys, tokenizer
):
    interrupt_after(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGINT))
    requests = [{"id": "a"}, {"id": "b"}]
    assert generate(*LENGTH, requests=requests) == 130
    before = (tmp_path / "replies.jsonl.partial").read_bytes()
    other_model = save_model(tmp_path / "other", tokenizer, seed=1)
    capsys.readouterr()
    for options, lines, named in [
        ((*LENGTH, "--temperature", 1), requests, "temperature"),
        ((*LENGTH, "--num_return", 2, "--token_ids"), requests, "token_ids, n"),
        ((*LENGTH, "--weights", "bfloat16"), requests, "weights"),
        (LENGTH, requests[:1], "input"),
    ]:
        assert generate(*options, requests=lines) == 2
        error = capsys.readouterr().err
        assert f".partial was begun with another {named}: delete it, or choose another" in error
    output = str(tmp_path / "replies.jsonl")
    arguments = ["--model", other_model, "--input", str(tmp_path / "requests.jsonl")]
    (tmp_path / "requests.jsonl").write_text('{"id": "a"}\n{"id": "b"}\n')
    assert main(["generate", *arguments, "--output", output, *LENGTH]) == 2
    assert "was begun with another model:" in capsys.readouterr().err
    assert (tmp_path / "replies.jsonl.partial").read_bytes() == before
    assert generate(*LENGTH, "--batch_size", 3, "--device", "cpu", requests=requests) == 0
