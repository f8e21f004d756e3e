"""The right gradient of one batch in float64, what wrong ones are made of, and how far rounding may take it.

Rounding: a plain sum of n values loses some √n eps, so μ is known only to that many eps·|x|. This moves x̂ by the same
amount everywhere, and dx by a constant and a multiple of x̂ in each channel. For data far from 0 that is most of the
rounding. The rest is a few eps of the largest term. A gradient that is off by no more is not called wrong. The
constants are twice what was measured on the published ways of writing the gradient, in float32, at offsets of up to
10⁵ σ, with 4 to 20,000 values per channel. Sums of values that are nearly equal round the same way every time, so the
plain mean of x is worked out too, to see how far off it is.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .. import reference
from ..functional import Saved
from ..reference import Array, Cache
from . import pathways

ROUNDING = 4
"""How many eps of the largest term may be lost where x is not far from 0 and n is small."""


class Rounding(NamedTuple):
    """What may be lost in each channel, as a fraction of its largest term."""

    shift: Array
    rest: Array


class Right:
    """The right gradient, and the parts of it that a slip puts together wrongly."""

    def __init__(self, dy: Array, cache: Cache, x: Array, var: Array, eps: float) -> None:
        self.dy, self.cache, self.x, self.var, self.eps = dy, cache, x, var, eps
        self.n = int(cache.n)
        self.correction = self.n / (self.n - 1)
        self.terms = reference.backward_terms(dy, cache)
        self.dx = self.paths(1, 1, 1)
        parts = (self.terms.direct, self.terms.mean, self.terms.variance)
        largest = np.maximum.reduce([abs(part).max(cache.axes, initial=0, keepdims=True) for part in parts])
        self.largest = np.where(largest > 0, largest, largest.max(initial=0) or 1)

    @classmethod
    def of(cls, dy: ArrayLike, saved: Saved) -> "Right":
        """The right gradient of what `forward` saved."""
        cache = pathways.textbook(saved)
        return cls(pathways.upstream(dy, saved), cache, saved.x, np.expand_dims(saved.var, cache.axes), saved.eps)

    def without_gamma(self) -> "Right":
        """The same with gamma = 1."""
        cache = self.cache._replace(gamma=np.ones_like(self.cache.gamma))
        return Right(self.dy, cache, self.x, self.var, self.eps)

    @property
    def offset(self) -> Array:
        """How far x is from 0 in each channel, in standard deviations."""
        furthest: Array = abs(self.x).max(self.cache.axes, keepdims=True) * self.cache.rstd
        return furthest

    def rounding(self, eps: float) -> Rounding:
        """What may be lost in arithmetic with this eps: as a shift of x̂, and besides."""
        axes, dtype = self.cache.axes, np.float32 if eps > np.finfo(np.float64).eps else np.float64
        mean = (self.x - self.cache.xmu).mean(axes, keepdims=True)
        seen = abs(self.x.astype(dtype).mean(axes, keepdims=True) - mean) * self.cache.rstd
        shift = np.maximum(eps * (3 + self.n**0.5) * (1 + self.offset), 2 * seen)
        variance = abs(self.terms.variance).max(self.cache.axes, keepdims=True) / self.largest
        return Rounding(shift, eps * (ROUNDING + self.n**0.5 / 2 + 2 * self.offset * variance) + shift**2)

    def cancellation(self, eps: float) -> Array:
        """The fraction of σ² + eps that E[x²] − μ² may lose in each channel."""
        lost: Array = self.rounding(eps).shift * (1 + self.offset)
        return lost

    def paths(self, direct: float, mean: float, variance: float) -> Array:
        """The sum of the three pathways, each times a factor."""
        dx: Array = direct * self.terms.direct + mean * self.terms.mean + variance * self.terms.variance
        return dx

    def with_gamma(self, gamma: Array) -> Array:
        """Another number in place of gamma."""
        return reference.backward(self.dy, self.cache._replace(gamma=gamma))[0]

    def with_gamma_in_some(self) -> Iterator[Array]:
        """gamma in one pathway or in two."""
        bare = self.without_gamma().terms
        for direct, mean, variance in np.ndindex(2, 2, 2):
            if direct + mean + variance not in (0, 3):
                yield (
                    (self.terms.direct if direct else bare.direct)
                    + (self.terms.mean if mean else bare.mean)
                    + (self.terms.variance if variance else bare.variance)
                )

    def with_count(self, count: int) -> Iterator[Array]:
        """Another number in place of n: in both pathways, in one, or in the whole of it."""
        ratio = self.n / count
        if count != self.n:
            yield self.paths(1, ratio, ratio)
            yield self.paths(1, 1, ratio)
            yield self.paths(1, ratio, 1)
            yield self.paths(ratio, ratio, ratio)

    def with_rstd(self, rstd: Array, of_variance: float = 1) -> Iterator[Array]:
        """Another number in place of rstd: everywhere, in the factor before the bracket, in dvar."""
        terms = reference.backward_terms(self.dy, self.cache._replace(rstd=rstd, xhat=self.cache.xmu * rstd))
        yield terms.direct + terms.mean + of_variance * terms.variance
        ratio = rstd / self.cache.rstd
        yield ratio * self.dx
        yield self.terms.direct + self.terms.mean + ratio**3 * self.terms.variance

    def with_rstds(self, *rstds: Array) -> Iterator[Array]:
        """Any of these in place of rstd."""
        for rstd in rstds:
            yield from self.with_rstd(rstd)

    def with_unbiased_variance(self) -> Iterator[Array]:
        """n − 1 in the variance, with and without n − 1 in its derivative."""
        rstd = self.unbiased_rstd()
        yield from self.with_rstd(rstd)
        yield from self.with_rstd(rstd, of_variance=self.correction)

    def unbiased_rstd(self) -> Array:
        """rstd of the variance that is divided by n − 1."""
        rstd: Array = 1 / np.sqrt(self.correction * self.var + self.eps)
        return rstd

    def eps_outside(self) -> Array:
        """1/(σ + eps)."""
        rstd: Array = 1 / (np.sqrt(self.var) + self.eps)
        return rstd

    def with_sum(self, wrong: Callable[[Array], Array]) -> Iterator[Array]:
        """Another sum in both pathways or in one, in the formulas of the graph and in the compact one."""
        xmu, xhat, rstd, gamma, _ = self.cache
        dy, n = self.dy, self.n
        for of_mean, of_variance in ((wrong, wrong), (wrong, self.sum), (self.sum, wrong)):
            mean, variance = of_mean(dy * gamma * rstd), xmu * of_variance(dy * gamma * xmu * rstd**3)
            yield dy * gamma * rstd - mean / n - variance / n
            yield gamma * rstd * (dy - of_mean(dy) / n - xhat * of_variance(dy * xhat) / n)

    def with_x(self) -> Iterator[Array]:
        """x in place of x − μ: in dvar, in ∂σ²/∂x, in both."""
        xmu, _, rstd, gamma, _ = self.cache
        rest, scale = self.terms.direct + self.terms.mean, gamma * rstd**3 / self.n
        for summed, factor in ((self.x, xmu), (xmu, self.x), (self.x, self.x)):
            yield rest - scale * self.sum(self.dy * summed) * factor

    def sum(self, values: Array) -> Array:
        """Over the channel."""
        summed: Array = values.sum(axis=self.cache.axes, keepdims=True)
        return summed

    def sums(self, dy: Array, xhat: Array) -> tuple[Array, Array]:
        """dgamma and dbeta, of something in place of dy or xhat."""
        return (dy * xhat).sum(axis=self.cache.axes), dy.sum(axis=self.cache.axes)
