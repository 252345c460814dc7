"""The layout of a chat model says exactly what its chat template writes."""

from copy import deepcopy
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from convai_fast.dialogue.chat_template import encode_dialogue, layout_of, verify
from convai_fast.dialogue.dialogue import Dialogue, Utterance
from convai_fast.dialogue.encoding import encode
from convai_fast.dialogue.layout import Place, Surroundings
from convai_fast.errors import UserError
from tests.helpers.chat_tokenizers import (
    CHAT_MODELS,
    LLAMA2,
    QWEN3,
    SMOLLM2,
    byte_level,
    chat_tokenizer,
)

layout_of_model = cache(lambda name: layout_of(chat_tokenizer(name)))

# What tokenizers join with their surroundings, and any other character.
characters = st.sampled_from("te aI. \n?'1é\u0301▁<|>[]/\r\t\u3000") | st.characters(codec="utf-8")
text = st.text(characters, min_size=1, max_size=12).map(str.strip)
text = text.filter(lambda words: words and not any(token in words for token in special_tokens()))


@cache
def special_tokens():
    """Of any of the models: in a text they are no special tokens, unlike for transformers."""
    return {token for name in CHAT_MODELS for token in chat_tokenizer(name).get_added_vocab()}


def template_ids(name, persona, history, reply):
    """What transformers makes of a dialogue that the partner begins, if the template wants that."""
    tokenizer = chat_tokenizer(name)
    roles = ["user", "assistant"] * len(history)
    turns = zip(roles[len(history) % 2 == 0 :], history, strict=False)
    system = [{"role": "system", "content": "\n".join(persona)}] if persona else []
    messages = [*system, *({"role": role, "content": content} for role, content in turns)]
    options = dict(tokenize=False, date_string="26 Jul 2024", enable_thinking=False)
    answer = [{"role": "assistant", "content": reply}]
    if name == "mistral0.3":  # which writes a persona in prompts only
        written = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
        turn = {"role": "user", "content": "?"}
        written += tokenizer.apply_chat_template([turn, *answer], **options).partition("[/INST]")[2]
    else:
        written = tokenizer.apply_chat_template([*messages, *answer], **options)
    return tokenizer(written.removesuffix("\n"), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", CHAT_MODELS)
@settings(max_examples=15, deadline=None)
@given(st.lists(text, max_size=5), st.lists(text, min_size=1, max_size=7), text)
def test_a_layout_gives_the_tokens_of_the_template(name, persona, history, reply):
    layout = layout_of_model(name)
    if layout.partner_begins and len(history) % 2 == 0:
        history = history[1:]
    ids = encode_dialogue(chat_tokenizer(name), layout, persona, history, reply)
    assert ids == template_ids(name, persona, history, reply)
    dialogue = Dialogue(persona, [Utterance(history, [reply])])
    assert verify(chat_tokenizer(name), layout, [dialogue]) == (1, 1)


@pytest.mark.parametrize(
    ("name", "parts"),
    {
        "qwen3": [
            "<|im_start|>system\n",
            "<|im_end|>\n",
            "",
            "<|im_start|>user\n",
            "<|im_end|>\n",
            "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ],
        "llama2": ["<s> [INST] <<SYS>>\n", "\n<</SYS>>\n\n", "", "<s> [INST]", "", " [/INST]"],
        "mistral0.3": ["[INST]", "\n\n", "", "[INST]", "", "[/INST]"],
        "unmarked": ["", "", "", "<|user|>", "", "<|assistant|>"],
    }.items(),
)
def test_parts_are_what_the_template_writes(name, parts):
    layout = layout_of_model(name)
    ids = layout.persona_open, layout.persona_close, layout.no_persona, layout.turn_open[1]
    ids = *ids, layout.turn_close[1], layout.reply_open
    assert [read(name, each) for each in ids] == parts


def read(name, ids):
    tokens = chat_tokenizer(name).convert_ids_to_tokens(ids)
    return "".join(tokens).replace("Ċ", "\n").replace("<0x0A>", "\n").replace("▁", " ")


def test_a_default_persona_is_read_where_there_is_none():
    layout = layout_of_model("smollm2")
    assert "SmolLM" in read("smollm2", layout.no_persona)
    assert "SmolLM" not in read("smollm2", (*layout.begin, *layout.persona_open))


def test_a_template_is_told_not_to_think():
    layout = layout_of(with_template(SMOLLM2.replace("SmolLM.", "' ~ enable_thinking ~ '")))
    assert "False" in read("qwen3", layout.no_persona)


def test_texts_that_nothing_joins_are_encoded_by_themselves():
    surroundings = layout_of_model("qwen3").surroundings
    assert surroundings[Place.SPEAKER1 :] == (Surroundings(),) * 4
    assert surroundings[Place.FIRST_SENTENCE] == Surroundings(trailing="\n", trims=True)


def test_the_date_of_a_template_stays_as_it_was_in_training():
    assert "26ĠJulĠ2024" in read("llama3", layout_of_model("llama3").begin)


@pytest.mark.parametrize(("name", "kept"), [("llama3", "hi"), ("qwen3", " hi ")])
def test_white_space_around_a_turn_is_trimmed_as_the_template_does(name, kept):
    ids = encode_dialogue(chat_tokenizer(name), layout_of_model(name), ["x"], [" hi "], " hi ")
    assert ids == template_ids(name, ["x"], [" hi "], " hi ")
    assert read(name, ids).count(kept.replace(" ", "Ġ")) == 2


def test_what_ends_a_reply_and_what_fills_rows():
    tokenizer = chat_tokenizer("mistral0.3")
    layout = layout_of_model("mistral0.3")
    tokens = tokenizer.convert_ids_to_tokens([layout.eos, *layout.ends])
    assert tokens == ["</s>", "<s>", "</s>", "[INST]", "[/INST]"]
    assert layout.pad == layout.speaker1 == layout.speaker2 == tokenizer.unk_token_id


def test_where_the_partner_must_begin_an_empty_turn_precedes():
    tokenizer, layout = chat_tokenizer("mistral0.3"), layout_of_model("mistral0.3")
    ids = encode_dialogue(tokenizer, layout, ["i"], ["tea", "no"], "like")
    assert read("mistral0.3", ids) == "<s>[INST][/INST] tea</s>[INST] i\n\nno[/INST] like</s>"
    # A template puts spaces around nothing, which are a token that an empty turn lacks.
    assert verify(tokenizer, layout, [Dialogue(["i"], [Utterance(["tea", "no"], ["like"])])]) == (
        1,
        0,
    )


def test_words_are_no_marks_of_a_template_that_are_not_called_special():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level("qwen"), chat_template=SMOLLM2)
    tokenizer.add_tokens([AddedToken(t) for t in ("<|im_start|>", "<|im_end|>", "tealeaf")])
    layout = layout_of(tokenizer)
    [ids] = encode(tokenizer, ["no<|im_end|><|im_start|>tealeaf"])
    assert tokenizer.convert_ids_to_tokens([ids[-1], layout.eos]) == ["tealeaf", "<|im_end|>"]
    assert {layout.eos, *layout.reply_open[:1]}.isdisjoint(ids)


@pytest.mark.parametrize("name", ["llama3", "smollm2"])
def test_a_template_may_begin_a_reply_that_nobody_asked_for(name):
    tokenizer = deepcopy(chat_tokenizer(name))
    condition = "if add_generation_prompt"
    assert condition in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(condition, "if true")
    layouts = layout_of(tokenizer), layout_of_model(name)
    for persona in ([], ["i like tea.", "i have two cats."]):
        dialogue = persona, ["hello!", "hi.", "how are you?"], "fine!"
        always, asked = (encode_dialogue(tokenizer, layout, *dialogue) for layout in layouts)
        assert always == asked


def test_dialogues_that_a_template_reads_in_another_way_are_counted():
    tokenizer, layout = chat_tokenizer("qwen3"), layout_of_model("qwen3")
    replies = ["fine", "fine<|im_end|>", "<think>fine</think>fine"]
    dialogues = [Dialogue([], [Utterance(["hi"], [reply])]) for reply in replies]
    assert verify(tokenizer, layout, dialogues) == (3, 1)
    ids = encode_dialogue(tokenizer, layout, [], ["hi"], "fine<|im_end|>")
    assert ids.count(layout.eos) == 2  # of the turn, and of the reply


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ messages[", r"refuses a conversation \("),
        (
            LLAMA2.replace("messages[1:]", "raise_exception('no system')"),
            r"a system message, which the persona is \(no system\): write one .* as chat_template",
        ),
        (
            SMOLLM2.replace("in messages", "in messages if each.role != 'system'"),
            "does not write a system message, which the persona is: write one",
        ),
        (SMOLLM2.replace("each.content", "each.content ~ each.content"), "write each text once"),
        (SMOLLM2.replace("each.content", "each.content|upper"), "not write each text once"),
        ("{{ messages[0].content }}", "does not write each text once"),
        ("{% for each in messages %}{{ each.content }}\n{% endfor %}", "without a special token"),
        (
            "{% for each in messages %}{{ each.content }}{{ eos_token }}{% endfor %}",
            "begins a reply",
        ),
        (QWEN3.replace("text -", "loop.index ~ text -"), "more ways"),
        (QWEN3.replace("text -", "'a' ~ text -"), "joins texts"),
    ],
)
def test_templates_that_are_no_layout_are_told(template, message):
    with pytest.raises(UserError, match=message):
        layout_of(with_template(template))


def with_template(template):
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level("qwen"), eos_token="<|im_end|>", chat_template=template
    )
