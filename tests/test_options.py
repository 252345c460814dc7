"""Files that give options by name."""

from pathlib import Path

import numpy as np
import pytest

from convai_fast.cli.options.generate import GenerateOptions
from convai_fast.cli.parse import parse
from convai_fast.errors import UserError
from convai_fast.options import as_yaml, options_of, read_options
from convai_fast.training.options import TrainOptions


@pytest.fixture
def config(tmp_path):
    """Writes a file of options and returns its name."""

    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


def test_what_the_command_line_gives_counts_over_the_file(config):
    file = config(
        "data: [a.json, b.json]\nlr: 1e-3\ntrain-batch-size: 2\ncompile: true\nthreads: 1"
    )
    words = ["--config", file, "--lr", "0.5", "--compile=false", "--data", "c.json"]
    options, process, given = parse(TrainOptions, words)
    assert (options.dataset_path, options.lr, options.compile) == (("c.json",), 0.5, False)
    assert (options.train_batch_size, process.threads) == (2, 1)
    assert given == {"dataset_path", "lr", "train_batch_size", "compile", "threads", "config"}
    assert parse(TrainOptions, ["--config", file])[0].dataset_path == ("a.json", "b.json")


def test_values_have_the_types_of_their_options(config):
    file = config("model: m\ntemperature: 1\nstop: '.'\noutput: out.jsonl\nn: 2\nmax_history: null")
    options, _, _ = parse(GenerateOptions, ["--config", file])
    assert type(options.sampling.temperature) is float
    assert (options.sampling.stop, options.output) == ((".",), Path("out.jsonl"))
    assert (options.num_return, options.max_history) == (2, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: m\nlrr: 3", "mine.yaml, line 2: there is no option 'lrr': do you mean lr?"),
        ("lr: 1\nlr: 2", "mine.yaml, line 2: lr is given twice: give it once"),
        ("data: a\ndataset_path: b", "mine.yaml, line 2: dataset_path is given twice"),
        ("lr: high", "mine.yaml, line 1: lr must be a number, not 'high'"),
        ("n_epochs: 1.5", "n_epochs must be a whole number, not 1.5"),
        ("n_epochs: true", "n_epochs must be a whole number, not True"),
        ("compile: 1", "compile must be true or false, not 1"),
        ("layout: flat", "layout must be one of shared, padded, not 'flat'"),
        ("output: 2026", "output must be a text, not 2026"),
        ("lr: [1]", r"lr must be a number, not \[1\]"),
        ("data: [a, {b: c}]", "data must be a text, or a list of such, not"),
        ("lr: null", "lr must be a number, not None"),
        ("3: 4", "there is no option 3"),
        ("lr: 1\n  x: [", "mine.yaml, line 2: this is not YAML"),
        ("x: 2026-99-99", "mine.yaml: this is not YAML"),
        ("x: !!timestamp y", "mine.yaml: this is not YAML"),
        ("lr: !!float ''", "mine.yaml: this is not YAML"),
        ("- lr", "mine.yaml must hold options, one a line"),
        (b"lr: \xff", "mine.yaml: this is not YAML"),
        ("a: " + "[" * 5000, "mine.yaml.*: this is not YAML"),
        ("config: other.yaml", "config can only be given on the command line"),
    ],
)
def test_a_mistake_is_one_sentence_with_its_line(config, text, says):
    with pytest.raises(UserError, match=says) as raised:
        parse(TrainOptions, ["--config", config(text)])
    assert "\n" not in str(raised.value)


def test_a_reader_that_is_code_has_to_be_named_on_the_command_line(config):
    words = ["--config", config("data: a\nreader: [json, mine.py:load]")]
    with pytest.raises(UserError, match=r"reader json mine\.py:load, which is code: give `reader`"):
        parse(TrainOptions, words)
    assert parse(TrainOptions, [*words, "--reader", "a:b"])[0].reader == ("a:b",)


def test_a_file_that_is_not_there_is_one_sentence():
    with pytest.raises(UserError, match=r"absent\.yaml cannot be read: No such file"):
        parse(TrainOptions, ["--config", "absent.yaml"])


def test_an_empty_file_gives_nothing(config):
    assert parse(TrainOptions, ["--config", config("# later\n")])[2] == {"config"}


def test_what_is_written_is_read_again(config):
    values = {"dataset_path": ("ä.json", "no"), "lr": 1e-05, "model": "1e-3", "compile": True}
    values |= {"reader": (), "output": "", "seed": 2**63 - 1, "tokenizer": "x" * 300 + " y"}
    values |= {"max_norm": np.float64(0.1), "dataset_cache": "\U0001f600 \udcff"}
    assert read_options(Path(config(as_yaml(values))), options_of(TrainOptions)) == values
