"""The right gradient, and the mistakes that people make with it: a slip is a formula.

The catalogue holds each slip once: its name, the remedy, and the wrong dx made of right parts, in the ways in which
people write it. Of slips that are alike with some data, the first is the likeliest.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .. import reference
from ..functional import Saved
from ..reference import Array
from . import pathways


class Right:
    """The right gradient of one batch in float64, and what wrong ones are made of."""

    def __init__(self, dy: ArrayLike, saved: Saved) -> None:
        self.cache = pathways.textbook(saved)
        self.dy = pathways.upstream(dy, saved)
        self.x, self.eps, self.n = saved.x, saved.eps, saved.count
        self.correction = self.n / (self.n - 1)
        self.var = np.expand_dims(saved.var, self.cache.axes)
        self.terms = reference.backward_terms(self.dy, self.cache)
        self.dx = self.paths(1, 1, 1)
        parts = (self.terms.direct, self.terms.mean, self.terms.variance)
        largest = np.maximum.reduce([abs(part).max(self.cache.axes, initial=0, keepdims=True) for part in parts])
        self.largest = np.where(largest > 0, largest, largest.max(initial=0) or 1)

    def paths(self, direct: float, mean: float, variance: float) -> Array:
        """The three pathways, each so many times."""
        dx: Array = direct * self.terms.direct + mean * self.terms.mean + variance * self.terms.variance
        return dx

    def with_gamma(self, gamma: Array) -> Array:
        """Another number in place of gamma."""
        return reference.backward(self.dy, self.cache._replace(gamma=gamma))[0]

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
        """n − 1 in the variance, and in its derivative or not."""
        rstd = 1 / np.sqrt(self.correction * self.var + self.eps)
        yield from self.with_rstd(rstd)
        yield from self.with_rstd(rstd, of_variance=self.correction)

    def with_sum(self, wrong: Callable[[Array], Array]) -> Iterator[Array]:
        """Another sum in both pathways or in one, in the formulas of the graph and in the compact one."""
        xmu, xhat, rstd, gamma, axes = self.cache
        dy, n = self.dy, self.n

        def right(values: Array) -> Array:
            summed: Array = values.sum(axis=axes, keepdims=True)
            return summed

        for of_mean, of_variance in ((wrong, wrong), (wrong, right), (right, wrong)):
            mean, variance = of_mean(dy * gamma * rstd), xmu * of_variance(dy * gamma * xmu * rstd**3)
            yield dy * gamma * rstd - mean / n - variance / n
            yield gamma * rstd * (dy - of_mean(dy) / n - xhat * of_variance(dy * xhat) / n)

    def sums(self, dy: Array, xhat: Array) -> tuple[Array, Array]:
        """dgamma and dbeta, of something in place of dy or xhat."""
        return (dy * xhat).sum(axis=self.cache.axes), dy.sum(axis=self.cache.axes)


class Slip(NamedTuple):
    """One mistake: its name, what to do about it, and the wrong dx in each of the ways it is written."""

    name: str
    remedy: str
    forms: Callable[[Right], Iterable[Array]]
    harmless: bool = False


SLIPS = (
    Slip(
        "second term of dmean left out",
        "harmless, because dvar·(−2/n)·Σ(x − μ) is 0",
        lambda right: [right.dx],
        harmless=True,
    ),
    Slip(
        "mean pathway missing",
        "x reaches y through μ too: add dmean/n with dmean = −rstd·Σdxhat",
        lambda right: [right.paths(1, 0, 1)],
    ),
    Slip(
        "variance pathway missing",
        "x reaches y through σ² too: add dvar·2(x − μ)/n with dvar = Σdxhat·(x − μ)·(−½)·rstd³",
        lambda right: [right.paths(1, 1, 0)],
    ),
    Slip(
        "mean and variance pathways missing",
        "μ and σ² are functions of the batch, not constants: add dmean/n + dvar·2(x − μ)/n",
        lambda right: [right.paths(1, 0, 0)],
    ),
    Slip(
        "direct pathway missing", "add dxhat·rstd to the paths through μ and σ²", lambda right: [right.paths(0, 1, 1)]
    ),
    Slip(
        "gamma forgotten",
        "y is gamma·xhat + beta, so dxhat = dy·gamma",
        lambda right: [right.with_gamma(np.ones_like(right.cache.gamma))],
    ),
    Slip(
        "gamma applied twice",
        "dxhat = dy·gamma has gamma already",
        lambda right: [right.with_gamma(right.cache.gamma**2)],
    ),
    Slip(
        "1/n forgotten",
        "μ and σ² are means of n values, so ∂μ/∂x = 1/n and ∂σ²/∂x = 2(x − μ)/n",
        lambda right: [right.paths(1, right.n, right.n), right.paths(right.n, right.n, right.n)],
    ),
    Slip("1/n forgotten in the mean pathway", "μ = Σx/n, so ∂μ/∂x = 1/n", lambda right: [right.paths(1, right.n, 1)]),
    Slip(
        "1/n forgotten in the variance pathway",
        "σ² = Σ(x − μ)²/n, so ∂σ²/∂x = 2(x − μ)/n",
        lambda right: [right.paths(1, 1, right.n)],
    ),
    Slip(
        "n - 1 in place of n",
        "μ and σ² are divided by n, so both pathways are too",
        lambda right: [
            right.paths(1, right.correction, right.correction),
            right.paths(1, 1, right.correction),
            right.paths(1, right.correction, 1),
            right.paths(right.correction, right.correction, right.correction),
        ],
    ),
    Slip(
        "n - 1 in the variance",
        "the batch is normalized with the biased variance Σ(x − μ)²/n",
        Right.with_unbiased_variance,
    ),
    Slip(
        "eps outside the root",
        "rstd = 1/√(σ² + eps), not 1/(√σ² + eps)",
        lambda right: right.with_rstd(1 / (np.sqrt(right.var) + right.eps)),
    ),
    Slip("eps forgotten", "rstd = 1/√(σ² + eps), not 1/√σ²", lambda right: right.with_rstd(1 / np.sqrt(right.var))),
    Slip(
        "variance taken for the standard deviation",
        "divide by √(σ² + eps), not by σ² + eps",
        lambda right: right.with_rstds(1 / (right.var + right.eps), 1 / right.var),
    ),
    Slip(
        "variance taken for the inverse standard deviation",
        "multiply by 1/√(σ² + eps), not by σ² + eps",
        lambda right: right.with_rstds(right.var + right.eps, right.var),
    ),
    Slip(
        "standard deviation taken for its inverse",
        "multiply by 1/√(σ² + eps), not by √(σ² + eps)",
        lambda right: right.with_rstds(np.sqrt(right.var + right.eps), np.sqrt(right.var)),
    ),
    Slip(
        "sum over the channels too",
        "sum over all axes but the channel axis; np.sum without axis= adds up everything",
        lambda right: right.with_sum(np.sum),
    ),
    Slip(
        "sum without the batch axis",
        "sum over all axes but the channel axis, the batch axis among them",
        lambda right: right.with_sum(lambda values: values.sum(axis=right.cache.axes[1:], keepdims=True)),
    ),
    Slip(
        "rstd not cubed",
        "dvar = Σdxhat·(x − μ)·(−½)·rstd³, from the derivative of (σ² + eps)^(−½)",
        lambda right: (
            right.terms.direct + right.terms.mean + right.terms.variance * right.cache.rstd**power for power in (-2, -1)
        ),
    ),
    Slip(
        "factor 2 in the variance pathway",
        "dvar has the factor −½, ∂σ²/∂x the factor 2",
        lambda right: [right.paths(1, 1, 2), right.paths(1, 1, 0.5)],
    ),
    Slip("wrong sign", "turn the sign of dx", lambda right: [right.paths(-1, -1, -1)]),
    Slip("wrong sign of the mean pathway", "dmean = −rstd·Σdxhat", lambda right: [right.paths(1, -1, 1)]),
    Slip(
        "wrong sign of the variance pathway", "dvar = Σdxhat·(x − μ)·(−½)·rstd³", lambda right: [right.paths(1, 1, -1)]
    ),
    Slip(
        "wrong sign of both pathways", "dmean and dvar both begin with a minus", lambda right: [right.paths(1, -1, -1)]
    ),
    Slip(
        "second term of dmean not summed",
        "it is dvar·(−2/n)·Σ(x − μ), one number a channel, and 0",
        lambda right: [right.paths(1, 1, 1 - 1 / right.n)],
    ),
)


class ParameterSlip(NamedTuple):
    """One mistake in dgamma and dbeta: its name and the wrong pair."""

    name: str
    gradients: Callable[[Right], tuple[Array, Array]]


PARAMETER_SLIPS = (
    ParameterSlip("wrong sign", lambda right: (-right.terms.dgamma, -right.terms.dbeta)),
    ParameterSlip("dgamma and dbeta exchanged", lambda right: (right.terms.dbeta, right.terms.dgamma)),
    ParameterSlip(
        "mean in place of the sum", lambda right: (right.terms.dgamma / right.n, right.terms.dbeta / right.n)
    ),
    ParameterSlip(
        "sum over the channels too",
        lambda right: (
            np.full_like(right.terms.dgamma, right.terms.dgamma.sum()),
            np.full_like(right.terms.dbeta, right.terms.dbeta.sum()),
        ),
    ),
    ParameterSlip("dxhat in place of dy", lambda right: right.sums(right.dy * right.cache.gamma, right.cache.xhat)),
    ParameterSlip("x - μ in place of xhat", lambda right: right.sums(right.dy, right.cache.xmu)),
    ParameterSlip("x in place of xhat", lambda right: right.sums(right.dy, right.x)),
)
