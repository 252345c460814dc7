"""`convai-fast prepare` as a user types it."""

import copy
import json
import re
from dataclasses import replace

import pytest

from convai_fast.cli.main import main
from convai_fast.cli.prepare import preview
from convai_fast.data.build_store import build_store
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.data.store import DialogueStore
from convai_fast.dialogue.dialogue import Dialogue, Utterance
from convai_fast.dialogue.layout import Place, Surroundings, classic
from convai_fast.dialogue.tokenizer import add_special_tokens, special_ids
from convai_fast.loading import Reading
from tests.helpers.batches import make_batches
from tests.helpers.chat_tokenizers import chat_tokenizer
from tests.helpers.model_peers import SIZES

PREVIEW = ["--data", "x", "--tokenizer", "x", "--preview", "1"]


def prepare(files, *arguments):
    data, tokenizer = str(files / "dialogues.json"), str(files / "tokenizer")
    return main(["prepare", "--data", data, "--tokenizer", tokenizer, *arguments])


def test_prepare_writes_a_store_and_says_what_it_holds(files, tmp_path, capsys):
    assert prepare(files, "--output", str(tmp_path / "store")) == 0
    printed = capsys.readouterr().out
    store = DialogueStore(tmp_path / "store")
    tables = store.splits["train"]
    assert f"train: 10 dialogues, {tables.num_examples} examples" in printed
    assert f"{store.num_tokens:,} tokens" in printed
    assert "candidates: 20.0 an example" in printed
    assert "cut to fit: nothing" in printed
    assert f"MB in {tmp_path / 'store'}" in printed


def test_prepare_counts_what_it_cuts(files, tmp_path, capsys):
    assert prepare(files, "--output", str(tmp_path / "store"), "--max_length", "30") == 0
    assert "cut to fit: history in " in capsys.readouterr().out


def test_prepare_cuts_where_the_model_that_is_named_ends(files, llama, capsys):
    """As `train` does."""
    config = SIZES | {"model_type": "llama", "max_position_embeddings": 64}
    (llama / "config.json").write_text(json.dumps(config))
    data = ["--data", str(files / "dialogues.json")]
    for tokenizer, options, most in [
        (llama, [], "the model's 64 positions"),
        (llama, ["--max_length", "50"], "50 by --max_length"),
        (files / "tokenizer", [], "512, as the model's positions are not known"),
    ]:
        arguments = [*data, "--tokenizer", str(tokenizer), "--preview", "1", *options]
        assert main(["prepare", *arguments]) == 0
        printed = capsys.readouterr().out
        longest, said = re.findall(r"longest (\d+) tokens \(of (.*)\)", printed)[0]
        assert said == most
        assert ("cut to fit: history in" in printed) == (tokenizer == llama)
        assert int(longest) <= int(re.search(r"\d+", said)[0])
    train = ["train", *data, "--model", str(llama), "--from_scratch", "--n_epochs", "0"]
    train += ["--dataset_cache", str(llama / "cache"), "--output", str(llama / "run")]
    assert main(train) == 0
    assert "cut to 64 positions: history in" in capsys.readouterr().out


def test_preview_shows_text_speakers_segments_and_labels(files, capsys):
    assert prepare(files, "--preview", "2") == 0
    printed = capsys.readouterr().out
    dialogue = builtin_dialogues(num_train=10, num_valid=3)["train"][0]
    first = dialogue.utterances[0]
    assert "<bos>" + "".join(dialogue.personality) in printed
    assert f"<speaker2>{first.history[0]}" in printed
    assert f"<speaker1> [{first.candidates[-1]}<eos>]" in printed
    assert printed.count("example ") == 2
    assert "… and 16 more" in printed


def test_a_preview_shows_what_a_layout_writes_around_texts(tokenizer, tmp_path):
    def ids(text):
        return tuple(tokenizer(text)["input_ids"])

    layout = replace(
        classic(special_ids(tokenizer)),
        begin=(),
        persona_open=ids("<bos>a\n"),
        persona_close=ids("!\n"),
        persona_turn="first",
        partner_begins=True,
        reply_open=ids("<speaker1>r\n"),
        surroundings=(Surroundings(trailing=" ."),) * len(Place),
    )
    dialogue = Dialogue(["x"], [Utterance(["y", "z"], ["n", "o"])])
    store = build_store({"train": [dialogue]}, tokenizer, tmp_path / "store", layout)
    reading = Reading(tokenizer, layout, chat=False, segments=True, n_positions=None)
    shown = preview(make_batches(store), 0, reading).splitlines()
    name, segment, text = slice(0, 11), slice(18, 30), slice(44, None)
    assert [(line[name].strip(), line[segment].strip(), line[text]) for line in shown[1:-1]] == [
        ("persona", "<speaker1>", r"<bos>a\nx .!\n"),
        ("turn 1", "<speaker1>", "<speaker1>y ."),
        ("turn 2", "<speaker2>", "<speaker2>z ."),
        ("reply", "<speaker1>", r"<speaker1>r\n [o .<eos>]"),
    ]
    assert shown[-1] == "  instead  n ."


