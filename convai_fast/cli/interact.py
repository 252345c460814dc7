"""`convai-fast interact`: talk with a model in the terminal."""

import random
import sys
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro
from transformers import PreTrainedTokenizerFast

from convai_fast.cli.remembered import RememberedOptions
from convai_fast.dialogue.encoding import encode
from convai_fast.errors import UserError
from convai_fast.evaluation.ranking import rank_candidates
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.messages import sentences
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Request, prompt_room
from convai_fast.hardware import resolve_device
from convai_fast.loading import load

_PROMPT = ">>> "

_HELP = """\
Write a line to talk, or a command:
  /persona            show the persona
  /persona a | b | c  give it these sentences and start a new conversation
  /persona random     the same, with a random persona of --dataset_path
  /rank a | b | c     rank these as replies to your last line (or as openings), best first
  /reset              forget the conversation
  /seed N             draw as from the start with seed N: the same lines get the same replies
  /help               show this
  /quit               end (as do /exit and Ctrl-D)
Ctrl-C clears the line, or stops a reply, and the model forgets that turn.
"""

# What a byte-level vocabulary can write but should not do to a terminal: move its cursor, ring.
_CONTROL_CHARACTERS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)], "�")
del _CONTROL_CHARACTERS[ord("\n")], _CONTROL_CHARACTERS[ord("\t")]


@dataclass
class InteractOptions(RememberedOptions):
    """Talk with a model in the terminal."""

    persona: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A sentence of the model's persona, as in --persona "i like tea ."."""
    persona_file: Path | None = None
    """Text file with the model's persona, one sentence a line."""
    no_personality: bool = False
    """Begin without a persona."""
    device: str = "auto"
    """cuda, cuda:1 or cpu; auto takes cuda where there is one."""
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = field(
        default_factory=SamplingParams
    )


