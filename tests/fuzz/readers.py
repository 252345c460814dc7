"""Broken dialogues for every reader: dialogues come out, or a UserError of one sentence."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import sys
import types
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pyarrow
from pyarrow import parquet
from zstandard import ZstdCompressor

from convai_fast.data.builtin import builtin_dialogues
from convai_fast.data.readers import load_dialogues
from convai_fast.data.readers.file import FILE_READERS
from convai_fast.dialogue.dialogue import Dialogue, Utterance
from convai_fast.errors import UserError
from tests.fuzz.damage import check_sentence, time_limit

TIMEOUT_S = 10
MAX_BYTES = 100_000
# Each layout, the reader that it has, and the extension of its files.
LAYOUTS = {
    "json": ("json", "json"),
    "rows": ("json", "json"),
    "parlai": ("parlai", "txt"),
    "fields": ("parlai", "txt"),
    "dialog": ("json", "jsonl"),
    "csv": ("csv", "csv"),
    "table": ("csv", "tsv"),
    "messages": ("messages", "jsonl"),
    "parts": ("messages", "jsonl"),
    "sharegpt": ("sharegpt", "jsonl"),
    "pairs": ("pairs", "jsonl"),
    "mixed": ("json", "jsonl"),
}
LINES = ("parlai", "fields")
TABLES = {
    "csv": ["user 1 personas", "user 2 personas", "Best Generated Conversation"],
    "table": ["persona", "prompt", "response", "label"],
}
ARCHIVES = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
ARCHIVES["zst"] = lambda content: ZstdCompressor().compress(content)


# ---- good inputs --------------------------------------------------------------------------------


def good_records():
    """The same few dialogues as records of each reader."""
    records = {name: [] for name in LAYOUTS}
    for dialogue in builtin_dialogues(num_train=4, num_valid=1)["train"]:
        last = dialogue.utterances[-1]
        turns = [*last.history, last.candidates[-1]]
        users = list(enumerate(turns))
        records["json"].append(
            {
                "personality": dialogue.personality,
                "utterances": [
                    {"history": u.history, "candidates": u.candidates[-3:]}
                    for u in dialogue.utterances
                ],
            }
        )
        roles = [("user", "assistant")[i % 2] for i, _ in users]
        persona = "\n".join(dialogue.personality)
        messages = zip(["system", *roles], [persona, *turns], strict=True)
        records["messages"].append({"messages": [{"role": r, "content": c} for r, c in messages]})
        names = ["system", *(("human", "gpt")[i % 2] for i, _ in users)]
        values = zip(names, [persona, *turns], strict=True)
        records["sharegpt"].append({"conversations": [{"from": n, "value": v} for n, v in values]})
        spoken = "\n".join(f"User {i % 2 + 1}: {turn}" for i, turn in users)
        records["csv"].append(["i sing .", persona, spoken])
        lines = [f"your persona: {sentence}" for sentence in dialogue.personality]
        pairs = list(zip(turns[::2], turns[1::2], strict=False))
        lines += [f"{text}\t{reply}\t\tno .|{reply}|yes ." for text, reply in pairs]
        records["pairs"] += [
            {"persona": persona, "prompt": text, "completion": reply, "label": i % 2}
            for i, (text, reply) in enumerate(pairs)
        ]
        records["parlai"].append("\n".join(f"{i} {line}" for i, line in enumerate(lines, 1)))
        first = "".join(f"your persona: {sentence}\\n" for sentence in dialogue.personality)
        records["fields"] += [
            f"text:{text if i else first + text}\tlabels:{reply}\tlabel_candidates:no .|{reply}"
            f"\tepisode_done:{i == len(turns) // 2 - 1}"
            for i, (text, reply) in enumerate(pairs)
        ]
        records["rows"] += [
            {"personality": persona, "conv_id": len(records["json"]), **utterance}
            for utterance in records["json"][-1]["utterances"]
        ]
        exchanges = [
            [{"id": "a", "text": text}, {"id": "b", "text": reply}] for text, reply in pairs
        ]
        records["dialog"].append({"dialog": exchanges})
        records["table"] += [
            [persona, text, reply, str(i % 2)] for i, (text, reply) in enumerate(pairs)
        ]
        parts = [
            {"role": role, "content": [{"type": "text", "text": text}], "weight": i % 3}
            for i, (role, text) in enumerate(zip(roles, turns, strict=True))
        ]
        parts[2:2] = [{"role": "developer", "content": persona}]
        records["parts"] += [
            {"messages": parts, "label": True},
            {"system": persona, "thread": turns},
            {"conversation": [{"human": a, "gpt": b} for a, b in pairs]},
        ]
    names = [name for name in LAYOUTS if name not in (*LINES, *TABLES, "mixed")]
    records["mixed"] = [record for name in names for record in records[name][:2]]
    random.Random(0).shuffle(records["mixed"])
    return records


RECORDS = good_records()


def good_data(rng, layout):
    """What a JSON file of the layout holds: a list, or an object of splits."""
    records = deepcopy(RECORDS[layout])
    return rng.choice(
        [records, {"train": records}, {"train": records, "valid": deepcopy(records[:1])}]
    )


def write_out(rng, layout, data):
    """Good or mutated data as the text of a file."""
    if layout in LINES:
        return "\n".join(map(str, data)) + "\n"
    if layout in TABLES:
        text = io.StringIO()
        csv.writer(text, delimiter=rng.choice(",;\t")).writerows(
            row if isinstance(row, list) else [row] for row in [TABLES[layout], *data]
        )
        return text.getvalue()
    if isinstance(data, list) and rng.random() < 0.5:
        return "\n".join(json.dumps(record) for record in data)
    return json.dumps(data, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5)


# ---- mutations ----------------------------------------------------------------------------------

TEXTS = [
    "",
    " ",
    "a",
    "\0",
    "\ud800",
    "\u2028",
    "\x85",
    "\r",
    "\\n",
    "\t",
    "|",
    "__SILENCE__",
    "😀",
]
VALUES = [None, True, 0, -1, 1.5, float("nan"), 10**400, *TEXTS, [], {}, [[]], [None], {"a": None}]
# What only a function of the user's can return.
OBJECTS = [b"bytes", ("a", "b"), {1}, object(), {3: 4}, Dialogue([], []), Utterance([], [])]
JUNK = [
    *(text.encode("utf-8", "surrogatepass") for text in TEXTS),
    *(b'"', b"'", b",", b":", b"[", b"]", b"{", b"}", b"\\", b"\n", b"\r\n", b"\xff", b"\xc3"),
    *(b"\xef\xbb\xbf", b"1 ", b"99999999999 ", b"NaN", b"1e999", b"9" * 5000, b"[" * 3000),
    *(b'{"a":' * 3000, b'"\\ud800"', b'"\\u0000"', b"User 1:", b"User 2: ", b"your persona: "),
    *(b'{"train": ', b'"valid": ', b'"utterances"', b'"messages"', b'"conversations"', b"* * *"),
]


def places(data):
    """Every (container, key) of nested lists and dicts."""
    items = []
    if isinstance(data, dict):
        items = list(data.items())
    elif isinstance(data, list):
        items = list(enumerate(data))
    for key, value in items:
        yield data, key
        yield from places(value)


def mutate_data(rng, data, values):
    """Replace, delete, repeat, rename, wrap or move something, up to three times."""
    for _ in range(rng.randint(0, 3)):
        found = list(places(data))
        if not found or rng.random() < 0.02:
            return deepcopy(rng.choice(values))
        container, key = rng.choice(found)
        other, other_key = rng.choice(found)
        kind = rng.randrange(6)
        if kind == 0:
            container[key] = deepcopy(rng.choice(values))
        elif kind == 1:
            del container[key]
        elif kind == 2 and isinstance(container, list):
            count = rng.choice([1, 5, 40])
            container[key:key] = [deepcopy(container[key]) for _ in range(count)]
        elif kind == 2:
            container[rng.choice(["utterances", "messages", "train", "role", "a"])] = container.pop(
                key
            )
        elif kind == 3:
            container[key] = [container[key]] if rng.random() < 0.5 else {"train": container[key]}
        elif kind == 4:
            container[key] = deepcopy(other[other_key])
        elif isinstance(container[key], str):
            at = rng.randint(0, len(container[key]))
            container[key] = container[key][:at] + rng.choice(TEXTS) + container[key][at:]
    return data


def mutate_bytes(rng, data):
    """Delete, insert, repeat, flip, move, cut or encode otherwise, up to four times."""
    for _ in range(rng.randint(0, 4)):
        at, length = rng.randint(0, len(data)), rng.choice([1, 2, 10, 100])
        part = data[at : at + length]
        kind = rng.randrange(7)
        if kind == 0:
            data = data[:at] + data[at + length :]
        elif kind == 1:
            data = data[:at] + rng.choice(JUNK) + data[at:]
        elif kind == 2:
            data = data[:at] + part * rng.choice([1, 3, 300]) + data[at:]
        elif kind == 3 and part:
            data = data[:at] + bytes([part[0] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif kind == 4:
            to = rng.randint(0, len(data))
            data = data[:to] + part + data[to:]
        elif kind == 5:
            data = data[:at]
        elif rng.random() < 0.1:
            text = data.decode("utf-8", "replace")
            data = text.encode(rng.choice(["utf-16", "utf-8-sig", "latin-1"]), "replace")
    return data[:MAX_BYTES]


# ---- one input ----------------------------------------------------------------------------------


def write_parquet(records):
    """The records as Parquet; None where they do not fit into columns."""
    file = io.BytesIO()
    try:
        parquet.write_table(pyarrow.Table.from_pylist(records), file)
    except (pyarrow.ArrowException, AttributeError, TypeError, UnicodeEncodeError, OverflowError):
        return None
    return file.getvalue()


def write_file(rng, folder, name, layout):
    data = mutate_data(rng, good_data(rng, layout), VALUES) if rng.random() < 0.5 else None
    if data is None or (layout in (*LINES, *TABLES) and not isinstance(data, list)):
        data = deepcopy(RECORDS[layout])
    suffix = LAYOUTS[layout][1] if rng.random() < 0.8 else rng.choice(["json", "csv", "txt", "x"])
    content = None
    if layout not in (*LINES, *TABLES) and isinstance(data, list) and rng.random() < 0.2:
        content = write_parquet(data)
        suffix = "parquet"
    if content is None:
        content = write_out(rng, layout, data).encode("utf-8", "surrogatepass")
    if rng.random() < 0.6:
        content = mutate_bytes(rng, content)
    if rng.random() < 0.1:
        archive = rng.choice(list(ARCHIVES))
        content, suffix = ARCHIVES[archive](content), f"{suffix}.{archive}"
        if rng.random() < 0.3:
            content = mutate_bytes(rng, content)
    path = folder / f"{name}.{suffix}"
    path.write_bytes(content)
    return path


def make_input(number, folder):
    """Write input `number` into `folder`; returns the path, the reader to name, its layout."""
    rng = random.Random(number)
    for old in folder.iterdir():
        old.unlink()
    if rng.random() < 0.15:
        data = mutate_data(rng, good_data(rng, "json"), [*VALUES, *OBJECTS])
        module = sys.modules["fuzzed_data"] = types.ModuleType("fuzzed_data")
        module.load = lambda path: data
        return folder, "fuzzed_data:load", "function"
    layout = rng.choice(list(LAYOUTS))
    if rng.random() < 0.1:
        write_file(rng, folder, "train", layout)
        write_file(rng, folder, rng.choice(["valid", "test", "train"]), layout)
        return folder, "auto", "folder"
    path = write_file(rng, folder, "data", layout)
    own = LAYOUTS[layout][0]
    named = rng.choices(["auto", own, rng.choice(FILE_READERS)], [6, 3, 1])[0]
    return path, named, layout


def fuzzer(folder: Path) -> Callable[[int], str]:
    """What reads input `number`, and tells the layout and how it ended."""

    def read_input(number: int) -> str:
        path, reader, layout = make_input(number, folder)
        try:
            with time_limit(TIMEOUT_S):
                splits = load_dialogues(
                    path, reader, num_candidates=number % 4 + 1, report=check_line
                )
        except UserError as error:
            check_refusal(str(error), path, reader)
            return f"{layout} refused"
        check_dialogues(splits)
        return f"{layout} read"

    return read_input


def check_line(line):
    assert len(line.splitlines()) == 1, f"not one line: {line!r}"


def check_refusal(sentence, path, reader):
    named = 10 if "records cannot be read" in sentence else 1
    check_sentence(sentence, most=named * (len(str(path)) + 500))
    assert str(path) in sentence or reader in sentence, f"names no file: {sentence!r}"


def check_dialogues(splits):
    assert splits.keys() == {"train", "valid"}
    assert splits["train"]
    for dialogue in [*splits["train"], *splits["valid"]]:
        assert dialogue.utterances
        for utterance in dialogue.utterances:
            assert utterance.candidates
            for text in [*dialogue.personality, *utterance.history, *utterance.candidates]:
                assert text.strip()
                assert text.encode()
