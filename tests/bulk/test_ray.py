"""Replies by the actors of a Ray cluster of this machine, whose processes are killed meanwhile."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convai_fast.bulk.reply_file import ReplyFile
from convai_fast.cli.main import main
from convai_fast.errors import UserError
from convai_fast.generation.params import SamplingParams
from tests.helpers.bulk_files import read_lines, save_model, write_lines

ray = pytest.importorskip("ray", reason="needs ray: pip install 'convai-fast[ray]'")
pytestmark = pytest.mark.ray

SESSION = f"CONVAI_FAST_TEST={os.getpid()}"  # in the environment of all processes of the cluster
REQUESTS = [
    {"id": f"{i}", "history": ["hello !"] * (1 + i % 3), "n": 1 + i % 2} for i in range(300)
]
REQUESTS[7] = "oops"
REQUESTS[11]["history"] = [" "]
REQUESTS[13]["history"] = [[1, 100_000]]
OPTIONS = ["--max_length", "12", "--min_length", "12", "--batch_size", "4", "--logprobs"]
ON_RAY = [*OPTIONS, "--ray", "--ray_actors", "2"]
PARAMS = SamplingParams(max_length=12, min_length=12, logprobs=True)


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), tokenizer)


@pytest.fixture(scope="module")
def cluster():
    """Its address: four cores by name, on as many as there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*SESSION.split("="))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        context = ray.init(num_cpus=4, log_to_driver=False, object_store_memory=200 << 20)
        yield context.address_info["address"]
        ray.shutdown()


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    """The replies of a run without Ray, and its bad lines."""
    folder = tmp_path_factory.mktemp("undisturbed")
    given = ["--input", write_lines(folder / "requests.jsonl", *REQUESTS), *OPTIONS]
    assert main(["generate", "--model", model, "--output", str(folder / "replies"), *given]) == 0
    return [(folder / name).read_bytes() for name in ("replies", "replies.errors.jsonl")]


@pytest.fixture
def arguments(model, tmp_path):
    requests = write_lines(tmp_path / "requests.jsonl", *REQUESTS)
    output = str(tmp_path / "replies")
    return ["generate", "--model", model, "--input", requests, "--output", output, *ON_RAY]


def found(folder):
    return [(folder / name).read_bytes() for name in ("replies", "replies.errors.jsonl")]


def actors():
    """The processes of the actors of this cluster, which have an engine or begin one."""
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name = (process / "cmdline").read_bytes()
            is_ours = SESSION.encode() in (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if is_ours and b"Writer" in name:
            pids.append(int(process.name))
    return pids


def test_actors_that_are_killed_lose_nothing_and_replies_are_those_of_one_process(
    cluster, arguments, tmp_path, undisturbed, monkeypatch, capsys
):
    added, killed, add = [], [], ReplyFile.add

    def killing(self, number, record):
        add(self, number, record)
        added.append(record["id"])
        if len(added) in (1, 60, 140):
            killed.append(random.choice(actors()))
            os.kill(killed[-1], signal.SIGKILL)

    monkeypatch.setattr(ReplyFile, "add", killing)
    assert main(arguments) == 0
    assert len(set(killed)) == 3
    assert len(added) == len(set(added)) == 297
    assert found(tmp_path) == undisturbed
    assert "3 bad lines: " in capsys.readouterr().out
    assert ray.is_initialized()  # by the caller, who still needs it
    deadline = time.monotonic() + 20
    while actors():
        assert time.monotonic() < deadline, "actors outlive their run"
        time.sleep(0.1)


def test_a_driver_that_is_killed_is_continued_and_repeats_nothing_that_was_done(
    cluster, arguments, tmp_path, undisturbed, capsys
):
    partial = tmp_path / "replies.partial"

    def num_answered():
        return max(0, partial.read_bytes().count(b"\n") - 1) if partial.exists() else 0

    environment = {**os.environ, "RAY_ADDRESS": cluster}
    driver = subprocess.Popen([sys.executable, "-m", "convai_fast", *arguments], env=environment)
    while num_answered() < 40:
        assert driver.poll() is None
        time.sleep(0.001)
    driver.kill()
    driver.wait()
    before = num_answered()
    assert 40 <= before < 297
    assert not (tmp_path / "replies").exists()
    done = read_lines(partial)[1 : before + 1]
    assert main(arguments) == 0
    assert f"(and those to {before} requests before)" in capsys.readouterr().out
    assert found(tmp_path) == undisturbed
    answered = {record["id"]: record for record in read_lines(tmp_path / "replies")}
    assert all({**record, **answered[record["id"]]} == record for record in done)


def test_a_run_goes_on_with_ray_or_without(cluster, arguments, tmp_path, undisturbed, monkeypatch):
    add = ReplyFile.add

    def stopping(self, number, record):
        add(self, number, record)
        if self.num_replies == 100:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ReplyFile, "add", stopping)
        assert main(arguments) == 130
    assert main([word for word in arguments if word not in ("--ray", "--ray_actors", "2")]) == 0
    assert found(tmp_path) == undisturbed


