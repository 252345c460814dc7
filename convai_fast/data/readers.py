"""Reading dialogues: which format a path holds, and what is missing from it."""

import importlib
import os
import random
import re
import sys
import traceback
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from convai_fast.data.formats import (
    SHAPES,
    VALID_NAMES,
    Conversation,
    Texts,
    read_csv,
    read_json,
    read_parlai,
    read_records,
    shape_of,
    split_records,
)
from convai_fast.dialogue.dialogue import Dialogue, Utterance
from convai_fast.errors import UserError

Splits = dict[str, list[Conversation]]

FILE_READERS = ("json", "parlai", "csv", "messages", "sharegpt")
_KNOWN = f"{', '.join(FILE_READERS)}, hub or your own package.module:function"
_ARROW_SUFFIXES = (".parquet", ".arrow")


def load_dialogues(
    path: str | Path,
    reader: str = "auto",
    *,
    num_candidates: int = 20,
    valid_fraction: float = 0.1,
    seed: int = 42,
) -> dict[str, list[Dialogue]]:
    r"""Read dialogues of any of the formats below into {"train": [...], "valid": [...]}.

    `path` is a file, or a folder that holds train.X and perhaps valid.X (or validation.X, val.X,
    dev.X, test.X; the first of these that is there), or what the readers `hub` and
    `package.module:function` say. Files are UTF-8. `reader` is one of these names; `auto` looks at
    the content of the files and at their extension.

    `json`: the format of the predecessor, huggingface/transfer-learning-conv-ai. The true reply is
    the last candidate; there may be any number of others. `personality` is optional. A list of
    dialogues will do instead of the object, and so will JSON lines, a dialogue a line. ::

        {"train": [{"personality": ["i like tea ."],
                    "utterances": [{"history": ["hello !"],
                                    "candidates": ["no .", "hi , some tea ?"]}]}],
         "valid": [...]}

    `parlai`: ParlAI text, `N text<TAB>reply<TAB>reward<TAB>candidate|candidate|...`, of which only
    text and reply are required. A number that does not go up begins a new dialogue. What was said
    before is the history; the text `__SILENCE__` opens a dialogue without any. The candidate equal
    to the reply is moved to the end, or the reply is added there. ::

        1 your persona: i like tea .
        2 hello !<TAB>hi , some tea ?<TAB><TAB>no .|hi , some tea ?
        3 yes , please .<TAB>here you are .

    `csv`: Synthetic-Persona-Chat, a conversation a row. Either user's side becomes a dialogue with
    that user's persona. A line without `User 1: ` or `User 2: ` in front continues the turn before
    it, unless it is a stage direction in brackets, parentheses or asterisks; such lines, those
    before the first turn, and a `User 1:` with nothing behind it are left out. ::

        user 1 personas,user 2 personas,Best Generated Conversation
        "I like tea.
        I am old.",I have a dog.,"User 1: Hello!
        User 2: Hi!"

    `messages`: JSON lines (or a JSON list) of chat messages. The lines of `system` are the persona
    and the turns of `assistant` the replies. ::

        {"messages": [{"role": "system", "content": "I like tea."},
                      {"role": "user", "content": "Hello!"},
                      {"role": "assistant", "content": "Hi, some tea?"}]}

    `sharegpt`: the same with other names. ::

        {"conversations": [{"from": "system", "value": "I like tea."},
                           {"from": "human", "value": "Hello!"},
                           {"from": "gpt", "value": "Hi, some tea?"}]}

    `hub`: the id of a Hugging Face dataset, a folder written by its `save_to_disk`, or a folder
    that `datasets.load_dataset` reads; needs `pip install 'convai-fast[hub]'`. The columns must
    be `utterances` (and `personality`), `messages`, `conversations`, or the three of `csv`, with
    the content shown above. The splits are train and the first of valid, validation, val, dev,
    test.

    `package.module:function`: a function of your own. It is called with `path` as a str and
    returns what `json` would read: an object or list, of dicts or `Dialogue`s. The working
    directory is importable. ::

        def read(path: str) -> dict:
            return {"train": [{"utterances": [{"history": ["hello !"], "candidates": ["hi !"]}]}]}

    In `csv`, `messages` and `sharegpt`, consecutive turns of one speaker are joined with a space,
    and only turns that answer something are utterances. Everywhere, a dialogue in which nothing is
    answered is left out, as is a blank persona sentence or distractor; a blank reply or turn is an
    error.

    What is missing is then filled in, depending on the data and `seed` alone:

    - Without a validation split, `valid_fraction` of the conversations is cut off from train: at
      least one unless there is only one or the fraction is 0. Both sides of a conversation stay in
      one split.
    - An utterance with a lone true reply gets distractors in front of it until it has
      `num_candidates`: replies from other conversations of its split, drawn as often as they
      occur there. None equals the true reply or another one but for case and white space, so
      there are fewer where the split has too few. Utterances with more candidates stay as they
      are.

    Raises:
        UserError: the path, an option or a record is wrong; one sentence that names the file, the
            line or index, and the field.
    """
    if num_candidates < 1:
        raise UserError(f"num_candidates must be at least 1, not {num_candidates}")
    if not 0 <= valid_fraction < 1:
        raise UserError(f"valid_fraction must be at least 0 and below 1, not {valid_fraction}")

    splits = _read(str(path), reader)
    train, valid = splits.get("train", []), splits.get("valid", [])
    if not train:
        raise UserError(f"{path} has no reply to learn from; add dialogues in which one answers")
    if not valid:
        train, valid = _cut_off(train, valid_fraction, random.Random(f"valid {seed}"))
    completed = {}
    for split, conversations in (("train", train), ("valid", valid)):
        rng = random.Random(f"distractors {split} {seed}")
        _add_distractors(conversations, num_candidates, rng)
        completed[split] = [side for sides in conversations for side in sides]
    return completed


