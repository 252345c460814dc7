"""Files of the Hugging Face Hub."""

from collections.abc import Sequence
from pathlib import Path

from convai_fast.errors import UserError, reason_of


def download(repo_id: str, patterns: Sequence[str], what: str) -> Path:
    """The folder, in the Hub's cache, with those files of a repository that match `patterns`.

    Raises UserError where there are none to be had; `what` says what was asked for.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(patterns)))
    # The client's errors, its HTTP library's and the operating system's have no common base.
    except Exception as error:
        raise UserError(
            f"there is no folder {repo_id}, and the Hugging Face hub gave no {what} of that name "
            f"({reason_of(error)}); check the name or the network, or give a folder."
        ) from error
