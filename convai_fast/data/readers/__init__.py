r"""Reading dialogues: which format a path holds, and what is missing from it."""

import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convai_fast.data.complete import Numbering, SplitArrays, split_conversations
from convai_fast.data.readers.log import ReadingLog
from convai_fast.data.readers.source import Source
from convai_fast.data.spool import Spool
from convai_fast.data.store import Origin, dialogues_of
from convai_fast.dialogue.dialogue import Dialogue
from convai_fast.errors import UserError

__all__ = ["Source", "load_dialogues", "read_into"]


def tell(line: str) -> None:
    """Print a line on the standard error stream."""
    print(line, file=sys.stderr)


def load_dialogues(
    path: str | Path | Source | Sequence[str | Path | Source],
    reader: str = "auto",
    *,
    num_candidates: int = 20,
    valid_fraction: float = 0.1,
    seed: int = 42,
    skip_bad_records: bool = False,
    report: Callable[[str], None] = tell,
) -> dict[str, list[Dialogue]]:
    r"""Read dialogues of any of the formats below into {"train": [...], "valid": [...]}.

    `path` is a file, or a folder that holds train.X and perhaps valid.X (or validation.X, val.X,
    dev.X, test.X; the first of these that is there; also ConvAI2's train_self_original.txt and
    valid_self_original.txt), a store that `convai-fast prepare` made, or what the readers `hub` and
    functions take. Several paths are read one after another. Files are UTF-8, plain or compressed
    (gzip, bzip2, xz, zstd), or Parquet. `reader` is one of these names; `auto` looks at the content
    of the files and at their extension.

    `json`: the format of the predecessor, huggingface/transfer-learning-conv-ai. The true reply is
    the last candidate; there may be any number of others. `personality` (or `persona`) is optional:
    a list of sentences, or a text with one a line. A list of dialogues will do instead of the
    object, and so will JSON lines, a dialogue a line, or a turn a line. ::

        {"train": [{"personality": ["i like tea ."],
                    "utterances": [{"history": ["hello !"],
                                    "candidates": ["no .", "hi , some tea ?"]}]}],
         "valid": [...]}

    `parlai`: ParlAI's text formats, see `convai_fast.data.readers.parlai`. ::

        1 your persona: i like tea .
        2 hello !<TAB>hi , some tea ?<TAB><TAB>no .|hi , some tea ?

    `csv`: a table with commas, semicolons or tabs: Synthetic-Persona-Chat, a conversation a row,
    see `convai_fast.data.readers.persona_chat`, or the columns of `pairs`. ::

        user 1 personas,user 2 personas,Best Generated Conversation
        "I like tea.
        I am old.",I have a dog.,"User 1: Hello!
        User 2: Hi!"

    `messages`, `sharegpt`: chat data in all its dialects, see `convai_fast.data.readers.chat`. ::

        {"messages": [{"role": "system", "content": "I like tea."},
                      {"role": "user", "content": "Hello!"},
                      {"role": "assistant", "content": "Hi, some tea?"}]}
        {"conversations": [{"from": "human", "value": "Hello!"},
                           {"from": "gpt", "value": "Hi, some tea?"}]}

    `pairs`: a prompt and its reply, see `convai_fast.data.readers.pairs`. ::

        {"prompt": "Hello!", "completion": "Hi, some tea?"}

    `hub`: the id of a Hugging Face dataset, a folder written by its `save_to_disk`, or a folder
    that `datasets.load_dataset` reads; needs `pip install 'convai-fast[hub]'`. The columns must be
    the fields of one of the formats above. The splits are train and the first of valid, validation,
    val, dev, test.

    `package.module:function` or `path/to/file.py:function`: a function of your own. It is called
    with `path` as a str and returns what `json` would read: an object, or a list or generator of
    dicts or `Dialogue`s. The working directory is importable. ::

        def read(path: str) -> dict:
            return {"train": [{"utterances": [{"history": ["hello !"], "candidates": ["hi !"]}]}]}

    In chat data and tables, consecutive turns of one speaker are joined with a space, and only
    turns that answer something are utterances. Everywhere, a dialogue in which nothing is answered
    is left out, as is a blank persona sentence or distractor; a blank reply or turn is an error.
    Blank is what nobody can see, also zero-width characters and direction marks.

    What is missing is then filled in, depending on the data and `seed` alone:

    - Without a validation split, `valid_fraction` of the conversations is cut off from train: at
      least one unless there is only one or the fraction is 0. All sides of a conversation stay in
      one split, also where the data holds it twice, from either side.
    - An utterance with a lone true reply gets distractors in front of it until it has
      `num_candidates`: replies from other conversations of its split, drawn as often as they
      occur there. None equals the true reply or another one but for case and white space, so
      there are fewer where the split has too few. Utterances with more candidates stay as they
      are.

    Args:
        skip_bad_records: leave out records that cannot be read, and tell how many.
        report: told what was left out or not used, line by line; by default on stderr.

    Raises:
        UserError: the path, an option or a record is wrong; one sentence that names the file, the
            line or index, and the field: for several bad records, their number and the first ten.
    """
    paths = [path] if isinstance(path, str | Path | Source) else list(path)
    sources = [p if isinstance(p, Source) else Source(str(p), reader) for p in paths]
    loaded = load_sources(
        sources,
        num_candidates=num_candidates,
        valid_fraction=valid_fraction,
        seed=seed,
        skip_bad_records=skip_bad_records,
        report=report,
    )
    return loaded.dialogues


