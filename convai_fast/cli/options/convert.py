"""The options of `convai-fast convert`."""

from dataclasses import dataclass


@dataclass
class ConvertOptions:
    """Bring a checkpoint of pytorch-pretrained-bert 0.6 or pytorch-transformers 1.x into the layout
    of today's transformers, check that it computes the same, and say what became of every tensor.
    A LoRA adapter that `train` wrote is merged into its base model.
    """

    model: str = ""
    """Folder, .tar.gz or Hub id of the old checkpoint or of the adapter."""
    output: str = ""
    """Folder to write; it must not exist, or be empty but for hidden files."""

    def missing(self) -> dict[str, str]:
        """What has to be given yet."""
        lacks = {} if self.model else {"model": "an old checkpoint or an adapter"}
        return lacks if self.output else lacks | {"output": "a folder for the new model"}
