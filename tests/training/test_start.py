"""What a run starts from, and what the command `train` says of it."""

import dataclasses
import json
import os

import pytest
from transformers import GPT2Config, GPT2DoubleHeadsModel

from convai_fast.cli.main import main
from convai_fast.data.builtin import builtin_dialogues
from convai_fast.errors import UserError
from convai_fast.training.loop import train
from tests.helpers.command_line import arguments_of


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_candidates": 0}, "`num_candidates` must be at least 1, not 0"),
        ({"num_candidates": 10**20}, "`num_candidates` must be at most 10000"),
        ({"personality_permutations": 10**11}, "`personality_permutations` must be at most 1000"),
        ({"train_batch_size": 10**20}, "`train_batch_size` must be at most 2147483647"),
        ({"seed": -1}, "`seed` must be at least 0, not -1"),
        ({"seed": 2**64}, "`seed` must be at most 9223372036854775807"),
        ({"lr": float("nan")}, "`lr` must be at least 0, not nan"),
        ({"lm_coef": 0, "mc_coef": 0}, "both 0: there is nothing to learn"),
        ({"device": "tpu"}, "device tpu is not available"),
        ({"precision": "fp16"}, "fp16 needs a CUDA device"),
        ({"model": "./absent"}, "there is no ./absent|absent"),
        ({"dataset_path": ""}, "no dialogues given"),
        ({"dataset_path": "absent.json"}, "absent.json"),
    ],
)
def test_options_that_make_no_sense_are_one_sentence(
    options, model_folder, data_file, change, says
):
    options.model, options.dataset_path = str(model_folder), str(data_file)
    options.from_scratch = True
    with pytest.raises(UserError, match=says) as raised:
        train(dataclasses.replace(options, **change), report=lambda _: None)
    assert "\n" not in str(raised.value)


def test_without_dialogues_nothing_is_loaded_or_downloaded(capsys):
    assert main(["train"]) == 2
    assert "--data is missing: give dialogues (files, folders" in capsys.readouterr().err


def test_a_model_that_has_no_room_for_a_reply_is_one_sentence(options, model_folder, data_file):
    path = model_folder / "config.json"
    config = path.read_text()
    path.write_text(json.dumps(json.loads(config) | {"n_positions": 2}))
    options.model, options.dataset_path = str(model_folder), str(data_file)
    options.from_scratch = True
    with pytest.raises(UserError, match=r"2 positions, as its config\.json says, too few"):
        train(options, report=lambda _: None)
    path.write_text(config)


def test_from_scratch_takes_the_shape_of_a_run(options, model_folder, data_file, tmp_path):
    options.model, options.dataset_path = str(model_folder), str(data_file)
    options.from_scratch, options.max_steps = True, 1
    run = train(options, report=lambda _: None).run
    again = dataclasses.replace(options, model=str(run), output=str(tmp_path / "again"))
    assert train(again, report=lambda _: None).steps == 1


def test_a_tokenizer_of_another_model_is_refused(options, model_folder, data_file, tmp_path):
    options.from_scratch, options.model = True, str(model_folder)
    options.dataset_path, options.max_steps = str(data_file), 1
    run = train(options, report=lambda _: None).run
    from convai_fast.dialogue.new_tokenizer import train_tokenizer

    other = train_tokenizer(builtin_dialogues(num_train=9, num_valid=1)["train"], 300)
    other.save_pretrained(tmp_path / "other")
    second = dataclasses.replace(
        options,
        model=str(run / "best"),
        tokenizer=str(tmp_path / "other"),
        from_scratch=False,
        output=str(tmp_path / "second"),
    )
    with pytest.raises(UserError, match="embeddings for 400 tokens, but its tokenizer has 300"):
        train(second, report=lambda _: None)


def test_special_tokens_are_added_to_a_plain_model_and_reported(
    options, data_file, shared_dir, tmp_path
):
    folder = tmp_path / "gpt2"
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=256)
    GPT2DoubleHeadsModel(config).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((shared_dir / "tokenizers" / "gpt2" / name).read_bytes())
    options.model, options.dataset_path, options.max_steps = str(folder), str(data_file), 1
    said = []
    run = train(options, report=said.append).run
    assert any("5 added, embedding 50,257 -> 50,262 rows" in line for line in said)
    assert "only 1 step to learn from: raise max_steps" in said
    assert GPT2DoubleHeadsModel.from_pretrained(run / "best").config.vocab_size == 50_262


def test_the_command_line_trains_and_says_how_to_go_on(options, model_folder, data_file, capsys):
    options.from_scratch, options.model = True, str(model_folder)
    options.dataset_path, options.max_steps = str(data_file), 2
    assert main(["train", *arguments_of(options)]) == 0
    output = capsys.readouterr().out
    assert "random weights" in output
    assert "only 2 steps to learn from: raise max_steps" in output
    assert f"convai-fast interact --model {options.output}/best --data {data_file}\n" in output


def test_a_mistake_on_the_command_line_is_one_sentence_and_code_2(options, data_file, capsys):
    options.model, options.dataset_path = "./absent", str(data_file)
    assert main(["train", *arguments_of(options)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("convai-fast train: ")
    assert errors.count("\n") == 1
    assert not os.path.exists(options.output)
