"""A conversation: what the model sees of it, and what its commands do."""

import errno
import json
import random
from dataclasses import replace

import pytest

from convai_fast.data.dataset import read_dialogues
from convai_fast.data.options import DataOptions
from convai_fast.dialogue.encoding import encode
from convai_fast.dialogue.layout import Place, Surroundings
from convai_fast.dialogue.tokenizer import load_tokenizer
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.ranking import rank_candidates
from convai_fast.generation.request import Request
from convai_fast.model import DoubleHeadsModel
from convai_fast.serving.conversation import COMMANDS, Conversation
from tests.helpers.decoder_steps import recorded_steps

PERSONA = ["i like tea .", "i have a cat ."]


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


def test_a_reply_is_the_engines_and_ends_the_line(conversation, engine, tokenizer, monkeypatch):
    seen = prompts_seen(conversation, monkeypatch)
    printed = say(conversation, "hi , do you like tea ?")
    persona, history = seen[0]
    assert persona == PERSONA
    assert history == encode(tokenizer, ["hi , do you like tea ?"])
    assert printed == tokenizer.decode(conversation.history[-1], skip_special_tokens=True) + "\n"
    assert 4 <= len(conversation.history[-1]) <= 8


def test_the_best_of_several_replies_is_said_and_remembered(engine, tokenizer):
    params = SamplingParams(max_length=8, min_length=4, temperature=2, best_of=5)
    conversation = Conversation(engine, tokenizer, params, persona=PERSONA)
    said = say(conversation, "do you like tea ?")
    request = Request(
        persona=conversation.persona,
        history=conversation.history[:1],
        params=replace(params, seed=random.Random(f"{params.seed} 0").getrandbits(63)),
    )
    [[best]] = engine.generate([request])
    end = " …\n" if best.finish_reason == "length" else "\n"
    assert said == best.text.strip() + end
    assert conversation.history[1] == best.token_ids
    assert best.score is not None


def test_the_model_sees_the_last_turns_within_max_history(conversation, monkeypatch):
    seen = prompts_seen(conversation, monkeypatch)
    for line in ("a", "b", "c"):
        say(conversation, line)
    assert [len(history) for _, history in seen] == [1, 3, 3]
    assert seen[2][1][:2] == conversation.history[2:4]


@pytest.mark.parametrize(("persona_turn", "lines"), [("last", "abc"), ("first", "aab")])
def test_the_line_that_a_persona_is_a_part_of_is_read_as_it_stands_there(
    engine, tokenizer, conversation, monkeypatch, persona_turn, lines
):
    around = dict.fromkeys(Place, Surroundings())
    around[Place.PERSONA_TURN] = Surroundings(trailing=" !")
    chat = {"partner_begins": True, "persona_turn": persona_turn}
    layout = replace(engine.layout, **chat, surroundings=tuple(around.values()))
    monkeypatch.setattr(engine, "layout", layout)
    seen = prompts_seen(conversation, monkeypatch)
    for said, line in zip("abc", lines, strict=True):
        say(conversation, said)
        _, history = seen[-1]
        assert history[-1 if persona_turn == "last" else 0] == encode(tokenizer, [f"{line} !"])[0]
    assert conversation.history[::2] == encode(tokenizer, ["a", "b", "c"])


def test_what_does_not_fit_the_model_is_told_with_the_oldest_turns_first(conversation, tokenizer):
    def told(line):
        said, _, reply = say(conversation, line).partition("\n")
        return said if reply else ""

    assert told("hi") == ""
    oldest = sum(map(len, conversation.history))
    persona = sum(map(len, encode(tokenizer, conversation.persona)))
    room = 512 - 8 - 3  # beside the reply, <bos> and the two speakers
    assert (
        told("tea " * (room - persona))
        == f"(left out to fit the model: {oldest} tokens of the oldest turns)"
    )
    say(conversation, "/reset")
    assert told("tea " * (room + 1)) == (
        f"(left out to fit the model: {persona} tokens of the persona, "
        "1 token of the beginning of your line)"
    )


