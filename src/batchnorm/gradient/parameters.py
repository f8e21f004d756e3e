"""What is wrong with dgamma and dbeta: whether they sum the wrong values, or sum over the wrong axes."""

from collections.abc import Callable, Iterable, Iterator
from itertools import combinations, product
from typing import NamedTuple

import numpy as np

from .. import _arrays
from ..reference import Array
from . import deviations, fitted
from .deviations import Named
from .regrouped import DY_RESHAPED, DY_TRANSPOSED, misread
from .right import ROUNDING, Right
from .search import CORRECT, NEARLY, NOT_FINITE, UNKNOWN, ZERO, Statistics


class ParameterSlip(NamedTuple):
    """One mistake in dgamma and dbeta: its name, its remedy and the wrong pair."""

    name: str
    remedy: str
    gradients: Callable[[Right], tuple[Array, Array]]


FACTORS: tuple[tuple[str, str, Callable[[Right], float]], ...] = (
    ("wrong sign", "flip the sign", lambda _: -1),
    (
        "mean in place of the sum",
        "gamma and beta serve every value of the channel, so their gradients are sums",
        lambda right: 1 / right.n,
    ),
    (
        "mean over the batch in place of the sum",
        "gamma and beta serve every value of the channel, so their gradients are sums",
        lambda right: 1 / _batch(right),
    ),
)
"""Mistakes that multiply all values, each alone or beside another mistake."""

PARAMETER_SLIPS = (
    ParameterSlip(
        "dgamma and dbeta exchanged",
        "dgamma = Σdy·xhat, dbeta = Σdy",
        lambda right: (right.terms.dbeta, right.terms.dgamma),
    ),
    ParameterSlip(
        "sum over the channels too",
        "sum over all axes but the channel axis; np.sum without axis= adds up everything",
        lambda right: (
            np.full_like(right.terms.dgamma, right.terms.dgamma.sum()),
            np.full_like(right.terms.dbeta, right.terms.dbeta.sum()),
        ),
    ),
    ParameterSlip(
        "dxhat in place of dy",
        "gamma occurs in neither gradient: dgamma = Σdy·xhat, dbeta = Σdy",
        lambda right: right.sums(right.dy * right.cache.gamma, right.cache.xhat),
    ),
    ParameterSlip("x - μ in place of xhat", "dgamma = Σdy·xhat", lambda right: right.sums(right.dy, right.cache.xmu)),
    ParameterSlip("x in place of xhat", "dgamma = Σdy·xhat", lambda right: right.sums(right.dy, right.x)),
)

WRONG_SHAPE = "wrong shape"
WRONG_AXES = "sum over the wrong axes"


