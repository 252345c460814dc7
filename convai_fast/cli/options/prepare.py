"""The options of `convai-fast prepare`."""

from dataclasses import dataclass

from convai_fast.cli.options.common import DATA
from convai_fast.data.options import DataOptions


@dataclass
class StoreOptions:
    """Store: what is made of the dialogues, and shown."""

    tokenizer: str = ""
    """Folder or Hub id of the model, or of the tokenizer alone."""
    segments: bool = False
    """For a model that `train --segments` shall train: who speaks is read with each token."""
    output: str = ""
    """Folder for the store: one that is not there, is empty, or holds an older store, which is then
    replaced. Hidden files do not count."""
    preview: int = 0
    """Show so many examples of the training split: text, speakers, segments, labels."""
    max_history: int = 2
    """Exchanges of history an example keeps (2 * max_history + 1 turns)."""
    num_candidates: int = 0
    """Candidates an example keeps, the last ones; 0: all."""
    max_length: int | None = None
    """Tokens of an example; longer ones are cut, and the cuts counted. By default the positions of
    the model that --tokenizer names, as in training, else 512."""


@dataclass
class PrepareOptions(StoreOptions, DataOptions):
    """Turn dialogues into a store of token ids that `train` opens at once, and print what it holds.

    With --preview N, show N examples as the model will read them; then --output may be left out.
    """

    def missing(self) -> dict[str, str]:
        """What has to be given yet."""
        lacks = {} if self.dataset_path else {"dataset_path": DATA}
        if not self.tokenizer:
            lacks["tokenizer"] = "the folder or Hub id of a model or tokenizer"
        if not self.output and self.preview <= 0:
            lacks["output"] = "a folder for the store (not needed with --preview 3)"
        return lacks