# ---- reading ----------------------------------------------------------------------------------


def _read(path: str, reader: str) -> Splits:
    texts = Texts()
    if re.fullmatch(r"\w+(\.\w+)*:\w+", reader):
        return _read_with_function(path, reader, texts)
    if reader not in ("auto", "hub", *FILE_READERS):
        raise UserError(f"there is no reader {reader!r}; choose {_KNOWN}")
    if reader == "hub":
        return _read_hub(path, texts)
    if os.path.isfile(path):
        return _read_file(path, reader, texts)
    if os.path.isdir(path):
        return _read_folder(path, reader, texts)
    raise UserError(
        f"{path}: there is no such file or folder; mend the path, or choose the reader hub if it "
        "is a Hugging Face dataset"
    )


def _read_folder(folder: str, reader: str, texts: Texts) -> Splits:
    try:
        files = sorted(Path(folder).iterdir())
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror}); check its permissions"
        ) from None
    if reader == "auto" and any(f.name in ("dataset_dict.json", "state.json") for f in files):
        return _read_hub(folder, texts)
    train = _file_of_split(files, "train")
    if train is None:
        inside = [*files, *Path(folder).glob("data/*")]
        if reader == "auto" and any(f.suffix in _ARROW_SUFFIXES for f in inside):
            return _read_hub(folder, texts)
        raise UserError(
            f"{folder}: this folder has no file train.json, train.jsonl, train.csv or train.txt; "
            "give the path of the file itself"
        )
    splits = _read_file(str(train), reader, texts)
    for name in VALID_NAMES:
        valid = _file_of_split(files, name, train.suffix)
        if valid is None:
            continue
        valid_splits = _read_file(str(valid), reader, texts)
        if "valid" in splits or "valid" in valid_splits:
            raise UserError(
                f"{folder}: {train.name} or {valid.name} holds both splits itself; give the path "
                "of that file"
            )
        return {"train": splits["train"], "valid": valid_splits["train"]}
    return splits


