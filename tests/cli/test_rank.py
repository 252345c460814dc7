"""`convai-fast rank` as a user types it: what it ranks, and what it refuses."""

import dataclasses
import json

import pytest

from convai_fast import GenerationEngine, Request, load
from convai_fast.bulk import answers
from convai_fast.cli.main import main
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.model import DoubleHeadsModel
from tests.helpers.bulk_files import files, read_lines, write_lines

CANDIDATES = ["yes , i do .", "no .", "i have a dog ."]
QUESTION = {"persona": ["i like tea ."], "history": ["do you like tea ?"]}
GOOD = {"id": "a", **QUESTION, "candidates": CANDIDATES}


@pytest.fixture
def rank(model, tmp_path):
    """Run the command on some requests, into tmp_path / "ranked.jsonl"."""

    def rank(*options, requests=None):
        if requests is not None:
            options = ("--input", write_lines(tmp_path / "requests.jsonl", *requests), *options)
        output = str(tmp_path / "ranked.jsonl")
        return main(["rank", "--model", model, "--output", output, *map(str, options)])

    return rank


def test_the_candidates_of_each_request_are_ranked_as_the_engine_ranks_them(
    rank, model, tmp_path, capsys
):
    engine = GenerationEngine(*load(model))
    expected = engine.rank(Request(**QUESTION), CANDIDATES)
    messages = [{"role": "system", "content": "i like tea ."}]
    messages += [{"role": "user", "content": "do you like tea ?"}]
    requests = [{"id": 3, "messages": messages, "candidates": CANDIDATES, "top_k": 5}, GOOD]
    assert rank(requests=requests) == 0
    chat, own = read_lines(tmp_path / "ranked.jsonl")
    assert (chat["id"], own["id"]) == (3, "a")
    assert chat["ranking"] == own["ranking"]
    for line, candidate in zip(own["ranking"], expected, strict=True):
        assert list(line) == ["index", "text", "probability", "score"]
        assert line == pytest.approx(dataclasses.asdict(candidate), abs=1e-6)
    printed = capsys.readouterr().out
    assert "fields that change nothing, and in how many lines: top_k (1)" in printed
    assert "2 rankings, 6 candidates in " in printed
    assert files(tmp_path) == ["ranked.jsonl", "requests.jsonl"]


def test_bad_lines_are_listed_and_the_others_ranked(rank, tmp_path, capsys):
    missing, blank = {"id": "missing", **QUESTION}, {"id": "blank", "candidates": ["yes .", " "]}
    none, number = {"id": "none", "candidates": []}, {"id": "number", "candidates": [1]}
    requests = ["oops", missing, GOOD, blank, none, number]
    assert rank(requests=requests) == 0
    assert [line["id"] for line in read_lines(tmp_path / "ranked.jsonl")] == ["a"]
    listed = read_lines(tmp_path / "ranked.jsonl.errors.jsonl")
    assert [(bad["line"], bad.get("id")) for bad in listed] == [
        *[(1, None), (2, "missing"), (4, "blank"), (5, "none"), (6, "number")]
    ]
    says = ["not JSON", "are missing: give a list of texts", "candidates[1] of the request is"]
    says += ["there are no candidates", "candidates is [1]: give a list"]
    assert all(part in bad["reason"] for part, bad in zip(says, listed, strict=True))
    assert rank("--overwrite", requests=[missing]) == 2
    assert "not one request can be answered (line 1: candidates are" in capsys.readouterr().err


def test_a_run_that_is_stopped_continues_to_the_same_file(rank, tmp_path, monkeypatch):
    requests = [{**GOOD, "id": id, "history": [id]} for id in "abcd"]
    assert rank(requests=requests) == 0
    undisturbed = (tmp_path / "ranked.jsonl").read_bytes()
    (tmp_path / "ranked.jsonl").unlink()
    asked = []
    own = answers.rank

    def stopping(model, tokenizer, ids, request, candidates):
        asked.append(request.history)
        if asked.count(["c"]) == 1 and request.history == ["c"]:
            raise KeyboardInterrupt
        return own(model, tokenizer, ids, request, candidates)

    monkeypatch.setattr(answers, "rank", stopping)
    assert rank(requests=requests) == 130
    assert files(tmp_path) == ["ranked.jsonl.partial", "requests.jsonl"]
    assert rank(requests=requests) == 0
    assert asked == [["a"], ["b"], ["c"], ["c"], ["d"]]
    assert (tmp_path / "ranked.jsonl").read_bytes() == undisturbed


def test_the_candidates_of_every_turn_are_ranked_and_the_true_reply_stands_beside_them(
    rank, tmp_path
):
    dialogues = builtin_dialogues(num_train=2, num_valid=1)
    data = {s: [dataclasses.asdict(d) for d in ds] for s, ds in dialogues.items()}
    (tmp_path / "data.json").write_text(json.dumps(data))
    assert rank("--data", tmp_path / "data.json") == 0
    lines = read_lines(tmp_path / "ranked.jsonl")
    turns = dialogues["valid"][0].utterances
    assert [line["id"] for line in lines] == [f"valid/0/{i}" for i in range(len(turns))]
    for line, turn in zip(lines, turns, strict=True):
        assert line["expected"] == turn.candidates[-1]
        texts = {each["index"]: each["text"] for each in line["ranking"]}
        assert texts == dict(enumerate(turn.candidates))


def test_a_model_whose_head_has_learnt_nothing_is_refused(model, tmp_path, capsys):
    loaded, tokenizer = load(model)
    new = tmp_path / "new"
    DoubleHeadsModel(loaded.config).save_pretrained(new, tokenizer)
    requests = write_lines(tmp_path / "requests.jsonl", GOOD)
    output = str(tmp_path / "ranked.jsonl")
    assert main(["rank", "--model", str(new), "--input", requests, "--output", output]) == 2
    assert "multiple-choice head, which this model has not learnt" in capsys.readouterr().err
    assert "ranked.jsonl" not in files(tmp_path)
