"""The formulas to which a dx is compared, in steps: the fewest slips first.

Decisions:

- A slip in the factors of the pathways is a row of a table, and so are two of them. A slip in another piece is a
  formula, to be combined with every row.
- Two slips in other pieces make a formula of their own. There are thousands, so impossible ones are left out: dx shows
  whether a sum runs over other axes, and if none does, which gamma and rstd are in the direct pathway. Sums over the
  channels and some of the other axes are not combined: they are rare, and each axis adds many more. Nor are terms
  without gamma·rstd, which are three wrong pieces already.
- A slip with a number that is estimated from dx comes after those without. Only an eps and a lost variance come before
  pairs: one number for several channels, or a small one for each, is not fitted by chance.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import chain, combinations
from typing import NamedTuple

import numpy as np

from ..reference import Array
from . import fitted
from .changes import COMMON_FACTOR, WRONG_AXES, Change, Factors, with_rstd
from .deviations import Named, pairs
from .formula import Formula
from .regrouped import regrouped
from .right import Right
from .slips import GAMMA_FORGOTTEN, SLIPS, constant_factors

FAR = 10
"""If x is more than this many σ from 0, lost digits in E[x²] − μ² are more likely than another eps."""


class Base(NamedTuple):
    """A formula without the factors of its pathways, and the doubt if any dx like this could have been fitted."""

    slips: Named
    formula: Formula
    doubt: str = ""


class Table(NamedTuple):
    """Rows of factors of the three pathways, and the slips that they stand for."""

    slips: list[Named]
    factors: Array


NO_FACTORS = Table([()], np.ones((1, 3)))

Step = Iterator[tuple[Base, Table]]


class Changed(NamedTuple):
    """A slip in pieces other than the factors: the formula, how it is made, and what combining it needs.

    `direct` is None if dmean is not summed, because it is then a multiple of dy too.
    """

    base: Base
    change: Change
    replaced: frozenset[str]
    in_channels: bool
    common: bool
    direct: Array | None


class Candidates:
    """The formulas for one dx. `noise` is the possible effect of rounding, `eps` that of the arithmetic."""

    dx: Array
    right: Right
    noise: Array
    eps: float

    def __init__(self, dx: Array, right: Right, noise: Array, eps: float) -> None:
        self.dx, self.right, self.noise, self.eps = dx, right, noise, eps

    def steps(self) -> list[Callable[[], Step]]:
        """All steps, the most credible first."""
        early = [self._usual_eps, self._lost_variance]
        if self.right.channels == 1 and self.right.offset.item() > FAR:
            early.reverse()  # with one channel, another eps explains any rstd
        late = [self.pairs, self.other_eps, self._rstd_and_factors, self._estimates, self._estimates_and_factors]
        return [self.singles, *early, *late, self._three]

    def singles(self) -> Step:
        """One slip."""
        yield Base((), self.right.formula), self._one
        for base in self._bases:
            yield base, NO_FACTORS

    def _usual_eps(self) -> Step:
        return (step for step in self.other_eps() if len(step[0].slips) == 1 and not step[0].doubt)

    def other_eps(self) -> Step:
        """Another eps, alone, with another mistake in rstd, without gamma."""
        for base in self._with(lambda form: fitted.another_eps(self.dx, self.right, form, self.noise)):
            yield base, NO_FACTORS

    def _lost_variance(self) -> Step:
        for base in self._with(lambda form: fitted.lost_variance(self.dx, self.right, form, self.eps)):
            yield base, NO_FACTORS

    def pairs_with_factors(self) -> Step:
        """Two slips, at least one of which is in the factors."""
        yield Base((), self.right.formula), self._two
        for base in self._bases:
            yield base, self._one

    def pairs(self) -> Step:
        """Two slips."""
        yield from self.pairs_with_factors()
        yield from ((base, NO_FACTORS) for base in self._two_in_rstd(self.right.formula))
        direct = fitted.direct_of(self.dx, self.right) if self._in_channels() else None
        common = [slip for slip in self._changed if slip.common]
        for one, other in combinations(common, 2):
            if one.replaced & other.replaced or one.base.slips[0][0] == other.base.slips[0][0]:
                continue
            if direct is None:
                possible = not (one.in_channels and other.in_channels)
            else:
                possible = one.in_channels and other.in_channels and self._is_direct(direct, one, other)
            if possible:
                yield Base(one.base.slips + other.base.slips, other.change(one.base.formula)), NO_FACTORS

    def _is_direct(self, measured: tuple[Array, Array], one: Changed, other: Changed) -> bool:
        if one.direct is None or other.direct is None:
            return True
        (ratio, weight), expected = measured, one.direct * other.direct
        size = np.maximum(1, np.maximum(abs(ratio), abs(expected)))
        return bool((weight * abs(ratio - expected) <= 4 * size * self.noise * np.sqrt(self.right.n)).all())

    def _two_in_rstd(self, formula: Formula) -> Iterator[Base]:
        for slips, rstd in pairs(self.right):
            yield Base(slips, next(with_rstd(rstd))(formula))

    def _running(self) -> Iterator[Base]:
        return self._with(lambda form: fitted.running_statistics(self.dx, self.right, form, self.noise))

    def _rstd_and_factors(self) -> Step:
        """Another eps or two mistakes in rstd, and one in the factors or in gamma."""
        two = list(self._with(lambda form: [fitted.Estimate(*base) for base in self._two_in_rstd(form)]))
        yield from ((base, NO_FACTORS) for base in two)
        for base in (*(base for base, _ in self.other_eps()), *two):
            yield base, self._one

    def _estimates(self) -> Step:
        for base in self._with(lambda form: fitted.factors(self.dx, self.right, form)):
            yield base, NO_FACTORS
        for base in self._running():
            yield base, NO_FACTORS

    def _estimates_and_factors(self) -> Step:
        for base in self._running():
            yield base._replace(doubt=base.doubt or fitted.ANY_FACTOR), self._one
        for slips, change in self._factors():
            for named, formula, _ in fitted.factors(self.dx, self.right, self.right.formula.times(*change)):
                doubt = "" if named[0][0] == fitted.PER_SAMPLE else fitted.ANY_FACTOR
                yield Base(slips + named, formula, doubt), NO_FACTORS

    def _three(self) -> Step:
        for base in self._bases:
            yield base, self._two

    def _with(self, estimates: Callable[[Formula], Iterable[fitted.Estimate]]) -> Iterator[Base]:
        """Estimates for the right formula, and for that without gamma."""
        remedy = next(slip.remedy for slip in SLIPS if slip.name == GAMMA_FORGOTTEN)
        formula = self.right.formula
        forgotten = ((GAMMA_FORGOTTEN, remedy),)
        for slips, form in (((), formula), (forgotten, formula.more_gamma(-1, -1, -1))):
            for named, estimated, doubt in estimates(form):
                yield Base((*slips, *named), estimated, doubt)

    def _factors(self) -> Iterator[tuple[Named, Factors]]:
        for slip in chain(SLIPS, constant_factors(self.right)):
            yield from slip.rows(self.right)

    @cached_property
    def _one(self) -> Table:
        rows = list(self._factors())
        return Table([slips for slips, _ in rows], np.array([factors for _, factors in rows]))

    @cached_property
    def _two(self) -> Table:
        """Two slips in the factors, neither of which undoes or hides the other."""
        known = {factors for _, factors in self._factors()} | {(1, 1, 1)}
        slips: list[Named] = []
        rows = []
        for (one, a), (other, b) in combinations(self._factors(), 2):
            both = (a[0] * b[0], a[1] * b[1], a[2] * b[2])
            if one[0][0] != other[0][0] and both not in known and not _hides(a, b) and not _hides(b, a):
                slips.append(one + other)
                rows.append(both)
        return Table(slips, np.array(rows))

    @cached_property
    def _bases(self) -> list[Base]:
        """Slips in other pieces, and formulas that do not work by channel at all."""
        others = [Base(((name, remedy),), formula) for name, remedy, formula in regrouped(self.right)]
        return [changed.base for changed in self._changed] + others

    @cached_property
    def _changed(self) -> list[Changed]:
        return [
            self._of(Base(slip.named(change.where), change(self.right.formula)), change)
            for slip in SLIPS
            for change in slip.changes(self.right)
        ]

    def _of(self, base: Base, change: Change) -> Changed:
        mean, variance = (frozenset(of.axes) for of in base.formula.sums)
        axes = frozenset(self.right.cache.axes)
        in_channels = (mean >= axes or not mean) and variance >= axes
        direct = base.formula.scale(0) / self.right.formula.scale(0) if mean else None
        replaced = base.formula.replaced
        rare = {WRONG_AXES: self.right.axis in mean | variance, COMMON_FACTOR: "gamma" in replaced}
        return Changed(base, change, replaced, in_channels, not rare.get(base.slips[0][0]), direct)

    def _in_channels(self) -> bool:
        """Whether dx is a sum of dy, x and a constant in every channel, which fails if a sum is over other axes."""
        right, rest = self.right, self.dx
        for part in fitted.orthonormal(right):
            rest = rest - part * (rest * part).sum(right.cache.axes, keepdims=True)

        def size(values: Array) -> Array:
            mean: Array = np.sqrt(np.mean((values / right.largest) ** 2, axis=right.cache.axes, keepdims=True))
            return mean

        return bool((size(rest) <= 4 * np.maximum(1, size(self.dx)) * self.noise).all())


def _hides(one: Factors, other: Factors) -> bool:
    """Whether a pathway that `one` leaves out has a factor in `other`."""
    return any(a == 0 and b != 1 for a, b in zip(one, other, strict=True)) and len(set(other)) > 1