class _Parameter:
    """dgamma or dbeta, compared to formulas."""

    def __init__(self, name: str, values: Array, right: Right, statistics: Statistics | None) -> None:
        self.name, self.values, self.right, self.statistics = name, values, right, statistics
        self.which = ("dgamma", "dbeta").index(name)
        self.summed = (right.dy * right.cache.xhat, right.dy)[self.which]
        self.exact: Array = (right.terms.dgamma, right.terms.dbeta)[self.which]
        eps = max(_arrays.precision_of(array) for array in (right.x, values))
        self.rounding = right.rounding(eps)
        shifted = self.rounding.shift * abs(right.dy) if name == "dgamma" else 0
        self.lost = (shifted + eps * (ROUNDING + right.n**0.5) * abs(self.summed)).sum(right.cache.axes)
        self.terms = abs(self.summed).sum(right.cache.axes)

    def distance(self, other: Array) -> float:
        """The largest difference, in units of the possible rounding of `other`."""
        unit = self.lost * np.maximum(1, abs(other) / np.where(self.terms > 0, self.terms, np.inf))
        return float((abs(self.values - other) / np.where(unit > 0, unit, np.finfo(float).tiny)).max())

    def of_values(self) -> tuple[str, str]:
        """What is wrong with values of the right shape."""
        exact = self.distance(self.exact)
        if exact <= 1:
            return CORRECT, ""
        if not self.values.any():
            return ZERO, f"{self.name} is a sum over the channel, and not 0 here"
        nothing: tuple[float, Named] = (np.inf, ())
        ones, twos = (
            min(((self.distance(wrong), named) for named, wrong in slips), key=lambda of: of[0], default=nothing)
            for slips in (self.one(), self.two())
        )
        for limit in (1, NEARLY * exact):
            for distance, named in (ones, twos):
                if distance <= limit:
                    return _joined(named)
        return self.of_axes() or self.of_eps() or (UNKNOWN, "no slip of the catalogue explains it")

    def one(self) -> Iterator[tuple[Named, Array]]:
        """Every value with one mistake."""
        for name, remedy, factor in FACTORS:
            yield ((name, remedy),), factor(self.right) * self.exact
        yield from self.wrongly_summed()

    def wrongly_summed(self) -> Iterator[tuple[Named, Array]]:
        """Every value with one mistake that is not a factor."""
        for slip in PARAMETER_SLIPS:
            yield ((slip.name, slip.remedy),), slip.gradients(self.right)[self.which]
        for dy in misread(self.right):
            yield ((DY_RESHAPED, DY_TRANSPOSED),), self.right.sums(dy, self.right.cache.xhat)[self.which]
        yield from self.of_rstd(deviations.singles(self.right))
        if self.statistics and self.name == "dgamma":
            named, xhat = self.statistics
            yield named, self.right.sums(self.right.dy, xhat)[0]

    def two(self) -> Iterator[tuple[Named, Array]]:
        """Every value with two mistakes in rstd, or with a factor and another mistake."""
        yield from self.of_rstd(deviations.pairs(self.right))
        for (named, wrong), (name, remedy, factor) in product(list(self.wrongly_summed()), FACTORS):
            yield (*named, (name, remedy)), factor(self.right) * wrong

    def of_rstd(self, wrong: Iterable[tuple[Named, Array]]) -> Iterator[tuple[Named, Array]]:
        """dgamma with each of these instead of rstd."""
        for named, rstd in wrong if self.name == "dgamma" else ():
            yield named, self.exact * (rstd / self.right.cache.rstd).ravel()

    def of_eps(self) -> tuple[str, str] | None:
        """Whether dgamma was made with another eps."""
        ratio = np.expand_dims(self.values / self.exact, self.right.cache.axes)
        found = fitted.of_any_eps(ratio * self.right.cache.rstd, self.right, self.rounding.rest)
        near = (named for named, wrong in self.of_rstd((of[0], of[2]) for of in found) if self.distance(wrong) <= 1)
        return next(map(_joined, near), None)

    def of_axes(self) -> tuple[str, str] | None:
        """Whether the sum is over other axes, or left out."""
        right = self.right
        for axes in self._subsets():
            wrong = self.summed.sum(axes, keepdims=True)
            if self.values.shape in (wrong.shape, self.summed.sum(axes).shape):
                rest = abs(self.values.reshape(wrong.shape) - wrong)
                if (rest <= self.rounding.shift.max() * (1 + abs(self.summed).sum(axes, keepdims=True))).all():
                    return WRONG_AXES, f"sum over the axes {right.cache.axes}, not over {axes or 'none'}"
        return None

    def _subsets(self) -> Iterator[tuple[int, ...]]:
        for count in range(self.summed.ndim):
            for axes in combinations(range(self.summed.ndim), count):
                if axes != self.right.cache.axes:
                    yield axes

    def explain(self) -> tuple[str, str]:
        """The name of the mistake, and its remedy."""
        values, channels = self.values, self.exact.size
        if not np.isfinite(values).all():
            return NOT_FINITE, f"{np.count_nonzero(~np.isfinite(values)):,} of {values.size:,} values"
        if values.shape == (channels,):
            return self.of_values()
        shape = f"{self.name} must have shape ({channels},), got {values.shape}"
        if values.size == channels and tuple(n for n in values.shape if n > 1) in ((channels,), ()):
            self.values = values.reshape(channels)
            name, remedy = self.of_values()
            if name == CORRECT:
                return WRONG_SHAPE, f"{shape}: the values are right; drop keepdims=True, or reshape"
            if name == UNKNOWN:
                return WRONG_SHAPE, f"{shape}; the values are wrong too, and no slip of the catalogue explains them"
            return f"{WRONG_SHAPE} + {name}", f"{shape}; {remedy}"
        if values.size == 1:
            self.values = np.full(channels, values.item())
            name, _ = self.of_values()
            axes = f"one number for all channels; sum over the axes {self.right.cache.axes}"
            return WRONG_SHAPE if name == UNKNOWN else name, f"{shape}: {axes}"
        name, remedy = self.of_axes() or (WRONG_SHAPE, f"sum over the axes {self.right.cache.axes}")
        return name, f"{shape}; {remedy}"


def _joined(slips: Named) -> tuple[str, str]:
    return " + ".join(name for name, _ in slips), "; ".join(remedy for _, remedy in slips)


def _batch(right: Right) -> int:
    return int(right.dy.shape[right.cache.axes[0]])


@np.errstate(all="ignore")
def explain_parameter(name: str, values: Array, right: Right, statistics: Statistics | None = None) -> tuple[str, str]:
    """The name of the mistake in dgamma or dbeta, and its remedy; `statistics` are those found in dx."""
    return _Parameter(name, values, right, statistics).explain()
