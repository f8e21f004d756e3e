"""The right gradient of one batch in float64, the pieces of wrong ones, and how far rounding may move it.

Rounding: a plain sum of n values loses some √n eps, so μ is known only to that many eps·|x|. This moves x̂ by the same
amount everywhere, and dx by a constant and a multiple of x̂ in each channel. For data far from 0 that is most of the
rounding. The rest is a few eps of the largest term. A gradient with no larger error is not called wrong. The constants
are twice the errors measured for the published ways of writing the gradient, in float32, at offsets of up to 10⁵ σ,
with 4 to 20,000 values per channel. Sums of nearly equal values round the same way every time, so the plain mean of x
is computed too, to see how far off it is.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .. import reference
from ..reference import Array, Cache
from ..saved import Saved
from . import pathways
from .formula import Formula, Parts

ROUNDING = 4
"""How many eps of the largest term may be lost if x is not far from 0 and n is small."""


class Rounding(NamedTuple):
    """The possible rounding error in each channel, as a fraction of its largest term."""

    shift: Array
    rest: Array


class Right:
    """The right gradient, its formula, and the properties of the batch."""

    dy: Array
    dx: Array
    terms: reference.Terms
    formula: Formula
    cache: Cache
    x: Array
    mean: Array
    var: Array
    eps: float
    n: int
    axis: int
    batch: int
    channels: int
    correction: float
    largest: Array
    """The largest of the terms, in each channel."""

    def __init__(self, dy: Array, cache: Cache, x: Array, var: Array, eps: float) -> None:
        self.dy, self.cache, self.x, self.var, self.eps = dy, cache, x, var, eps
        self.n = int(cache.n)
        (self.axis,) = set(range(dy.ndim)) - set(cache.axes)
        self.batch, self.channels = dy.shape[cache.axes[0]], dy.shape[self.axis]
        self.mean = (x - cache.xmu).mean(cache.axes, keepdims=True)
        self.formula = Formula.right(Parts(dy, cache))
        self.correction = self.n / (self.n - 1)
        self.terms = reference.backward_terms(dy, cache)
        _, xhat, rstd, gamma, axes = cache
        n, dbeta, dgamma = self.n, dy.sum(axes, keepdims=True), (dy * xhat).sum(axes, keepdims=True)
        self.dx = gamma * rstd * (dy - dbeta / n - xhat * dgamma / n)
        parts = (self.terms.direct, self.terms.mean, self.terms.variance)
        largest = np.maximum.reduce([abs(part).max(cache.axes, initial=0, keepdims=True) for part in parts])
        self.largest = np.where(largest > 0, largest, largest.max(initial=0) or 1)

    @classmethod
    def of(cls, dy: ArrayLike, saved: Saved) -> "Right":
        """The right gradient, from what `forward` saved."""
        cache = pathways.textbook(saved)
        return cls(pathways.upstream(dy, saved), cache, saved.x, np.expand_dims(saved.var, cache.axes), saved.eps)

    def without_gamma(self) -> "Right":
        """The same with gamma = 1."""
        cache = self.cache._replace(gamma=np.ones_like(self.cache.gamma))
        return Right(self.dy, cache, self.x, self.var, self.eps)

    @property
    def offset(self) -> Array:
        """The distance of x from 0 in each channel, in standard deviations."""
        furthest: Array = abs(self.x).max(self.cache.axes, keepdims=True) * self.cache.rstd
        return furthest

    def rounding(self, eps: float) -> Rounding:
        """The possible error of arithmetic with this eps: as a shift of x̂, and otherwise."""
        axes, dtype = self.cache.axes, np.float32 if eps > np.finfo(np.float64).eps else np.float64
        seen = abs(self.x.astype(dtype).mean(axes, keepdims=True) - self.mean) * self.cache.rstd
        shift = np.maximum(eps * (3 + self.n**0.5) * (1 + self.offset), 2 * seen)
        variance = abs(self.terms.variance).max(self.cache.axes, keepdims=True) / self.largest
        return Rounding(shift, eps * (ROUNDING + self.n**0.5 / 2 + 2 * self.offset * variance) + shift**2)

    def cancellation(self, eps: float) -> Array:
        """The fraction of σ² + eps that E[x²] − μ² may lose in each channel."""
        lost: Array = self.rounding(eps).shift * (1 + self.offset)
        return lost

    def sums(self, dy: Array, xhat: Array) -> tuple[Array, Array]:
        """dgamma and dbeta, with these arrays instead of dy and xhat."""
        return (dy * xhat).sum(axis=self.cache.axes), dy.sum(axis=self.cache.axes)