class Loaded(NamedTuple):
    """Dialogues by split, and for each source the sets of dialogues that it holds."""

    dialogues: dict[str, list[Dialogue]]
    origins: list[list[Origin]]


def load_sources(
    sources: Sequence[Source],
    *,
    num_candidates: int,
    valid_fraction: float,
    seed: int,
    skip_bad_records: bool = False,
    report: Callable[[str], None] = tell,
) -> Loaded:
    """Read and complete dialogues; see `load_dialogues`."""
    check_completion(num_candidates, valid_fraction)
    with Spool() as spool:
        read_into(spool, sources, skip_bad_records=skip_bad_records, report=report)
        chosen, origins, notes = split_conversations(spool, valid_fraction, seed)
        for note in notes:
            report(note)
        numbering = Numbering.of(spool)
        text_of = cache(spool.text_of())
        dialogues = {}
        for split, conversations in chosen.items():
            arrays = SplitArrays(spool, numbering, conversations)
            ids, counts = [np.zeros(0, np.int32)], [np.zeros(1, np.int64)]
            for candidates, count in arrays.candidates(num_candidates, split, seed):
                ids.append(candidates)
                counts.append(count)
            tables = dict(arrays.tables()) | {
                "candidate_ids": np.concatenate(ids),
                "candidate_offsets": np.concatenate(counts).cumsum(),
            }
            dialogues[split] = list(dialogues_of(tables, text_of))
        return Loaded(dialogues, origins)


def read_into(
    spool: Spool,
    sources: Sequence[Source],
    *,
    skip_bad_records: bool = False,
    report: Callable[[str], None] = tell,
) -> None:
    """Read all sources into `spool`, telling what of each was left out or not used.

    Raises UserError as `load_dialogues`.
    """
    for number, source in enumerate(sources):
        log = ReadingLog()
        found = set()
        if source.is_store:
            spool.made_before[number] = [each for own in source.store.origins for each in own]
        for split, conversation in source.read(log):
            found.add(split)
            spool.add(split, conversation, number)
        log.finish(source.path, skip_bad_records, lambda note: spool.tell(note, report))
        if found and "train" not in found:
            raise UserError(
                f"{source.path}: train is missing (found are {', '.join(sorted(found))}); give "
                "dialogues to learn from"
            )
        if not found:
            raise UserError(
                f"{source.path} has no reply to learn from; add dialogues in which one answers"
            )


def check_completion(num_candidates: int, valid_fraction: float) -> None:
    """Raise UserError for numbers that make no sense."""
    if num_candidates < 1:
        raise UserError(f"num_candidates must be at least 1, not {num_candidates}")
    if not 0 <= valid_fraction < 1:
        raise UserError(f"valid_fraction must be at least 0 and below 1, not {valid_fraction}")
