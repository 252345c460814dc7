"""Which conversations are one: held twice, from either side, in growing parts, or under one id.

What is learnt from one of them is no longer unknown in the others, so a group stays in one split.

A conversation leaves links (`links_of`), of which equal ones join it with others. The whole of one
joins with the whole of another, and with what the other is without its first turn, its last, or
both, or with its beginning:

    a b c d e        the conversation
    a b c d e        held again
      b c d e        from the other side, which says nothing first
    a b c            an earlier part of it, as where each turn is a record with its history

Two that only begin alike are not joined: `a b c d` and `a b c x` are two answers to one question.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

# The kinds of links. Equal ones join where one of them is WHOLE, or where one is LATER and another
# EARLIER: `b c d` of `a b c d` and of `b c d e`, sides that lack a turn at different ends.
WHOLE, PART, LATER, EARLIER = range(4)

_SORTED = 1 << 17  # keys that are sorted at a time
# Equal parts shorter than both are a coincidence: many conversations begin with a greeting.
_FEWEST_TURNS = 3
_FEWEST_CHARACTERS = 40


Link = tuple[int, bytes]  # its kind, and a key of 16 bytes


def links_of(keys: Sequence[bytes], lengths: Sequence[int]) -> list[Link]:
    """The links of a conversation.

    Args:
        keys: of its turns, equal for equal texts.
        lengths: of the turns, in characters.
    """
    count, links = len(keys), [(WHOLE, _digest(b"turns", keys))]
    beginning, so_far = hashlib.blake2b(b"turns", digest_size=16), 0
    for turns in range(1, count):
        beginning.update(keys[turns - 1])
        so_far += lengths[turns - 1]
        if _is_telling(turns, so_far):
            links.append((PART, beginning.copy().digest()))
    for kind, space, begin, end in (
        (PART, b"turns", 1, count),
        (PART, b"turns", 1, count - 1),
        (LATER, b"shifted", 1, count),
        (EARLIER, b"shifted", 0, count - 1),
    ):
        if end > begin and _is_telling(end - begin, sum(lengths[begin:end])):
            links.append((kind, _digest(space, keys[begin:end])))
    return links


def link_of_id(conversation_id: str) -> Link:
    """A link that all parts with this id share, of a conversation that comes in parts."""
    return WHOLE, _digest(b"id", [conversation_id.encode("utf-8", "surrogatepass")])


def is_telling(turns: Sequence[str]) -> bool:
    """Whether equal ones elsewhere are no coincidence."""
    return _is_telling(len(turns), sum(map(len, turns)))


def _is_telling(num_turns: int, num_characters: int) -> bool:
    return num_turns >= _FEWEST_TURNS or num_characters >= _FEWEST_CHARACTERS


def _digest(space: bytes, parts: Sequence[bytes]) -> bytes:
    return hashlib.blake2b(space + b"".join(parts), digest_size=16).digest()


def first_equal(keys: np.ndarray) -> np.ndarray:
    """For each 16-byte key (uint8 [16 * n]) the place of the first that equals it, int32 [n].

    Part by part of the keys' values, so that memory is a few bytes a key.
    """
    pairs = keys.view(np.uint64).reshape(-1, 2)
    count = len(pairs)
    first = np.empty(count, np.int32)
    num_parts = 1 + count // _SORTED
    parts = np.empty(count, np.uint16)
    for start in range(0, count, _SORTED):
        parts[start : start + _SORTED] = pairs[start : start + _SORTED, 0] % np.uint64(num_parts)
    for part in range(num_parts):
        places = np.flatnonzero(parts == part)
        own = np.asarray(pairs[places])
        order = np.lexsort((own[:, 1], own[:, 0]))  # stable: equal ones stay in order
        own, places = own[order], places[order]
        is_new = np.ones(len(places), bool)
        is_new[1:] = (own[1:] != own[:-1]).any(1)
        starts = np.flatnonzero(is_new)
        first[places] = np.repeat(places[starts], np.diff([*starts, len(places)]))
    return first


def groups(
    first: np.ndarray, kinds: np.ndarray, owners: np.ndarray, num_conversations: int
) -> np.ndarray:
    """The group of each conversation: the number of the first one in it, int64.

    Args:
        first: for each link the place of the first that equals it, as `first_equal` has it.
        kinds: the kind of each link.
        owners: the conversation of each link, in rising order.
    """
    has = np.zeros((EARLIER + 1, len(first)), bool)
    for kind in range(len(has)):
        has[kind, first[kinds == kind]] = True
    joins = has[WHOLE] | (has[LATER] & has[EARLIER])
    parent = list(range(num_conversations))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for link in np.flatnonzero(joins[first] & (owners != owners[first])).tolist():
        a, b = sorted((root(int(owners[link])), root(int(owners[first[link]]))))
        parent[b] = a
    return np.fromiter(map(root, range(num_conversations)), np.int64, num_conversations)
