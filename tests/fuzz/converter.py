"""Damaged checkpoints through `convert`: one sentence or a good model, never a traceback."""

import gzip
import io
import json
import random
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from convai_fast.dialogue.tokenizer import add_special_tokens
from convai_fast.model.families import FAMILIES
from tests.fuzz.damage import (
    ODD_VALUES,
    assert_one_sentence,
    mutate_bytes,
    mutate_json,
    run_command,
)
from tests.helpers.model_peers import make_peer
from tests.helpers.old_checkpoints import ARCHITECTURES, LAYOUTS, write_old_checkpoint
from tests.helpers.small_tokenizers import byte_tokenizer

NAMES = [
    "../config.json", "/tmp/config.json", "a/config.json", "config.json", "./vocab.json", "", ".",
    "é", "\ud8ff", "a\nb", "x" * 300, "a/../vocab.json", "pytorch_model.bin", "adapter_config.json",
    "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json",
]  # fmt: skip


def read_bases(folder):
    """Checkpoints to damage: files by name, and their tensors."""
    bases = []
    for layout in LAYOUTS:
        for architecture in ARCHITECTURES:
            for plain in (False, True):
                path = folder / f"{layout}-{architecture}-{plain}"
                write_old_checkpoint(path, layout, architecture, plain)
                tensors = torch.load(path / "pytorch_model.bin")
                today = path.with_suffix(".today")
                assert (
                    run_command(["convert", "--model", str(path), "--output", str(today)]).code == 0
                )
                for written in (path, path, today):
                    files = {f.name: f.read_bytes() for f in written.iterdir()}
                    bases.append((files, tensors))
    tokenizer = byte_tokenizer()
    add_special_tokens(tokenizer)
    for name in ("llama-3.1", "qwen2"):
        path = folder / name
        make_peer(name, vocab_size=len(tokenizer)).save_pretrained(path)
        tokenizer.save_pretrained(path)
        files = {file.name: file.read_bytes() for file in path.iterdir()}
        bases += 4 * [(files, load_file(path / "model.safetensors"))]
    return bases


def damage(rng, base):
    """Files of a checkpoint with one to three things wrong."""
    files, tensors = dict(base[0]), dict(base[1])
    for _ in range(rng.choice([1, 1, 2, 3])):
        name = rng.choice(list(files) or ["config.json"])
        kind = rng.randrange(9)
        if kind == 0:
            files[name] = mutate_bytes(rng, files.get(name, b""))
        elif kind == 1 and rng.random() < 0.3:
            files["pytorch_model.bin"] = damage_pickle(rng, tensors)
        elif kind == 1:
            files["pytorch_model.bin"] = mutate_bytes(
                rng, files.get("pytorch_model.bin", b""), 6000
            )
        elif kind in (2, 3):
            name = rng.choice([n for n in files if n.endswith(".json")] or [name])
            name = rng.choice([name, "config.json"])
            files[name] = mutate_json(rng, files.get(name, b""))
        elif kind in (4, 5):
            damage_tensors(rng, tensors)
            as_bytes, file = serialise(rng, tensors)
            files.pop("pytorch_model.bin", None)
            files[file] = as_bytes
        elif kind == 6:
            del files[name]
        elif kind == 7:
            files[rng.choice(list(files) or [name])] = files.get(name, b"")
        else:
            content = rng.choice(
                [b"", b"{}", b"[]", b'{"weight_map": {"a": "b"}}', *files.values()]
            )
            files[rng.choice(NAMES[-6:])] = content
        if not files:
            break
    return files


def damage_tensors(rng, tensors):
    # One that was made odd before cannot be made so in most other ways.
    names = [name for name, value in tensors.items() if is_dense(value)]
    if not names:
        return
    name = rng.choice(names)
    tensor = tensors[name]
    kind = rng.randrange(12)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[rng.choice([name + "x", "x", "", "lm_head.weight", "score.weight", "\ud800"])] = (
            tensor
        )
    elif kind == 2:
        tensors[rng.choice(list(tensors))] = tensor
    elif kind == 3:
        dtypes = [torch.int8, torch.bool, torch.float64, torch.float16, torch.complex64]
        tensors[name] = tensor.to(rng.choice([*dtypes, torch.bfloat16, torch.float8_e4m3fn]))
    elif kind == 4:
        tensors[name] = tensor.flatten()[: rng.choice([0, 1, -1])]
    elif kind == 5:
        tensors[name] = (
            tensor[None] if rng.random() < 0.5 else tensor.t() if tensor.dim() == 2 else tensor[0]
        )
    elif kind == 6:
        tensors[name] = tensor.to_sparse()
    elif kind == 7:
        tensors[name] = tensor.to("meta")
    elif kind == 8:
        value = rng.choice([float("nan"), float("inf"), 1e38, 0.0])
        tensors[name] = torch.full(tensor.shape, value)
    elif kind == 9:
        tensors[name] = torch.zeros(1).expand(10**4, 10**4, 10**4)
    elif kind == 10:
        tensors[name] = rng.choice([None, 1, "a", [tensor], {"a": tensor}])
    else:
        tensors[name] = tensor.float() + torch.randn(tensor.shape) * rng.choice([1e-6, 1.0, 1e6])


