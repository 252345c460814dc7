"""From whatever the user names as data to dialogues, or to an open store."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from convai_fast.data.build_store import complete_and_write_store
from convai_fast.data.options import DataOptions, texts
from convai_fast.data.readers import (
    Loaded,
    Source,
    check_completion,
    load_sources,
    read_into,
    tell,
)
from convai_fast.data.spool import Spool
from convai_fast.data.store import FORMAT_VERSION, DialogueStore, is_store
from convai_fast.data.trained_with import TrainedSource, TrainedWith
from convai_fast.dialogue.encoding import tokenizer_fingerprint
from convai_fast.dialogue.layout import Layout
from convai_fast.errors import UserError
from convai_fast.files import fingerprint, locked, open_bytes
from convai_fast.options import check_at_least

_CHUNK_BYTES = 1 << 20


def sources_of(options: DataOptions) -> list[Source]:
    """What `dataset_path` and `reader` name; UserError where nothing, or not one for each."""
    paths, readers = texts(options.dataset_path), texts(options.reader)
    if not paths:
        raise UserError(
            "no dialogues given: name a file, folder or Hub dataset with `dataset_path`"
        )
    if len(readers) == 1:
        readers = readers * len(paths)
    if len(readers) != len(paths):
        raise UserError(
            f"there are {len(paths)} data sets and {len(readers)} readers: give "
            "one reader for all, or one for each"
        )
    return [Source.parse(*pair) for pair in zip(paths, readers, strict=True)]


def checked_sources(options: DataOptions) -> list[Source]:
    """The sources; UserError where one is not there, or a number makes no sense."""
    check_at_least(options, {"fill_candidates": 1})
    check_completion(options.fill_candidates, options.valid_fraction)
    sources = sources_of(options)
    for source in sources:
        source.files()
    return sources


def read_dialogues(options: DataOptions, report: Callable[[str], None] = tell) -> Loaded:
    """The dialogues as text, and where they come from; UserError when there is nothing to read."""
    return load_sources(
        sources_of(options),
        num_candidates=options.fill_candidates,
        valid_fraction=options.valid_fraction,
        seed=options.data_seed,
        skip_bad_records=options.skip_bad_records,
        report=report,
    )


def open_dataset(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerFast,
    layout: Layout,
    cache: str | Path,
    report: Callable[[str], None] = print,
) -> DialogueStore:
    """Open the store for these dialogues, tokenizer and layout, built in `cache` if need be.

    The cache holds a folder for each combination of these and of options. Where the
    dialogues are files, it is found by a hash of their bytes, without reading them as dialogues;
    what a function or the Hub gives has to be read first. What reading told, such as which records
    were left out, is told again when the store is found. A store that is damaged is built anew, and
    of several processes that want the same one, one builds it.
    """
    sources = checked_sources(options)
    if len(sources) == 1 and sources[0].is_store:
        store = sources[0].store
        is_same = store.meta["tokenizer"] == tokenizer_fingerprint(tokenizer)
        if is_same and store.layout == layout:
            report(f"dialogues: the store {sources[0].path}; its splits and distractors stay")
            return store
        other = "layout" if is_same else "tokenizer"
        report(f"{sources[0].path} was made with another {other}: its texts are tokenised anew")

    def read(spool: Spool) -> None:
        read_into(spool, sources, skip_bad_records=options.skip_bad_records, report=report)

    files = [each for source in sources if (each := source.files()) is not None]
    folder = None
    if len(files) == len(sources):
        contents = [_hash_of_files(each) for each in files]
        folder = Path(cache) / _key(options, tokenizer, layout, contents)
        found = _find(folder, report)
        if found is not None:
            return found
    try:
        Path(cache).mkdir(parents=True, exist_ok=True)
        scratch = Spool(Path(cache))  # not where temporary files are, which may be memory
    except OSError as error:
        raise UserError(f"cannot write to {cache}: {error.strerror}") from error
    with scratch as spool:
        if folder is None:
            read(spool)
            folder = Path(cache) / _key(options, tokenizer, layout, spool.fingerprints)
        with locked(Path(cache), folder.name):
            found = _find(folder, report, spool.notes)
            if found is not None:
                return found
            if not spool.fingerprints:
                read(spool)
            report(f"dialogues: tokenising into {folder}")
            return complete_and_write_store(
                spool,
                tokenizer,
                layout,
                folder,
                num_candidates=options.fill_candidates,
                valid_fraction=options.valid_fraction,
                seed=options.data_seed,
                report=report,
            )


def trained_with(
    options: DataOptions,
    store: DialogueStore,
    max_history: int,
    before: Sequence[TrainedSource] = (),
) -> TrainedWith:
    """What a model that is trained on `store`, opened for these options, should remember, beside
    what it was trained on `before`."""
    sources = sources_of(options) if options.dataset_path else [Source("")]
    origins, everything = store.origins, [origin for own in store.origins for origin in own]
    if len(sources) != len(origins):  # one store, made of several
        origins = [everything]
    how = next((origin for origin in everything if origin.is_cut), options)
    return TrainedWith(
        max_history=max_history,
        fill_candidates=store.meta["num_candidates"],
        valid_fraction=how.valid_fraction,
        data_seed=how.data_seed,
        sources=tuple(
            TrainedSource(source.path, source.reader, source.weight, tuple(own))
            for source, own in zip(sources, origins, strict=True)
        ),
        before=tuple(before),
    )


def unknown_share(store: DialogueStore) -> str:
    """Which share of the tokens is the unknown one, in words; empty where there is none."""
    unknown, tokens = store.meta["num_unknown_tokens"], store.num_tokens
    if not unknown:
        return ""
    share = f"{unknown / tokens:.2%} of the tokens are unknown to the tokenizer"
    warning = (
        "; its vocabulary lacks what these texts are written in" if unknown > tokens / 100 else ""
    )
    return f"{'WARNING: ' if warning else ''}{share}{warning}"


def _find(
    folder: Path, report: Callable[[str], None], told: Sequence[str] = ()
) -> DialogueStore | None:
    """The store in `folder`, if it is sound; its notes are reported but for those `told`."""
    if not is_store(folder):
        return None
    try:
        store = DialogueStore(folder)
    except UserError as error:
        report(f"dialogues: {error}; it is built again")
        return None
    report(f"dialogues: found tokenised in {folder}")
    for line in store.meta.get("notes", ()):
        if line not in told:
            report(line)
    return store


def _key(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerFast,
    layout: Layout,
    contents: list[str],
) -> str:
    settings = (
        FORMAT_VERSION,
        tokenizer_fingerprint(tokenizer),
        layout,
        options.fill_candidates,
        options.valid_fraction,
        options.data_seed,
        options.skip_bad_records,
        [
            (source.reader, content)
            for source, content in zip(sources_of(options), contents, strict=True)
        ],
    )
    return fingerprint(repr(settings).encode())


def _hash_of_files(files: dict[str, str]) -> str:
    digest = hashlib.sha256()
    for split, path in files.items():
        digest.update(f"\0{split}\0{Path(path).suffixes}\0".encode())
        with open_bytes(path) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
