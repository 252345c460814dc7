"""A conversation with one model: what it remembers, and what each line of the user does."""

import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from convai_fast.dialogue.encoding import encode_at
from convai_fast.dialogue.fit import fit
from convai_fast.dialogue.layout import Place
from convai_fast.errors import UserError
from convai_fast.generation.detokenizer import Detokenizer
from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import (
    Request,
    check_ranking,
    dialogue_of,
    find_blank_turn,
    prompt_room,
)
from convai_fast.serving.shown_text import stream_text
from convai_fast.serving.transcript import Transcript
from convai_fast.terminal import counted

_HELP = """\
Write a line to talk, or a command:
  /persona            show the persona
  /persona a | b | c  give it these sentences and start a new conversation
  /persona random     the same, with a random persona of the dialogues
  /rank a | b | c     rank these as replies to your last line (or as openings), best first
  /reset              start a new conversation with the same persona
  /save FILE          write every conversation so far, also those before /reset and /persona, into
                      a new file, a JSON line of messages each, as `convai-fast train` reads them
  /seed N             draw as from the start with seed N: the same lines get the same replies
  /help               show this
  /quit               end (as do /exit and Ctrl-D)
Ctrl-C clears the line, or stops a reply, and the model forgets that turn. In a terminal, Tab
completes a command, and the arrow keys bring back earlier lines, also those of earlier sessions.
"""

COMMANDS = tuple(sorted({*re.findall(r"(?<!\S)/[a-z]+", _HELP)}))


class Conversation:
    """One conversation.

    `personas` are those that `/persona random` draws from. A turn's seed follows from `params.seed`
    and the number of replies before it, so that a conversation can be repeated while its turns
    differ; starting a new conversation does not start the seeds again, `/seed` does.

    Attributes:
        ended: whether the user has ended it.
        is_cut: whether the last reply ended at `params.max_length` tokens; an ellipsis is printed
            after such a one, and is neither remembered nor saved.

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
        prompt_room(engine.model.config.n_positions, params, engine.layout)
        check_ranking(params, engine.model)
        self.engine = engine
        self.tokenizer = tokenizer
        self.params = params
        self.personas = personas
        self.window = 2 * max_history + 1
        self.ended = False
        self.is_cut = False
        self.history: list[list[int]] = []
        self.lines: list[str] = []  # the user's
        self.transcript = Transcript()
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
        if find_blank_turn([line], self.tokenizer) is not None:
            yield "Nothing to reply to: write a line, or /help.\n"
            return
        places = [Place.SPEAKER2]
        (user_turn,) = encode_at(self.tokenizer, [line], places, self.engine.layout)
        history = [*self.history, user_turn]
        turn_seed = random.Random(f"{self.params.seed} {self.turn}").getrandbits(63)
        reply: list[int] = []
        request = Request(
            persona=self.persona,
            history=self._read(history, [*self.lines, line]),
            params=replace(self.params, seed=turn_seed),
        )
        if cut := self._describe_cut(request):
            yield cut
        text = ""
        for piece in stream_text(self.tokenizer, self._tokens(request), reply):
            text += piece
            yield piece
        yield " …\n" if self.is_cut else "\n"  # which the text has no part in
        self.history, self.lines = [*history, reply], [*self.lines, line]
        self.transcript.add(line, text.strip())
        self.turn += 1

    def _read(self, history: list[list[int]], lines: list[str]) -> list[list[int]]:
        """The last turns of a history, the user's of which are `lines`, as the model reads them."""
        turns, layout = history[-self.window :], self.engine.layout
        at = layout.turn_of_persona(len(turns)) if self.persona else None
        if at is not None and at >= 0:
            line = lines[-((len(turns) - at + 1) // 2)]
            turns[at : at + 1] = encode_at(self.tokenizer, [line], [Place.PERSONA_TURN], layout)
        return turns

    def _describe_cut(self, request: Request) -> str:
        """The line that tells what of persona and history does not fit; empty if all does."""
        config, layout = self.engine.model.config, self.engine.layout
        ids = dialogue_of(request, self.tokenizer, layout, config.vocab_size)
        sentences, turns = [*map(len, ids.persona)], [*map(len, ids.history)]
        elsewhere = {place: [*map(len, texts)] for place, texts in ids.elsewhere.items()}
        room = prompt_room(config.n_positions, self.params, layout)
        # Beside the prompt's last token.
        kept = fit(sentences, turns, layout, room - 1, elsewhere)
        numbers = {
            "the oldest turns": sum(turns[: len(turns) - kept.num_turns]),
            "the persona": sum(sentences[kept.num_sentences :]),
            "the beginning of your line": kept.num_skipped_tokens,
        }
        cut = [f"{counted(n, 'token')} of {what}" for what, n in numbers.items() if n]
        return f"(left out to fit the model: {', '.join(cut)})\n" if cut else ""

    def _tokens(self, request: Request) -> Iterator[int]:
        """The tokens of the reply as they come, or all at once where the best of several is."""
        if request.params.best_of == 1:
            finish_reason = yield from self.engine.stream(request)
        else:
            [[best, *_]] = self.engine.generate([request])
            detokenizer = Detokenizer(self.tokenizer)
            yield from best.token_ids[: detokenizer.num_within(best.token_ids, len(best.text))]
            finish_reason = best.finish_reason
        self.is_cut = finish_reason == "length"

    def _command(self, line: str) -> Iterator[str]:
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        match name:
            case "/help":
                yield _HELP
            case "/quit" | "/exit":
                self.ended = True
            case "/reset":
                self._begin()
                yield "The conversation is forgotten.\n"
            case "/save":
                yield self._save(argument)
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
                return "There are no personas to draw from: start with dialogues that have some.\n"
            self._set_persona(self._random.choice(self.personas))
        elif argument:
            self._set_persona(_split(argument))
        return self.describe_persona()

    def _save(self, argument: str) -> str:
        if not argument:
            return "/save takes the name of a file, as in /save chat.jsonl.\n"
        path = Path(os.path.expanduser(argument))  # which leaves ~nobody as it is
        try:
            count = self.transcript.save(path)
        except UserError as error:
            return f"{error}.\n"
        return f"Saved {counted(count, 'conversation')} in {path}.\n"

    def _rank(self, candidates: list[str]) -> Iterator[str]:
        if not candidates:
            yield "/rank takes candidates, as in /rank i like tea . | i like coffee .\n"
            return
        # What was said last is the model's own reply; a candidate competes with it.
        history = self._read(self.history[:-1], self.lines)
        request = Request(persona=self.persona, history=history)
        try:
            for candidate in self.engine.rank(request, candidates):
                yield f"  {candidate.probability:.3f}  {candidate.text}\n"
        except UserError as error:
            yield f"{error}.\n"

    def _set_persona(self, sentences: Sequence[str]) -> None:
        self.persona = list(sentences)
        self._begin()

    def _begin(self) -> None:
        self.history = []
        self.lines = []
        self.transcript.begin(self.persona)

    def _reseed(self, seed: int) -> None:
        self.params = replace(self.params, seed=seed)
        self.turn = 0
        self._random = random.Random(f"{seed} personas")


def _split(argument: str) -> list[str]:
    return [part.strip() for part in argument.split("|") if part.strip()]