def _file_of_split(files: list[Path], split: str, suffix: str | None = None) -> Path | None:
    """The file called `split`, with that suffix where there are several."""
    found = [f for f in files if f.stem == split and f.suffix not in _ARROW_SUFFIXES]
    found = [f for f in found if os.path.isfile(f)]
    found = [f for f in found if f.suffix == suffix] or found
    if len(found) > 1:
        raise UserError(
            f"{found[0].parent}: this folder holds both {found[0].name} and {found[1].name}; give "
            "the path of one of them"
        )
    return found[0] if found else None


def _read_file(path: str, reader: str, texts: Texts) -> Splits:
    text = _read_text(path)
    if reader == "auto":
        reader = _recognise(text, path)
    if reader == "parlai":
        return {"train": read_parlai(text, path, texts)}
    if reader == "csv":
        return {"train": read_csv(text, path, texts)}
    return read_json(text, path, None if reader == "auto" else reader, texts)


def _read_text(path: str) -> str:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); check its permissions"
        ) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: the byte 0x{error.object[error.start]:02x} is not UTF-8; save "
            "the file as UTF-8 text"
        ) from None
    if not text.strip():
        raise UserError(f"{path} is empty; give a file with dialogues")
    if (nul := text.find("\0")) >= 0:
        line = text.count("\n", 0, nul) + 1
        raise UserError(f"{path}, line {line}: there is a NUL byte; save the file as UTF-8 text")
    return text


def _recognise(text: str, path: str) -> str:
    """The reader for the content of a file; "auto" is JSON whose records tell their shape."""
    first_line = text.lstrip().split("\n", 1)[0]
    if first_line[0] in "{[":
        return "auto"
    if re.match(r"[0-9]+ (.*\t|your persona:|partner's persona:)", first_line):
        return "parlai"
    columns = {cell.strip().strip('"').lower() for cell in first_line.split(",")}
    if columns >= {column.lower() for column in SHAPES["csv"].keys}:
        return "csv"
    # The content is not as it should be; the reader of the extension says what is wrong with it.
    by_suffix = {".csv": "csv", ".json": "auto", ".jsonl": "auto", ".ndjson": "auto"}
    suffix = Path(path).suffix.lower()
    if suffix not in by_suffix:
        raise UserError(f"{path}: the format is not recognised; choose the reader: {_KNOWN}")
    return by_suffix[suffix]


def _read_hub(path: str, texts: Texts) -> Splits:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{path}: reading it needs the datasets library; install it with "
            "pip install 'convai-fast[hub]'"
        ) from None
    saved = any(os.path.isfile(f"{path}/{n}") for n in ("dataset_dict.json", "state.json"))
    try:
        loaded = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
    except Exception as error:  # the library has many, those of the network among them
        raise UserError(
            f"{path}: the datasets library cannot load it ({_reason(error)}); check the name and "
            "the network"
        ) from error
    if isinstance(loaded, datasets.Dataset):
        loaded = {"train": loaded}
    if "train" not in loaded:
        raise UserError(
            f"{path}: this dataset has no split train, only {', '.join(map(str, loaded))}; read it "
            "with a function of your own"
        )
    splits = {}
    valid_name = next((name for name in VALID_NAMES if name in loaded), None)
    for split, name in (("train", "train"), ("valid", valid_name)):
        if name is None:
            continue
        columns = loaded[name].column_names
        shape = shape_of(columns)
        if shape is None:
            raise UserError(
                f"{path}: the columns of {name} are {', '.join(columns)}, none of which is "
                "utterances, messages or conversations; read it with a function of your own"
            )
        kept = [c for c in columns if c in (*SHAPES[shape].keys, "personality")]
        rows = loaded[name].with_format(None).select_columns(kept)
        records = ((f"{path}: {name}[{i}].", row) for i, row in enumerate(rows))
        splits[split] = read_records(records, shape, texts)
    return splits


