"""`convai-fast generate` as a user types it: what it answers, and what it refuses."""

import bz2
import dataclasses
import gzip
import json
import lzma
import tracemalloc

import pytest
import zstandard
from safetensors.torch import load_file, save_file

from convai_fast.bulk.dataset import DatasetRequests
from convai_fast.cli.main import main
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.data.readers import load_dialogues
from convai_fast.dialogue.dialogue import Dialogue, History, Utterance
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.params import SamplingParams
from tests.helpers.bulk_files import LENGTH, files, read_lines, save_model, write_lines


def test_every_request_is_answered_in_the_order_of_the_file(generate, tmp_path, capsys, tokenizer):
    ids = ["b", "a", 3, 2.5]
    requests = [{"id": id, "persona": ["i like tea ."], "history": ["hello !"]} for id in ids]
    assert generate("--token_ids", requests=requests) == 0
    lines = read_lines(tmp_path / "replies.jsonl")
    assert [line["id"] for line in lines] == ids
    for line in lines:
        (reply,) = line["replies"]
        assert list(reply) == ["text", "finish_reason", "token_ids"]
        assert reply["text"] == tokenizer.decode(reply["token_ids"], skip_special_tokens=True)
    assert len({line["replies"][0]["text"] for line in lines}) == 4
    tokens = sum(len(line["replies"][0]["token_ids"]) for line in lines)
    printed = capsys.readouterr()
    assert printed.out.startswith(f"4 replies, {tokens} tokens in ")
    assert printed.out.endswith(f" tokens/s: {tmp_path / 'replies.jsonl'}\n")
    assert printed.out.count("\n") == 1
    assert printed.err == ""  # a bar is for terminals, and for what takes half a minute
    assert files(tmp_path) == ["replies.jsonl", "requests.jsonl"]


def test_lines_hold_text_and_reason_alone_unless_more_is_asked_for(generate, replies):
    assert generate(requests=[{"id": "a"}]) == 0
    assert list(replies()["a"][0]) == ["text", "finish_reason"]


def test_a_line_may_draw_otherwise_than_the_command(generate, replies):
    requests = [{"id": "long"}, {"id": "short", "max_length": 2, "min_length": 1}, {"id": "s"}]
    requests += [{"id": "same", "seed": 3}, {"id": "again", "seed": 3}, {"id": "two", "n": 2}]
    assert generate(*LENGTH, "--token_ids", requests=requests) == 0
    found = replies()
    assert len(found["long"][0]["token_ids"]) == 12
    assert len(found["short"][0]["token_ids"]) <= 2
    assert found["same"] == found["again"] != found["s"]
    assert [len(found[id]) for id in ("long", "two")] == [1, 2]


def test_num_return_is_the_number_of_replies_to_each_request(generate, replies):
    assert generate("--num_return", 5, requests=[{"id": "a"}, {"id": "b"}]) == 0
    assert [len(drawn) for drawn in replies().values()] == [5, 5]


def test_a_reply_does_not_depend_on_the_place_of_its_request_but_on_the_seed(
    generate, replies, tmp_path
):
    requests = [{"id": id, "history": ["hello !"]} for id in "abc"]
    assert generate(requests=requests) == 0
    first = replies()
    assert generate("--overwrite", "--batch_size", 1, requests=requests[::-1]) == 0
    assert replies() == first
    assert generate("--overwrite", "--seed", 1, requests=requests) == 0
    assert replies() != first


def test_replies_that_are_ready_in_another_order_find_their_ids(generate, replies, monkeypatch):
    requests = [{"id": id, "history": [id]} for id in "abcdef"]
    assert generate(requests=[*requests, "bad"]) == 0
    first = replies()
    serve = GenerationEngine.serve
    monkeypatch.setattr(GenerationEngine, "serve", lambda *given: reversed([*serve(*given)]))
    assert generate("--overwrite", requests=["bad", *requests]) == 0
    assert list(replies().items()) == list(first.items())


