"""What every reader produces: dialogues as text."""

from dataclasses import dataclass


@dataclass(slots=True)
class Utterance:
    """One turn to be answered.

    `history` holds the turns so far, oldest first, the partner's last; `candidates` the possible
    replies, the true one last (the order of the predecessor's JSON).
    """

    history: list[str]
    candidates: list[str]


@dataclass(slots=True)
class Dialogue:
    """One speaker's side of a conversation: who that speaker is, and each turn they answered."""

    personality: list[str]
    utterances: list[Utterance]