class Conversation:
    """One conversation with a model: what it remembers, and what each line of the user does.

    `personas` are those that `/persona random` draws from. A turn's seed follows from `params.seed`
    and the number of replies before it, so that a conversation can be repeated while its turns
    differ; starting a new conversation does not start the seeds again, `/seed` does.

    Raises UserError when `params.max_length` leaves the model no room for a prompt.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        tokenizer: PreTrainedTokenizerFast,
        params: SamplingParams,
        *,
        persona: Sequence[str] = (),
        personas: Sequence[Sequence[str]] = (),
        max_history: int = 2,
    ) -> None:
        prompt_room(engine.model.config.n_positions, params)
        self.engine = engine
        self.tokenizer = tokenizer
        self.params = params
        self.personas = personas
        self.window = 2 * max_history + 1
        self.ended = False
        self._reseed(params.seed)
        self._set_persona(persona)

    def handle(self, line: str) -> Iterator[str]:
        """Do what `line` asks, yielding the text to print as it comes, up to its last newline.

        A turn is remembered once the iterator is exhausted: abandon it, and the turn is forgotten.
        """
        line = line.strip()
        if line.startswith("/"):
            yield from self._command(line)
        else:
            yield from self._answer(line)

    def describe_persona(self) -> str:
        """The persona as lines to print."""
        if not self.persona:
            return "The model has no persona.\n"
        return "The model's persona:\n" + "".join(f"  {sentence}\n" for sentence in self.persona)

    def _answer(self, line: str) -> Iterator[str]:
        (user_turn,) = encode(self.tokenizer, [line])
        if not user_turn:
            yield "Nothing to reply to: write a line, or /help.\n"
            return
        history = [*self.history, user_turn]
        turn_seed = random.Random(f"{self.params.seed} {self.turn}").getrandbits(63)
        reply = []
        # Beside <bos>, <speaker2> and the reply's <speaker1>.
        room = prompt_room(self.engine.model.config.n_positions, self.params) - 3
        if len(user_turn) > room:
            yield "(the beginning of your line was left out to fit)\n"
        elif len(user_turn) + sum(map(len, self.persona_ids)) > room:
            yield "(some of the persona was left out to fit)\n"
        request = Request(
            persona=self.persona_ids,
            history=history[-self.window :],
            params=replace(self.params, seed=turn_seed),
        )
        tokens = self.engine.stream(request)
        yield from stream_text(self.tokenizer, tokens, reply)
        yield "\n"
        self.history = [*history, reply]
        self.turn += 1

    def _command(self, line: str) -> Iterator[str]:
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        match name:
            case "/help":
                yield _HELP
            case "/quit" | "/exit":
                self.ended = True
            case "/reset":
                self.history = []
                yield "The conversation is forgotten.\n"
            case "/seed":
                yield self._seed_command(argument)
            case "/persona":
                yield self._persona_command(argument)
            case "/rank":
                yield from self._rank(_split(argument))
            case _:
                yield f"{name} is not a command; /help lists them.\n"

    def _seed_command(self, argument: str) -> str:
        try:
            self._reseed(int(argument))
        except ValueError:
            return "/seed takes a whole number, as in /seed 42.\n"
        except UserError as error:
            return f"{error}.\n"
        return f"Drawing from the start with seed {self.params.seed}.\n"

    def _persona_command(self, argument: str) -> str:
        if argument == "random":
            if not self.personas:
                return "There are no personas to draw from: start with --dataset_path.\n"
            self._set_persona(self._random.choice(self.personas))
        elif argument:
            self._set_persona(_split(argument))
        return self.describe_persona()

    def _rank(self, candidates: list[str]) -> Iterator[str]:
        if not candidates:
            yield "/rank takes candidates, as in /rank i like tea . | i like coffee .\n"
            return
        # What was said last is the model's own reply; a candidate competes with it.
        history = self.history[:-1]
        log_probabilities = rank_candidates(
            self.engine.model,
            self.engine.special_ids,
            self.persona_ids,
            history[-self.window :],
            encode(self.tokenizer, candidates),
        )
        ranked = zip(log_probabilities.exp().tolist(), candidates, strict=True)
        for probability, candidate in sorted(ranked, key=lambda pair: -pair[0]):
            yield f"  {probability:.3f}  {candidate}\n"

    def _set_persona(self, sentences: Sequence[str]) -> None:
        self.persona = list(sentences)
        self.persona_ids = encode(self.tokenizer, self.persona)
        self.history: list[list[int]] = []

    def _reseed(self, seed: int) -> None:
        self.params = replace(self.params, seed=seed)
        self.turn = 0
        self._random = random.Random(f"{seed} personas")


def stream_text(
    tokenizer: PreTrainedTokenizerFast, token_ids: Iterable[int], seen: list[int]
) -> Iterator[str]:
    """Yield the text of `token_ids` piece by piece, without spaces in front of the first word.

    Each id is appended to `seen`. All of them are decoded each time, since a token's spaces can
    depend on its neighbours; the bytes of an unfinished character wait for its end, and are dropped
    when it does not come.
    """
    shown = 0
    for token in token_ids:
        seen.append(token)
        text = tokenizer.decode(seen, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = text.lstrip().rstrip("�")
        if len(text) > shown:
            yield text[shown:].translate(_CONTROL_CHARACTERS)
            shown = len(text)


def run(options: InteractOptions) -> None:
    """Load the model and talk until the user ends it."""
    options.recall()
    if options.max_history < 0:
        raise UserError(f"max_history is {options.max_history}, but must be at least 0")
    personas = _read_personas(options)
    persona = _first_persona(options, personas)

    device = resolve_device(options.device)
    model, tokenizer = load(options.model)
    engine = GenerationEngine(model.to(device), tokenizer, max_batch_size=1)
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
        print("Give one with --persona, --persona_file or --dataset_path, or /persona a | b | c.")
    print("Write a line to talk; /help lists the commands, Ctrl-D ends.")
    chat(conversation)


def chat(conversation: Conversation) -> None:
    """Feed the lines of standard input to `conversation` until it, or the input, ends."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing and history)
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")
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
            for piece in conversation.handle(line):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print("\n(stopped; the model forgets this turn)")
        except UserError as error:
            print(f"\n({error}; the model forgets this turn)")


def _split(argument: str) -> list[str]:
    return [part.strip() for part in argument.split("|") if part.strip()]


def _read_personas(options: InteractOptions) -> list[list[str]]:
    if not options.dataset_path:
        return []
    dialogues = replace(options.data, fill_candidates=1).load()
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
