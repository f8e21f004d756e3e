"""Which values count, and how much: `mask=`, `lengths=` and `weights=`, as the kernels read them.

Decisions:

- They are the same for all channels, so they have one entry per *place*: one position of x without its channel axis.
  The kernels read them in the memory order of x.
- All of them are copied: `backward` reads them again, and they are small compared to x.
- A mask without False, or lengths that are all full, are dropped, so the bits are those of the call without them.
- Lengths stay lengths if the places of a sequence follow each other in memory; otherwise they become a mask.
- Weights are scaled by a power of two, which changes no digit, so that the largest is between a half and one: sums in
  float32 then cannot overflow.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _arrays
from ._arrays import Array, Layout
from ._foreign import as_array
from ._kernels import Chosen, per_channel

_ROOM = 16
"""Padding after the last place, because the kernels load whole vectors."""

_MOST_EXPONENT = 498
"""Largest exponent of two, positive or negative, of the largest weight: sums of squares then stay within float64."""


class Tally(NamedTuple):
    """The number of values per channel that count, the sum of their weights and the sum of their squared weights."""

    values: int
    weight: float
    squares: float

    @classmethod
    def of_all(cls, values: int) -> "Tally":
        """The tally of values without weights, which count as 1 each."""
        return tuple.__new__(cls, (values, values, values))  # takes half as long as Tally(…)

    def merged(self, other: "Tally") -> "Tally":
        return Tally(self.values + other.values, self.weight + other.weight, self.squares + other.squares)

    def divisor(self, ddof: float = 1) -> float:
        """The divisor of Σw(x − μ)²: W − ddof·Σw²/W, or n − ddof without weights."""
        return self.weight - ddof * (self.squares / self.weight) if self.weight else 0

    def correction(self) -> float:
        """The unbiased variance divided by the biased one."""
        return self.weight / self.divisor()

    @property
    def has_spread(self) -> bool:
        """Whether the unbiased variance exists."""
        return self.values > 1 and self.divisor() > 0


@dataclass(frozen=True, slots=True)
class Selection:
    """Which places count, for an array of one layout."""

    tally: Tally
    period: int
    mask: NDArray[np.bool_] | None = None
    lengths: NDArray[np.intp] | None = None
    weights: Array | None = None
    exponent: int = 0

    def chosen(self, fill: float = 0.0) -> Chosen:
        """The argument of the kernels."""
        return self.mask, self.lengths, self.period, self.weights, fill

    def scaled(self, weight: float) -> float:
        """Σw, in the unit of these weights."""
        return math.ldexp(weight, -self.exponent)

    def normalized(self, layout: Layout) -> int:
        """The number of values per channel that are normalized: a weight of 0 is not a mask."""
        return layout.values if self.weights is not None else self.tally.values

    def blank(self, array: Array, layout: Layout) -> None:
        """Set values that do not count to 0, in an array that fits the layout."""
        mask = self.mask
        if self.lengths is not None:
            mask = _within(self.lengths, self.period).reshape(-1)
        if mask is not None:
            N, _, S = layout.view
            np.copyto(layout.seen(array), 0, where=~mask[: N * S].reshape(N, 1, S))


def _within(lengths: NDArray[np.integer[Any]], places: int) -> NDArray[np.bool_]:
    within: NDArray[np.bool_] = np.arange(places) < lengths[:, None]
    return within


def _others(layout: Layout) -> tuple[int, ...]:
    """The lengths of all axes but the channel axis."""
    return layout.shape[: layout.axis] + layout.shape[layout.axis + 1 :]


def as_places(value: NDArray[Any], name: str, layout: Layout) -> NDArray[Any]:
    """The argument with one entry for each place, along all axes of x but the channel axis."""
    shape, ndim, axis, others = value.shape, len(layout.shape), layout.axis, _others(layout)
    if len(shape) == ndim and shape[axis] == 1:
        shape = shape[:axis] + shape[axis + 1 :]
    if len(shape) != ndim - 1 or any(own not in (1, wanted) for own, wanted in zip(shape, others, strict=True)):
        one = (*layout.shape[:axis], 1, *layout.shape[axis + 1 :])
        raise ValueError(f"{name} must have shape {others} or {one}, or length 1 along any axis, got {value.shape}")
    places = value.reshape(shape)
    return places if shape == others else np.broadcast_to(places, others)


def as_mask(mask: ArrayLike) -> NDArray[np.bool_]:
    array = as_array(mask, "mask")
    if array.dtype != np.bool_:
        raise TypeError(f"mask must have dtype bool, True where x counts, got {array.dtype}")
    return array


def as_lengths(lengths: ArrayLike, layout: Layout) -> NDArray[np.intp]:
    array, others = as_array(lengths, "lengths"), _others(layout)
    if len(others) != 2:
        raise ValueError(
            f"lengths need x with 3 dimensions (sequences, positions and channels), got x of shape {layout.shape}"
        )
    if array.dtype.kind not in "iu":
        raise TypeError(f"lengths must be integers, got dtype {array.dtype}")
    if array.shape != (others[0],):
        raise ValueError(f"lengths must have shape ({others[0]},), one per sequence, got {array.shape}")
    if array.astype(np.uint64).max(initial=0) > others[1]:  # where a negative number is larger than any other
        raise ValueError(f"lengths must be 0 to {others[1]}, got {array.min()} to {array.max()}")
    return array.astype(np.intp)


def as_weights(weights: ArrayLike) -> NDArray[np.float64]:
    array = _arrays.as_float(weights, "weights", integers=True).astype(np.float64)
    bad = array[~((array >= 0) & (array < np.inf))]
    if bad.size:
        raise ValueError(f"weights must be finite and at least 0, got {bad[0]}")
    return array


def _in_memory_order(places: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """A copy with one entry per place, in the memory order of x, and padding after them."""
    if layout.order is not None:
        places = places.transpose([i - (i > layout.axis) for i in layout.order if i != layout.axis])
    copy = np.zeros(layout.values + _ROOM, places.dtype)
    copy[: layout.values] = places.reshape(-1)
    return copy


def by_sample(name: str, value: ArrayLike, layout: Layout) -> NDArray[Any]:
    """A mask, lengths or weights with one row per sample; samples are the first axis of x but the channel axis."""
    if name == "lengths":
        return as_lengths(value, layout)
    return as_places(as_mask(value) if name == "mask" else as_weights(value), name, layout)


def one_of_three(mask: Any, lengths: Any, weights: Any) -> dict[str, Any]:
    """What is given of the three, by name; at most one may be."""
    if mask is None and lengths is None and weights is None:
        return {}
    three = {"mask": mask, "lengths": lengths, "weights": weights}
    given = {name: value for name, value in three.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"at most one of mask, lengths and weights can be given, got {' and '.join(given)}")
    return given


def _of_mask(places: NDArray[np.bool_], layout: Layout) -> Selection | None:
    count = int(np.count_nonzero(places))
    if count == layout.values:
        return None
    return Selection(Tally.of_all(count), layout.values, mask=_in_memory_order(places, layout))


def _of_lengths(lengths: NDArray[np.intp], layout: Layout) -> Selection | None:
    _, places = _others(layout)
    count = int(lengths.sum())
    if count == layout.values:
        return None
    order = range(3) if layout.order is None else layout.order
    first, second = (i for i in order if i != layout.axis)
    if first < second and layout.view[2] in (1, places):
        return Selection(Tally.of_all(count), places, lengths=lengths)
    return _of_mask(_within(lengths, places), layout)


def _of_weights(places: NDArray[np.float64], layout: Layout, dtype: np.dtype[Any]) -> Selection:
    largest = float(places.max(initial=0))
    _, exponent = math.frexp(largest)
    if abs(exponent) > _MOST_EXPONENT:
        raise ValueError(f"the largest of the weights must be 0, or 1e-150 to 1e150, got {largest}")
    scaled = np.ldexp(_in_memory_order(places, layout), -exponent)
    weight, squares = per_channel.weigh(scaled, layout.values)
    tally = Tally(int(np.count_nonzero(places)), math.ldexp(weight, exponent), math.ldexp(squares, 2 * exponent))
    real = np.float64 if dtype.itemsize == 8 else np.float32
    return Selection(tally, layout.values, weights=scaled.astype(real), exponent=exponent)


def selection_of(
    layout: Layout,
    dtype: np.dtype[Any],
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> Selection | None:
    """The selection that a call's arguments make from x; None if all values count alike."""
    one_of_three(mask, lengths, weights)
    if mask is not None:
        return _of_mask(as_places(as_mask(mask), "mask", layout), layout)
    if lengths is not None:
        return _of_lengths(as_lengths(lengths, layout), layout)
    if weights is not None:
        return _of_weights(as_places(as_weights(weights), "weights", layout), layout, dtype)
    return None


def chosen_by(selection: Selection | None, fill: float = 0.0) -> Chosen | None:
    return None if selection is None else selection.chosen(fill)


def normalized_in(layout: Layout, selection: Selection | None) -> int:
    """The number of values per channel that are normalized."""
    return layout.values if selection is None else selection.normalized(layout)
