"""What dialogues lack is filled in: a validation split, and distractors beside lone true replies.

It depends on the dialogues and a seed alone, and works on the numbers of a `Spool`.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from convai_fast.data.groups import first_equal
from convai_fast.data.shuffle import mixed, seed_of
from convai_fast.data.spool import VALID_NAMES, Spool
from convai_fast.data.store import Origin

_ROWS = 1 << 12  # examples whose distractors are drawn at a time
_DRAWS = 4  # as many as are wanted, before the reserve is asked
_NONE = -1


@dataclass(frozen=True)
class Numbering:
    """Equal texts under one number.

    Attributes:
        first: int32 [num_texts], for each text of the spool the first that equals it.
        classes: int32 [num_examples], the same of true replies, but for case and white space.
        groups: int64 [num_conversations], equal for conversations that are one.
    """

    first: np.ndarray
    classes: np.ndarray
    groups: np.ndarray

    @classmethod
    def of(cls, spool: Spool) -> "Numbering":
        """That of what was read so far."""
        first, classes = (first_equal(spool[name]) for name in ("text_keys", "reply_keys"))
        return cls(first, classes, spool.group_of)


def split_conversations(
    spool: Spool, valid_fraction: float, seed: int
) -> tuple[dict[str, np.ndarray], list[list[Origin]], list[str]]:
    """The conversations of "train" and "valid", each in the order of reading: int64 numbers.

    And, for each source, the sets of dialogues that it holds, several where it is a store; and
    sentences about what a user may not expect.

    A source's validation split is the first of VALID_NAMES that it has; other splits are left out.
    Where it has none, `valid_fraction` of its conversations is cut off from train, unless it is a
    store: at least one if there are two and the fraction is not 0. Conversations that are one (see
    `convai_fast.data.groups`) are in one split. What is cut off does not depend on other sources;
    but what one source holds out, another does not give to learn from.
    """
    split_of, source_of = spool["conversation_split"], spool["conversation_source"]
    train, valid, origins, notes = [], [], [], []
    for source, fingerprint in enumerate(spool.fingerprints):
        own = {
            name: np.flatnonzero((source_of == source) & (split_of == i))
            for i, name in enumerate(spool.splits)
        }
        nothing = np.zeros(0, np.int64)
        in_train = own.get("train", nothing)
        in_valid = next((own[n] for n in VALID_NAMES if len(own.get(n, ()))), nothing)
        is_cut = not len(in_valid) and source not in spool.made_before
        if is_cut:
            own_groups = spool.group_in_source[in_train]
            chosen = _choose(own_groups, valid_fraction, random.Random(f"valid {seed}"))
            in_valid, in_train = in_train[chosen], in_train[~chosen]
            if valid_fraction and not len(in_valid) and len(in_train) > 1:
                notes.append(
                    f"the {len(in_train):,} conversations repeat one another, so that none can be "
                    "held out for validation"
                )
        made_now = [Origin(fingerprint, is_cut, valid_fraction, seed)]
        origins.append(spool.made_before.get(source, made_now))
        train.append(in_train)
        valid.append(in_valid)
    num_moved = _move_held_out(spool.group_of, train, valid) if len(train) > 1 else 0
    if num_moved:
        notes.append(
            f"{num_moved:,} conversations are in the validation split and not learnt, since another"
            " data set holds them out"
        )
    return {"train": np.concatenate(train), "valid": np.concatenate(valid)}, origins, notes


def _move_held_out(group_of: np.ndarray, train: list[np.ndarray], valid: list[np.ndarray]) -> int:
    """Move what one source holds out and another would give to learn from, in these lists with an
    item a source; returns how many conversations that were."""
    held_out, num_moved = list(valid), 0
    for source, own in enumerate(train):
        is_held_out = np.zeros(len(group_of), bool)
        for other in (*held_out[:source], *held_out[source + 1 :]):
            is_held_out[group_of[other]] = True
        is_moved = is_held_out[group_of[own]]
        valid[source] = np.sort(np.concatenate([valid[source], own[is_moved]]))
        train[source] = own[~is_moved]
        num_moved += int(is_moved.sum())
    return num_moved


def _choose(group_of: np.ndarray, fraction: float, rng: random.Random) -> np.ndarray:
    """Whether each conversation, of which `group_of` is the group, is cut off: whole groups in
    random order, as far as they fit."""
    if not fraction or not len(group_of):
        return np.zeros(len(group_of), bool)
    _, own, sizes = np.unique(group_of, return_inverse=True, return_counts=True)
    wanted = max(1, round(len(group_of) * fraction))
    order = list(range(len(sizes)))
    rng.shuffle(order)
    taken = np.zeros(len(sizes), bool)
    left = len(group_of)
    for group in order:
        if sizes[group] <= min(wanted, left - 1):
            taken[group] = True
            wanted -= sizes[group]
            left -= sizes[group]
        if wanted == 0:
            break
    if not taken.any() and len(sizes) > 1:  # each is larger than what is wanted
        taken[sizes.argmin()] = True
    return taken[own]


@dataclass(frozen=True)
class SplitArrays:
    """One split of a spool, its conversations chosen; texts by their numbers in the spool.

    The arrays are those of a store's split (see `convai_fast.data.store`), except that the
    candidates are completed as they are asked for: `candidates` yields the rest.
    """

    spool: Spool
    numbering: Numbering
    conversations: np.ndarray

    @cached_property
    def _dialogues(self) -> np.ndarray:
        return _runs(self.spool["conversation_dialogue_end"], self.conversations)[0]

    @cached_property
    def _examples(self) -> np.ndarray:
        ends = np.searchsorted(
            self.spool["example_dialogue"], np.arange(len(self.spool["persona_ends"])), "right"
        )
        return _runs(ends, self._dialogues)[0]

    def num_examples_by_source(self) -> list[int]:
        """How many examples come from each source; those of one follow one another."""
        owners = self._owners
        sources = self.spool["conversation_source"][owners]
        return np.bincount(sources, minlength=len(self.spool.fingerprints)).tolist()

    @cached_property
    def _owners(self) -> np.ndarray:
        """The conversation of each example, int32."""
        ends = self.spool["conversation_dialogue_end"]
        dialogues = self.spool["example_dialogue"][self._examples]
        return np.searchsorted(ends, dialogues, "right").astype(np.int32)

    def tables(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield name and content of each table but those of the candidates, one after another,
        since together they are large."""
        spool, dialogues, examples = self.spool, self._dialogues, self._examples
        places, offsets = _runs(spool["persona_ends"], dialogues)
        yield "persona_offsets", offsets
        yield "persona_ids", self._ids(spool["persona_ids"][places])
        places, offsets = _runs(spool["conversation_history_end"], self.conversations)
        yield "history_ids", self._ids(spool["history_ids"][places])
        del places
        # Where the run of an example's conversation has moved to.
        begins = np.concatenate([[0], spool["conversation_history_end"]])
        moved = offsets[:-1] - begins[self.conversations]
        first = spool["example_history_first"][examples]
        first += moved[np.searchsorted(self.conversations, self._owners)]
        yield "history_first", first
        del first
        yield "history_count", np.asarray(spool["example_history_count"][examples])
        number = np.empty(len(spool["persona_ends"]), np.int32)
        number[dialogues] = np.arange(len(dialogues), dtype=np.int32)
        yield "dialogue", number[spool["example_dialogue"][examples]]

    def candidates(
        self, num_candidates: int, name: str, seed: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (ids, count of each example) of some examples after others.

        An example with a lone true reply gets distractors in front of it, until it has
        `num_candidates`: true replies of other conversations of its split, drawn as often as they
        occur there, lest "the frequent one is true" be learnt. None equals the true reply or
        another one but for case and white space, so there are fewer where the split has too few.
        """
        spool, examples = self.spool, self._examples
        ends, all_ids = spool["candidate_ends"], spool["candidate_ids"]
        replies = np.empty(len(examples), np.int32)
        for start in range(0, len(examples), _ROWS):
            part = slice(start, start + _ROWS)
            replies[part] = self._ids(all_ids[ends[examples[part]] - 1])
        # Who says it: one conversation also where it is held twice.
        owners = self.numbering.groups[self._owners].astype(np.int32)
        classes = self.numbering.classes[examples]
        draw = _Distractors(classes, owners, num_candidates - 1, f"{name} {seed}")
        for start in range(0, len(examples), _ROWS):
            rows = np.arange(start, min(start + _ROWS, len(examples)))
            own, offsets = _runs(ends, examples[rows])
            counts = np.diff(offsets)
            lone = counts == 1
            ids = np.full((len(rows), max(num_candidates, counts.max())), _NONE, np.int32)
            ids[lone, num_candidates - 1] = replies[rows[lone]]
            if num_candidates > 1:
                drawn = draw.rows(rows[lone])
                ids[lone, : num_candidates - 1] = np.where(drawn >= 0, replies[drawn], _NONE)
            # The others keep what they have.
            column = np.arange(len(own)) - np.repeat(offsets[:-1], counts)
            row = np.repeat(np.arange(len(rows)), counts)
            kept = ~lone[row]
            ids[row[kept], column[kept]] = self._ids(all_ids[own[kept]])
            present = ids != _NONE
            yield ids[present], present.sum(1)

    def _ids(self, texts: np.ndarray) -> np.ndarray:
        return self.numbering.first[texts]


class _Distractors:
    """Draws, for each example, the places of other examples whose replies are its distractors."""

    def __init__(self, classes: np.ndarray, owners: np.ndarray, wanted: int, seed: str) -> None:
        self.classes, self.owners, self.wanted = classes, owners, wanted
        self.seed = seed_of("distractors", seed)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """int64 [len(rows), wanted], -1 where there are too few different replies."""
        found = self._draw(rows, self.wanted + 8)
        lacking = np.flatnonzero(found[:, -1] < 0)
        if len(lacking):
            found[lacking] = self._draw(rows[lacking], _DRAWS * self.wanted)
            for i in lacking[found[lacking, -1] < 0].tolist():
                self._ask_reserve(int(rows[i]), found[i])
        return found

    def _draw(self, rows: np.ndarray, num_draws: int) -> np.ndarray:
        first = rows[:, None].astype(np.uint64) << np.uint64(20)
        counters = first + np.arange(num_draws, dtype=np.uint64)
        drawn = (mixed(counters, self.seed) % np.uint64(len(self.classes))).astype(np.int64)
        classes = self.classes[drawn].astype(np.int64)
        fits = (classes != self.classes[rows, None]) & (
            self.owners[drawn] != self.owners[rows, None]
        )
        # The first draw of each class counts; what does not fit is made a class of its own.
        classes = np.where(fits, classes, -1 - np.arange(num_draws))
        order = classes.argsort(axis=1, kind="stable")
        ordered = np.take_along_axis(classes, order, 1)
        is_first = np.ones_like(fits)
        is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        np.put_along_axis(fits, order, np.take_along_axis(fits, order, 1) & is_first, 1)
        place = fits.cumsum(1) - 1
        fits &= place < self.wanted
        found = np.full((len(rows), self.wanted), -1, np.int64)
        row, column = fits.nonzero()
        found[row, place[row, column]] = drawn[row, column]
        return found

    @cached_property
    def _reserve(self) -> tuple[np.ndarray, np.ndarray]:
        """A place of each class, and one more of another conversation, so that any conversation
        finds it; those of a conversation side by side. And the conversation of each."""
        order = np.argsort(self.classes, kind="stable")
        classes, owners = self.classes[order], self.owners[order]
        starts = np.flatnonzero(np.concatenate([[True], classes[1:] != classes[:-1]]))
        first_owner = np.repeat(owners[starts], np.diff([*starts, len(order)]))
        foreign = np.flatnonzero(owners != first_owner)
        _, second = np.unique(classes[foreign], return_index=True)
        places = np.concatenate([order[starts], order[foreign[second]]])
        places = places[mixed(places.astype(np.uint64), self.seed).argsort(kind="stable")]
        places = places[self.owners[places].argsort(kind="stable")]
        return places, self.owners[places]

    def _ask_reserve(self, row: int, found: np.ndarray) -> None:
        """Fill up `found` with what was not drawn, from a random place of the reserve on."""
        places, owners = self._reserve
        begin, end = (np.searchsorted(owners, self.owners[row], side) for side in ("left", "right"))
        num_foreign = len(places) - (end - begin)
        taken = {int(self.classes[row]), *self.classes[found[found >= 0]].tolist()}
        count = int((found >= 0).sum())
        start = int(mixed(np.array([row], np.uint64), self.seed + 1)[0] % np.uint64(2**32))
        for i in range(num_foreign):
            if count == len(found):
                break
            at = (start + i) % num_foreign
            place = int(places[at if at < begin else at + end - begin])
            if (reply := int(self.classes[place])) not in taken:
                taken.add(reply)
                found[count] = place
                count += 1


def _runs(ends: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of runs that end at `ends` [n], the places of all elements of the chosen ones (int32), one
    run after another, and where each begins among them, int64 [len(chosen) + 1]."""
    offsets = np.zeros(len(chosen) + 1, np.int64)
    for start in range(0, len(chosen), _ROWS):
        part = slice(start, start + _ROWS)
        first, last = _bounds(ends, chosen[part])
        offsets[1:][part] = last - first
    offsets.cumsum(out=offsets)
    places = np.empty(offsets[-1], np.int32)
    for start in range(0, len(chosen), _ROWS):
        first, last = _bounds(ends, chosen[start : start + _ROWS])
        own = offsets[start : start + len(first) + 1]
        moved = np.repeat(first - own[:-1], last - first)
        places[own[0] : own[-1]] = np.arange(own[0], own[-1]) + moved
    return places, offsets


def _bounds(ends: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the chosen runs begin and end, int64."""
    return np.where(chosen > 0, ends[np.maximum(chosen, 1) - 1], 0), np.asarray(ends[chosen])
