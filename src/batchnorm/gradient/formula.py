"""A gradient as a formula whose pieces can be replaced: a slip replaces some of them, two slips more of them.

    dx = f·γ·r·dy  −  f·Σ(dy·γ·r)/n  −  f·(x − μ)·Σ(dy·γ·r³·(x − μ))/n

The three summands are the pathways: directly, through the mean, through the variance. Each has its factor f, its powers
of γ and of r, and its r = rstd. Each sum may run over other axes, each x − μ may be shifted.

What is constant in a channel may stand before a sum or inside it, unless the sum runs over the channels too. Then it
matters how the formula was written: `Sum` says what stands inside.

A formula can be worked out at a few places of x alone. So thousands are compared before one is worked out whole.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..reference import Array, Cache

Places = NDArray[np.intp]
"""Some values of x, as they are counted in C order."""

Taken = Callable[[Array], Array]
"""Takes from an array, which may have one value per channel, those at some places."""


class Parts:
    """What the pieces are made of, and sums of dy and dy·(x − μ), each worked out once."""

    dy: Array
    cache: Cache
    n: int

    def __init__(self, dy: Array, cache: Cache) -> None:
        self.dy, self.cache, self.n = dy, cache, int(cache.n)
        self._sums: dict[tuple[Any, ...], Array] = {}
        self._places: Places | None = None
        self._indices: dict[tuple[int, ...], tuple[Any, ...]] = {}
        self._there: dict[int, Array] = {}

    def at(self, places: Places | None) -> Taken:
        """What takes the values at some places from arrays that broadcast to the shape of dy."""
        if places is None:
            return lambda values: values
        if self._places is not places:
            self._places, self._indices, self._there = places, {}, {}
            for array in (self.dy, self.cache.xmu):
                self._there[id(array)] = self._taken(array)
        return lambda values: self._there[id(values)] if id(values) in self._there else self._taken(values)

    def _taken(self, values: Array) -> Array:
        assert self._places is not None
        if values.shape not in self._indices:
            index = np.unravel_index(self._places, self.dy.shape)
            sizes = zip(index, values.shape, strict=True)
            self._indices[values.shape] = tuple(i if size > 1 else 0 for i, size in sizes)
        taken: Array = values[self._indices[values.shape]]
        return taken

    def over(self, axes: tuple[int, ...], inner: Array, centred: bool, at: Taken) -> Array:
        """Σ dy·inner over some axes, or Σ dy·inner·(x − μ), at some places; first along what inner does not change."""
        varies = tuple(axis for axis in axes if inner.shape[axis] > 1)
        total = self._over(tuple(axis for axis in axes if axis not in varies), centred)
        if not varies:
            return at(inner) * at(total)
        key = axes, centred, inner.tobytes()
        if key not in self._sums:
            self._sums[key] = (total * inner).sum(axis=varies, keepdims=True)
        return at(self._sums[key])

    def _over(self, axes: tuple[int, ...], centred: bool) -> Array:
        key = axes, centred, None
        if key not in self._sums:
            values = self.dy * self.cache.xmu if centred else self.dy
            self._sums[key] = values.sum(axis=axes, keepdims=True)
        return self._sums[key]


class Sum(NamedTuple):
    """A sum over some axes, times a number. γ stands inside or not, as does a power of rstd; the rest stands before."""

    axes: tuple[int, ...]
    times: float = 1
    gamma_inside: int = 1
    rstd_inside: int = 0


UNSHIFTED = (0, 0)


class Formula(NamedTuple):
    """The pieces: of three pathways, of the two sums, of x − μ in its sum and after it."""

    parts: Parts
    factors: tuple[Any, Any, Any]
    gamma: tuple[int, int, int]
    rstd: tuple[Array, Array, Array]
    powers: tuple[int, int, int]
    sums: tuple[Sum, Sum]
    shifts: tuple[Any, Any]

    @classmethod
    def right(cls, parts: Parts) -> "Formula":
        """The right one."""
        cache = parts.cache
        return cls(parts, (1, 1, 1), (1, 1, 1), (cache.rstd,) * 3, (1, 1, 3), (Sum(cache.axes),) * 2, UNSHIFTED)

    def times(self, direct: Any, mean: Any, variance: Any) -> "Formula":
        """Each pathway times a factor."""
        d, m, v = self.factors
        return self._replace(factors=(d * direct, m * mean, v * variance))

    def more_gamma(self, direct: int, mean: int, variance: int) -> "Formula":
        """Each pathway times a power of γ."""
        d, m, v = self.gamma
        return self._replace(gamma=(d + direct, m + mean, v + variance))

    def more_rstd(self, direct: int, mean: int, variance: int) -> "Formula":
        """Each pathway times a power of rstd."""
        d, m, v = self.powers
        return self._replace(powers=(d + direct, m + mean, v + variance))

    def terms(self, places: Places | None = None) -> tuple[Array, Array, Array]:
        """The three pathways, which broadcast to the shape of dy, or to some places of its values in C order."""
        at, (mean, variance), (inside, after) = self.parts.at(places), self.sums, self.shifts
        through_mean = -at(self.scale(1, mean)) * self._summed(1, mean, UNSHIFTED[0], at)
        through_variance = -at(self.scale(2, variance)) * self._summed(2, variance, inside, at)
        xmu = at(self.parts.cache.xmu) if after is UNSHIFTED[1] else at(self.parts.cache.xmu) + at(after)
        return at(self.scale(0)) * at(self.parts.dy), through_mean, through_variance * xmu

    def scale(self, pathway: int, of: Sum | None = None) -> Array:
        """What stands before the sum."""
        gamma, rstd = (of.gamma_inside, of.rstd_inside) if of else (0, 0)
        power = self.parts.cache.gamma ** (self.gamma[pathway] * (1 - gamma))
        scale: Array = self.factors[pathway] * power * self.rstd[pathway] ** (self.powers[pathway] - rstd)
        return scale

    def _summed(self, pathway: int, of: Sum, shift: Any, at: Taken) -> Array:
        """The sum over n."""
        gamma = self.parts.cache.gamma ** (self.gamma[pathway] * of.gamma_inside)
        inner = gamma * self.rstd[pathway] ** of.rstd_inside * (of.times / self.parts.n)
        total = self.parts.over(of.axes, inner, pathway == 2, at)
        return total if shift is UNSHIFTED[0] else total + self.parts.over(of.axes, inner * shift, False, at)

    def dx(self, shape: tuple[int, ...]) -> Array:
        """The sum of the pathways, as an array of this shape."""
        direct, mean, variance = self.terms()
        total: Array = (direct + mean + variance).reshape(shape)
        return total

    @property
    def replaced(self) -> frozenset[str]:
        """The pieces that are not the right ones. Powers of rstd do not count: two slips may both be in them."""
        right = Formula.right(self.parts)
        same = {
            "gamma": self.gamma == right.gamma,
            "rstd": all(rstd is self.parts.cache.rstd for rstd in self.rstd) and np.ndim(self.factors[2]) == 0,
            "sums": self.sums == right.sums,
            "shifts": self.shifts is UNSHIFTED,
        }
        return frozenset(name for name, unchanged in same.items() if not unchanged)


def number_of(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    """How many values a sum over these axes adds up."""
    return math.prod(shape[axis] for axis in axes)
