"""A checkpoint packed as a tar archive, checked member by member and opened as a folder."""

import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from convai_fast.errors import UserError, reason_of, shown
from convai_fast.files import read_json, scratch_folder
from convai_fast.options import options_file

# What a model and its tokenizer are read from; anything else stays in the archive.
_CHECKPOINT_FILE = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config)\.json"
    r"|(special_tokens_map|added_tokens|vocab)\.json"
    r"|(merges|special_tokens)\.txt|chat_template\.jinja"
    r"|(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|adapter_config\.json|adapter_model\.safetensors|trained_with\.json"
)
_MAX_MEMBERS = 10_000
# Headers that tarfile reads whole before it names the member that they belong to.
_EXTENDED_TYPES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_MAX_EXTENDED_BYTES = 2**16


class Unpacked(NamedTuple):
    """Where the files of a checkpoint lie: a folder or Hub id, and names of files not needed."""

    path: str | Path
    ignored: list[str]


@contextmanager
def unpacked(path: str | Path) -> Iterator[Unpacked]:
    """The folder that a tar archive (.tar.gz, .tgz, .tar) holds, for as long as the context lasts.

    Whatever is no file, a folder or a Hub id, is given back as it is, but that the folder of a
    training run stands for its best checkpoint. An archive's files may lie in one folder of it. All
    members are checked before the first is extracted, and only the files of a checkpoint are, to a
    temporary folder. Errors raised within the context name the archive.

    Raises:
        UserError: the file is no archive, is damaged or larger than there is room for, does not
            hold one checkpoint, or has members that no checkpoint needs: links, devices, absolute
            paths, `..`, the same name twice.
    """
    source = Path(path).expanduser()
    if not source.is_file():
        if _is_store(source):
            raise UserError(
                f"{path} is a store of dialogues, which `dataset_path` takes: give the folder of "
                "a model"
            )
        if _is_run(source):
            path = source = best_checkpoint(source)
        names = (file.name for file in source.iterdir()) if source.is_dir() else ()
        yield Unpacked(path, sorted(name for name in names if not is_checkpoint_file(name)))
        return
    with scratch_folder(None, "convai-fast-") as temporary:
        try:
            ignored = _extract(source, temporary)
            yield Unpacked(temporary, ignored)
        except UserError as error:
            raise UserError(str(error).replace(str(temporary), str(path))) from error


def checkpoint_of(path: str | Path) -> Path:
    """The folder at `path` by its own name, not by that of a link; of a run its best checkpoint.

    What is no folder is given back as it is. Raises UserError for a run without a checkpoint.
    """
    folder = Path(path).expanduser()
    if _is_run(folder):
        folder = best_checkpoint(folder)
    return folder.resolve() if folder.is_dir() else Path(path)


def name_of(model: str) -> str:
    """The last part of its path; of a checkpoint of a run (runs/mine/best) the run's: mine."""
    path = Path(model)
    is_checkpoint = path.name in ("best", "last") and options_file(path.parent) is not None
    return (path.parent if is_checkpoint else path).name or "model"


def _is_run(folder: Path) -> bool:
    return options_file(folder) is not None and not (folder / "config.json").is_file()


def _is_store(folder: Path) -> bool:
    try:
        return {"format_version", "sizes"} <= read_json(folder / "meta.json").keys()
    except UserError:
        return False


def best_checkpoint(run: Path) -> Path:
    """The link to the best checkpoint of a run; to the last where a copy has lost the best.

    Raises UserError where there is none yet.
    """
    found = next((run / name for name in ("best", "last") if (run / name).is_dir()), None)
    if found is None:
        raise UserError(
            f"{run} is a training run that has saved no checkpoint yet: wait for its first epoch, "
            f"or begin it again with `convai-fast train --resume {run}`"
        )
    return found


def is_checkpoint_file(name: str) -> bool:
    """Whether a model or its tokenizer is read from files of this name."""
    return _CHECKPOINT_FILE.fullmatch(name) is not None