def test_every_turn_of_a_split_is_answered_and_the_true_reply_stands_beside_it(
    generate, tmp_path, monkeypatch
):
    dialogues = builtin_dialogues(num_train=3, num_valid=2)
    data = {s: [dataclasses.asdict(d) for d in ds] for s, ds in dialogues.items()}
    (tmp_path / "data.json").write_text(json.dumps(data))
    seen = []
    add = GenerationEngine.add
    monkeypatch.setattr(
        GenerationEngine, "add", lambda self, i, r, **how: seen.append(r) or add(self, i, r, **how)
    )
    assert generate("--data", tmp_path / "data.json", "--max_history", 0) == 0
    expected = {
        f"valid/{number}/{turn}": (dialogue, utterance)
        for number, dialogue in enumerate(dialogues["valid"])
        for turn, utterance in enumerate(dialogue.utterances)
    }
    lines = read_lines(tmp_path / "replies.jsonl")
    assert [line["id"] for line in lines] == list(expected)
    for line, request, (dialogue, utterance) in zip(lines, seen, expected.values(), strict=True):
        assert line["expected"] == utterance.candidates[-1]
        assert request.persona == dialogue.personality
        assert request.history == utterance.history[-1:]  # of 2 * max_history + 1 turns
    assert generate("--data", tmp_path / "data.json", "--split", "train", "--overwrite") == 0
    assert read_lines(tmp_path / "replies.jsonl")[0]["id"] == "train/0/0"


def test_the_turns_of_a_long_conversation_take_memory_in_proportion():
    turns = [f"this is the turn number {i} of many ." for i in range(2000)]
    utterances = [Utterance(History(turns, i), [turns[i]]) for i in range(1, len(turns), 2)]
    dialogues = [Dialogue([], utterances)]
    tracemalloc.start()
    try:
        requests = DatasetRequests(dialogues, "valid", 2, SamplingParams())
        assert sum(len(item.request.history) for item in requests) > 4000
        assert tracemalloc.get_traced_memory()[1] < 10e6  # all histories are 35 MB
    finally:
        tracemalloc.stop()


def test_a_missing_validation_split_is_the_one_that_train_cuts_off(generate, tmp_path, capsys):
    dialogues = builtin_dialogues(num_train=8, num_valid=0)["train"]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([dataclasses.asdict(dialogue) for dialogue in dialogues]))
    valid = load_dialogues(path, valid_fraction=0.25, seed=3)["valid"]
    options = ("--data", path, "--valid_fraction", 0.25, "--data_seed", 3, "--max_length", 1)
    assert generate(*options) == 0
    expected = [utterance.candidates[-1] for dialogue in valid for utterance in dialogue.utterances]
    assert [line["expected"] for line in read_lines(tmp_path / "replies.jsonl")] == expected
    assert generate("--data", path, "--valid_fraction", 0, "--overwrite") == 2
    assert f"the valid split of {path} is empty" in capsys.readouterr().err


def test_bad_lines_are_listed_and_the_others_answered(generate, replies, tmp_path, capsys):
    too_long = {"id": "long", "input_ids": [1] * 60}
    unknown = {"id": "ids", "history": [[1, 100_000]]}
    requests = ["oops", {"id": "a"}, {"id": "a"}, too_long, unknown, {"maxlength": 3}]
    assert generate(requests=requests) == 0
    assert list(replies()) == ["a"]
    errors = tmp_path / "replies.jsonl.errors.jsonl"
    listed = read_lines(errors)
    assert [(bad["line"], bad.get("id")) for bad in listed] == [
        (1, None),
        (3, "a"),
        (4, "long"),
        (5, "ids"),
        (6, 6),
    ]
    reasons = [bad["reason"] for bad in listed]
    says = ["not JSON", "line 2 has", "60 input_ids", "100000", "do you mean max_length?"]
    assert all(part in reason for part, reason in zip(says, reasons, strict=True))
    assert capsys.readouterr().out.startswith(f"5 bad lines: {errors} says why\n1 reply, ")
    assert generate("--overwrite", requests=[{"id": "a"}]) == 0
    assert not errors.exists()


