"""In which order parts are merged: one tree, whether one process has all parts or every rank has its own.

Decisions:

- Addition of floats depends on its order. So the order depends on the number of parts alone.
- It is that of recursive doubling: part 0 with 1, 2 with 3, …, then pairs of pairs, and so on. Ranks that exchange with
  one partner after another, and a process that merges the parts of all, get the same bits.
- Doubling needs a power of two. Of another number the leading parts are paired first until one is left, so neighbours
  stay neighbours, and the order of parts is kept.
"""

from functools import lru_cache


def _doublings(parts: int) -> int:
    return parts.bit_length() - 1


def leading_pairs(parts: int) -> int:
    """How many pairs of parts, 0 with 1, 2 with 3, …, are merged before the doubling."""
    return parts - (1 << _doublings(parts))


def _part(place: int, parts: int) -> int:
    """What is left then: the first part at each place, of which there is a power of two."""
    paired = leading_pairs(parts)
    return 2 * place if place < paired else place + paired


@lru_cache(maxsize=16)
def merges(parts: int) -> tuple[tuple[int, int], ...]:
    """(lower, upper), in which order an upper part is merged into a lower one; at last part 0 is the whole."""
    order = [(2 * i, 2 * i + 1) for i in range(leading_pairs(parts))]
    left = [_part(place, parts) for place in range(1 << _doublings(parts))]
    while len(left) > 1:
        order += zip(left[0::2], left[1::2], strict=True)
        left = left[0::2]
    return tuple(order)


@lru_cache(maxsize=16)
def partners(part: int, parts: int) -> tuple[int, ...]:
    """With which one a part that is left is merged, one after the other, if all of them are to be the whole."""
    paired = leading_pairs(parts)
    place = part // 2 if part < 2 * paired else part - paired
    return tuple(_part(place ^ 1 << turn, parts) for turn in range(_doublings(parts)))
