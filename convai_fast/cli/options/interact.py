"""The options of `convai-fast interact`."""

from dataclasses import dataclass
from pathlib import Path

from convai_fast.cli.options.common import DeviceOption, RememberedOptions, ReplyOptions


@dataclass
class PersonaOptions:
    """Persona: by default one of the dialogues, where they are given."""

    persona: tuple[str, ...] = ()
    """Sentences of the model's persona, as in --persona "i like tea ." "i have a cat ."."""
    persona_file: Path | None = None
    """Text file with the model's persona, one sentence a line."""
    no_personality: bool = False
    """Begin without a persona."""


@dataclass
class InteractOptions(DeviceOption, ReplyOptions, PersonaOptions, RememberedOptions):
    """Talk with a model in the terminal."""
