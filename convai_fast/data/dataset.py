"""From whatever the user names as data to an open store."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from convai_fast.data.readers import load_dialogues
from convai_fast.data.store import DialogueStore, build_store, fingerprint, is_store
from convai_fast.dialogue.dialogue import Dialogue
from convai_fast.dialogue.encoding import tokenizer_fingerprint
from convai_fast.errors import UserError


@dataclass
class DataOptions:
    """Which dialogues to use, and how to complete them."""

    dataset_path: str = ""
    """File, folder, Hub dataset id, or a store made by `prepare` (also --data)."""
    reader: str = "auto"
    """auto, json, parlai, csv, messages, sharegpt, hub, or your own package.module:function."""
    fill_candidates: int = 20
    """Where the data has no distractors: draw other dialogues' replies up to so many candidates."""
    valid_fraction: float = 0.1
    """Where the data has no validation split: cut off this share of its dialogues."""
    data_seed: int = 42
    """Seed of the drawn distractors and of the validation split."""

    def load(self) -> dict[str, list[Dialogue]]:
        """Read the dialogues as text; raises UserError when there is nothing to read."""
        if not self.dataset_path:
            raise UserError(
                "no dialogues given: name a file, folder or Hub dataset with --dataset_path"
            )
        if is_store(self.dataset_path):
            raise UserError(f"{self.dataset_path} is a store of token ids: give the dialogues")
        if self.fill_candidates < 1:
            raise UserError(f"--fill_candidates must be at least 1, not {self.fill_candidates}")
        return load_dialogues(
            self.dataset_path,
            self.reader,
            num_candidates=self.fill_candidates,
            valid_fraction=self.valid_fraction,
            seed=self.data_seed,
        )


def open_dataset(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerFast,
    cache: str | Path,
    report: Callable[[str], None] = print,
) -> DialogueStore:
    """Open the store for these dialogues and this tokenizer, built in `cache` if need be.

    The cache holds a folder for each combination of dialogues, tokenizer and format version, so a
    changed file or tokenizer never meets an old store.
    """
    if is_store(options.dataset_path):
        store = DialogueStore(options.dataset_path)
        if store.meta["tokenizer"] != tokenizer_fingerprint(tokenizer):
            raise UserError(
                f"the store {options.dataset_path} was made with another tokenizer than this "
                f"model's: make it anew with `convai-fast prepare --tokenizer` and this model"
            )
        return store
    dialogues = options.load()
    folder = Path(cache) / fingerprint(dialogues, tokenizer)
    if is_store(folder):
        report(f"dialogues: found tokenised in {folder}")
        return DialogueStore(folder)
    report(f"dialogues: tokenising into {folder}")
    return build_store(dialogues, tokenizer, folder)
