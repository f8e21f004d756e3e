"""Which formula gives a dx: the right one, a slip of the catalogue, or one of them times a constant.

Decisions:

- A dx whose error rounding explains is right, even if something else explains the error better.
- Simple explanations come first: one slip; gamma forgotten as well; one factor for all of dx, if it is a number that
  people forget or add; another eps; a variance that was lost to cancellation; any factor. Within a step the closest
  formula is named; ties go to the first.
- A difference is a fraction of the largest term of its channel, so that small channels count, and every channel has to
  be explained.
"""

import math
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

FAR = 10
"""From this many σ from 0 on, E[x²] − μ² has more likely lost digits than that eps is another one."""

ALIKE = 1 - 1e-12
"""cos² of two arrays that are multiples of each other."""

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
    """dx, compared with formulas."""

    def __init__(self, dx: Array, right: Right, eps: float) -> None:
        self.dx, self.right, self.eps = dx, right, eps
        self.rounding = right.rounding(eps)
        self.norm = (right.cache.xhat**2).sum(right.cache.axes, keepdims=True)
        self.off = self.left(dx, right.dx, math.inf)

    def left(self, dx: Array, form: Array, limit: Array | float, times: Array | float = 1) -> Array:
        """Root mean square of a difference over the largest term, per channel, without what a shift of x̂ explains."""
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

    def unseen(self, form: Array) -> bool:
        """Whether a slip changes no more than the rounding of two results may."""
        limit = 2 * self.rounding.rest
        return bool((self.left(self.right.dx, form, limit, 2) <= limit).all())

    def explain(self) -> Explanation | None:
        """What is wrong with dx; None if no formula is near."""
        one = self.right.var.size == 1 and self.right.offset.item() > FAR  # one eps explains any rstd
        found = (self.lost_variance() if one else None) or self.nearest(candidates(self.right))
        found = found or self.nearest(self.without_gamma())
        if found:
            return found
        known, scaled = self.times_a_factor()
        return known or self.another_eps() or self.lost_variance() or scaled

    def without_gamma(self) -> Iterator[Candidate]:
        """gamma forgotten, and a slip besides."""
        right = self.right.without_gamma()
        for name, remedy, form in candidates(right):
            if "gamma" not in name:
                yield Candidate(f"{GAMMA_FORGOTTEN} + {name}", f"dxhat = dy·gamma; {remedy}", form)

    def nearest(self, found: Iterable[Candidate], factor: float = 1.0) -> Explanation | None:
        """The nearest of these formulas, times a factor, if it is near enough."""
        dx = self.dx / factor
        off = self.left(dx, self.right.dx, math.inf)
        believed = []
        for name, remedy, form in found:
            size = self._size(form / self.right.largest)
            larger = np.maximum(1, size)
            noise = larger * self.rounding.rest
            limit = np.maximum(noise, NEARLY * np.minimum(off, size))
            left = self.left(dx, form, limit, larger)
            if (left <= limit).all():
                believed.append((float((left / noise).max()), Explanation(name, remedy, float(left.max()))))
        if not believed:
            return None
        best = min(distance for distance, _ in believed)
        return next(explanation for distance, explanation in believed if distance <= 2 * best + 1 / 16)

    def times_a_factor(self) -> tuple[Explanation | None, Explanation | None]:
        """A formula times a number that is often forgotten or added; the right dx times the number that fits best."""
        known, best = _factors(self.right), None
        for candidate in chain([Candidate("", "", self.right.dx)], candidates(self.right), self.without_gamma()):
            factor, alike = self._factor(candidate.dx, self.dx)
            if not alike or (candidate.name and self._factor(candidate.dx, self.right.dx)[1] > ALIKE):
                continue  # no multiple of it, or of what is a multiple of the right dx itself
            for name, value in known.items():
                found = self.nearest([candidate], value) if abs(factor / value - 1) < NEARLY else None
                if found:
                    return _with_factor(found, f"{FACTOR} {name}", f"divide dx by {name}"), None
            found = self.nearest([candidate], factor) if candidate.name in ("", GAMMA_FORGOTTEN) else None
            if found and not best:
                best = _with_factor(found, FACTOR, f"dx is {factor:.6g} times what it should be")
        return None, best

    def _factor(self, form: Array, dx: Array) -> tuple[float, float]:
        """The factor that makes dx of the form, by least squares, and cos² between them, 0 where it is small."""
        form, dx = (form / self.right.largest).ravel(), (dx / self.right.largest).ravel()
        product, square = float(form @ dx), float(form @ form)
        alike = product**2 / (square * float(dx @ dx) or math.inf)
        return product / (square or math.inf), alike if alike > 0.9 else 0.0

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
        """rstd as it is in the direct pathway: the factor of that part of dy which the other pathways do not touch."""
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
    """The eps that changes rstd by these ratios, one per channel; None if there is none."""
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
