"""The named workloads: what is measured, in one place, so that figures can be compared."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from convai_fast.data.builtin import builtin_dialogues, train_builtin_tokenizer
from convai_fast.data.dialogue import Dialogue
from convai_fast.data.readers import load_dialogues
from convai_fast.data.tokenizer import load_tokenizer

SHARED = Path(__file__).parents[1].parent / "shared"


@dataclass(frozen=True)
class CollateShape:
    """A batch to collate: `batch` examples of `num_candidates` candidates."""

    batch: int
    num_candidates: int
    max_history: int = 2

    def __str__(self) -> str:
        return f"{self.batch}x{self.num_candidates}"


# A training step at 2 and 4 candidates, ranking 20, and a batch that leaves the cache.
COLLATE_SHAPES = [
    CollateShape(8, 2),
    CollateShape(8, 4),
    CollateShape(4, 20),
    CollateShape(64, 20),
]


@cache
def dialogues_and_tokenizer() -> tuple[str, dict[str, list[Dialogue]], PreTrainedTokenizerFast]:
    """Synthetic-Persona-Chat with the OpenAI GPT tokenizer, or the built-in world without them.

    Returns the name of the data, to be printed beside every figure, the dialogues, and the
    tokenizer.
    """
    if SHARED.is_dir():
        dialogues = load_dialogues(SHARED / "data" / "synthetic-persona-chat")
        tokenizer = load_tokenizer(SHARED / "tokenizers" / "openai-gpt")
        return "Synthetic-Persona-Chat, 1,000 conversations", dialogues, tokenizer
    dialogues = builtin_dialogues()
    return "built-in dialogues", dialogues, train_builtin_tokenizer(dialogues["train"])