def _read_with_function(path: str, reader: str, texts: Texts) -> Splits:
    module_name, _, function_name = reader.partition(":")
    sys.path.insert(0, "")  # the working directory
    try:
        module = _run_users_code(
            f"reader {reader}: importing", importlib.import_module, module_name
        )
        function = getattr(module, function_name, None)
        if not callable(function):
            raise UserError(
                f"reader {reader}: the module has no function {function_name}; mend the name"
            )
        data = _run_users_code(f"reader {reader}: reading", function, path)
    finally:
        if "" in sys.path:
            sys.path.remove("")
    splits = split_records(data, f"{reader}: ")
    return {name: read_records(records, "json", texts) for name, records in splits.items()}


def _run_users_code(what: str, function: Callable[[str], Any], argument: str) -> Any:
    try:
        return function(argument)
    except UserError:
        raise
    except Exception as error:  # anything can go wrong in code that is not ours
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [f for f in frames if not f.filename.startswith("<") and f.filename != __file__]
        place = f" in {theirs[-1].filename}, line {theirs[-1].lineno}" if theirs else ""
        raise UserError(
            f"{what} {argument} failed{place} ({_reason(error)}); mend that function or its name"
        ) from error


def _reason(error: Exception) -> str:
    """An exception of somebody else's, as a part of our sentence."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(". ")


# ---- completion -------------------------------------------------------------------------------


def _cut_off(
    conversations: list[Conversation], fraction: float, rng: random.Random
) -> tuple[list[Conversation], list[Conversation]]:
    """Split into (train, valid), both in the order of the data."""
    total = len(conversations)
    num_valid = min(max(1, round(total * fraction)), total - 1) if fraction > 0 else 0
    chosen = set(rng.sample(range(total), num_valid))
    train = [c for i, c in enumerate(conversations) if i not in chosen]
    return train, [conversations[i] for i in sorted(chosen)]


def _add_distractors(
    conversations: list[Conversation], num_candidates: int, rng: random.Random
) -> None:
    """Put distractors from other conversations in front of every lone true reply."""
    numbers: dict[str, int] = {}
    pool: list[tuple[str, int, int]] = []  # reply, number of its normalised text, conversation
    utterances: list[Utterance] = []
    for owner, sides in enumerate(conversations):
        for utterance in (u for side in sides for u in side.utterances):
            reply = utterance.candidates[-1]
            number = numbers.setdefault(" ".join(reply.lower().split()), len(numbers))
            pool.append((reply, number, owner))
            utterances.append(utterance)
    reserve = _different_replies(pool)
    rng.shuffle(reserve)

    wanted = num_candidates - 1
    for utterance, (_, number, owner) in zip(utterances, pool, strict=True):
        if len(utterance.candidates) > 1:
            continue
        # Replies are drawn as often as they occur, lest "the frequent one is true" be learnt. Where
        # that finds too few, because the split has few different ones, the reserve has them all.
        start = int(rng.random() * len(reserve))
        entries = chain(
            (pool[int(rng.random() * len(pool))] for _ in range(4 * wanted)),
            (reserve[(start + i) % len(reserve)] for i in range(len(reserve))),
        )
        taken = {number}
        distractors: list[str] = []
        while len(distractors) < wanted and (entry := next(entries, None)):
            other, other_number, other_owner = entry
            if other_owner != owner and other_number not in taken:
                taken.add(other_number)
                distractors.append(other)
        utterance.candidates[:0] = distractors


def _different_replies(pool: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Each reply once, and again from a second conversation, so that any conversation finds it."""
    found: dict[int, list[tuple[str, int, int]]] = {}
    for entry in pool:
        known = found.setdefault(entry[1], [entry])
        if len(known) == 1 and known[0][2] != entry[2]:
            known.append(entry)
    return [entry for entries in found.values() for entry in entries]
