"""Which replies are written now, in which slots of the cache, and what of their prompts is there.

Plain integers: nothing here knows of tensors, models or texts. Sequences join and leave at every
step (continuous batching: Yu et al., "Orca", OSDI 2022), and a slot remembers its tokens, also when
its sequence is done, so that another one that begins alike copies what they share (prefix caching:
Zheng et al., "SGLang", arXiv 2312.07104).
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

_WINDOW = 1024  # sequences that are planned together, to bring those that share next to each other
_WORTH_WAITING_FOR = 16  # tokens of a prompt that another sequence is about to compute


class TokenSequence:
    """The tokens of one slot: a prompt, and what is drawn after it.

    Attributes:
        id: of the request that it belongs to.
        input_ids, token_type_ids: all tokens so far; those that the slot does not hold yet are
            computed in the next step.
        keys: int64, a number for each token of the prompt that stands for its id and its segment's.
        order: the keys again, as bytes that sort as they do.
        slot: its slot, or -1 while it waits.
        flight: not 0 while a backend draws one token after another for it, ahead of what is known
            here: `land` ends it. A number of its own, so that what comes of another is told apart.
    """

    def __init__(
        self,
        id: Hashable,
        input_ids: Sequence[int],
        token_type_ids: Sequence[int],
        keys: np.ndarray,
    ) -> None:
        self.id = id
        self.input_ids, self.token_type_ids = list(input_ids), list(token_type_ids)
        self.keys = keys
        self.order = keys.astype(">i8").tobytes()
        self.slot = -1
        self.flight = 0

    def extend(self, tokens: Sequence[int], segment: int) -> None:
        """Let the sequence go on with tokens, which the next step computes unless it flies."""
        self.input_ids += tokens
        self.token_type_ids += [segment] * len(tokens)


class Copy(NamedTuple):
    """The first `length` tokens of a slot, which another one begins with."""

    source: int
    slot: int
    length: int


@dataclass(frozen=True, slots=True)
class Step:
    """What a backend does in one forward pass: first the copies, in their order.

    Attributes:
        sequences: whose tokens are computed, one after another.
        slots: int64 [sequences], the slot of each.
        past: int64 [sequences], how many tokens its slot holds before.
        offsets: int64 [sequences + 1], where the new tokens of each sequence begin and end.
        input_ids, token_type_ids: int64 [tokens], the new tokens of all sequences.
        flying: whose next tokens the backend knows already.
    """

    sequences: list[TokenSequence]
    copies: list[Copy]
    slots: np.ndarray
    past: np.ndarray
    offsets: np.ndarray
    input_ids: np.ndarray
    token_type_ids: np.ndarray
    flying: list[TokenSequence] = field(default_factory=list)

    @property
    def counts(self) -> np.ndarray:
        """int64 [sequences], how many tokens of each sequence are new."""
        return np.diff(self.offsets)

    @property
    def last(self) -> np.ndarray:
        """int64 [sequences], which of the tokens is each sequence's last."""
        return self.offsets[1:] - 1

    @property
    def position_ids(self) -> np.ndarray:
        """int64 [tokens], each token's place in its own sequence."""
        # 5 and 6 for two tokens after 5, then 0, 1 and 2 for three of a new sequence.
        shifts = self.past - self.offsets[:-1]
        return np.arange(len(self.input_ids)) + np.repeat(shifts, self.counts)


