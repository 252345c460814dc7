"""A part of the requests, for one job of many."""

import re
from dataclasses import dataclass

from convai_fast.errors import UserError, shown


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `number` of `count`, counted from 1, by default all.

    Parts are stretches of the requests: their answers, one part after another, are those to all.
    """

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """The shard that 3/16 names; UserError where `text` names none."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        number, count = map(int, match.groups()) if match else (0, 0)
        if not 1 <= number <= count:
            raise UserError(
                f"`shard` is {shown(text)}, but must be a part of so many, from 1/16 to 16/16"
            )
        return cls(number, count)

    @property
    def is_all(self) -> bool:
        """Whether there is no other part."""
        return self.count == 1

    @property
    def settings(self) -> dict[str, str]:
        """What the requests depend on, by name."""
        return {} if self.is_all else {"shard": f"{self.number}/{self.count}"}

    def positions(self, num_requests: int) -> range:
        """Which of `num_requests` requests are its own."""
        first, end = (num_requests * part // self.count for part in (self.number - 1, self.number))
        return range(first, end)


ALL = Shard()
