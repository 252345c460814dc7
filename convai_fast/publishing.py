"""A model as others get it: ordinary weights and a card, in a folder or on the Hugging Face Hub."""

import re
from pathlib import Path

from convai_fast.archive import unpacked
from convai_fast.data.trained_with import TrainedWith
from convai_fast.errors import UserError
from convai_fast.files import check_is_free, new_folder, scratch_folder
from convai_fast.hub import upload
from convai_fast.loading import load
from convai_fast.model.card import CARD, UNKNOWN_ID, model_card
from convai_fast.model.checkpoint import find_folder


def publish(model: str, repo: str = "", output: str = "", private: bool = False) -> str:
    """Write `model` into the folder `output`, if named, and upload it as `repo`, if named.

    A LoRA adapter is merged. The card is the README.md of the model's folder, or made of what is
    known of it.

    Returns the repository's address, or an empty text.

    Raises:
        UserError: it cannot be read, written or uploaded.
    """
    if repo and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        raise UserError(f"`repo` must be a name such as me/my-model, not {repo}")
    place = Path(output).expanduser()
    try:
        if output:
            check_is_free(place)
        made = new_folder(place, ".saving-") if output else scratch_folder(None, "convai-fast-")
        with made as folder:
            _write(model, repo, folder)
            return upload(folder, repo, private) if repo else ""
    except OSError as error:
        name = output or "a temporary folder"
        raise UserError(f"{name} cannot be written: {error.strerror}.") from error


def _write(model: str, repo: str, folder: Path) -> None:
    trained = TrainedWith.read(model)
    with unpacked(model) as unpacked_model:
        source = find_folder(unpacked_model.path)
        weights, tokenizer = load(source)
        weights.save_pretrained(folder, tokenizer)
        if trained is not None:
            trained.shareable().write(folder)
        own = source / CARD
        card = own.read_text(encoding="utf-8") if own.is_file() else model_card(folder, source)
    (folder / CARD).write_text(card.replace(UNKNOWN_ID, repo or UNKNOWN_ID), encoding="utf-8")
