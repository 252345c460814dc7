"""The command `interact`: on a pipe, in a terminal, and with options that make no sense."""

import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest

from convai_fast.cli.line_editing import line_editing
from convai_fast.cli.main import main
from convai_fast.model import DoubleHeadsModel, TransformerConfig
from tests.helpers.command_line import standard_input
from tests.helpers.small_tokenizers import byte_tokenizer

COMMAND = [sys.executable, "-m", "convai_fast.cli.main", "interact"]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONUTF8": "1",
    "PYTHONWARNINGS": "ignore",  # an install without compiled operators says so on stderr
    "TERM": "dumb",
}
UTTERANCE = {"history": ["hi"], "candidates": ["hello"]}


def test_lines_from_a_pipe_are_answered_until_quit_and_not_kept(model_folder, tmp_path):
    options = ["--persona", "i like tea .", "--persona", "i have a cat .", "--min_length", "2"]
    lines = "hi , tea ?\n\n/persona\n/rank yes . | no .\n/foo\n/quit\nnot read\n"
    process = subprocess.run(
        [*COMMAND, "--model", str(model_folder), *options],
        input=lines.encode(),
        capture_output=True,
        env={**ENVIRONMENT, "XDG_STATE_HOME": str(tmp_path)},
        timeout=120,
    )
    assert (process.returncode, process.stderr) == (0, b"")
    assert not [*tmp_path.iterdir()]
    greeting, reply, empty, persona, rank, unknown, end = process.stdout.decode().split(">>> ")
    shown = "The model's persona:\n  i like tea .\n  i have a cat .\n"
    assert greeting == shown + "Write a line to talk; /help lists the commands, Ctrl-D ends.\n"
    assert len(reply.strip()) >= 2
    assert empty == "Nothing to reply to: write a line, or /help.\n"
    assert persona == shown
    assert sorted(line.split("  ")[-1] for line in rank.splitlines()) == ["no .", "yes ."]
    assert unknown == "/foo is not a command; /help lists them.\n"
    assert end == ""


def test_the_end_of_the_input_ends_it_and_a_bad_byte_does_not(model_folder, capsys):
    with standard_input(b"tea \xff\n"):
        assert main(["interact", "--model_checkpoint", str(model_folder)]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    assert output.startswith("The model has no persona.\nGive one with --persona")
    assert output.count(">>> ") == 2
    assert output.endswith(">>> \n")


def test_that_replies_are_cut_is_told_once(model_folder, capsys):
    with standard_input(b"hi\ntea ?\n"):
        options = ["--max_length", "4", "--min_length", "4"]
        assert main(["interact", "--model", str(model_folder), *options]) == 0
    output, errors = capsys.readouterr()
    assert errors == "(cut after 4 tokens: --max_length gives more)\n"
    assert output.count(" …\n") == 2


def test_a_line_too_long_and_a_reply_that_cannot_be_drawn_are_told(model_folder, capsys):
    options = ["--persona", "i like tea .", "--max_length", "200", "--min_length", "200"]
    options += ["--no_repeat_ngram_size", "1"]  # there are fewer tokens than that
    lines = f"{'tea ' * 400}\nhi\n{'tea ' * 307}\n"
    with standard_input(lines.encode()):
        assert main(["interact", "--model", str(model_folder), *options]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    _, too_long, short, almost, _ = output.split(">>> ")
    assert "of the beginning of your line)\n" in too_long
    assert "of the persona)\n" in almost
    assert "left out" not in short
    for answer in (too_long, short, almost):
        assert "\n(no token can be drawn, since no_repeat_ngram_size bans them all: " in answer
        assert answer.endswith("; the model forgets this turn)\n")


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *options, state):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *options],
            env={**ENVIRONMENT, "XDG_STATE_HOME": str(state)},
            preexec_fn=lambda: os.login_tty(slave),
        )
        os.close(slave)
        self.output = b""

    def wait_for(self, text, seconds=60):
        """Read on until `text` comes; return what stood before it."""
        deadline = time.monotonic() + seconds
        while text not in self.output:
            assert time.monotonic() < deadline, f"{text} did not come after {self.output}"
            if select.select([self.master], [], [], 0.1)[0]:
                self.output += os.read(self.master, 4096)
        before, _, self.output = self.output.partition(text)
        return before

    def type(self, text):
        os.write(self.master, text)


