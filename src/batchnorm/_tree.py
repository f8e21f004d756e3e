"""The order in which parts are merged: one tree, whether one process has all parts or each rank has its own.

Decisions:

- The sum of floats depends on the order of addition, so this order depends only on the number of parts.
- It is that of recursive doubling: part 0 with 1, 2 with 3, …, then pairs of pairs, and so on. Ranks that exchange with
  one partner after another, and a process that merges the parts of all, get the same bits.
- Doubling needs a power of two. For any other number, leading parts are paired first until a power of two is left, so
  neighbours stay neighbours and parts keep their order.
"""

from functools import lru_cache


def _doublings(parts: int) -> int:
    return parts.bit_length() - 1


def leading_pairs(parts: int) -> int:
    """The number of pairs of parts, 0 with 1, 2 with 3, …, that are merged before the doubling."""
    return parts - (1 << _doublings(parts))


def _part(place: int, parts: int) -> int:
    """The part at each of the places that are left after that, a power of two of them."""
    paired = leading_pairs(parts)
    return 2 * place if place < paired else place + paired


@lru_cache(maxsize=16)
def merges(parts: int) -> tuple[tuple[int, int], ...]:
    """Pairs (lower, upper) in merging order: the upper part is merged into the lower; at the end part 0 has all."""
    order = [(2 * i, 2 * i + 1) for i in range(leading_pairs(parts))]
    left = [_part(place, parts) for place in range(1 << _doublings(parts))]
    while len(left) > 1:
        order += zip(left[0::2], left[1::2], strict=True)
        left = left[0::2]
    return tuple(order)


@lru_cache(maxsize=16)
def partners(part: int, parts: int) -> tuple[int, ...]:
    """The partners of a remaining part, one after the other, if every remaining part is to become the whole."""
    paired = leading_pairs(parts)
    place = part // 2 if part < 2 * paired else part - paired
    return tuple(_part(place ^ 1 << turn, parts) for turn in range(_doublings(parts)))
