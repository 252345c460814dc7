"""The options of `convai-fast push`."""

from dataclasses import dataclass


@dataclass
class PushOptions:
    """Upload a model to the Hugging Face Hub, with a card, for the account that `hf auth login` or
    HF_TOKEN names.

    What is uploaded are ordinary weights, the tokenizer, trained_with.json and README.md: that of
    the model's folder, or one made of what is known of its run. A LoRA adapter is merged into its
    base model, and no folder of this machine is named.
    """

    model: str = ""
    """Folder, run, adapter or .tar.gz of the model."""
    repo: str = ""
    """OWNER/NAME of the repository, which is made where missing."""
    private: bool = False
    """Make a repository that only its owner sees; one that is public is then left alone."""
    output: str = ""
    """Folder to write the same into; it must not exist, or be empty but for hidden files. Without
    --repo nothing is uploaded."""

    def missing(self) -> dict[str, str]:
        """What has to be given yet."""
        lacks = {} if self.model else {"model": "a model (folder or run)"}
        return lacks if self.repo or self.output else lacks | {"repo": "a name such as me/my-model"}