@pytest.mark.parametrize("kind", ["five tokens", "chat"])
def test_a_preview_brackets_no_end_of_a_reply_that_was_cut(files, llama, tmp_path, capsys, kind):
    """Since such a reply has none to learn."""
    tokenizer, end = (llama, "<|im_end|>") if kind == "chat" else (files / "tokenizer", "<eos>")
    data = tmp_path / "pairs.json"
    data.write_text(json.dumps([{"utterances": [{"history": ["y"], "candidates": ["z " * 90]}]}]))
    arguments = ["--data", str(data), "--tokenizer", str(tokenizer), "--preview", "1"]
    assert main(["prepare", *arguments, "--valid_fraction", "0", "--max_length", "40"]) == 0
    printed = capsys.readouterr().out
    assert "example 0: 40 tokens" in printed
    (reply,) = (line for line in printed.splitlines() if line.startswith("  reply"))
    assert re.search(rf" \[z( z)+ ?\] {re.escape(end)}$", reply)


def test_a_preview_of_more_than_there_is_shows_each_example_once(files, capsys):
    assert prepare(files, "--preview", "1000") == 0
    numbers = re.findall(r"^example (\d+):", capsys.readouterr().out, re.MULTILINE)
    assert [int(number) for number in numbers] == list(range(len(numbers)))


@pytest.fixture
def llama(tmp_path):
    """A model's folder: a shape, and a tokenizer with a chat template."""
    folder = tmp_path / "llama"
    copy.deepcopy(chat_tokenizer("smollm2")).save_pretrained(folder)
    config = SIZES | {"model_type": "llama", "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("has_template", [True, False])
def test_a_preview_shows_the_segments_that_a_model_reads_and_no_others(
    files, llama, capsys, has_template
):
    if not has_template:
        (llama / "chat_template.jinja").unlink()
    arguments = ["prepare", "--data", str(files / "dialogues.json"), "--tokenizer", str(llama)]
    shown = []
    for segments in ([], ["--segments"]):
        assert main([*arguments, "--preview", "1", *segments]) == 0
        printed = capsys.readouterr().out
        assert ("chat template: 10 of 10 dialogues are read" in printed) == has_template
        shown.append([line for line in printed.splitlines() if line.startswith("  ")])
    without, with_segments = shown
    assert not any("segment " in line for line in without)
    assert [re.sub(r" segment <speaker\d> ", "", line) for line in with_segments] == without
    assert any("turn 1   segment <speaker2>" in line for line in with_segments)


def test_a_store_with_segments_is_what_train_opens_with_segments(files, llama, tmp_path, capsys):
    store, data = str(tmp_path / "store"), str(files / "dialogues.json")
    arguments = ["--data", data, "--tokenizer", str(llama), "--output", store, "--segments"]
    assert main(["prepare", *arguments]) == 0
    train = ["train", "--data", store, "--model", str(llama), "--from_scratch", "--n_epochs", "0"]
    train += ["--dataset_cache", str(tmp_path / "cache")]
    for segments in (["--segments"], []):
        run = str(tmp_path / f"run{len(segments)}")
        assert main([*train, *segments, "--output", run]) == 0
        is_made_anew = "was made with another tokenizer" in capsys.readouterr().out
        assert is_made_anew != bool(segments)


def test_a_template_is_read_also_beside_the_five_special_tokens(files, llama, capsys):
    tokenizer = copy.deepcopy(chat_tokenizer("smollm2"))
    add_special_tokens(tokenizer)
    tokenizer.save_pretrained(llama)
    # A config without model_type is known by its class.
    config = SIZES | {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 512}
    (llama / "config.json").write_text(json.dumps(config))
    arguments = ["--data", str(files / "dialogues.json"), "--tokenizer", str(llama)]
    assert main(["prepare", *arguments, "--preview", "1"]) == 0
    printed = capsys.readouterr().out
    assert "chat template: 10 of 10 dialogues are read" in printed
    assert "is not read" not in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "absent.json", "--tokenizer", "x", "--output", "y"], "absent.json"),
        (
            ["--data", "x", "--tokenizer", "x", "--preview", "1", "--max_history", "-2"],
            "--max_history must be",
        ),
        (
            ["--data", "x", "--tokenizer", "x", "--preview", "1", "--max_length", "2"],
            "--max_length must be",
        ),
        (
            ["--data", "x", "--tokenizer", "x", "--output", "y", "--fill_candidates", "0"],
            "fill_candidates must",
        ),
        (
            ["--data", f"{__file__}=3", "--tokenizer", "x", "--output", "y"],
            "test_prepare.py would be lost, since weights count in training: prepare a store for",
        ),
    ],
)
def test_what_prepare_lacks_is_one_sentence_and_code_2(arguments, says, capsys):
    assert main(["prepare", *arguments]) == 2
    errors = capsys.readouterr().err
    assert says in errors
    assert errors.count("\n") == 1


def test_a_store_is_tokenised_anew_for_another_tokenizer(files, tmp_path, capsys):
    assert prepare(files, "--output", str(tmp_path / "store")) == 0
    model = tmp_path / "model"
    from convai_fast.dialogue.new_tokenizer import train_tokenizer

    other = train_tokenizer(builtin_dialogues(num_train=5, num_valid=1)["train"], 300)
    other.save_pretrained(model)
    config = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 256}
    (model / "config.json").write_text(json.dumps(config))
    arguments = ["--dataset_path", str(tmp_path / "store"), "--model", str(model)]
    arguments += ["--dataset_cache", str(tmp_path / "cache"), "--max_steps", "1"]
    assert main(["train", *arguments, "--from_scratch", "--output", str(tmp_path / "run")]) == 0
    assert "was made with another tokenizer" in capsys.readouterr().out
    (cached,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    first, second = DialogueStore(tmp_path / "store"), DialogueStore(cached)
    assert list(first.dialogues("train")) == list(second.dialogues("train"))
    assert list(first.dialogues("valid")) == list(second.dialogues("valid"))