class _TarInfo(tarfile.TarInfo):
    """A member whose name is not longer than any checkpoint needs."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_TarInfo":
        """The member of a header, as in tarfile; raises ValueError for one that is too long."""
        member = super().frombuf(buf, encoding, errors)
        if member.type in _EXTENDED_TYPES and member.size > _MAX_EXTENDED_BYTES:
            raise ValueError(f"it holds a name of {member.size:,} bytes")
        return member


def _extract(archive: Path, folder: Path) -> list[str]:
    """Extract the checkpoint's files into `folder`, and name those that were left."""
    if archive.suffix in (".bin", ".pt", ".pth", ".safetensors"):
        raise UserError(
            f"{archive} is a file of weights: give the folder that holds it, with config.json and "
            "the tokenizer's files."
        )
    try:
        with open(archive, "rb") as file:
            if file.read(4) == b"PK\3\4":
                raise UserError(f"{archive} is a zip archive: unpack it, and give the folder.")
        with tarfile.open(archive, tarinfo=_TarInfo) as tar:
            members = _checked_members(tar, archive, shutil.disk_usage(folder).free)
            configs = [name for name in members if name.name == "config.json"]
            if len(configs) != 1:
                raise UserError(
                    f"{archive} holds {len(configs) or 'no'} files named config.json, but an "
                    "archive must hold one checkpoint: unpack it, and give the folder."
                )
            ignored = []
            for name, member in members.items():
                if name.parent == configs[0].parent and is_checkpoint_file(name.name):
                    source = tar.extractfile(member)
                    assert source is not None  # as all members that were checked, it is a file
                    with source, open(folder / name.name, "xb") as file:
                        shutil.copyfileobj(source, file)
                else:
                    ignored.append(str(name))
            return sorted(ignored)
    except UserError:
        raise
    # A damaged archive can raise nearly anything, and a full disk an OSError.
    except Exception as error:
        raise UserError(
            f"{archive} cannot be unpacked as a tar archive ({reason_of(error)}): give a folder "
            "with config.json and weights, or a complete .tar.gz of one."
        ) from error


def _checked_members(
    tar: tarfile.TarFile, archive: Path, free_bytes: int
) -> dict[PurePosixPath, tarfile.TarInfo]:
    """The regular files of the archive, by name. Raises UserError for members that are not safe."""
    # Weights hardly compress; what grows a hundredfold was made to fill a disk.
    limit_bytes = min(free_bytes, 2**30 + 100 * archive.stat().st_size)
    members: dict[PurePosixPath, tarfile.TarInfo] = {}
    total_bytes = 0
    # Each is checked before the next is looked for, which a false size would lead astray.
    for number, member in enumerate(tar, 1):
        name = PurePosixPath(member.name)
        total_bytes += member.size
        if number > _MAX_MEMBERS:
            raise _too_large(archive, total_bytes)
        if name.is_absolute() or ".." in name.parts:
            problem = "would be written outside of the folder"
        elif member.isdir():
            continue
        elif not member.isreg() or member.issparse():
            problem = "is not an ordinary file but a link, a device or the like"
        elif name in members:
            problem = "is there twice"
        elif member.size < 0:
            problem = "has a size below 0"
        elif total_bytes > limit_bytes:
            raise _too_large(archive, total_bytes)
        else:
            members[name] = member
            continue
        raise UserError(
            f"{archive} cannot be trusted: its member {shown(member.name)} {problem}; nothing was "
            "extracted."
        )
    # A compressed file has its checksum at the end.
    while rest := tar.fileobj.read(2**20):
        total_bytes += len(rest)
        if total_bytes > limit_bytes:
            raise _too_large(archive, total_bytes)
    return members


def _too_large(archive: Path, total_bytes: int) -> UserError:
    return UserError(
        f"{archive} holds {total_bytes / 1e9:,.1f} GB or more than {_MAX_MEMBERS:,} files, too "
        "much for a checkpoint in so small a file or for the free space of the temporary folder: "
        "unpack what you need of it, and give the folder."
    )