def test_what_is_saved_is_every_conversation_with_its_persona_as_data_to_train_on(
    conversation, tmp_path
):
    path = tmp_path / "chat.jsonl"
    assert say(conversation, f"/save {path}") == "there is no conversation to save yet.\n"
    first = [text for line in ("hi", "tea ?") for text in (line, say(conversation, line).strip())]
    conversation.handle("forgotten").close()
    say(conversation, "/reset")
    say(conversation, "/persona i am old . | i am a cook .")
    second = ["naïve ?", say(conversation, "naïve ?").strip()]
    assert say(conversation, f"/save {path}") == f"Saved 2 conversations in {path}.\n"

    options = DataOptions(dataset_path=(str(path),), valid_fraction=0, fill_candidates=1)
    dialogues = read_dialogues(options).dialogues["train"]
    assert [dialogue.personality for dialogue in dialogues] == [
        PERSONA,
        ["i am old .", "i am a cook ."],
    ]
    said = [
        [*dialogue.utterances[-1].history, dialogue.utterances[-1].candidates[-1]]
        for dialogue in dialogues
    ]
    assert said == [first, second]


@pytest.mark.parametrize("best_of", [1, 2])
def test_a_reply_that_is_cut_is_marked_in_print_and_nowhere_else(
    engine, tokenizer, tmp_path, best_of
):
    params = SamplingParams(max_length=4, min_length=4, best_of=best_of)
    conversation = Conversation(engine, tokenizer, params, persona=PERSONA)
    said = say(conversation, "hi")
    assert said.endswith(" …\n") and conversation.is_cut
    assert len(conversation.history[-1]) == 4
    say(conversation, f"/save {tmp_path / 'chat.jsonl'}")
    messages = json.loads((tmp_path / "chat.jsonl").read_text())["messages"]
    assert messages[-1]["content"] == said.removesuffix(" …\n")

    params = SamplingParams(max_length=40, min_length=4, stop=(" ",), best_of=best_of)
    conversation = Conversation(engine, tokenizer, params, persona=PERSONA)
    assert not say(conversation, "hi").endswith(" …\n") and not conversation.is_cut


def test_a_save_replaces_no_file_and_leaves_nothing_where_it_cannot_write(
    conversation, tmp_path, monkeypatch
):
    say(conversation, "hi")
    taken = tmp_path / "taken"
    taken.write_text("mine")
    assert (
        say(conversation, f"/save {taken}") == f"{taken} is already there: choose another name.\n"
    )
    assert taken.read_text() == "mine"
    assert say(conversation, f"/save {taken}/chat.jsonl").endswith(": Not a directory.\n")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("convai_fast.files.os.replace", full)
    new = tmp_path / "new"
    assert (
        say(conversation, f"/save {new}") == f"{new} cannot be written: No space left on device.\n"
    )
    assert list(tmp_path.iterdir()) == [taken]
    assert "takes the name of a file" in say(conversation, "/save")


def test_every_command_that_is_completed_is_one(conversation):
    assert {"/help", "/exit", "/persona", "/save"} <= {*COMMANDS}
    assert not any("is not a command" in say(conversation, name) for name in COMMANDS)


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
    model = DoubleHeadsModel.from_pretrained(model_folder)
    conversation = Conversation(
        GenerationEngine(model, tokenizer, max_batch_size=1),
        tokenizer,
        SamplingParams(max_length=6, min_length=6),
        persona=PERSONA,
        max_history=5,
    )
    with recorded_steps(lambda input_ids, _: input_ids.numel()) as computed:
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
        engine.layout,
        encode(tokenizer, PERSONA),
        encode(tokenizer, ["do you like tea ?"]),
        encode(tokenizer, candidates),
    )
    expected = [
        f"  {scores[i].exp():.3f}  {candidates[i]}" for i in scores.argsort(descending=True)
    ]
    assert say(conversation, "/rank " + " | ".join(candidates)).splitlines() == expected
    assert len(conversation.history) == 2


def test_rank_with_a_head_that_has_learnt_nothing_is_refused(conversation, monkeypatch):
    monkeypatch.setattr(conversation.engine.model, "head_is_new", True)
    said = say(conversation, "/rank hello |hi")
    assert said.startswith("candidates are ranked with the multiple-choice head, which this model")
    assert said.count("\n") == 1


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
    assert seen[0][0] == ["i am old .", "i am a cook ."]


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
