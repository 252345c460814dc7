"""Several drafts to a request: the best are written, or all of them for training to tell apart."""

import dataclasses
import json

import pytest

from convai_fast.data.builtin import builtin_dialogues
from convai_fast.data.readers import load_dialogues
from tests.helpers.bulk_files import read_lines

LIVELY = ("--temperature", 2, "--top_p", 0, "--max_length", 12)


@pytest.fixture
def data(tmp_path):
    dialogues = builtin_dialogues(num_train=4, num_valid=2)
    content = {
        split: [dataclasses.asdict(each) for each in own] for split, own in dialogues.items()
    }
    (tmp_path / "data.json").write_text(json.dumps(content))
    return tmp_path / "data.json"


def test_the_best_of_several_drafts_is_written_with_its_score(generate, replies):
    requests = [{"id": "a", "history": ["hello !"]}, {"id": "b", "best_of": 1, "history": ["bye"]}]
    assert generate(*LIVELY, "--num_return", 8, requests=requests) == 0
    drafts = replies()
    options = (*LIVELY, "--overwrite", "--num_return")
    assert generate(*options, 2, "--best_of", 8, requests=requests[:1]) == 0
    best = replies()["a"]
    assert best[0]["score"] >= best[1]["score"]
    assert all("score" not in draft for draft in drafts["a"])
    texts = [draft["text"] for draft in drafts["a"]]
    assert all(reply["text"] in texts for reply in best)
    assert generate(*options, 1, "--best_of", 8, requests=requests) == 0
    assert ["score" in replies()[id][0] for id in "ab"] == [True, False]


def test_drafts_become_candidates_as_train_reads_them(generate, tmp_path, data):
    output = tmp_path / "replies.jsonl"
    given = ("--data", data, "--split", "train", *LIVELY, "--num_return", 4)
    assert generate(*given) == 0
    drafts = [[reply["text"] for reply in line["replies"]] for line in read_lines(output)]
    assert generate(*given, "--as_candidates", "--overwrite") == 0
    turns = [(d, turn) for d in load_dialogues(data)["train"] for turn in d.utterances]
    written = read_lines(output)
    assert len(written) == len(turns)
    for line, (dialogue, turn), texts in zip(written, turns, drafts, strict=True):
        [utterance] = line["utterances"]
        assert line["personality"] == list(dialogue.personality)
        *own, true = utterance["candidates"]
        assert true == turn.candidates[-1]
        assert list(turn.history)[-len(utterance["history"]) :] == utterance["history"]
        assert set(own) <= {text.strip() for text in texts}
        assert len(own) == len(set(own)) and true not in own and "" not in own
    read = load_dialogues(output)
    assert sum(len(d.utterances) for own in read.values() for d in own) == len(turns)


def test_candidates_need_true_replies_and_hold_texts_alone(generate, data, capsys):
    assert generate("--as_candidates", requests=[{"id": "a"}]) == 2
    assert "--as_candidates needs true replies" in capsys.readouterr().err
    assert generate("--data", data, "--as_candidates", "--token_ids") == 2
    assert "--as_candidates writes texts alone" in capsys.readouterr().err


def test_fewer_drafts_than_replies_are_refused(generate, capsys):
    assert generate("--best_of", 2, "--num_return", 3, requests=[{"id": "a"}]) == 2
    assert "best_of is 2, but must be 1, or between n, which is 3" in capsys.readouterr().err