def test_a_file_without_a_single_request_is_code_2_and_the_reasons_are_listed(
    generate, tmp_path, capsys
):
    assert generate(requests=[{"oops": 1}, {"oops": 2}, "oops"]) == 2
    errors = tmp_path / "replies.jsonl.errors.jsonl"
    printed = capsys.readouterr().err
    assert "not one request can be answered (line 1: there is no field 'oops'" in printed
    assert f"): {errors} lists them all; dialogues are answered with --data\n" in printed
    assert [line["line"] for line in read_lines(errors)] == [1, 2, 3]
    assert files(tmp_path) == ["replies.jsonl.errors.jsonl", "requests.jsonl"]


def test_a_file_of_something_else_is_refused_before_the_model_is_loaded(generate, tmp_path, capsys):
    dialogues = json.dumps({"train": list(range(100_000))}, indent=1).splitlines()
    assert generate(requests=dialogues) == 2
    assert (
        "holds no requests, since not one line is a JSON object (line 1: not JSON: Expecting "
        "property name enclosed in double quotes at column 1): write one a line; dialogues are "
        "answered with --data\n"
    ) in capsys.readouterr().err
    assert files(tmp_path) == ["requests.jsonl"]


def test_a_thousand_bad_lines_before_the_first_good_one_end_nothing(generate, tmp_path):
    good = [{"id": "first"}, {"id": "second"}]
    assert generate(*LENGTH, requests=[*({"histroy": []} for _ in range(1000)), *good]) == 0
    assert [line["id"] for line in read_lines(tmp_path / "replies.jsonl")] == ["first", "second"]
    assert len(read_lines(tmp_path / "replies.jsonl.errors.jsonl")) == 1000


@pytest.mark.parametrize("batch_size", [1, 64])
def test_a_request_from_which_nothing_can_be_drawn_is_an_error_line(
    tmp_path, batch_size, tokenizer
):
    # A damaged row of positions, which only long prompts reach.
    damaged = save_model(tmp_path / "damaged", tokenizer)
    weights = load_file(f"{damaged}/model.safetensors")
    weights["transformer.wpe.weight"][40:] = float("nan")
    save_file(weights, f"{damaged}/model.safetensors", {"format": "pt"})
    requests = [
        {"id": "before"},
        {"id": "impossible", "history": [[5] * 45], "n": 3},
        {"id": "after"},
    ]
    path = write_lines(tmp_path / "requests.jsonl", *requests)
    arguments = ["--model", damaged, "--input", path, "--output", str(tmp_path / "replies.jsonl")]
    for again in ([], ["--overwrite"]):
        assert main(["generate", *arguments, *LENGTH, "--batch_size", str(batch_size), *again]) == 0
        replies = read_lines(tmp_path / "replies.jsonl")
        assert [line["id"] for line in replies] == ["before", "after"]
        (bad,) = read_lines(tmp_path / "replies.jsonl.errors.jsonl")
        assert (bad["line"], bad["id"]) == (2, "impossible")
        assert "no token can be drawn, since its logits are no numbers" in bad["reason"]


@pytest.mark.parametrize("blank", ["", "  ", "\u200b", "\ufeff", "\u00a0", "\u3164", "\n"])
def test_a_turn_with_nothing_to_see_is_listed_and_such_a_persona_dropped(
    generate, replies, tmp_path, blank
):
    seed = {"seed": 1, "history": ["hello !"]}
    requests = [
        {"id": "turn", "history": ["hello !", blank]},
        {"id": "prompt", "prompt": blank},
        {"id": "message", "messages": [{"role": "user", "content": blank}]},
        {"id": "persona", "persona": [blank, "i like tea .", blank], **seed},
        {"id": "text", "persona": f"{blank}\ni like tea .", **seed},
        {"id": "without", "persona": ["i like tea ."], **seed},
    ]
    assert generate(requests=requests) == 0
    found = replies()
    assert list(found) == ["persona", "text", "without"]
    assert found["persona"] == found["text"] == found["without"]
    listed = read_lines(tmp_path / "replies.jsonl.errors.jsonl")
    assert [(bad["id"], bad["reason"]) for bad in listed] == [
        ("turn", "history[1] is blank: leave it out"),
        ("prompt", "prompt is blank: give it text"),
        ("message", "history[0] is blank: leave it out"),
    ]


