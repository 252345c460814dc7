"""A run that was killed and continued ends as one that was not; what cannot continue is refused."""

import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from interruptions import assert_equal_runs, die_at, in_a_process, records

from convai_fast.cli.main import main
from convai_fast.errors import UserError
from convai_fast.training import checkpoints, loop, run_folder, step
from convai_fast.training.evaluation import MetricSums
from convai_fast.training.options import TrainOptions
from convai_fast.training.resume import resume_command as resume_command_of

STEPS = 14  # of `run_options`: two epochs of 7


@pytest.fixture(scope="module")
def run_options(model_folder, data_file, tmp_path_factory):
    """Dropout, accumulation, and saving and logging at steps that fall together only sometimes."""
    return TrainOptions(
        model=str(model_folder),
        from_scratch=True,
        dataset_path=str(data_file),
        dataset_cache=str(tmp_path_factory.mktemp("cache")),
        precision="fp32",
        device="cpu",
        n_epochs=2,
        train_batch_size=2,
        gradient_accumulation_steps=3,
        valid_batch_size=6,
        lr=1e-2,
        eval_before_start=True,
        log_every=3,
        save_every=2,
    )


@pytest.fixture(scope="module")
def undisturbed(run_options, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    result = loop.train(dataclasses.replace(run_options, output=str(run)), lambda _: None)
    assert result.steps == STEPS
    return run


@pytest.fixture
def killed(undisturbed, tmp_path):
    """A run in the middle of its second epoch; a copy of one that is at rest serves as well."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run, symlinks=True)
    return run


def resume_command(run, *arguments):
    command = [sys.executable, "-m", "convai_fast", "train", "--resume", str(run), *arguments]
    # As many threads as the tests have: how a product is shared out changes its rounding.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize(
    ("target", "name", "call"),
    [
        (MetricSums, "add", 2),  # evaluating before the first step
        (step, "combined_loss", 23),  # a step half accumulated
        (MetricSums, "add", 6),  # evaluating after an epoch
        (checkpoints.torch, "save", 4),  # of the checkpoint after an epoch
        (checkpoints.torch, "save", 9),  # of the same step once more, when it is evaluated
        (run_folder.os, "rename", 3),
        (run_folder.RunFolder, "_point", 1),  # before there is any link
        (run_folder.RunFolder, "_point", 2),  # between `last` and `best`
        (run_folder.RunFolder, "_point", 10),
        (checkpoints.os, "replace", 19),
        (run_folder.shutil, "rmtree", 9),
    ],
)
def test_killed_at_a_chosen_moment(run_options, undisturbed, tmp_path, target, name, call):
    options = dataclasses.replace(run_options, output=str(tmp_path / "run"))
    process = in_a_process(options, lambda: die_at(target, name, call))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    loop.train(TrainOptions(resume=str(tmp_path / "run")), lambda _: None)
    assert_equal_runs(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_again_and_again_at_random_moments(run_options, undisturbed, tmp_path, seed):
    options = dataclasses.replace(run_options, output=str(tmp_path / "run"), resume="auto")
    draw, kills = random.Random(seed), 0
    while True:
        process = in_a_process(options)
        process.join((1 + kills / 4) * 0.1 * draw.random())  # longer and longer: it must end
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0
    assert kills > 0
    assert_equal_runs(tmp_path / "run", undisturbed)


def test_the_command_line_continues_a_killed_run(run_options, undisturbed, tmp_path):
    run = tmp_path / "run"
    options = dataclasses.replace(run_options, output=str(run))
    process = in_a_process(options, lambda: die_at(checkpoints.torch, "save", 2))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    result = resume_command(run)
    assert result.returncode == 0, result.stderr
    assert "continuing after step" in result.stdout
    assert_equal_runs(run, undisturbed)


@pytest.mark.parametrize("moment", ["combined_loss", "add"])
def test_a_signal_within_a_step_or_an_evaluation_saves_and_says_how_to_go_on(
    run_options, undisturbed, tmp_path, monkeypatch, moment
):
    target, call = {"combined_loss": (step, 23), "add": (MetricSums, 6)}[moment]
    function, calls = getattr(target, moment), []

    def signalled(*args):
        calls.append(moment)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args)

    monkeypatch.setattr(target, moment, signalled)
    said, run = [], tmp_path / "run"
    options = dataclasses.replace(run_options, output=str(run), save_every=0)
    result = loop.train(options, said.append)
    assert result.stopped_by == signal.SIGTERM
    assert len(calls) == call  # not one batch more
    assert said[-1] == f"continue with: convai-fast train --resume {run}"
    loop.train(TrainOptions(resume=str(run)), lambda _: None)
    assert_equal_runs(run, undisturbed)


def test_a_full_disk_is_one_sentence_and_loses_nothing_before_it(
    run_options, undisturbed, tmp_path, monkeypatch
):
    fsync, run = os.fsync, tmp_path / "run"

    def full(descriptor):
        if (run / "checkpoints" / ".step-000006").exists():
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left") as raised:
        patch.setattr(checkpoints.os, "fsync", full)
        loop.train(dataclasses.replace(run_options, output=str(run)), lambda _: None)
    assert "step 6 cannot be saved" in str(raised.value)
    assert "make room" in str(raised.value)
    assert not (run / "checkpoints" / ".step-000006").exists()
    assert json.loads((run / "last" / "metrics.json").read_text())["step"] == 4
    loop.train(TrainOptions(resume=str(run)), lambda _: None)
    assert_equal_runs(run, undisturbed)


def tree(run):
    return {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("left", [None, "dangling"])
def test_a_run_that_lost_its_links_continues_from_its_newest_checkpoint(
    killed, undisturbed, left, capsys
):
    for link in ("last", "best"):
        (killed / link).unlink()
        if left:
            (killed / link).symlink_to("/absent/step-000014")
    assert main(["train", "--resume", str(killed)]) == 0
    assert "this run is finished, with 14 steps" in capsys.readouterr().out
    assert_equal_runs(killed, undisturbed)


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


def test_a_best_checkpoint_that_was_deleted_leaves_no_link(killed):
    best, path = killed / "best", killed / "last" / checkpoints.STATE_FILE
    state = torch.load(path)
    state["progress"]["best_step"] = 7
    torch.save(state, path)
    best.unlink()
    best.symlink_to("checkpoints/step-000007")
    loop.train(TrainOptions(resume=str(killed)), lambda _: None)
    assert not best.is_symlink()
    assert (killed / "last").is_dir()


def test_a_finished_run_says_so_and_changes_nothing(killed, undisturbed, capsys):
    assert main(["train", "--resume", str(killed)]) == 0
    printed = capsys.readouterr().out
    assert "this run is finished, with 14 steps" in printed
    assert "tokens/s" not in printed
    assert_equal_runs(killed, undisturbed)


def test_steps_of_earlier_processes_do_not_count_in_the_speed_of_the_bar(killed, monkeypatch):
    done = json.loads((killed / "last" / "metrics.json").read_text())["step"]
    bars, progress_bar = [], loop.progress_bar

    def noted(*arguments, **settings):
        bars.append(settings)
        return progress_bar(*arguments, **settings)

    monkeypatch.setattr(loop, "progress_bar", noted)
    options = TrainOptions(resume=str(killed), max_steps=0, n_epochs=4)
    loop.train(options, lambda _: None)
    assert next(bar for bar in bars if bar["unit"] == "step")["initial"] == done


def test_a_finished_run_can_be_made_longer(killed):
    result = loop.train(TrainOptions(resume=str(killed), max_steps=0, n_epochs=4), lambda _: None)
    assert result.steps == 2 * STEPS
    assert json.loads((killed / "options.json").read_text())["n_epochs"] == 4
    assert records(killed)[-1]["step"] == 2 * STEPS


def test_options_given_anew_may_not_contradict_the_run(killed, capsys):
    assert main(["train", "--resume", str(killed), "--train-batch-size=2", "--lr", "0.01"]) == 0
    before = (killed / "options.json").read_text()
    # 6.25e-05 is the default: what is named counts, were it as the default.
    assert main(["train", "--resume", str(killed), "--lr", "6.25e-05"]) == 2
    message = capsys.readouterr().err
    assert "--lr 6.25e-05 contradicts the run" in message
    assert "which has 0.01" in message
    assert main(["train", "--resume", str(killed), "--output", "elsewhere"]) == 2
    assert (killed / "options.json").read_text() == before


def chosen(options):
    with run_folder.Claim() as claim:
        return loop.resolve_resume(options, None, claim).resume


def test_auto_takes_the_newest_unfinished_run_with_these_options(
    run_options, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("finished", "other", "older", "newer"):
        options = dataclasses.replace(run_options, output=f"runs/{name}", max_steps=1)
        options.lr = 0.5 if name == "other" else options.lr
        loop.train(options, lambda _: None)
        metrics = Path("runs", name, "last", "metrics.json")
        metrics.write_text(json.dumps({"finished": name == "finished"}))
    for age, name in enumerate(("finished", "other", "newer", "older")):
        os.utime(f"runs/{name}/options.json", (1e9 - age, 1e9 - age))
    auto = dataclasses.replace(run_options, resume="auto")
    assert chosen(auto) == "runs/newer"
    with open("runs/newer/metrics.jsonl") as file:
        assert run_folder.try_lock(file.fileno())  # as by a process that trains there
        assert chosen(auto) == "runs/older"
        with pytest.raises(UserError, match="another process is training in runs/newer"):
            loop.train(TrainOptions(resume="runs/newer"), lambda _: None)
    assert chosen(dataclasses.replace(auto, seed=9)) == ""
    assert chosen(dataclasses.replace(auto, dataset_path=("b.json",))) == ""
    assert chosen(dataclasses.replace(auto, output="runs/new")) == ""


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


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
        (Path.unlink, "options.json", "is not a run folder"),
        (cut_short, "options.json", "options.json is not JSON"),
        (lambda p: edit(p, num_candidates=3), "options.json", "with another --num_candidates"),
        (lambda p: edit(p, lr="high"), "options.json", "lr cannot be 'high'"),
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


def test_a_run_can_be_made_in_the_empty_folder_it_is_started_in(run_options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loop.train(dataclasses.replace(run_options, output=".", max_steps=1), lambda _: None)
    assert Path("last", "model.safetensors").is_file()


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


def failing(name, number, when=lambda path: True):
    """A stand-in for a function of `os` or `open` that fails for some paths."""
    function = open if name == "open" else getattr(os, name)

    def fail(path, *args, **kwargs):
        if when(str(path)):
            raise OSError(number, os.strerror(number), str(path))
        return function(path, *args, **kwargs)

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("file", ["metrics.jsonl", "options.json"])
def test_a_run_that_cannot_be_written_is_one_sentence(killed, monkeypatch, file, number):
    before = tree(killed)
    stand_in = failing("open", number, lambda path: path.endswith(file) and "run" in path)
    for module in (run_folder, checkpoints):
        monkeypatch.setattr(module, "open", stand_in, raising=False)
    says = rf"the run .* cannot be written \({os.strerror(number)}: .*{file}\): (make|get) .*, then"
    with pytest.raises(UserError, match=says):
        loop.train(TrainOptions(resume=str(killed), n_epochs=3), lambda _: None)
    assert tree(killed) == before
    monkeypatch.undo()
    loop.train(TrainOptions(resume=str(killed), n_epochs=3), lambda _: None)


def test_a_full_disk_while_a_run_begins_or_is_logged_is_one_sentence(
    run_options, tmp_path, monkeypatch
):
    options = dataclasses.replace(run_options, output=str(tmp_path / "run"))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot be made"):
        patch.setattr(checkpoints, "open", failing("open", errno.ENOSPC), raising=False)
        loop.train(options, lambda _: None)
    assert not any(tmp_path.iterdir())
    trainer_log = run_folder.RunFolder.log

    def log(self, *args):
        self._metrics.close()
        self._metrics = open("/dev/full", "w")  # noqa: SIM115
        trainer_log(self, *args)

    monkeypatch.setattr(run_folder.RunFolder, "log", log)
    with pytest.raises(UserError, match=r"cannot record the figures of step 0 \(No space left"):
        loop.train(options, lambda _: None)


def test_a_file_system_without_links_is_named_before_the_first_step(
    run_options, tmp_path, monkeypatch
):
    def refuse(*_, **__):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    options = dataclasses.replace(run_options, output=str(tmp_path / "linkless"))
    with pytest.raises(UserError, match="no symbolic link can be made in"):
        loop.train(options, lambda _: None)


def test_two_runs_that_begin_in_one_second_have_two_folders(run_options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: "20260101-000000")
    paths = [run_folder.RunFolder(run_options).path for _ in range(3)]
    first = paths[0].name
    assert [path.name for path in paths] == [first, f"{first}-2", f"{first}-3"]
    assert all((path / "options.json").is_file() for path in paths)
    assert {path.name for path in Path("runs").iterdir()} == {path.name for path in paths}


def test_only_checkpoints_of_its_own_are_removed(killed, capsys, monkeypatch):
    folder = killed / "checkpoints"
    shutil.copytree(folder / "step-000014", folder / "my-backup")
    (folder / ".DS_Store").write_text("")
    (folder / "step-000003").write_text("notes")
    (folder / "step-000004").symlink_to("my-backup")
    for name in (".step-000001", "step-000002"):
        (folder / name).mkdir()
    kept = {p.name for p in folder.iterdir()} - {".step-000001", "step-000002"}
    loop.train(TrainOptions(resume=str(killed)), lambda _: None)
    assert {p.name for p in folder.iterdir()} == kept
    (folder / "step-000002").mkdir()
    broken = SimpleNamespace(rmtree=failing("rmdir", errno.ENOTEMPTY))
    monkeypatch.setattr(run_folder, "shutil", broken)
    loop.train(TrainOptions(resume=str(killed)), lambda _: None)
    assert "step-000002 cannot be removed: Directory not empty" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_says_that_it_begins_anew(run_options, tmp_path, capsys):
    options = dataclasses.replace(run_options, output=str(tmp_path / "run"))
    process = in_a_process(options, lambda: die_at(step, "combined_loss", 2))
    process.join()
    assert main(["train", "--resume", str(tmp_path / "run"), "--max_steps", "1"]) == 0
    assert "nothing was saved in this run yet: beginning it anew" in capsys.readouterr().out