class Scheduler:
    """Sequences that wait, those that run, and the slots of the cache that these have.

    Args:
        num_slots: sequences that run at a time, at most.
        vocab_size: tokens that there are.
        prefill_tokens: tokens of prompts in one step, if there is more than one.
    """

    def __init__(self, num_slots: int, vocab_size: int, prefill_tokens: int = 1024) -> None:
        self._vocab_size, self._prefill_tokens = vocab_size, prefill_tokens
        self._incoming: list[TokenSequence] = []  # in the order they came
        self._waiting: list[TokenSequence] = []  # those that begin alike next to each other
        self.running: list[TokenSequence] = []
        self.free_slots = list(range(num_slots))  # the one longest free first
        self.lengths = [0] * num_slots  # tokens of each slot that are computed
        # The keys of these, and of those of a prompt that it is about to compute; else -1. What is
        # drawn is noted when its sequence is done: nobody begins like it before.
        self._keys = np.full((num_slots, 1), -1, np.int64)
        self.num_prompt_tokens = self.num_copied_tokens = 0  # of all prompts so far

    @property
    def num_waiting(self) -> int:
        """How many sequences have no slot yet."""
        return len(self._incoming) + len(self._waiting)

    def keys_of(
        self, input_ids: Sequence[int] | np.ndarray, token_type_ids: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """A number for each token that stands for its id and its segment's."""
        ids, segments = np.asarray(input_ids, np.int64), np.asarray(token_type_ids, np.int64)
        return ids + segments * self._vocab_size

    def reserve(self, capacity: int) -> None:
        """Remember as many tokens of a slot as it has room for."""
        more = capacity - self._keys.shape[1]
        if more > 0:
            self._keys = np.pad(self._keys, ((0, 0), (0, more)), constant_values=-1)

    def add(self, sequences: Iterable[TokenSequence]) -> None:
        """Let sequences wait for a slot."""
        self._incoming += sequences

    def remove(self, sequence: TokenSequence) -> None:
        """Free the slot of a sequence that is done; its tokens can still be copied."""
        self.land(sequence)
        keys = self._keys[sequence.slot]
        length = min(self.lengths[sequence.slot], len(sequence.input_ids))
        self.lengths[sequence.slot] = length
        keys[:length] = self.keys_of(sequence.input_ids[:length], sequence.token_type_ids[:length])
        keys[length:] = -1  # nobody shall wait for what it promised to compute and did not
        self.running.remove(sequence)
        self.free_slots.append(sequence.slot)
        sequence.slot = -1

    def cancel(self, id: Hashable, *, keep_prefixes: bool = True) -> None:
        """Remove all sequences of a request.

        Args:
            keep_prefixes: whether their tokens can still be copied.
        """
        self._incoming = [each for each in self._incoming if each.id != id]
        self._waiting = [each for each in self._waiting if each.id != id]
        for sequence in [each for each in self.running if each.id == id]:
            self.land(sequence)
            if not keep_prefixes:
                self.lengths[sequence.slot] = 0
            self.remove(sequence)

    def truncate(self, sequence: TokenSequence, length: int) -> None:
        """Drop all but the first `length` tokens of a running sequence, at least its prompt's."""
        self.land(sequence)
        del sequence.input_ids[length:], sequence.token_type_ids[length:]
        self.lengths[sequence.slot] = min(self.lengths[sequence.slot], length)

    def land(self, sequence: TokenSequence) -> None:
        """Let a backend draw no more tokens for a running sequence ahead of what is known here.

        All of its tokens but the last are computed then.
        """
        if sequence.flight:
            sequence.flight = 0
            self.lengths[sequence.slot] = len(sequence.input_ids) - 1

    def clear_free_slots(self) -> None:
        """Forget which tokens the slots hold that no sequence has."""
        for slot in self.free_slots:
            self.lengths[slot] = 0
        self._keys[self.free_slots] = -1

    def schedule(self) -> Step | None:
        """What to compute next, which counts as computed from here on; None without sequences."""
        copies = self._admit()
        if not self.running:
            return None
        known = [sequence for sequence in self.running if not sequence.flight]
        flying = [sequence for sequence in self.running if sequence.flight]
        slots, past, offsets = [], [], [0]
        input_ids: list[int] = []
        token_type_ids: list[int] = []
        for sequence in known:
            slot, length = sequence.slot, len(sequence.input_ids)
            # A token is always computed, also where a step was interrupted after its forward pass.
            start = min(self.lengths[slot], length - 1)
            input_ids += sequence.input_ids[start:]
            token_type_ids += sequence.token_type_ids[start:]
            slots.append(slot)
            past.append(start)
            offsets.append(len(input_ids))
            self.lengths[slot] = length
        return Step(
            known,
            copies,
            slots=np.array(slots, np.int64),
            past=np.array(past, np.int64),
            offsets=np.array(offsets, np.int64),
            input_ids=np.array(input_ids, np.int64),
            token_type_ids=np.array(token_type_ids, np.int64),
            flying=flying,
        )

    def forget(self) -> None:
        """Count nothing of the sequences that run as computed, since a step was interrupted.

        Their tokens are computed anew in the next one.
        """
        for sequence in self.running:
            sequence.flight = self.lengths[sequence.slot] = 0
            self._promise(sequence)

    def _promise(self, sequence: TokenSequence) -> None:
        """Note in its slot what a running sequence is about to compute: its prompt."""
        self._keys[sequence.slot] = -1
        self._keys[sequence.slot, : len(sequence.keys)] = sequence.keys

    def _admit(self) -> list[Copy]:
        """Give waiting sequences a slot while there are free ones.

        One whose prompt begins like that of a sequence admitted just now waits for the next step,
        in which it can copy what they share.
        """
        if not self._waiting:
            self._waiting, self._incoming = self._incoming[:_WINDOW], self._incoming[_WINDOW:]
            self._waiting.sort(key=lambda sequence: sequence.order)
        budget, copies = self._prefill_tokens, []
        passed_over: list[TokenSequence] = []
        while self._waiting and self.free_slots and budget > 0:
            if len(passed_over) >= _WINDOW // 8:
                break
            sequence = self._waiting.pop(0)
            length = len(sequence.keys)
            # The last token is always computed: its logits are what the reply begins with.
            promised = np.minimum(self._shared_lengths(sequence.keys), length - 1)
            shared = np.minimum(promised, self.lengths)
            source = int(shared.argmax())
            if promised.max() >= shared[source] + _WORTH_WAITING_FOR:
                passed_over.append(sequence)
                continue
            count = int(shared[source])
            # In place where nothing is lost by it, as when a conversation goes on.
            is_whole = count == self.lengths[source]
            slot = source if is_whole and source in self.free_slots else self.free_slots[0]
            if source != slot and count > 0:
                copies.append(Copy(source, slot, count))
            self.free_slots.remove(slot)
            sequence.slot = slot
            self.running.append(sequence)
            self.lengths[slot] = count
            self._promise(sequence)
            self.num_prompt_tokens += length
            self.num_copied_tokens += count
            budget -= length - count
        self._waiting[:0] = passed_over
        return copies

    def _shared_lengths(self, keys: np.ndarray) -> np.ndarray:
        """How many of the first tokens each slot has in common with `keys`: int64 [num_slots].

        Those of a slot's tokens that are promised but not computed yet count too.
        """
        differs = self._keys[:, : len(keys)] != keys
        return np.where(differs.any(1), differs.argmax(1), len(keys))

    def check_integrity(self) -> None:
        """Raise AssertionError unless every slot is either free or one sequence's."""
        taken = [sequence.slot for sequence in self.running]
        assert sorted(taken + self.free_slots) == list(range(len(self.lengths)))
        held = self._keys >= 0
        place = np.arange(self._keys.shape[1])
        for slot in self.free_slots:
            assert (held[slot] == (place < self.lengths[slot])).all()
        for sequence in self.running:
            known, length = sequence.keys, self.lengths[sequence.slot]
            assert (self._keys[sequence.slot, : len(known)] == known).all()
            assert length <= len(sequence.input_ids)