def test_a_line_without_an_id_is_another_request_than_one_with_its_number(generate, replies):
    assert generate(requests=[{"id": 2}, {}, {}]) == 0
    assert list(replies()) == [2, "line 2", 3]


@pytest.mark.parametrize("name", ["replies.jsonl.partial", "replies.jsonl.errors.jsonl"])
def test_requests_that_would_be_written_over_are_refused(generate, tmp_path, capsys, name):
    path = tmp_path / name
    write_lines(path, {"id": "a"})
    before = path.read_bytes()
    assert generate("--input", path) == 2
    assert f"{path} holds the requests: choose another --output" in capsys.readouterr().err
    assert (path.read_bytes(), files(tmp_path)) == (before, [name])


def test_a_batch_file_of_openai_is_answered_under_its_own_ids(generate, tmp_path, capsys):
    def line(custom_id, **body):
        url = "/v1/chat/completions"
        return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}

    messages = [{"role": "system", "content": "i sing ."}, {"role": "user", "content": "hello !"}]
    requests = [
        line("r-1", model="gpt-x", messages=messages, max_tokens=3, temperature=0, stop="zz"),
        line("r-2", model="gpt-x", messages=messages, tools=[{"type": "function"}]),
        line("r-3", model="gpt-x", messages=messages[:1]),
        {"id": "own", "persona": ["i sing ."], "history": ["hello !"], "max_length": 3}
        | {"temperature": 0},
    ]
    assert generate("--token_ids", requests=requests) == 0
    batch, own = read_lines(tmp_path / "replies.jsonl")
    assert (batch["id"], own["id"]) == ("r-1", "own")
    assert batch["replies"] == own["replies"]
    assert "model (1)" in capsys.readouterr().out
    bad = read_lines(tmp_path / "replies.jsonl.errors.jsonl")
    assert [(line["id"], line["reason"].split(",")[0][:40]) for line in bad] == [
        ("r-2", 'tools is [{"type": "function"}]'),
        ("r-3", "the last turn of messages must be the us"),
    ]


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_compressed_requests_are_read_whatever_their_name(model, tmp_path, kind):
    pack = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": zstandard.compress,
    }
    content = b'{"id": "a"}\n{"id": "b"}\n'
    (tmp_path / "requests").write_bytes(pack[kind](content))
    output = tmp_path / "replies.jsonl"
    arguments = ["--model", model, "--input", str(tmp_path / "requests"), "--output", str(output)]
    assert main(["generate", *arguments, *LENGTH]) == 0
    assert [line["id"] for line in read_lines(output)] == ["a", "b"]
    (tmp_path / "requests").write_bytes(pack[kind](content)[:-3])
    assert main(["generate", *arguments, *LENGTH, "--overwrite"]) == 2


