"""What every reader produces: dialogues as text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload


class History(Sequence[str]):
    """The first `num_turns` turns of a conversation: a view, since a copy for each turn to be
    answered would take memory with the square of the conversation's length.

    It compares and copies as a list: `History(["a", "b", "c"], 2) == ["a", "b"]`.
    """

    __slots__ = ("num_turns", "turns")
    __hash__ = None  # type: ignore[assignment]  # as a list's

    def __init__(self, turns: list[str], num_turns: int) -> None:
        self.turns, self.num_turns = turns, num_turns

    def __len__(self) -> int:
        return self.num_turns

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        places = range(self.num_turns)[index]
        if isinstance(places, int):
            return self.turns[places]
        return [self.turns[place] for place in places]

    def __iter__(self) -> Iterator[str]:
        return map(self.turns.__getitem__, range(self.num_turns))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str) or not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return repr(self[:])

    def __deepcopy__(self, memo: object) -> list[str]:
        return self[:]  # so that dataclasses.asdict gives what json writes


@dataclass(slots=True)
class Utterance:
    """One turn to be answered.

    `history` holds the turns so far, oldest first, the partner's last; `candidates` the possible
    replies, the true one last (the order of the predecessor's JSON).
    """

    history: Sequence[str]
    candidates: list[str]


@dataclass(slots=True)
class Dialogue:
    """One speaker's side of a conversation: who that speaker is, and each turn they answered."""

    personality: list[str]
    utterances: list[Utterance]


Conversation = list[Dialogue]
"""The sides of one conversation. They share their texts, so they must land in the same split."""
