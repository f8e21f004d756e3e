"""A gradient as a formula with replaceable pieces: a slip replaces some of them, two slips replace more.

    dx = f·γ·r·dy  −  f·Σ(dy·γ·r)/n  −  f·(x − μ)·Σ(dy·γ·r³·(x − μ))/n

The three terms are the pathways: direct, through the mean, through the variance. Each has its own factor f, powers of
γ and r, and r = rstd. Each sum may run over other axes, and each x − μ may be shifted.

A constant of a channel may be before a sum or inside it, unless the sum runs over the channels too. Then it matters how
the formula was written: `Sum` says what is inside.

A formula can be evaluated at a few positions of x alone. So thousands are compared before one is evaluated completely.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..reference import Array, Cache

Places = NDArray[np.intp]
"""Positions of some values of x, counted in C order."""

Taken = Callable[[Array], Array]
"""A function that takes the values at some positions from an array, which may have one value per channel."""


class Parts:
    """The arrays behind the pieces, and sums of dy and dy·(x − μ), each computed once."""

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
        """The function that takes values at some positions from arrays that broadcast to the shape of dy."""
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
        """Σ dy·inner or Σ dy·inner·(x − μ) over some axes, at some positions; axes of constant inner come first."""
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
    """A sum over some axes, times a number. γ and a power of rstd may be inside; everything else is before it."""

    axes: tuple[int, ...]
    times: float = 1
    gamma_inside: int = 1
    rstd_inside: int = 0


UNSHIFTED = (0, 0)


class Formula(NamedTuple):
    """The pieces of the three pathways, of the two sums, and of x − μ in its sum and after it."""

    parts: Parts
    factors: tuple[Any, Any, Any]
    gamma: tuple[int, int, int]
    rstd: tuple[Array, Array, Array]
    powers: tuple[int, int, int]
    sums: tuple[Sum, Sum]
    shifts: tuple[Any, Any]

    @classmethod
    def right(cls, parts: Parts) -> "Formula":
        """The right formula."""
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
        """The three pathways, which broadcast to the shape of dy, or to its values at some positions in C order."""
        at, (mean, variance), (inside, after) = self.parts.at(places), self.sums, self.shifts
        through_mean = -at(self.scale(1, mean)) * self._summed(1, mean, UNSHIFTED[0], at)
        through_variance = -at(self.scale(2, variance)) * self._summed(2, variance, inside, at)
        xmu = at(self.parts.cache.xmu) if after is UNSHIFTED[1] else at(self.parts.cache.xmu) + at(after)
        return at(self.scale(0)) * at(self.parts.dy), through_mean, through_variance * xmu

    def scale(self, pathway: int, of: Sum | None = None) -> Array:
        """The factors before the sum."""
        gamma, rstd = (of.gamma_inside, of.rstd_inside) if of else (0, 0)
        power = self.parts.cache.gamma ** (self.gamma[pathway] * (1 - gamma))
        scale: Array = self.factors[pathway] * power * self.rstd[pathway] ** (self.powers[pathway] - rstd)
        return scale

    def _summed(self, pathway: int, of: Sum, shift: Any, at: Taken) -> Array:
        """The sum, divided by n."""
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
    def xhat(self) -> Array:
        """The x̂ of the variance pathway."""
        xhat: Array = (self.parts.cache.xmu + self.shifts[1]) * self.rstd[2]
        return xhat

    @property
    def replaced(self) -> frozenset[str]:
        """The pieces that are wrong. Powers of rstd do not count: two slips may both be in them."""
        right = Formula.right(self.parts)
        same = {
            "gamma": self.gamma == right.gamma,
            "rstd": all(rstd is self.parts.cache.rstd for rstd in self.rstd) and np.ndim(self.factors[2]) == 0,
            "sums": self.sums == right.sums,
            "shifts": self.shifts is UNSHIFTED,
        }
        return frozenset(name for name, unchanged in same.items() if not unchanged)


def number_of(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    """The number of values in a sum over these axes."""
    return math.prod(shape[axis] for axis in axes)
