"""Files and pictures that a command writes: checked before it works, and written all or none."""

import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any

from convai_fast.bulk.reply_file import check_absent
from convai_fast.errors import UserError
from convai_fast.extras import require
from convai_fast.files import scratch_folder, write_whole


def check_outputs(
    named: Mapping[str, Path | None], dataset_path: Collection[str], *, overwrite: bool
) -> None:
    """Raise UserError at the first path that cannot be written; of `named`, plots is a folder."""
    outputs = {name: path for name, path in named.items() if path}
    if "plots" in outputs:
        require("matplotlib", "`plots`")
    if len({path.resolve() for path in outputs.values()}) < len(outputs):
        *flags, last = (f"--{name}" for name in named)
        raise UserError(f"{', '.join(flags)} and {last} must differ: name one file for each")
    for name, path in outputs.items():
        if not overwrite:
            check_absent(path, name)
        if path.exists() and not (path.is_dir() if name == "plots" else path.is_file()):
            kind = "folder" if name == "plots" else "regular file"
            raise UserError(f"{path} is there and no {kind}: choose another --{name}")
        if path.resolve() in [Path(data).resolve() for data in dataset_path]:
            raise UserError(f"{path} holds the dialogues: choose another --{name}")
        if any(path.resolve() in other.resolve().parents for other in outputs.values()):
            raise UserError(f"{path} would hold the other outputs: choose another --{name}")
        folder = next(p for p in path.absolute().parents if p.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"nothing can be written in {folder}: choose another --{name}")


def write_outputs(
    texts: Mapping[Path, str], plots: Path | None, draw: Callable[[Path], Sequence[Path]]
) -> list[Path]:
    """Write each file beside its place and rename it, pictures as `draw(folder)` leaves them.

    Returns all that was written. Raises UserError where something cannot be; nothing new is left
    then.
    """
    written: list[Path] = []
    new: list[Path] = []
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            new += [] if path.exists() else [path]
            write_whole(path, methodcaller("write", text.encode()))
            written.append(path)
        if plots:
            plots.mkdir(parents=True, exist_ok=True)
            with scratch_folder(plots, ".drawing-") as scratch:
                for picture in draw(scratch):
                    place = plots / picture.name
                    new += [] if place.exists() else [place]
                    written.append(picture.replace(place))
    except OSError as error:
        # All or nothing, so that the same command may be given again.
        for path in new:
            path.unlink(missing_ok=True)
        raise UserError(f"cannot write {error.filename or 'all'}: {error.strerror}") from error
    return written


def to_json(report: Mapping[str, Any]) -> str:
    """A report as text, with null for numbers that JSON does not have."""
    return json.dumps(finite(report), ensure_ascii=False, indent=2) + "\n"


def finite(value: Any) -> Any:
    """`value` with null for numbers that JSON does not have: NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return str(value) if isinstance(value, Path) else value