def test_a_model_that_no_actor_can_hold_and_a_cluster_without_room_are_one_sentence(
    cluster, arguments, capsys
):
    assert main([*arguments, "--ray_cpus", "64"]) == 2
    assert capsys.readouterr().err.endswith(
        "an actor with --ray_cpus 64 and --ray_gpus 0 has no room in the cluster, which has 4 "
        "cores and 0 GPUs: give it less\n"
    )
    assert main(["5000" if word == "4" else word for word in arguments]) == 2
    error = capsys.readouterr().err
    assert "an actor of the Ray cluster cannot go on (max_batch_size is 5000, but must" in error
    assert error.count("\n") == 1


def write_dataset(model, folder):
    """Write the replies to rows in Parquet, but for those of which there are some already."""
    from ray.data.checkpoint import CheckpointConfig

    from convai_fast.bulk.ray import Actors, generate

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.checkpoint_config = CheckpointConfig("id", str(folder / "checkpoint"))
    dataset = ray.data.read_json(str(folder / "requests"))
    replies = generate(dataset, model, PARAMS, Actors(2, max_batch_size=4))
    replies.write_parquet(str(folder / "replies"))


def test_a_dataset_whose_driver_is_killed_is_continued_and_gets_the_replies_of_the_command(
    cluster, model, tmp_path, undisturbed
):
    (tmp_path / "requests").mkdir()
    rows = [row for row in REQUESTS if row != "oops" and row["history"] != [[1, 100_000]]]
    for first in range(0, len(rows), 50):
        write_lines(tmp_path / "requests" / f"{first}.jsonl", *rows[first : first + 50])
    program = (
        "import pathlib, sys, ray; from tests.bulk.test_ray import write_dataset; "
        "ray.init(log_to_driver=False); write_dataset(sys.argv[1], pathlib.Path(sys.argv[2]))"
    )
    environment = {**os.environ, "RAY_ADDRESS": cluster}
    driver = subprocess.Popen([sys.executable, "-c", program, model, tmp_path], env=environment)

    def written():
        """Files of replies that are complete, as Ray knows by those of their ids."""
        parts = [path.stem for path in (tmp_path / "checkpoint").glob("*.parquet")]
        return [path for part in parts for path in (tmp_path / "replies").glob(f"{part}-*")]

    while len(written()) < 3:
        assert driver.poll() is None
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    before = {path: path.read_bytes() for path in written()}
    write_dataset(model, tmp_path)
    assert {path: path.read_bytes() for path in before} == before
    table = ray.data.read_parquet(str(tmp_path / "replies")).take_all()
    assert sorted(row["id"] for row in table) == sorted(row["id"] for row in rows)
    answered = {row["id"]: row for row in table}
    assert answered["11"]["error"] == "history[0] is blank: leave it out"
    for line in undisturbed[0].splitlines():
        record = json.loads(line)
        theirs = answered[record["id"]]["replies"]
        assert [
            (reply["text"], reply["finish_reason"], [round(each, 6) for each in reply["logprobs"]])
            for reply in theirs
        ] == [(r["text"], r["finish_reason"], r["logprobs"]) for r in record["replies"]]


def test_a_dataset_without_ids_is_refused(cluster, model):
    from convai_fast.bulk.ray import generate

    with pytest.raises(UserError, match="the dataset has no column id: give each row one"):
        generate(ray.data.from_items([{"history": ["hello !"]}]), model)
