"""A run in bulk: a source of requests, an engine that answers them, a file of answers."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

from convai_fast.bulk.answers import Answers, refusal
from convai_fast.bulk.dataset import DatasetRequests
from convai_fast.bulk.jsonl import BadLine, RequestFile
from convai_fast.bulk.reply_file import ReplyFile
from convai_fast.errors import UserError
from convai_fast.generation.identified import IdentifiedRequest, id_key
from convai_fast.terminal import counted, progress_bar, say


class BulkRun:
    """One run: what it keeps track of between a request and its replies.

    Args:
        answers: replies or rankings.
        source: its requests in an order that stays.
        replies: where the answers go; those that it holds already are not asked for again.
        report: is told, line by line, what came of it.
    """

    def __init__(
        self,
        answers: Answers,
        source: RequestFile | DatasetRequests,
        replies: ReplyFile,
        *,
        report: Callable[[str], None] = say,
    ) -> None:
        self.answers, self.source, self.replies = answers, source, replies
        self.report = report
        self.num_earlier = len(replies.positions)
        self.keys: dict[str, None] = {}  # what the file of replies will hold, in its order
        self.first_bad: BadLine | None = None
        self.unused: Counter[str] = Counter()  # lines with a field that changes nothing

    def run(self) -> None:
        """Answer what is not answered yet, then put the file of replies in its place.

        Raises:
            UserError: not one request can be answered, or a file cannot be read or written.
        """
        self.started = time.perf_counter()
        self.progress = progress_bar(
            total=self.source.num_requests, initial=self.num_earlier, unit="request"
        )
        try:
            with self.progress:
                self._answer()
        except (KeyboardInterrupt, SystemExit):
            print(
                f"stopped: {len(self.replies.positions):,} of {self.source.num_requests:,} "
                f"requests are answered; the same command continues from {self.replies.partial}",
                file=sys.stderr,
            )
            raise
        # Of a part, there must be a file to be put behind those of the others.
        self.replies.finish(list(self.keys), may_be_empty=not self.source.shard.is_all)
        self._report()

    def _answer(self) -> None:
        for _, record in self.answers.answer(self._unanswered(), self._fail):
            self.replies.add(record)
            self.progress.set_postfix_str(self._speed(), refresh=False)
            self.progress.update()

    def _unanswered(self) -> Iterator[IdentifiedRequest]:
        """The requests without answers so far, as they are asked for."""
        for item in self.source:
            if isinstance(item, BadLine):
                self._reject(item)
                continue
            self.unused.update(item.unused)
            key = id_key(item.id)
            is_answered = key in self.replies.positions
            if not is_answered and (reason := self._refusal(item)):
                self._reject(BadLine(item.line, item.id, reason))
                continue
            self.keys[key] = None
            if not is_answered:
                yield item

    def _refusal(self, item: IdentifiedRequest) -> str | None:
        if item.line is None:  # what the turns of a dataset hold is its reader's business
            return None
        return refusal(item.request, self.answers.tokenizer)

    def _fail(self, item: IdentifiedRequest, reason: str) -> None:
        del self.keys[id_key(item.id)]
        self._reject(BadLine(item.line, item.id, reason))

    def _reject(self, bad: BadLine) -> None:
        self.replies.add_error(bad)
        self.progress.update()
        self.first_bad = self.first_bad or bad

    def _speed(self) -> str:
        per_second = self.answers.num_units / (time.perf_counter() - self.started)
        return f"{per_second:,.0f} {self.answers.unit}s/s"

    def _report(self) -> None:
        answers = self.answers
        bad = self.replies.num_errors
        if not self.keys and self.source.shard.is_all:
            first = self.first_bad
            assert first is not None  # no source is empty
            where = first.id if first.line is None else f"line {first.line}"
            raise UserError(
                f"not one request can be answered ({where}: {first.reason}): {self.replies.errors} "
                "lists them all; dialogues are answered with `dataset_path`"
            )
        if bad:
            self.report(f"{counted(bad, 'bad line')}: {self.replies.errors} says why")
        if self.unused:
            fields = ", ".join(f"{name} ({count:,})" for name, count in self.unused.items())
            self.report(f"fields that change nothing, and in how many lines: {fields}")
        earlier = (
            f" (and those to {self.num_earlier:,} requests before)" if self.num_earlier else ""
        )
        self.report(
            f"{counted(answers.num_answers, answers.noun)}{earlier}, "
            f"{counted(answers.num_units, answers.unit)} in "
            f"{time.perf_counter() - self.started:.1f} s, {self._speed()}: {self.replies.output}"
        )
