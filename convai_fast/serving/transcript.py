"""What was said, as chat data that can be trained on."""

import json
from collections.abc import Sequence
from pathlib import Path

from convai_fast.data.readers.fields import is_blank
from convai_fast.errors import UserError
from convai_fast.files import write_whole


class Transcript:
    """Every conversation since the start, each with the persona that it was held with."""

    def __init__(self) -> None:
        self._conversations: list[list[dict[str, str]]] = []

    def begin(self, persona: Sequence[str]) -> None:
        """Begin a conversation."""
        self._conversations.append([])
        self._add("system", "\n".join(persona))

    def add(self, line: str, reply: str) -> None:
        """Add what the user said, and the reply."""
        self._add("user", line)
        self._add("assistant", reply)

    def save(self, path: Path) -> int:
        """Write the conversations that have a reply, a JSON line of `messages` each.

        Returns how many they are. Raises UserError where there are none, or a file is there or
        cannot be written; nothing is left then.
        """
        lines = [
            json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
            for messages in self._conversations
            if messages and messages[-1]["role"] == "assistant"
        ]
        if not lines:
            raise UserError("there is no conversation to save yet")
        content = "".join(lines).encode(errors="replace")
        try:
            if path.exists():
                raise UserError(f"{path} is already there: choose another name")
            write_whole(path, lambda file: file.write(content))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from error
        return len(lines)

    def _add(self, role: str, text: str) -> None:
        if not is_blank(text):  # which training data must not be
            self._conversations[-1].append({"role": role, "content": text})
