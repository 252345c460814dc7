"""A run in bulk: a source of requests, an engine that answers them, a file of answers."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

from convai_fast.bulk.answers import Answers, refusal
from convai_fast.bulk.dataset import DatasetRequests
from convai_fast.bulk.jsonl import BadLine, RequestFile
from convai_fast.bulk.reply_file import ReplyFile
from convai_fast.bulk.scratch import room_for_scratch
from convai_fast.errors import UserError
from convai_fast.generation.identified import IdentifiedRequest
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
        self.are_lines = isinstance(source, RequestFile)
        self.report = report
        self.num_earlier = replies.num_replies
        self.first_bad: BadLine | None = None
        self.unused: Counter[str] = Counter()  # lines with a field that changes nothing

    @room_for_scratch()
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
                f"stopped: {self.replies.num_replies:,} of {self.source.num_requests:,} "
                f"requests are answered; the same command continues from {self.replies.partial}",
                file=sys.stderr,
            )
            raise
        # Of a part, there must be a file to be put behind those of the others.
        self.replies.finish(may_be_empty=not self.source.shard.is_all)
        self._report()

    def _answer(self) -> None:
        for item, record in self.answers.answer(self._unanswered(), self._fail):
            self.replies.add(item.number, record)
            self.progress.set_postfix_str(self._speed(), refresh=False)
            self.progress.update()

    def _unanswered(self) -> Iterator[IdentifiedRequest]:
        """The requests without answers so far, as they are asked for."""
        for item in self.source:
            if isinstance(item, BadLine):
                self._reject(item)
                continue
            self.unused.update(item.unused)
            if self.num_earlier and item.number in self.replies:
                continue
            if reason := self._refusal(item):
                self._reject(BadLine(item.number, item.id, reason))
            else:
                yield item

    def _refusal(self, item: IdentifiedRequest) -> str | None:
        if not self.are_lines:  # what the turns of a dataset hold is its reader's business
            return None
        return refusal(item.request, self.answers.tokenizer)

    def _fail(self, item: IdentifiedRequest, reason: str) -> None:
        self._reject(BadLine(item.number, item.id, reason))

    def _reject(self, bad: BadLine) -> None:
        line = {"line": bad.number} if self.are_lines else {}
        id = {} if bad.id is None else {"id": bad.id}
        self.replies.add_error(bad.number, {**line, **id, "reason": bad.reason})
        self.progress.update()
        self.first_bad = self.first_bad or bad

    def _speed(self) -> str:
        per_second = self.answers.num_units / (time.perf_counter() - self.started)
        return f"{per_second:,.0f} {self.answers.unit}s/s"

    def _report(self) -> None:
        answers = self.answers
        bad = self.replies.num_errors
        if not self.replies.num_replies and self.source.shard.is_all:
            first = self.first_bad
            assert first is not None  # no source is empty
            where = f"line {first.number}" if self.are_lines else first.id
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
