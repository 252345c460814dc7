"""What a reader met beside good records: told once, at the end, with counts."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from convai_fast.dialogue.dialogue import Conversation
from convai_fast.errors import UserError

Record = TypeVar("Record")

_NUM_NAMED = 10


class ReadingLog:
    """Counts the records of one source, the bad ones, and what of the others was not used."""

    def __init__(self) -> None:
        self.num_records = 0
        self.num_bad = 0
        self.first_bad: list[str] = []
        self.notes: Counter[str] = Counter()

    def bad(self, error: UserError) -> None:
        """Count a record that cannot be read."""
        self.num_bad += 1
        if len(self.first_bad) < _NUM_NAMED:
            self.first_bad.append(str(error))

    def note(self, what: str) -> None:
        """Count something of a record that is read in a way its user should know of."""
        self.notes[what] += 1

    def conversations(
        self, records: Iterable[tuple[str, Record]], read: Callable[[Record, str], Conversation]
    ) -> Iterator[Conversation]:
        """What `read` makes of each (where, record), without sides on which nothing is answered."""
        for where, record in records:
            self.num_records += 1
            try:
                conversation = read(record, where)
            except UserError as error:
                self.bad(error)
                continue
            if answered := [side for side in conversation if side.utterances]:
                yield answered
            elif conversation:  # a reader that leaves a record out gives no side, and says why
                self.note("conversations in which nothing is answered are left out")

    def finish(self, path: str, skip_bad_records: bool, report: Callable[[str], None]) -> None:
        """Tell what was left out or not used.

        Raises UserError for bad records, unless they are to be skipped and there are good ones.
        """
        if self.num_bad:
            named = "; ".join(self.first_bad)
            if self.num_bad > len(self.first_bad):
                named += "; …"
            summary = f"{self.num_bad:,} of {self.num_records:,} records cannot be read"
            if skip_bad_records and self.num_bad < self.num_records:
                report(f"{path}: {summary} and are skipped: {named}")
            elif self.num_bad == 1:
                raise UserError(f"{named} (or leave the record out with `skip_bad_records`)")
            else:
                raise UserError(
                    f"{path}: {summary} (leave them out with `skip_bad_records`): {named}"
                )
        for what, count in self.notes.items():
            report(f"{path}: {what} ({count:,})")
