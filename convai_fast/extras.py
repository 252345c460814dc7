"""The packages that only a part of the library needs, and the extra that installs each."""

from importlib.util import find_spec

from convai_fast.errors import UserError

EXTRA_OF = {
    "datasets": "hub",
    "fastapi": "serve",
    "matplotlib": "plots",
    "peft": "lora",
    "prometheus_client": "serve",
    "pyarrow": "hub",
    "ray": "ray",
    "sacrebleu": "eval",
    "tensorboard": "train",
    "trackio": "report",
    "uvicorn": "serve",
    "wandb": "report",
}


def require(package: str, what: str) -> None:
    """Raise UserError if `what` needs a package that is not installed; before work begins."""
    if find_spec(package) is None:
        raise UserError(f"{what} needs {package}: pip install 'convai-fast[{EXTRA_OF[package]}]'")
