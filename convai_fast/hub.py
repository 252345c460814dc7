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


def is_cached(repo_id: str) -> bool:
    """Whether a model of this id, and no path, has been downloaded to this machine."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(repo_id, "config.json"), str)
    except HFValidationError:  # a path
        return False


def upload(folder: Path, repo_id: str, private: bool) -> str:
    """Upload the files of a folder into the model repository `repo_id`, made where it is missing.

    Returns its address. The token is the one that huggingface_hub finds.

    Raises UserError when it cannot be done, or when it is to be `private` and is public already.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        is_public = private and not api.model_info(repo_id).private
        if not is_public:
            message = "Upload a model of convai_fast"
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    # As above.
    except Exception as error:
        raise UserError(
            f"{repo_id} cannot be uploaded to the Hugging Face hub ({reason_of(error)}); log in "
            "with `hf auth login`, and check the name and the network."
        ) from error
    if is_public:
        raise UserError(
            f"{repo_id} is there and public, so nothing was uploaded: make it private in its "
            "settings, or leave out `private`"
        )
    return str(address)
