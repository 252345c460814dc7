"""How a reply is drawn."""

from dataclasses import dataclass

from convai_fast.errors import UserError

_LARGEST_SEED = 2**63 - 1  # seeds travel in int64 tensors


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the replies to one request are drawn; the filters are those of `convai_fast.ops.sample`.

    Attributes:
        max_length: Most tokens in a reply.
        min_length: Fewest tokens in a reply: before that, no special token and no stop text can
            end it.
        temperature: Divides the logits: below 1 safer, above 1 livelier, 0 always the likeliest
            token.
        top_k: Draw from this many likeliest tokens (0 or less: from all).
        top_p: Draw from the likeliest tokens that together have this probability (0 or 1:
            from all).
        min_p: Draw from tokens at least this share as probable as the likeliest (0: from all).
        no_sample: Always take the likeliest token (greedy decoding).
        seed: The same seed, prompt and options give the same reply.
        repetition_penalty: Above 1, tokens of the prompt and of the reply so far become less
            likely (1: off).
        no_repeat_ngram_size: So many tokens in a row never occur twice in prompt and reply
            together (0: off).
        stop: A reply ends before the first of these texts.
        n: Replies to each request.
        best_of: Draw so many replies and return the n that the multiple-choice head ranks best, the
            best first (1: do not rank).
        logprobs: Whether to return the log-probability of each token.

    Raises UserError naming the first field whose value is out of range.

    Sources: `repetition_penalty`, Keskar et al. 2019 (arXiv 1909.05858);
    `no_repeat_ngram_size`, Paulus et al. 2017 (arXiv 1705.04304).
    """

    max_length: int = 20
    min_length: int = 1
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    no_sample: bool = False
    seed: int = 42
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    stop: tuple[str, ...] = ()
    n: int = 1
    best_of: int = 1
    logprobs: bool = False

    def __post_init__(self) -> None:
        self._require("max_length", self.max_length >= 1, "at least 1")
        self._require(
            "min_length",
            0 <= self.min_length <= self.max_length,
            f"between 0 and max_length, which is {self.max_length}",
        )
        self._require("temperature", 0 <= self.temperature < float("inf"), "a number from 0 up")
        self._require("top_k", abs(self.top_k) < 2**63, "below 2**63")
        self._require("top_p", 0 <= self.top_p <= 1, "between 0 and 1")
        self._require("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        self._require("seed", 0 <= self.seed <= _LARGEST_SEED, "between 0 and 2**63 - 1")
        self._require(
            "repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "between 0.01 and 100"
        )
        self._require("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "at least 0")
        stop: object = self.stop  # one text, if the caller forgot the brackets
        self._require(
            "stop",
            not isinstance(stop, str) and all(self.stop),
            "a list of texts, none of them empty",
        )
        self._require("n", 1 <= self.n <= 10_000, "between 1 and 10,000")
        self._require(
            "best_of",
            self.best_of == 1 or self.n <= self.best_of <= 10_000,
            f"1, or between n, which is {self.n}, and 10,000",
        )

    @property
    def num_drafts(self) -> int:
        """How many replies are drawn, of which `n` are returned."""
        return max(self.n, self.best_of)

    def _require(self, field: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UserError(f"{field} is {getattr(self, field)}, but must be {rule}")