def test_in_a_terminal_keys_do_what_they_do_in_a_shell(model_folder, tmp_path):
    history = tmp_path / "convai_fast" / "history"
    history.parent.mkdir()
    history.write_text("/nothing\n")
    options = ["--max_length", "480", "--min_length", "480", "--no_personality"]
    terminal = Terminal("--model", str(model_folder), *options, state=tmp_path)
    try:
        terminal.wait_for(f"loading {model_folder} …\r\n".encode())
        assert b"The model has no persona." in terminal.wait_for(b">>> ")
        terminal.type(b"\x10\n")  # Ctrl-P: the line before, of an earlier session
        terminal.wait_for(b"/nothing is not a command")
        terminal.wait_for(b">>> ")
        terminal.type(b"tea ?\n")
        terminal.wait_for(b"tea ?\r\n")
        terminal.wait_for(b" ")  # between two words of the reply
        terminal.type(b"/pers")  # not echoed into the reply
        time.sleep(0.1)
        terminal.type(b"\x03")
        assert b"/pers" not in terminal.wait_for(b"(stopped; the model forgets this turn)\r\n")
        terminal.wait_for(b">>> ")
        terminal.type(b"/pers\t\n")
        terminal.wait_for(b"/persona\r\n")
        terminal.wait_for(b"The model has no persona.\r\n")
        terminal.wait_for(b">>> ")
        terminal.type(b"half a li")
        terminal.wait_for(b"half a li")
        # Python's readline loses a Ctrl-C that comes between two waits for a key, which nobody
        # types so fast as to meet, but a test does.
        time.sleep(0.5)
        terminal.type(b"\x03")
        terminal.wait_for(b"(Ctrl-D or /quit ends)\r\n")
        terminal.wait_for(b">>> ")
        terminal.type(b"\x04")
        assert terminal.process.wait(timeout=60) == 0
        assert b"Traceback" not in terminal.output
        assert history.read_text().splitlines() == ["/nothing", "tea ?", "/persona"]
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)


def test_a_history_that_cannot_be_read_or_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for state in ("file", "folder"):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / state))
        (tmp_path / "folder" / "convai_fast" / "history").mkdir(parents=True, exist_ok=True)
        with line_editing([]):
            pass
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "new"))
    with line_editing([]):
        pass
    assert (tmp_path / "new" / "convai_fast" / "history").is_file()


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return write


def error_of(capsys, *options):
    """The one sentence on stderr of a command that must fail as a user's mistake."""
    assert main(["interact", *map(str, options)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def test_a_mistake_in_the_options_is_one_sentence(model_folder, capsys, write):
    def error(*options):
        return error_of(capsys, "--model", model_folder, *options)

    assert "top_p is 1.5" in error("--top_p", 1.5)
    assert "--max_history must be at least 0, not -1" in error("--max_history", -1)
    assert "leaves no room for a prompt" in error("--max_length", 510)
    assert "--persona and --no_personality exclude" in error("--persona", "a", "--no_personality")
    assert "device nowhere" in error("--device", "nowhere")
    assert "/nope.txt" in error("--persona_file", "/nope.txt")
    assert "is empty" in error("--persona_file", write("empty", b" \n"))
    assert "not UTF-8" in error("--persona_file", write("latin", b"na\xefve"))
    assert "is UTF-16" in error("--persona_file", write("utf16", "naïve".encode("utf-16")))
    silent = write(
        "silent.json", b'{"train": [{"utterances": [{"history": [], "candidates": ["a"]}]}]}'
    )
    assert "has a persona" in error("--dataset_path", silent)


def test_a_missing_model_and_one_without_the_special_tokens_are_named(capsys, tmp_path):
    assert str(tmp_path / "no_model") in error_of(capsys, "--model", tmp_path / "no_model")
    plain = byte_tokenizer()
    config = TransformerConfig.from_transformers(
        dict(model_type="gpt2", vocab_size=len(plain), n_embd=8, n_layer=1, n_head=1)
    )
    DoubleHeadsModel(config).save_pretrained(tmp_path, plain)
    assert "`convai-fast train` first" in error_of(capsys, "--model", tmp_path)


def test_the_persona_comes_from_a_file_or_at_random_from_a_dataset(
    model_folder, write, capsys, monkeypatch
):
    def greeting(*options):
        monkeypatch.setattr("convai_fast.cli.interact.chat", lambda conversation: None)
        assert main(["interact", "--model", str(model_folder), *options]) == 0
        return capsys.readouterr().out

    persona_file = write("persona.txt", "i am old .\n\n  i am naïve .\n".encode())
    assert "\n  i am old .\n  i am naïve .\nWrite" in greeting("--persona_file", persona_file)
    of_notepad = write(
        "bom.txt", b"\xef\xbb\xbfi am old .\r\n\xe2\x80\x8b\r\ni am na\xc3\xafve .\r\n"
    )
    assert greeting("--persona_file", of_notepad) == greeting("--persona_file", persona_file)

    dialogues = [{"personality": [f"i am {i} ."], "utterances": [UTTERANCE]} for i in range(9)]
    dataset = write("data.json", json.dumps(dialogues).encode())
    shown = {greeting("--dataset_path", dataset, "--seed", str(seed)) for seed in range(6)}
    assert len(shown) > 1
    assert "no persona" in greeting("--dataset_path", dataset, "--no_personality")
    given = greeting("--dataset_path", dataset, "--persona", "i like tea .")
    assert given.startswith("The model's persona:\n  i like tea .\nWrite")
