"""Find the formula that gives a dx: a slip of the catalogue, two at once, or one with an estimated number.

Decisions:

- If rounding explains the error of a dx, it is right, even if something else explains the error better.
- The answer is in the first step of `candidates` in which rounding explains the remaining difference. Only if there is
  none, a formula that comes near is named, as unsure.
- Within a step the closest formula is named; ties go to the first. A formula that rounding cannot distinguish from it
  is a rival, and makes the answer unsure. So does a third slip.
- There are many formulas. Each is evaluated at a few hundred positions. The factors of the pathways, which are most of
  the slips, are tried all at once, through the products of the three pathways with each other and with dx.
- A difference is a fraction of the largest term of its channel, so that small channels count, and every channel must
  be explained.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..reference import Array
from .candidates import Base, Candidates, Step
from .deviations import Named
from .fitted import RUNNING
from .formula import Formula
from .right import Right, Rounding

CORRECT = "correct"
UNKNOWN = "unknown"
NOT_FINITE = "not finite"
ZERO = "zero everywhere"

NEARLY = 1e-3
"""The fraction of the difference that a slip may leave unexplained."""

PLACES = 512
"""The number of values of dx that decide whether to evaluate a formula on all of them."""


Statistics = tuple[Named, Array]
"""The name and remedy of running statistics, and x̂ made with them."""


class Explanation(NamedTuple):
    """A name, the remedy, what it leaves as a fraction of the largest term, the reasons for doubt, other statistics."""

    name: str
    remedy: str
    left: float
    doubts: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()
    statistics: Statistics | None = None


Believed = tuple[float, Named, float, Base]
"""The distance in units of the possible rounding, the slips, what they leave, and the formula without factors."""


class Search:
    """dx, compared to formulas."""

    dx: Array
    right: Right
    eps: float
    rounding: Rounding
    norm: Array
    off: Array
    places: NDArray[np.intp]
    largest: Array
    there: Array
    noise: float

    def __init__(self, dx: Array, right: Right, eps: float) -> None:
        self.dx, self.right, self.eps = dx, right, eps
        self.rounding = right.rounding(eps)
        self.norm = (right.cache.xhat**2).sum(right.cache.axes, keepdims=True)
        self.off = self.left(dx, right.dx, math.inf)
        some = np.random.default_rng(0).choice(dx.size, PLACES) if dx.size > PLACES else np.arange(dx.size)
        self.places = np.sort(some)
        self.largest = self._at(right.largest)
        self.there = self._at(dx) / self.largest
        self.noise = float(np.sqrt(np.mean(self._at(self.rounding.rest + 2 * self.rounding.shift) ** 2)))

    def _at(self, values: Array) -> Array:
        return np.broadcast_to(values, self.dx.shape)[np.unravel_index(self.places, self.dx.shape)]

    def left(self, dx: Array, form: Array, limit: Array | float, times: Array | float = 1) -> Array:
        """Root mean square of the difference per channel, over the largest term, minus what a shift of x̂ explains."""
        xhat, axes = self.right.cache.xhat, self.right.cache.axes
        rest, bound = (dx - form) / self.right.largest, times * self.rounding.shift
        size = self._size(rest)
        if (size > limit + 2 * bound).any():
            return size  # no shift could explain it
        constant = np.clip(rest.mean(axes, keepdims=True), -bound, bound)
        slope = (rest * xhat).sum(axes, keepdims=True) / np.where(self.norm > 0, self.norm, 1)
        return self._size(rest - constant - xhat * np.clip(slope, -bound, bound))

    def _size(self, values: Array) -> Array:
        size = np.sqrt(np.mean(values**2, axis=self.right.cache.axes, keepdims=True))
        return np.where(np.isfinite(size), size, np.inf)

    def correct(self) -> bool:
        """Whether rounding explains dx."""
        return bool((self.off <= self.rounding.rest).all())

    def explains_anything(self) -> bool:
        """Whether rounding would explain dx = 0 too."""
        nothing = self.left(np.zeros_like(self.right.dx), self.right.dx, self.rounding.rest)
        return bool((nothing <= self.rounding.rest).all())

    def unseen(self, form: Formula) -> bool:
        """Whether a slip changes dx by no more than the rounding of two results can."""
        direct, mean, variance = form.terms(self.places)
        change = direct + mean + variance - self._at(self.right.dx)
        if not np.sqrt(np.mean((change / self.largest) ** 2)) <= 6 * self.noise:
            return False
        limit = 2 * self.rounding.rest
        return bool((self.left(self.right.dx, form.dx(self.dx.shape), limit, 2) <= limit).all())

    def explain(self) -> Explanation | None:
        """What is wrong with dx; None if no formula is near."""
        candidates = Candidates(self.dx, self.right, self.rounding.rest, self.eps)
        for step in candidates.steps():
            found = self.nearest(step())
            if found:
                return self._beside_the_catalogue(found, candidates) if RUNNING in found.name else found
        few = candidates.singles, candidates.other_eps, candidates.pairs_with_factors
        return next(filter(None, (self.nearest(step(), NEARLY) for step in few)), None)

    def _beside_the_catalogue(self, found: Explanation, candidates: Candidates) -> Explanation:
        """Doubt a fit if a slip of the catalogue is nearly as close, because fitted statistics absorb rounding too."""
        near = self.nearest(candidates.singles(), NEARLY)
        if near is None or near.name == found.name:
            return found
        doubt = f"{near.name} is nearly as close"
        return found._replace(doubts=(*found.doubts, doubt), rivals=(*found.rivals, near.name))

    def nearest(self, found: Step, nearly: float = 0) -> Explanation | None:
        """The closest of these formulas, if it is close enough."""
        believed: list[Believed] = []
        for base, table in found:
            for row in self._worth_a_look(base.formula, table.factors, nearly):
                form = base.formula.times(*table.factors[row]).dx(self.dx.shape)
                size = self._size(form / self.right.largest)
                larger = np.maximum(1, size)
                noise = larger * self.rounding.rest
                limit = np.maximum(noise, nearly * np.minimum(self.off, size))
                left = self.left(self.dx, form, limit, larger)
                if (left <= limit).all():
                    slips = *base.slips, *table.slips[row]
                    believed.append((float((left / noise).max()), slips, float(left.max()), base))
        return _chosen(believed) if believed else None

    def _worth_a_look(self, formula: Formula, factors: Array, nearly: float) -> Iterable[int]:
        """The rows of factors that bring a formula close to dx at the positions that are tried."""
        terms, dx = np.empty((3, self.places.size)), self.there
        for term, values in zip(terms, formula.terms(self.places), strict=True):
            term[:] = values
        terms /= self.largest
        size = ((factors @ (terms @ terms.T)) * factors).sum(axis=1)
        rest = dx @ dx - 2 * factors @ (terms @ dx) + size
        limit = 3 * np.maximum(self.noise * np.sqrt(dx.size + size), nearly * np.sqrt(size))
        return np.flatnonzero(rest <= limit**2 + 1e-13 * (dx @ dx + size)).tolist()


def _chosen(believed: list[Believed]) -> Explanation:
    """The first of the closest, and the reasons for doubt; distances are in units of the possible rounding."""
    best = min(distance for distance, *_ in believed)
    distance, slips, left, base = next(tie for tie in believed if tie[0] <= 2 * best + 1 / 16)
    names = {" + ".join(_names(other)): set(_names(other)) for far, other, *_ in believed if far <= max(1, best)}
    rivals = tuple(name for name, parts in names.items() if parts != set(_names(slips)))
    doubts = {
        f"these data do not tell it from {_some(rivals)}": bool(rivals),
        "it leaves more than rounding explains": distance > 1,
        "three slips are needed": len(slips) > 2,
        base.doubt: bool(base.doubt),
    }
    remedy = "; ".join(remedy for _, remedy in slips)
    why = tuple(doubt for doubt, holds in doubts.items() if holds)
    return Explanation(" + ".join(_names(slips)), remedy, left, why, rivals, _statistics(base))


def _statistics(base: Base) -> Statistics | None:
    """The running statistics of the formula, if it has any."""
    running = tuple(slip for slip in base.slips if slip[0] == RUNNING)
    return (running, base.formula.xhat) if running else None


def _names(slips: Named) -> list[str]:
    return [name for name, _ in slips]


def _some(names: tuple[str, ...]) -> str:
    return " or ".join(names[:3]) + (f" or {len(names) - 3} more" if len(names) > 3 else "")
