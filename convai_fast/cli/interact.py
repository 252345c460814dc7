"""`convai-fast interact`: talk with a model in the terminal."""

import io
import random
import sys
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from convai_fast.cli.line_editing import line_editing, unechoed
from convai_fast.cli.options.interact import InteractOptions
from convai_fast.cli.remembered import recall
from convai_fast.data.dataset import read_dialogues
from convai_fast.errors import UserError
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.messages import sentences
from convai_fast.hardware import resolve_device
from convai_fast.loading import load
from convai_fast.options import check_at_least
from convai_fast.serving.conversation import COMMANDS, Conversation
from convai_fast.terminal import counted

_PROMPT = ">>> "


def run(options: InteractOptions) -> None:
    """Load the model and talk until the user ends it."""
    recall(options)
    assert options.max_history is not None  # recalled
    check_at_least(options, {"max_history": 0})
    personas = _read_personas(options)
    persona = _first_persona(options, personas)

    device = resolve_device(options.device)
    model, tokenizer = load(options.model)
    engine = GenerationEngine(
        model.to(device), tokenizer, max_batch_size=min(64, options.sampling.num_drafts)
    )
    conversation = Conversation(
        engine,
        tokenizer,
        options.sampling,
        persona=persona,
        personas=personas,
        max_history=options.max_history,
    )

    print(conversation.describe_persona(), end="")
    if not persona and not options.no_personality:
        print("Give one with --persona, --persona_file or --data, or /persona a | b | c.")
    print("Write a line to talk; /help lists the commands, Ctrl-D ends.")
    chat(conversation)


def chat(conversation: Conversation) -> None:
    """Feed the lines of standard input to `conversation` until it, or the input, ends."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    with line_editing(COMMANDS) if is_terminal else nullcontext():
        _talk(conversation)


def _talk(conversation: Conversation) -> None:
    has_told_of_cut = False
    while not conversation.ended:
        try:
            line = input(_PROMPT)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit ends)")
            continue
        try:
            with unechoed():
                for piece in conversation.handle(line):
                    print(piece, end="", flush=True)
            if conversation.is_cut and not has_told_of_cut:
                length = counted(conversation.params.max_length, "token")
                print(f"(cut after {length}: --max_length gives more)", file=sys.stderr)
                has_told_of_cut = True
        except KeyboardInterrupt:
            print("\n(stopped; the model forgets this turn)")
        except UserError as error:
            print(f"\n({error}; the model forgets this turn)")


def _read_personas(options: InteractOptions) -> list[list[str]]:
    if not options.dataset_path:
        return []
    dialogues = read_dialogues(replace(options.data, fill_candidates=1)).dialogues
    personas = [d.personality for split in dialogues.values() for d in split if d.personality]
    if not personas:
        raise UserError(
            f"no dialogue in {' and '.join(options.dataset_path)} has a persona: leave it out"
        )
    return personas


def _first_persona(options: InteractOptions, personas: list[list[str]]) -> list[str]:
    given = {
        "--persona": bool(options.persona),
        "--persona_file": options.persona_file is not None,
        "--no_personality": options.no_personality,
    }
    chosen = [name for name, is_given in given.items() if is_given]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)} exclude each other: give only one of them")
    if options.persona_file is not None:
        return _read_persona_file(options.persona_file)
    if options.persona or options.no_personality or not personas:
        return list(options.persona)
    return random.Random(options.sampling.seed).choice(personas)


def _read_persona_file(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
        persona = sentences(content.decode("utf-8-sig"))  # Windows puts a mark in front
    except OSError as error:
        raise UserError(f"cannot read the persona file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        found = "is UTF-16" if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "is not UTF-8"
        raise UserError(f"the persona file {path} {found} text: save it as UTF-8") from error
    if not persona:
        raise UserError(f"the persona file {path} is empty: write one sentence a line")
    return persona
