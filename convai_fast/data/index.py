"""Cuts every example of a split to what the model can read, and measures it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from convai_fast import _native
from convai_fast.data.store import DialogueStore
from convai_fast.dialogue.fit import fit
from convai_fast.dialogue.layout import Place
from convai_fast.errors import UserError
from convai_fast.ops import PLAN_COLUMNS
from convai_fast.ops.plan import first_of_places, layout_of

_MAX_TURNS = 2**31  # more than any history has, and few enough for the host's integers


class CutCounts(NamedTuple):
    """How many examples lost history (turns, or the beginning of the one that is answered), persona
    sentences, or the end of a reply."""

    history: int
    persona: int
    reply: int


@dataclass(frozen=True, slots=True)
class ExampleIndex:
    """What `collate` needs to know of each example of a split.

    With `personality_permutations` p, row `r * num_examples + e` is example e with its persona
    rotated by r.

    Attributes:
        plan: int64 [p * num_examples, 9], columns as in `convai_fast.ops.PLAN_COLUMNS`.
        prefix_lengths: int32 [p * num_examples], tokens that its candidates share.
        padded_lengths: int32 [p * num_examples], tokens of the example's longest candidate, which
            is its length in the padded layout.
        shared_lengths: int32 [p * num_examples], tokens of its prefix and of every candidate's own
            part, which is its length in the shared-prefix layout.
        num_labels: int32 [p * num_examples], labelled tokens: the true reply and, unless it
            was cut, the token that ends it.
        is_cut: int32 [p * num_examples], 1 where the true reply was cut, else 0.
        cuts: what did not fit.
    """

    plan: np.ndarray
    prefix_lengths: np.ndarray
    padded_lengths: np.ndarray
    shared_lengths: np.ndarray
    num_labels: np.ndarray
    is_cut: np.ndarray
    cuts: CutCounts


def index_examples(
    store: DialogueStore,
    split: str,
    *,
    max_history: int,
    num_candidates: int,
    max_length: int,
    personality_permutations: int = 1,
) -> ExampleIndex:
    """Decide for every example of `split` which turns and persona sentences it keeps.

    An example keeps its last `2 * max_history + 1` turns and its last `num_candidates` candidates
    (0: all). Where its longest candidate would still pass `max_length` tokens, persona and history
    are cut as `convai_fast.dialogue.fit` says; a reply is cut only when it alone is too long.

    Raises ValueError for a number that makes no sense, and UserError for a `max_length` that what
    stands around a reply fills alone.
    """
    if max_history < 0 or num_candidates < 0 or max_length < 3 or personality_permutations < 1:
        raise ValueError(
            f"index_examples: max_history {max_history}, num_candidates {num_candidates}, "
            f"max_length {max_length} and personality_permutations {personality_permutations} "
            f"must be at least 0, 0, 3 and 1"
        )
    if max_length <= store.layout.empty_prompt:
        raise UserError(
            f"max_length is {max_length}, but what stands around a reply in this model's layout "
            f"takes {store.layout.empty_prompt + 1} tokens: give more"
        )
    tables = store.splits[split]
    arrays = [
        tensor.numpy()
        for tensor in (
            store.utterance_offsets,
            tables.persona_offsets,
            tables.persona_ids,
            tables.history_ids,
            tables.dialogue,
            tables.history_first,
            tables.history_count,
            tables.candidate_offsets,
            tables.candidate_ids,
        )
    ]
    index = _native.host_function("index_examples", index_examples_reference)
    plan, sizes, cuts = index(
        *arrays,
        store.layout_numbers.numpy(),
        min(2 * max_history + 1, _MAX_TURNS),
        num_candidates,
        max_length,
        personality_permutations,
    )
    padded, shared, num_labels, is_cut, prefix = sizes.T.copy()
    return ExampleIndex(plan, prefix, padded, shared, num_labels, is_cut, CutCounts(*cuts))


def index_examples_reference(
    utterance_offsets: np.ndarray,
    persona_offsets: np.ndarray,
    persona_ids: np.ndarray,
    history_ids: np.ndarray,
    dialogue: np.ndarray,
    history_first: np.ndarray,
    history_count: np.ndarray,
    candidate_offsets: np.ndarray,
    candidate_ids: np.ndarray,
    layout_numbers: np.ndarray,
    history_turns: int,
    num_candidates: int,
    max_length: int,
    permutations: int,
) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int]]:
    """The plain Python of `csrc/host/index.h`, used where nothing is compiled."""
    lengths = np.diff(utterance_offsets).tolist()
    numbers = layout_numbers.tolist()
    layout = layout_of(numbers, lambda id: [0] * lengths[id])  # by its lengths alone

    def lengths_of(texts: list[int], places: Sequence[Place]) -> list[int]:
        firsts = first_of_places(numbers)
        return [lengths[id + firsts[place]] for id, place in zip(texts, places, strict=True)]

    num_examples = len(dialogue)
    plan = np.zeros((permutations * num_examples, len(PLAN_COLUMNS)), np.int64)
    sizes = np.zeros((permutations * num_examples, 5), np.int32)
    history_cuts = persona_cuts = reply_cuts = 0

    for row in range(permutations * num_examples):
        rotation, example = divmod(row, num_examples)
        candidate_first, candidate_end = candidate_offsets[example : example + 2].tolist()
        if num_candidates > 0:
            candidate_first = max(candidate_first, candidate_end - num_candidates)
        candidates = candidate_ids[candidate_first:candidate_end].tolist()
        replies = lengths_of(candidates, [Place.REPLY] * len(candidates))
        longest_reply = max(replies, default=0)

        first, last = persona_offsets[dialogue[example] : dialogue[example] + 2].tolist()
        rotation = rotation % (last - first) if last > first else 0
        persona = np.roll(persona_ids[first:last], rotation).tolist()
        sentences = lengths_of(persona, [Place.MIDDLE_SENTENCE] * len(persona))
        elsewhere = {
            place: lengths_of(persona, [place] * len(persona))
            for place in (Place.ONLY_SENTENCE, Place.FIRST_SENTENCE, Place.LAST_SENTENCE)
        }

        end = int(history_first[example] + history_count[example])
        begin = max(int(history_first[example]), end - history_turns)
        history = history_ids[begin:end].tolist()
        turns = lengths_of(history, layout.places_of_turns(len(history), has_persona=False))
        elsewhere[Place.PERSONA_TURN] = lengths_of(history, [Place.PERSONA_TURN] * len(history))

        # Beside the prefix stand the tokens before and after a reply.
        kept = fit(sentences, turns, layout, max_length - 2 - longest_reply, elsewhere)
        reply_room = max_length - 2 - kept.num_tokens
        history_cuts += kept.num_turns < len(turns) or kept.num_skipped_tokens > 0
        persona_cuts += kept.num_sentences < len(sentences)
        reply_cuts += longest_reply > reply_room

        persona_columns = (first, last - first, rotation, kept.num_sentences)
        history_columns = (end - kept.num_turns, kept.num_turns, kept.num_skipped_tokens)
        candidate_columns = (candidate_first, candidate_end - candidate_first)
        plan[row] = (*persona_columns, *history_columns, *candidate_columns)
        parts = [min(length, reply_room) + 2 for length in replies]
        padded_length = kept.num_tokens + 2 + min(longest_reply, reply_room)
        # A reply that was cut does not end there: its eos has no label.
        is_cut = bool(replies) and replies[-1] > reply_room
        num_labels = parts[-1] - 1 - is_cut if replies else 0
        shared_length = kept.num_tokens + sum(parts)
        sizes[row] = (padded_length, shared_length, num_labels, is_cut, kept.num_tokens)
    return plan, sizes, (history_cuts, persona_cuts, reply_cuts)
