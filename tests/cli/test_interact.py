import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import GPT2Tokenizer, OpenAIGPTTokenizer

from convai_fast.cli.interact import Conversation, stream_text
from convai_fast.cli.main import main
from convai_fast.dialogue.encoding import encode
from convai_fast.dialogue.tokenizer import load_tokenizer
from convai_fast.evaluation.ranking import rank_candidates
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.params import SamplingParams
from convai_fast.model import DoubleHeadsModel, TransformerConfig

COMMAND = [sys.executable, "-m", "convai_fast.cli.main", "interact"]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONUTF8": "1",
    "PYTHONWARNINGS": "ignore",  # an install without compiled operators says so on stderr
    "TERM": "dumb",
}
UTTERANCE = {"history": ["hi"], "candidates": ["hello"]}
PERSONA = ["i like tea .", "i have a cat ."]


def gpt_tokenizer():
    """Letters and a few words, in OpenAI GPT's manner: </w> marks the end of a word."""
    letters = "abcdefghijklmnopqrstuvwxyz.,?'"
    pieces = ["<unk>", *letters, *(letter + "</w>" for letter in letters)]
    pieces += ["te", "tea</w>", "li", "ke</w>", "like</w>"]
    merges = [("t", "e"), ("te", "a</w>"), ("l", "i"), ("k", "e</w>"), ("li", "ke</w>")]
    return OpenAIGPTTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)


