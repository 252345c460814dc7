"""Token ids as text: what a reply says, where a stop text ends it, what of it is certain."""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerFast

from convai_fast.generation.params import SamplingParams

_UNFINISHED = "�"  # a character of which only some bytes have come


class Detokenizer:
    """The text of replies, written by `tokenizer`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer

    def text(self, token_ids: Sequence[int]) -> str:
        """Token ids as text, without special tokens."""
        # Some tokenizers' files ask for spaces to be tidied away, which changes what was written.
        text = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)  # as of one sequence
        return text

    def find_stop(self, token_ids: Sequence[int], params: SamplingParams) -> int:
        """Where in the text the first stop text begins; -1 without one, or before `min_length`."""
        if len(token_ids) < params.min_length:
            return -1
        text = self.text(token_ids)
        # What had to be written could not stop the reply, nor can it now.
        forced = self.text(token_ids[: max(params.min_length, 1) - 1])
        free = len(forced.rstrip(_UNFINISHED))
        starts = [(stop, max(free + 1 - len(stop), 0)) for stop in params.stop]
        found = [at for stop, start in starts if (at := text.find(stop, start)) >= 0]
        return min(found, default=-1)

    def num_certain(self, token_ids: Sequence[int], stop: Sequence[str]) -> int:
        """How many tokens of an unfinished reply lie before whatever may be a stop text."""
        if not stop:
            return len(token_ids)
        # "wait <st" may go on to "<stop>": its last three characters are not certain, nor is one of
        # which only some bytes have come.
        whole = self.text(token_ids).rstrip(_UNFINISHED)
        open_lengths = [
            n
            for each in stop
            for n in range(1, min(len(each), len(whole) + 1))
            if whole.endswith(each[:n])
        ]
        return self.num_within(token_ids, len(whole) - max(open_lengths, default=0))

    def num_within(self, token_ids: Sequence[int], end: int) -> int:
        """How many of the first tokens have a text of at most `end` characters."""
        count = len(token_ids)
        while count > 0 and len(self.text(token_ids[:count])) > end:
            count -= 1
        return count


class TextPieces:
    """The text of a reply piece by piece, as its tokens come.

    All of them are decoded each time, since a token's spaces can depend on its neighbours; the
    bytes of an unfinished character wait for its end.
    """

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self.token_ids: list[int] = []
        self._num_shown = 0

    def add(self, token_ids: Iterable[int]) -> str:
        """What they add to the text."""
        longer = [*self.token_ids, *token_ids]
        text = self._detokenizer.text(longer).rstrip(_UNFINISHED)
        self.token_ids = longer
        return self._show(text)

    def end(self, text: str) -> str:
        """What is missing of the whole text."""
        return self._show(text)

    def _show(self, text: str) -> str:
        piece = text[self._num_shown :]
        self._num_shown = max(self._num_shown, len(text))
        return piece