def test_requests_in_parquet_are_read(model, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    requests = [{"id": "a", "history": ["hello !"], "seed": 1}, {"id": "b", "history": ["hi"]}]
    parquet.write_table(pyarrow.Table.from_pylist(requests), tmp_path / "requests.parquet")
    write_lines(tmp_path / "requests.jsonl", *requests)
    replies = []
    for suffix in ("parquet", "jsonl"):
        output = tmp_path / f"{suffix}-replies"
        arguments = ["--input", str(tmp_path / f"requests.{suffix}"), "--output", str(output)]
        assert main(["generate", "--model", model, *arguments, *LENGTH]) == 0
        replies.append(output.read_text())
    assert replies[0] == replies[1]


def test_files_of_others_are_never_touched(model, tmp_path, capsys):
    output = tmp_path / "replies.jsonl"
    foreign = {}
    for name in ("replies.jsonl.tmp", "replies.jsonl.errors.jsonl.tmp"):
        foreign[name] = '{"id": "a"}\n'
        (tmp_path / name).write_text(foreign[name])
    arguments = ["--model", model, "--output", str(output), *LENGTH]
    assert main(["generate", *arguments, "--input", str(tmp_path / "replies.jsonl.tmp")]) == 0
    assert {name: (tmp_path / name).read_text() for name in foreign} == foreign
    errors = tmp_path / "replies.jsonl.errors.jsonl"
    errors.write_text("my notes\n")
    arguments += ["--input", str(tmp_path / "replies.jsonl.tmp"), "--overwrite"]
    assert main(["generate", *arguments]) == 2
    assert "is no list of bad lines: move it away" in capsys.readouterr().err
    assert errors.read_text() == "my notes\n"


def test_an_output_that_is_a_link_is_written_through(generate, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "replies.jsonl").symlink_to(tmp_path / "elsewhere" / "replies.jsonl")
    assert generate(*LENGTH, requests=[{"id": "a"}]) == 0
    assert (tmp_path / "replies.jsonl").is_symlink()
    assert read_lines(tmp_path / "elsewhere" / "replies.jsonl")[0]["id"] == "a"


def test_a_file_of_replies_is_overwritten_only_when_asked(generate, tmp_path, capsys):
    output = tmp_path / "replies.jsonl"
    output.write_text("precious\n")
    assert generate(requests=[{"id": "a"}]) == 2
    assert f"{output} is already there: choose another --output, or" in capsys.readouterr().err
    assert output.read_text() == "precious\n"
    assert generate("--overwrite", requests=[{"id": "a"}]) == 0
    assert read_lines(output)[0]["id"] == "a"


def test_a_mistake_in_the_options_is_one_sentence_and_code_2(model, tmp_path, capsys):
    requests = write_lines(tmp_path / "requests.jsonl", {"id": "a"})
    (tmp_path / "empty").touch()

    def error(*options, output=tmp_path / "replies.jsonl"):
        arguments = ["--model", model, "--output", output, *options]
        assert main(["generate", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        return line

    given = ("--input", requests)
    assert "--input is missing: give a file of requests (or with --data dialogues)" in error()
    assert "both --input and --data given: give one" in error(*given, "--data", requests)
    assert f"{tmp_path}/absent: No such file" in error("--input", tmp_path / "absent")
    assert f"{tmp_path} is not a regular file" in error("--input", tmp_path)
    assert f"{tmp_path}/empty is empty" in error("--input", tmp_path / "empty")
    assert "there is no such file" in error("--data", tmp_path / "absent")
    assert f"{tmp_path} is not a regular file" in error(*given, output=tmp_path)
    assert "/dev/null is not a regular file" in error(*given, "--overwrite", output="/dev/null")
    assert "cannot write" in error(*given, output=tmp_path / "empty" / "replies.jsonl")
    assert f"{requests} holds the requests" in error(*given, "--overwrite", output=requests)
    assert "--data_seed is about dialogues (--data)" in error(*given, "--data_seed", 3)
    assert "--split is about dialogues (--data)" in error(*given, "--split", "train")
    assert "--num_return must be at least 1" in error(*given, "--n", 0)
    assert "--batch_size must be at least 1" in error(*given, "--batch_size", 0)
    assert "--max_history must be at least 0" in error(*given, "--max_history", -1)
    assert "leaves no room for a prompt" in error(*given, "--max_length", 64)
    assert "top_p is 2.0" in error(*given, "--top_p", 2)
    assert "device nowhere" in error(*given, "--device", "nowhere")
    assert "--ray_cpus is for the actors of --ray" in error(*given, "--ray_cpus", 2)
    assert "--ray_gpus must be between 0 and 1, not 2" in error(*given, "--ray_gpus", 2)
    assert "give --ray_gpus" in error(*given, "--ray", "--device", "cpu")
    assert files(tmp_path) == ["empty", "requests.jsonl"]