def byte_tokenizer():
    """A token a byte, in GPT-2's alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return GPT2Tokenizer(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    gpt_tokenizer().save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(0)
    config = TransformerConfig.from_transformers(
        dict(model_type="openai-gpt", vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4)
    )
    DoubleHeadsModel(config).save_pretrained(folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return load_tokenizer(model_folder)


@pytest.fixture(scope="module")
def engine(model_folder, tokenizer):
    return GenerationEngine(DoubleHeadsModel.from_pretrained(model_folder), tokenizer)


@pytest.fixture
def conversation(engine, tokenizer):
    return Conversation(
        engine,
        tokenizer,
        SamplingParams(max_length=8, min_length=4, temperature=2),
        persona=PERSONA,
        personas=[["i am a dog ."], ["i am a fox ."]],
        max_history=1,
    )


def say(conversation, line):
    return "".join(conversation.handle(line))


def prompts_seen(conversation, monkeypatch):
    """Every (persona, history) that the engine is asked about from here on."""
    seen = []
    stream = GenerationEngine.stream

    def spy(self, request):
        seen.append((request.persona, request.history))
        return stream(self, request)

    monkeypatch.setattr(GenerationEngine, "stream", spy)
    return seen


# --- the text of a reply ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (gpt_tokenizer(), "i like tea , do you ? yes ."),
        (byte_tokenizer(), "I don't: naïve 日本 🙂👩‍👧\ttoo\n ok"),
    ],
)
def test_pieces_join_to_the_text_and_never_show_half_a_character(tokenizer, text):
    ids, seen = tokenizer.encode(text), []
    pieces = list(stream_text(tokenizer, ids, seen))
    assert "".join(pieces) == text
    assert all(piece and "�" not in piece for piece in pieces)
    assert seen == ids


def test_a_piece_is_shown_as_soon_as_its_token_comes():
    tokenizer = gpt_tokenizer()
    assert list(stream_text(tokenizer, tokenizer.encode("i like tea ."), [])) == [
        "i",
        " like",
        " tea",
        " .",
    ]


def test_a_character_cut_off_by_the_end_of_the_reply_is_left_out():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("tea 日")
    assert "".join(stream_text(tokenizer, ids[:-1], [])) == "tea "


def test_bytes_that_are_no_character_are_shown_as_one_replacement():
    tokenizer = byte_tokenizer()
    ids = [*tokenizer.encode("日")[:2], *tokenizer.encode("tea")]
    assert "".join(stream_text(tokenizer, ids, [])) == "�tea"


def test_spaces_are_not_tidied_away_where_a_tokenizers_file_asks_for_it():
    tokenizer = gpt_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    ids = tokenizer.encode("i like tea , do you ?")
    assert "".join(stream_text(tokenizer, ids, [])) == "i like tea , do you ?"


def test_spaces_in_front_of_the_first_word_are_left_out():
    tokenizer = byte_tokenizer()
    assert "".join(stream_text(tokenizer, tokenizer.encode("  tea"), [])) == "tea"


def test_a_reply_cannot_drive_the_terminal():
    tokenizer = byte_tokenizer()
    assert "".join(stream_text(tokenizer, tokenizer.encode("a\x1b[2J\r\x07b"), [])) == "a�[2J��b"


# --- a conversation -----------------------------------------------------------------------------


def test_a_reply_is_the_engines_and_ends_the_line(conversation, engine, tokenizer, monkeypatch):
    seen = prompts_seen(conversation, monkeypatch)
    printed = say(conversation, "hi , do you like tea ?")
    persona, history = seen[0]
    assert persona == encode(tokenizer, PERSONA)
    assert history == encode(tokenizer, ["hi , do you like tea ?"])
    assert printed == tokenizer.decode(conversation.history[-1], skip_special_tokens=True) + "\n"
    assert 4 <= len(conversation.history[-1]) <= 8


def test_the_model_sees_the_last_turns_within_max_history(conversation, monkeypatch):
    seen = prompts_seen(conversation, monkeypatch)
    for line in ("a", "b", "c"):
        say(conversation, line)
    assert [len(history) for _, history in seen] == [1, 3, 3]
    assert seen[2][1][:2] == conversation.history[2:4]


def test_an_abandoned_reply_is_forgotten_with_its_question(conversation):
    say(conversation, "hi")
    history = list(conversation.history)
    pieces = conversation.handle("do you like tea ?")
    next(pieces)
    pieces.close()
    assert conversation.history == history
    interrupted = say(conversation, "do you like tea ?")
    assert len(conversation.history) == 4
    say(conversation, "/seed 42")
    say(conversation, "/reset")
    say(conversation, "hi")
    assert say(conversation, "do you like tea ?") == interrupted


def test_turns_differ_but_a_seed_repeats_them(conversation):
    def replies():
        out = []
        for _ in range(3):
            say(conversation, "/reset")
            out.append(say(conversation, "hi"))
        return out

    first = replies()
    assert len(set(first)) == 3
    assert say(conversation, "/seed 42") == "Drawing from the start with seed 42.\n"
    assert replies() == first
    say(conversation, "/seed 43")
    assert replies() != first


def test_a_turn_computes_what_is_new_and_what_was_interrupted_only_once(model_folder, tokenizer):
    model, computed = DoubleHeadsModel.from_pretrained(model_folder), []
    model.transformer.register_forward_pre_hook(
        lambda module, args: computed.append(args[0].numel())
    )
    conversation = Conversation(
        GenerationEngine(model, tokenizer, max_batch_size=1),
        tokenizer,
        SamplingParams(max_length=6, min_length=6),
        persona=PERSONA,
        max_history=5,
    )
    say(conversation, "hi")
    assert computed[0] > 10
    assert computed[1:] == [1] * 5
    for line in ("i like tea .", "do you ?"):
        computed.clear()
        say(conversation, line)
        # The reply's last token, <speaker2>, the line and <speaker1>.
        assert computed == [3 + len(encode(tokenizer, [line])[0]), *[1] * 5]
    pieces = conversation.handle("tea ?")
    next(pieces)
    pieces.close()
    computed.clear()
    say(conversation, "tea ?")
    assert computed == [1] * 6


def test_rank_orders_candidates_as_replies_to_the_users_last_line(conversation, engine, tokenizer):
    say(conversation, "do you like tea ?")
    candidates = ["yes .", "no , i like a cat .", "do you ?"]
    scores = rank_candidates(
        engine.model,
        engine.special_ids,
        encode(tokenizer, PERSONA),
        encode(tokenizer, ["do you like tea ?"]),
        encode(tokenizer, candidates),
    )
    expected = [
        f"  {scores[i].exp():.3f}  {candidates[i]}" for i in scores.argsort(descending=True)
    ]
    assert say(conversation, "/rank " + " | ".join(candidates)).splitlines() == expected
    assert len(conversation.history) == 2


def test_rank_takes_openings_before_anything_is_said(conversation):
    assert say(conversation, "/rank hello |hi").count("\n") == 2
    assert say(conversation, "/rank hello") == "  1.000  hello\n"
    assert "/rank takes candidates" in say(conversation, "/rank  | ")


def test_a_new_persona_starts_a_new_conversation(conversation, monkeypatch):
    say(conversation, "hi")
    assert say(conversation, "/persona") == (
        "The model's persona:\n  i like tea .\n  i have a cat .\n"
    )
    assert len(conversation.history) == 2  # showing it changes nothing
    assert say(conversation, "/persona i am old .|i am a cook . |") == (
        "The model's persona:\n  i am old .\n  i am a cook .\n"
    )
    assert conversation.history == []
    seen = prompts_seen(conversation, monkeypatch)
    say(conversation, "hi")
    assert seen[0][0] == encode(conversation.tokenizer, ["i am old .", "i am a cook ."])


def test_a_random_persona_is_one_of_the_datasets_and_depends_on_the_seed(conversation):
    say(conversation, "hi")
    first = [say(conversation, "/persona random") for _ in range(20)]
    assert conversation.history == []
    assert {persona.splitlines()[1] for persona in first} == {"  i am a dog .", "  i am a fox ."}
    say(conversation, "/seed 42")
    assert [say(conversation, "/persona random") for _ in range(20)] == first


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("", "Nothing to reply to"),
        ("   ", "Nothing to reply to"),
        ("/nonsense", "/nonsense is not a command; /help lists them."),
        ("/ hello", "/ is not a command"),
        ("/seed", "/seed takes a whole number"),
        ("/seed tea", "/seed takes a whole number"),
        ("/seed -1", "seed is -1, but must be"),
        ("/help", "/rank"),
    ],
)
def test_a_line_that_is_no_turn_is_answered_and_not_remembered(conversation, line, answer):
    assert answer in say(conversation, line)
    assert conversation.history == []
    assert not conversation.ended


@pytest.mark.parametrize("line", ["/quit", "/exit", " /quit "])
def test_quit_ends_the_conversation(conversation, line):
    assert say(conversation, line) == ""
    assert conversation.ended


# --- the command --------------------------------------------------------------------------------


def interact(model_folder, *options, lines):
    return subprocess.run(
        [*COMMAND, "--model", str(model_folder), *options],
        input=lines.encode(),
        capture_output=True,
        env=ENVIRONMENT,
        timeout=120,
    )


def test_lines_from_a_pipe_are_answered_until_quit(model_folder):
    options = ["--persona", "i like tea .", "--persona", "i have a cat .", "--min_length", "2"]
    lines = "hi , tea ?\n\n/persona\n/rank yes . | no .\n/foo\n/quit\nnot read\n"
    process = interact(model_folder, *options, lines=lines)
    assert (process.returncode, process.stderr) == (0, b"")
    greeting, reply, empty, persona, rank, unknown, end = process.stdout.decode().split(">>> ")
    shown = "The model's persona:\n  i like tea .\n  i have a cat .\n"
    assert greeting == shown + "Write a line to talk; /help lists the commands, Ctrl-D ends.\n"
    assert len(reply.strip()) >= 2
    assert empty == "Nothing to reply to: write a line, or /help.\n"
    assert persona == shown
    assert sorted(line.split("  ")[-1] for line in rank.splitlines()) == ["no .", "yes ."]
    assert unknown == "/foo is not a command; /help lists them.\n"
    assert end == ""


def test_the_end_of_the_input_ends_it_and_a_bad_byte_does_not(model_folder):
    process = subprocess.run(
        [*COMMAND, "--model_checkpoint", str(model_folder)],
        input=b"tea \xff\n",
        capture_output=True,
        env=ENVIRONMENT,
        timeout=120,
    )
    assert (process.returncode, process.stderr) == (0, b"")
    output = process.stdout.decode()
    assert output.startswith("The model has no persona.\nGive one with --persona")
    assert output.count(">>> ") == 2
    assert output.endswith(">>> \n")


def test_a_line_too_long_and_a_reply_that_cannot_be_drawn_are_told(model_folder):
    options = ["--persona", "i like tea .", "--max_length", "200", "--min_length", "200"]
    options += ["--no_repeat_ngram_size", "1"]  # there are fewer tokens than that
    lines = f"{'tea ' * 400}\nhi\n{'tea ' * 307}\n"
    process = interact(model_folder, *options, lines=lines)
    assert (process.returncode, process.stderr) == (0, b"")
    _, too_long, short, almost, _ = process.stdout.decode().split(">>> ")
    assert too_long.startswith("(the beginning of your line was left out to fit)\n")
    assert almost.startswith("(some of the persona was left out to fit)\n")
    assert "left out" not in short
    for answer in (too_long, short, almost):
        assert "\n(no token can be drawn, since no_repeat_ngram_size bans them all: " in answer
        assert answer.endswith("; the model forgets this turn)\n")


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *options):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *options], env=ENVIRONMENT, preexec_fn=lambda: os.login_tty(slave)
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


def test_ctrl_c_stops_a_reply_or_clears_a_line_and_ctrl_d_ends(model_folder):
    options = ["--max_length", "480", "--min_length", "480", "--no_personality"]
    terminal = Terminal("--model", str(model_folder), *options)
    try:
        assert b"The model has no persona." in terminal.wait_for(b">>> ")
        terminal.type(b"tea ?\n")
        terminal.wait_for(b"tea ?\r\n")
        terminal.wait_for(b" ")  # between two words of the reply
        terminal.type(b"\x03")
        terminal.wait_for(b"(stopped; the model forgets this turn)\r\n")
        terminal.wait_for(b">>> ")
        terminal.type(b"/persona\n")
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
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)


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
    assert "max_history is -1" in error("--max_history", -1)
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
