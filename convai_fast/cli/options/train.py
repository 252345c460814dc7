"""The options of `convai-fast train`."""

from dataclasses import dataclass

from convai_fast.cli.options.common import DATA
from convai_fast.training.options import TrainOptions


@dataclass
class TrainCommand(TrainOptions):  # noqa: D101  (`--help` prints what TrainOptions says)
    __doc__ = TrainOptions.__doc__

    def missing(self) -> dict[str, str]:
        """What has to be given yet."""
        return {} if self.dataset_path or self.resume else {"dataset_path": DATA}
