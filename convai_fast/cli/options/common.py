"""Options that several commands have."""

from dataclasses import dataclass, field
from pathlib import Path

from convai_fast.data.options import DataOptions
from convai_fast.errors import UserError
from convai_fast.generation.params import SamplingParams

_MOST_THREADS = 1024

DATA = "dialogues (files, folders, stores or Hub dataset ids)"


@dataclass
class ProcessOptions:
    """All commands: how they are started."""

    config: Path | None = None
    """YAML file with options of this command by name, lists as lists, as `train` takes the
    options.yaml of a run; what the command line gives counts over it."""
    threads: int = 0
    """Threads to compute with; 0: as torch chooses, one for each core of this machine. Fewer are
    faster where other processes take the cores."""

    def check(self) -> None:
        """Raise UserError at the first option that makes no sense."""
        if not 0 <= self.threads <= _MOST_THREADS:
            raise UserError(f"`threads` must be between 0 and {_MOST_THREADS}, not {self.threads}")


@dataclass
class RememberedOptions:
    """Model and dialogues: how much of them the model sees, by default as in training."""

    model: str = ""
    """Folder, run, .tar.gz or Hub id of a fine-tuned model with its tokenizer."""
    dataset_path: tuple[str, ...] = ()
    """Files, folders, Hub dataset ids, or stores made by `prepare`."""
    reader: tuple[str, ...] = ()
    """auto, json, parlai, csv, messages, sharegpt, pairs, hub, or your own package.module:function
    or file.py:function; one for all data, or one for each. By default that of the training, if
    these are its dialogues, else auto."""
    fill_candidates: int | None = None
    """Where the data has no distractors: draw other dialogues' replies up to so many candidates.
    By default as in training, else 20."""
    valid_fraction: float | None = None
    """Where the data has no validation split: the share that is cut off. By default as in training,
    else 0.1."""
    data_seed: int | None = None
    """Seed of the validation split and of drawn distractors. By default as in training, else 42."""
    skip_bad_records: bool = False
    """Leave out records that cannot be read, and tell how many; otherwise they are an error."""
    max_history: int | None = None
    """Exchanges of history that the model sees (2 * max_history + 1 turns). By default as in
    training, else 2."""

    @property
    def data(self) -> DataOptions:
        """The options of the data alone, once recalled."""
        assert self.fill_candidates is not None
        assert self.valid_fraction is not None and self.data_seed is not None
        return DataOptions(
            dataset_path=self.dataset_path,
            reader=self.reader,
            fill_candidates=self.fill_candidates,
            valid_fraction=self.valid_fraction,
            data_seed=self.data_seed,
            skip_bad_records=self.skip_bad_records,
        )

    def missing(self) -> dict[str, str]:
        """What has to be given yet."""
        return {} if self.model else {"model": "a fine-tuned model (folder, run or Hub id)"}


@dataclass
class ReplyOptions:
    """How replies are drawn."""

    # The commands have options of their own for what is left out.
    sampling: SamplingParams = field(
        default_factory=SamplingParams, metadata={"without": ("n", "logprobs")}
    )


@dataclass
class DeviceOption:
    """Device: where it is computed."""

    device: str = "auto"
    """cuda, cuda:1 or cpu; auto takes cuda where there is one."""
