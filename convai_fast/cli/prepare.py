"""`convai-fast prepare`: dialogues into a store, or a look at what the model will read."""

from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from convai_fast.cli.options.prepare import PrepareOptions
from convai_fast.data.batches import DialogueBatches
from convai_fast.data.build_store import complete_and_write_store
from convai_fast.data.dataset import checked_sources, unknown_share
from convai_fast.data.readers import read_into, tell
from convai_fast.data.spool import Spool
from convai_fast.data.store import DialogueStore, is_store
from convai_fast.dialogue.chat_template import verify
from convai_fast.dialogue.format import IGNORED
from convai_fast.dialogue.layout import Part, parts_of
from convai_fast.errors import UserError
from convai_fast.files import scratch_folder
from convai_fast.loading import Reading, reading_of
from convai_fast.ops.plan import read_plan
from convai_fast.options import check_at_least

_COMPARED = 200  # dialogues, of which each takes some milliseconds
_MAX_LENGTH = 512  # where the model's positions are not known


def run(options: PrepareOptions) -> None:
    """Build the store, print its summary and the preview."""
    check_at_least(options, {"preview": 0, "max_history": 0, "num_candidates": 0})
    if options.max_length is not None:
        check_at_least(options, {"max_length": 4})
    sources = checked_sources(options)
    if weighted := next((source for source in sources if source.weight != 1), None):
        raise UserError(
            f"the weight of {weighted.path} would be lost, since weights count in training: "
            "prepare a store for each data set, and give train --data store1=3 store2"
        )
    reading = reading_of(options.tokenizer, segments=options.segments)
    with scratch_folder(None, "convai-fast-") as scratch, Spool() as spool:
        read_into(spool, sources, skip_bad_records=options.skip_bad_records)
        place = options.output
        is_replaced = bool(place) and Path(place).is_dir() and is_store(place)
        store = complete_and_write_store(
            spool,
            reading.tokenizer,
            reading.layout,
            place or scratch / "store",
            num_candidates=options.fill_candidates,
            valid_fraction=options.valid_fraction,
            seed=options.data_seed,
            report=tell,
        )
        for split in store.splits:
            print(summary(store, split, options, reading))
        if reading.chat:
            print(_beside_template(store, reading.tokenizer))
        elif reading.tokenizer.chat_template:
            print(
                "the tokenizer's chat template is not read: name the folder of a Llama, Mistral or "
                "Qwen, with its config.json, as the tokenizer"
            )
        if place:
            where = ", in place of the store that was there" if is_replaced else ""
            print(f"{store.num_bytes / 1e6:.1f} MB in {store.folder}{where}")
        if options.preview > 0:
            batches = _batches(store, "train", options, reading)
            count = min(options.preview, batches.num_examples)
            for row in (number * batches.num_examples // count for number in range(count)):
                print(f"\n{preview(batches, row, reading)}")
            print("\n[brackets]: the tokens that are labelled, which the model learns to write.")


def _max_length(options: PrepareOptions, reading: Reading) -> tuple[int, str]:
    """How many tokens an example may have, and in words, with who says so."""
    if options.max_length is not None:
        return options.max_length, f"{options.max_length:,} by --max_length"
    if reading.n_positions is not None:
        return reading.n_positions, f"the model's {reading.n_positions:,} positions"
    return _MAX_LENGTH, f"{_MAX_LENGTH}, as the model's positions are not known"


def _batches(
    store: DialogueStore, split: str, options: PrepareOptions, reading: Reading
) -> DialogueBatches:
    max_length, _ = _max_length(options, reading)
    return DialogueBatches(
        store,
        split,
        batch_size=1,
        num_candidates=options.num_candidates,
        max_history=options.max_history,
        max_length=max_length,
        layout="padded",
    )


def summary(store: DialogueStore, split: str, options: PrepareOptions, reading: Reading) -> str:
    """What one split holds, in a few lines."""
    batches, tables = _batches(store, split, options, reading), store.splits[split]
    if batches.num_examples == 0:
        return f"{split}: empty"
    cuts, (_, most) = batches.cuts, _max_length(options, reading)
    lines = [
        f"{split}: {tables.num_dialogues:,} dialogues, {tables.num_examples:,} examples",
        f"  longest candidate of an example: mean {batches.index.padded_lengths.mean():.0f}, "
        f"longest {batches.index.padded_lengths.max()} tokens (of {most})",
        f"  candidates: {len(tables.candidate_ids) / tables.num_examples:.1f} an example",
    ]
    if any(cuts):
        lines.append(
            f"  cut to fit: history in {cuts.history:,}, persona in {cuts.persona:,}, "
            f"reply in {cuts.reply:,} examples"
        )
    else:
        lines.append("  cut to fit: nothing")
    if split == "train":
        lines.insert(1, f"  {store.num_tokens:,} tokens in distinct utterances (all splits)")
        if warning := unknown_share(store):
            lines.insert(2, f"  {warning}")
    return "\n".join(lines)


def _beside_template(store: DialogueStore, tokenizer: PreTrainedTokenizerFast) -> str:
    """How many of some dialogues have exactly the tokens that the chat template gives them."""
    dialogues = islice((d for d in store.dialogues("train") if d.utterances), _COMPARED)
    count, equal = verify(tokenizer, store.layout, dialogues)
    line = (
        f"chat template: {equal:,} of {count:,} dialogues are read token by token as it writes them"
    )
    if equal == count:
        return line
    return (
        f"{line}; in the others a text has what the template or its tokenizer takes for its own, "
        "such as <think> or <|im_end|>, which is read as text here, or speaker1 begins"
    )


def _parts(batches: DialogueBatches, row: int) -> Iterator[Part]:
    """The parts of what an example's candidates share, and where the reply begins."""
    store, tables = batches.store, batches.tables
    _, (texts,) = read_plan(
        store.tokens,
        store.utterance_offsets,
        tables.persona_ids,
        tables.history_ids,
        tables.candidate_ids,
        torch.from_numpy(batches.plan[batches.rows[row : row + 1]]),
        store.layout_numbers,
        batches.max_length,
    )
    return parts_of(texts.persona, texts.history, [], store.layout)


def preview(batches: DialogueBatches, row: int, reading: Reading) -> str:
    """One example as the model reads it: a line a part, labelled tokens in brackets."""
    tokenizer, layout = reading.tokenizer, reading.layout

    def text_of(ids: list[int]) -> str:
        return str(tokenizer.decode(ids)).replace("\n", "\\n")

    batch = batches.collate(batches.rows[row : row + 1])
    true = int(batch["mc_labels"][0])
    length = int(batch["mc_token_ids"][0, true]) + 1
    ids = batch["input_ids"][0, true, :length].tolist()
    segments = batch["token_type_ids"][0, true, :length].tolist()
    labels = batch["labels"][0, true, :length].tolist()

    lines = [f"example {row}: {length} tokens, {true + 1} candidates"]
    end = turn = 0
    for name, _, part in _parts(batches, row):
        begin, end = end, length if name == "reply" else end + len(part)
        if begin == end:
            continue
        if name == "turn":
            name, turn = f"turn {turn + 1}", turn + 1
        speaker = tokenizer.convert_ids_to_tokens(segments[begin])
        segment = f" segment {speaker:<11}" if reading.segments else ""
        runs = groupby(range(begin, end), lambda i: labels[i] != IGNORED)
        texts = [(learnt, text_of([ids[i] for i in run])) for learnt, run in runs]
        text = " ".join(f"[{text}]" if learnt else text for learnt, text in texts)
        lines.append(f"  {name:<8}{segment} {end - begin:>4} tokens  {text}")
    reply = begin + len(layout.reply_open)
    for j in range(true):
        end = int(batch["mc_token_ids"][0, j])
        text = text_of(batch["input_ids"][0, j, reply:end].tolist())
        lines.append(f"  {'instead':<8} {text}")
        if j == 2 and true > 4:
            lines.append(f"  {'instead':<8} … and {true - j - 1} more")
            break
    return "\n".join(lines)
