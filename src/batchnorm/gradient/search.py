"""Which formula a given dx is: the right one, a slip of the catalogue, or one of them times a constant.

Decisions:

- What rounding explains is right, whatever would explain it better.
- Simple explanations come first: one slip; gamma forgotten as well; one factor for all of dx, if it is a number that
  people forget or add; another eps; a variance that was lost to cancellation; any factor. Within a step the nearest
  formula is named, and the first of those that are alike.
- A difference is a fraction of the largest term of its channel, so that small channels count, and every channel has to
  be explained.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np

from ..reference import Array
from .right import Right
from .slips import GAMMA_FORGOTTEN, SLIPS

CORRECT = "correct"
UNKNOWN = "unknown"
NOT_FINITE = "not finite"
ZERO = "zero everywhere"

NEARLY = 1e-3
"""What a slip may leave of the difference that it explains."""

ANOTHER_EPS = "another eps"
FACTOR = "constant factor"

EPS_IN_USE = tuple(10.0**-power for power in range(1, 17))
"""Values that people choose for eps."""


class Explanation(NamedTuple):
    """A name, the remedy, and what it leaves of the difference, as a fraction of the largest term."""

    name: str
    remedy: str
    left: float


class Candidate(NamedTuple):
    """A formula that dx may be."""

    name: str
    remedy: str
    dx: Array


class Search:
    """dx, held against formulas."""

    def __init__(self, dx: Array, right: Right, eps: float) -> None:
        self.dx, self.right, self.eps = dx, right, eps
        self.rounding = right.rounding(eps)
        self.off = self.left(dx, right.dx)

    def left(self, dx: Array, form: Array, times: Array | float = 1) -> Array:
        """Root mean square of a difference over the largest term, per channel, without what a shift of x̂ explains."""
        xhat, axes = self.right.cache.xhat, self.right.cache.axes
        bound, rest = times * self.rounding.shift, (dx - form) / self.right.largest
        for direction in (np.ones_like(xhat), xhat):
            norm = (direction * direction).sum(axes, keepdims=True)
            part = (rest * direction).sum(axes, keepdims=True) / np.where(norm > 0, norm, 1)
            rest = rest - direction * np.clip(part, -bound, bound)
        return self._size(rest)

    def _size(self, values: Array) -> Array:
        size = np.sqrt(np.mean(values**2, axis=self.right.cache.axes, keepdims=True))
        return np.where(np.isfinite(size), size, np.inf)

    def correct(self) -> bool:
        """Whether rounding explains dx."""
        return bool((self.off <= self.rounding.rest).all())

    def unseen(self, form: Array) -> bool:
        """Whether a slip changes no more than the rounding of two results may."""
        return bool((self.left(self.right.dx, form, 2) <= 2 * self.rounding.rest).all())

    def explain(self) -> Explanation | None:
        """What is wrong with dx; None if no formula is near."""
        found = self.nearest(candidates(self.right)) or self.nearest(self.without_gamma()) or self.by_known_factor()
        if self.right.var.size == 1:  # where one eps explains any rstd
            return found or self.lost_variance() or self.another_eps() or self.by_any_factor()
        return found or self.another_eps() or self.lost_variance() or self.by_any_factor()

    def without_gamma(self) -> Iterator[Candidate]:
        """gamma forgotten, and a slip beside."""
        right = self.right.without_gamma()
        for name, remedy, form in candidates(right):
            if "gamma" not in name:
                yield Candidate(f"{GAMMA_FORGOTTEN} + {name}", f"dxhat = dy·gamma; {remedy}", form)

    def unscaled(self) -> Iterator[Candidate]:
        """All that a factor may stand before: not what is a multiple of the right dx already."""
        yield Candidate("", "", self.right.dx)
        for candidate in chain(candidates(self.right), self.without_gamma()):
            multiple = self._factor(candidate.dx, self.right.dx)
            if (self._size((candidate.dx * multiple - self.right.dx) / self.right.largest) > self.rounding.rest).any():
                yield candidate

    def nearest(self, found: Iterable[Candidate], factor: float = 1.0) -> Explanation | None:
        """The nearest of these formulas, times a factor, if it is near enough."""
        dx = self.dx / factor
        off = self.left(dx, self.right.dx)
        believed = []
        for name, remedy, form in found:
            size = self._size(form / self.right.largest)
            larger = np.maximum(1, size)
            left, noise = self.left(dx, form, larger), larger * self.rounding.rest
            if (left <= np.maximum(noise, NEARLY * np.minimum(off, size))).all():
                believed.append((float((left / noise).max()), Explanation(name, remedy, float(left.max()))))
        if not believed:
            return None
        best = min(distance for distance, _ in believed)
        return next(explanation for distance, explanation in believed if distance <= 2 * best + 1 / 16)

    def by_known_factor(self) -> Explanation | None:
        """A formula times a number that is often forgotten or added."""
        known = _factors(self.right)
        for candidate in self.unscaled():
            factor = self._factor(candidate.dx, self.dx)
            for name, value in known.items():
                found = self.nearest([candidate], value) if abs(factor / value - 1) < NEARLY else None
                if found:
                    return _with_factor(found, f"{FACTOR} {name}", f"divide dx by {name}")
        return None

    def by_any_factor(self) -> Explanation | None:
        """A formula times the number that fits best."""
        for candidate in self.unscaled():
            factor = self._factor(candidate.dx, self.dx)
            found = self.nearest([candidate], factor) if np.isfinite(1 / factor) else None
            if found:
                return _with_factor(found, FACTOR, f"dx is {factor:.6g} times what it should be")
        return None

    def _factor(self, form: Array, dx: Array) -> float:
        """How many times the form dx is, by least squares."""
        form, dx = form / self.right.largest, dx / self.right.largest
        return float((form * dx).sum() / (form * form).sum())

    def another_eps(self) -> Explanation | None:
        """rstd = 1/√(σ² + another eps), with gamma or without."""
        for right, beside in ((self.right, ""), (self.right.without_gamma(), f"{GAMMA_FORGOTTEN} + ")):
            eps = eps_of(self._rstd(right) / right.cache.rstd, right, self.rounding.rest)
            if eps is not None:
                forms = right.with_rstd(1 / np.sqrt(right.var + eps))
                found = self.nearest(_named(beside + ANOTHER_EPS, of_another_eps(eps, right), forms))
                if found:
                    return found
        return None

    def lost_variance(self) -> Explanation | None:
        """An rstd of its own in each channel, as far as E[x²] − μ² may lose it."""
        rstd = self._rstd(self.right)
        if not (abs((self.right.cache.rstd / rstd) ** 2 - 1) <= self.right.cancellation(self.eps)).all():
            return None
        offset = float(self.right.offset.max())
        remedy = f"E[x²] − μ² loses σ² where x lies up to {offset:.3g} σ from 0: take the mean of (x − μ)²"
        return self.nearest(_named("variance lost to cancellation", remedy, self.right.with_rstd(rstd)))

    def _rstd(self, right: Right) -> Array:
        """rstd as it is in the direct pathway: what dx has of that part of dy which no pathway takes off."""
        dy, (_, xhat, rstd, gamma, axes) = right.dy, right.cache
        norm = (xhat * xhat).sum(axes, keepdims=True)
        rest = dy - dy.mean(axes, keepdims=True)
        rest = rest - xhat * (rest * xhat).sum(axes, keepdims=True) / np.where(norm > 0, norm, 1)
        fitted = (self.dx * rest).sum(axes, keepdims=True) / ((rest * rest).sum(axes, keepdims=True) * gamma)
        return np.where(np.isfinite(fitted) & (fitted > 0), fitted, rstd)


def of_another_eps(eps: float, right: Right) -> str:
    """The remedy."""
    return f"rstd = 1/√(σ² + eps) is made with eps = {eps:.3g}, but `forward` was given {right.eps:.3g}"


def eps_of(ratio: Array, right: Right, noise: Array) -> float | None:
    """The eps that makes rstd so many times what it is in each channel; None if there is none."""
    exact = right.var + right.eps
    weight = 1 / (exact * noise) ** 2
    eps = float(((exact / ratio**2 - right.var) * weight).sum() / weight.sum())
    usual = [value for value in EPS_IN_USE if abs(eps - value) <= 0.03 * value + 1 / float(np.sqrt(weight.sum()))]
    eps = min(usual, key=lambda value: abs(eps - value), default=eps)
    return eps if eps >= 0 else None


def _named(name: str, remedy: str, forms: Iterable[Array]) -> Iterator[Candidate]:
    return (Candidate(name, remedy, form) for form in forms)


def candidates(right: Right) -> Iterator[Candidate]:
    """All forms of all slips of the catalogue."""
    for slip in SLIPS:
        yield from _named(slip.name, slip.remedy, slip.forms(right))


def _with_factor(found: Explanation, name: str, remedy: str) -> Explanation:
    if not found.name:
        return found._replace(name=name, remedy=remedy)
    return found._replace(name=f"{found.name} + {name}", remedy=f"{found.remedy}; {remedy}")


def _factors(right: Right) -> dict[str, float]:
    """Numbers by which people multiply too much or too little, with their names."""
    batch, channels = right.dy.shape[right.cache.axes[0]], right.cache.gamma.size
    counts = {"n": right.n, "the batch size": batch, "the number of channels": channels, "the size of x": right.dy.size}
    factors = {"2": 2.0, "1/2": 0.5, "-1": -1.0, "-2": -2.0, "-1/2": -0.5}
    for name, count in counts.items():
        factors |= {name: count, f"1/{name}": 1 / count, f"-{name}": -count, f"-1/{name}": -1 / count}
    return {name: factor for name, factor in factors.items() if factor != 1}
