"""Wrong standard deviations: the numbers that people take for rstd = 1/√(σ² + eps), one mistake or two.

Decisions:

- A wrong rstd is a wrong function of a variance and an eps. The variance may be wrong too, and so may the eps: these
  are the two mistakes at once, so they need no entries of their own.
- All of them are functions of the batch. Only if none gives the rstd of a gradient, it may be of running statistics.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ..reference import Array
from .right import Right

Named = tuple[tuple[str, str], ...]
"""The names and remedies of slips."""


def placed(slips: Named, where: str) -> Named:
    """The same, with the place of the last mistake before its remedy."""
    *others, (name, remedy) = slips
    return (*others, (name, f"{where}: {remedy}")) if where else slips


class Deviation(NamedTuple):
    """One mistake: its name, its remedy, and rstd as people then write it, from a variance and eps.

    `partly` if it may be in some of the factors of dvar alone.
    """

    name: str
    remedy: str
    rstds: tuple[Callable[[Array, float], Array], ...]
    partly: bool = False


class Spread(NamedTuple):
    """Another number instead of σ²: its name, its remedy, and the number."""

    name: str
    remedy: str
    var: Callable[[Right], Array]


def _root(var: Array, eps: float) -> Array:
    rstd: Array = 1 / np.sqrt(var + eps)
    return rstd


OUTSIDE = Deviation(
    "eps outside the root",
    "rstd = 1/√(σ² + eps), not 1/(√σ² + eps)",
    (lambda var, eps: 1 / (np.sqrt(var) + eps),),
    partly=True,
)
FORGOTTEN = Deviation("eps forgotten", "rstd = 1/√(σ² + eps), not 1/√σ²", (lambda var, _: 1 / np.sqrt(var),), True)
NO_ROOT = Deviation(
    "variance taken for the standard deviation",
    "divide by √(σ² + eps), not by σ² + eps",
    (lambda var, eps: 1 / (var + eps), lambda var, _: 1 / var),
)
DEVIATIONS = (
    OUTSIDE,
    FORGOTTEN,
    Deviation(
        "eps added twice",
        "rstd = 1/√(σ² + eps), with eps added once",
        (lambda var, eps: 1 / np.sqrt(var + 2 * eps), lambda var, eps: 1 / (np.sqrt(var + eps) + eps)),
        partly=True,
    ),
    NO_ROOT,
    Deviation(
        "variance taken for the inverse standard deviation",
        "multiply by 1/√(σ² + eps), not by σ² + eps",
        (lambda var, eps: var + eps, lambda var, _: var),
    ),
    Deviation(
        "standard deviation taken for its inverse",
        "multiply by 1/√(σ² + eps), not by √(σ² + eps)",
        (lambda var, eps: np.sqrt(var + eps), lambda var, _: np.sqrt(var)),
    ),
)

UNBIASED = Spread(
    "n - 1 in the variance",
    "the batch is normalized with the biased variance Σ(x − μ)²/n",
    lambda right: right.correction * right.var,
)
ABSOLUTE = Spread(
    "mean absolute deviation",
    "divide by √(σ² + eps) with σ² = Σ(x − μ)²/n, not by Σ|x − μ|/n",
    lambda right: abs(right.cache.xmu).mean(right.cache.axes, keepdims=True) ** 2,
)
SPREADS = (UNBIASED, ABSOLUTE)


def of_spread(spread: Spread, right: Right) -> Iterator[Array]:
    """rstd from another number than σ². Where eps then belongs is known for a variance only."""
    var = spread.var(right)
    for form in (_root,) if spread is UNBIASED else (_root, *OUTSIDE.rstds, *FORGOTTEN.rstds):
        yield form(var, right.eps)


def singles(right: Right) -> Iterator[tuple[Named, Array]]:
    """Every rstd with one mistake."""
    for spread in SPREADS:
        for rstd in of_spread(spread, right):
            yield ((spread.name, spread.remedy),), rstd
    for name, remedy, rstds, _ in DEVIATIONS:
        for form in rstds:
            yield ((name, remedy),), form(right.var, right.eps)


def pairs(right: Right) -> Iterator[tuple[Named, Array]]:
    """Every rstd with two mistakes: a wrong function of a wrong variance."""
    for spread in SPREADS:
        for name, remedy, rstds, _ in DEVIATIONS:
            for form in rstds:
                yield ((spread.name, spread.remedy), (name, remedy)), form(spread.var(right), right.eps)


def with_any_eps(right: Right) -> Iterator[tuple[Named, Array, int]]:
    """The mistakes that another eps may come with, as (base, power) in rstd = (base + eps)^(−1/power)."""
    yield (), right.var, 2
    for spread in SPREADS:
        yield ((spread.name, spread.remedy),), spread.var(right), 2
    yield (OUTSIDE[:2],), np.sqrt(right.var), 1
    yield (NO_ROOT[:2],), right.var, 1