def is_dense(value):
    """Whether it is a tensor that was not made odd before."""
    return (
        type(value) is torch.Tensor
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and value.numel() < 10**6
        and not value.is_complex()
    )


def serialise(rng, tensors):
    """(bytes, file name) of the tensors in one of the formats."""
    dense = {k: v.contiguous() for k, v in tensors.items() if is_dense(v)}
    if rng.random() < 0.3:
        dense = {k.replace("\ud800", "?"): v.clone() for k, v in dense.items()}
        return save(dense), "model.safetensors"
    buffer = io.BytesIO()
    try:
        torch.save(tensors, buffer, _use_new_zipfile_serialization=rng.random() < 0.5)
    except Exception:  # what cannot be saved cannot be met
        buffer = io.BytesIO()
        torch.save(dense, buffer)
    return buffer.getvalue(), "pytorch_model.bin"


def damage_pickle(rng, tensors):
    """torch's zip format with other instructions in its pickle, and the checksums to match."""
    buffer, damaged = io.BytesIO(), io.BytesIO()
    torch.save({k: v for k, v in tensors.items() if type(v) is torch.Tensor}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(damaged, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, mutate_bytes(rng, content) if "data.pkl" in name else content)
    return damaged.getvalue()


def damage_archive(rng, files):
    """A tar archive of the files, with something wrong or not."""
    buffer = io.BytesIO()
    prefix = rng.choice(["", "run/", "./"])
    with tarfile.open(fileobj=buffer, mode="w", format=rng.choice([0, 1, 2])) as tar:
        victim = rng.randrange(len(files) + 1)
        for number, (name, content) in enumerate(files.items()):
            info = tarfile.TarInfo(prefix + name)
            info.size = len(content)
            if number == victim:
                damage_member(rng, info)
            try:
                header = info.tobuf(tar.format, "utf-8", "surrogateescape")
            except (ValueError, UnicodeError):
                continue
            buffer.write(header + content + b"\0" * (-len(content) % 512))
    data = buffer.getvalue()
    if rng.random() < 0.1:
        data = mutate_bytes(rng, data)
    if rng.random() < 0.5:
        data = gzip.compress(data, 1)
    return mutate_bytes(rng, data) if rng.random() < 0.3 else data


def damage_member(rng, info):
    kind = rng.randrange(6)
    if kind == 0:
        info.name = rng.choice(NAMES)
    elif kind == 1:
        info.type = bytes([rng.randrange(256)])
    elif kind == 2:
        info.type = rng.choice(b"0123456789SLKxgXDVNM").to_bytes(1, "big")
        info.linkname = rng.choice(NAMES)
    elif kind == 3:
        info.size = rng.choice([-(2**40), -512, -1, 0, 1, 2**30, 2**50, info.size + 512])
    elif kind == 4:
        pax = rng.choice(
            ["size", "path", "linkpath", "GNU.sparse.major", "GNU.sparse.size", "mtime"]
        )
        info.pax_headers = {pax: str(rng.choice([v for v in ODD_VALUES if v != "\ud800"]))}
    else:
        info.mode = rng.choice([0, 0o4777, 0o777, 2**20])


def try_one(number, bases, folder):
    """Convert the damaged checkpoint of this number, and check how it ended."""
    rng = random.Random(number)
    files = damage(rng, rng.choice(bases))
    old, new = folder / "old", folder / "new"
    if files and rng.random() < 0.4:
        old = folder / "old.tar.gz"
        old.write_bytes(damage_archive(rng, files))
    else:
        old.mkdir()
        for name, content in files.items():
            (old / name).write_bytes(content)
        if files and rng.random() < 0.02:
            name = rng.choice(list(files))
            (old / name).unlink()
            (old / name).mkdir()
    outcome = run_command(["convert", "--model", str(old), "--output", str(new)])
    assert_one_sentence(outcome, "convert")
    written = sorted(path.name for path in folder.iterdir())
    assert written == sorted([old.name, *(["new"] if outcome.code == 0 else [])]), written
    if outcome.code == 0:
        assert json.loads((new / "config.json").read_text())["model_type"] in FAMILIES
    return outcome


def fuzzer(folder: Path) -> Callable[[int], str]:
    """What converts the damaged checkpoint of a number, and tells how that ended."""
    temporary, here = folder / "temporary", folder / "input"
    temporary.mkdir()
    bases = read_bases(folder / "bases")

    def convert(number: int) -> str:
        here.mkdir()
        before, tempfile.tempdir = tempfile.tempdir, str(temporary)
        try:
            outcome = try_one(number, bases, here)
            assert not any(temporary.iterdir())
        finally:
            tempfile.tempdir = before
            shutil.rmtree(here)
            shutil.rmtree(temporary)
            temporary.mkdir()
        return {0: "converted", 2: "refused"}[outcome.code]

    return convert
