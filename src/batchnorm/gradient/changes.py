"""The effects of slips on the right formula: factors of its pathways, or a wrong piece instead of a right one.

Each function here is one kind of mistake; its arguments distinguish the slips of that kind.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import combinations, product
from typing import Any

from ..reference import Array
from .deviations import UNBIASED, Deviation, of_spread
from .formula import Formula, Sum, number_of
from .right import Right

Factors = tuple[float, float, float]
Change = Callable[[Formula], Formula]

NO_AXIS = "sum over the channels too"
DIAGONAL = "only the diagonal of the Jacobian"
WITHOUT_BATCH = "sum without the batch axis"
OVER_CHANNELS = "sum over the channel axis"
WRONG_AXES = "sum over the wrong axes"


def applied(method: Callable[..., Formula], *arguments: Any, **pieces: Any) -> Change:
    """A change that calls a method of the formula with these arguments."""
    return lambda formula: method(formula, *arguments, **pieces)


def always(*factors: Factors) -> Callable[[Right], Iterable[Factors]]:
    """The same factors for all data."""
    return lambda _: factors


def counted(count: Callable[[Right], int]) -> Callable[[Right], Iterator[Factors]]:
    """Another number instead of n: in both pathways, in one, or in all of dx."""

    def factors(right: Right) -> Iterator[Factors]:
        k = right.n / count(right)
        if k != 1:
            yield from ((1, k, k), (1, 1, k), (1, k, 1), (k, k, k))

    return factors


def gamma(*powers: tuple[int, int, int]) -> Callable[[Right], Iterable[Change]]:
    """More powers of γ in the pathways."""
    return lambda _: [applied(Formula.more_gamma, *more) for more in powers]


def rstd(*powers: tuple[int, int, int]) -> Callable[[Right], Iterable[Change]]:
    """More powers of rstd in the pathways."""
    return lambda _: [applied(Formula.more_rstd, *more) for more in powers]


def with_rstd(wrong: Array, derivative: float = 1) -> Iterator[Change]:
    """Another number instead of rstd: everywhere, in the factor before the bracket, in dvar."""
    yield lambda formula: formula._replace(rstd=(wrong,) * 3).times(1, 1, derivative)
    yield lambda formula: formula.times(*[wrong / formula.parts.cache.rstd] * 3)
    yield lambda formula: formula._replace(rstd=(*formula.rstd[:2], wrong))


def rstds(deviation: Deviation) -> Callable[[Right], Iterator[Change]]:
    """A wrong rstd, possibly in only one or two of the three factors of dvar."""

    def changes(right: Right) -> Iterator[Change]:
        for form in deviation.rstds:
            number = form(right.var, right.eps)
            yield from with_rstd(number)
            for power in (1, 2) if deviation.partly else ():
                yield applied(Formula.times, 1, 1, (number / right.cache.rstd) ** power)

    return changes


def sample_variance(right: Right) -> Iterator[Change]:
    """n − 1 in the variance, with and without n − 1 in its derivative."""
    (rstd,) = of_spread(UNBIASED, right)
    yield from with_rstd(rstd)
    yield next(with_rstd(rstd, right.correction))


def shifted(*shifts: Callable[[Right], tuple[Any, Any]]) -> Callable[[Right], Iterable[Change]]:
    """A shift added to x − μ, in the sum and after it."""
    return lambda right: [applied(Formula._replace, shifts=shift(right)) for shift in shifts]


def not_summed(right: Right) -> Iterator[Change]:
    """Both summations left out, one of them, or that of dmean in both of its terms."""
    yield from summed(DIAGONAL)(right)
    sums = Sum(()), Sum(right.cache.axes)
    yield lambda formula: formula._replace(sums=sums).times(1, 1, 1 - 1 / right.n)


def over_other_axes(right: Right) -> dict[str, list[tuple[int, ...]]]:
    """The wrong sets of axes, by the name of the slip; axes of length 1 do not count."""
    shape, axis = right.dy.shape, right.axis
    long = [i for i, size in enumerate(shape) if size > 1]
    _, *positions = (i for i in right.cache.axes if i in long or i == right.cache.axes[0])
    sets: dict[str, list[tuple[int, ...]]] = {NO_AXIS: [tuple(range(len(shape)))], DIAGONAL: [()], WITHOUT_BATCH: []}
    if positions:
        sets[WITHOUT_BATCH].append(tuple(positions))
    sets[OVER_CHANNELS] = [(axis,)]
    known = {frozenset(axes) & frozenset(long) for of_slip in sets.values() for axes in of_slip}
    known.add(frozenset(right.cache.axes) & frozenset(long))
    every = [axes for count in range(1, len(long)) for axes in combinations(long, count)]
    sets[WRONG_AXES] = [axes for axes in every if frozenset(axes) not in known]
    return sets


def summed(name: str) -> Callable[[Right], Iterator[Change]]:
    """Other axes in both sums or in one, as sums or means, for each way to write the formula that then differs."""

    def changes(right: Right) -> Iterator[Change]:
        shape = right.dy.shape
        for axes in over_other_axes(right)[name]:
            mixes = right.axis in axes and shape[right.axis] > 1
            for style, times in product(STYLES if mixes else STYLES[:1], (1, right.n / number_of(shape, axes))):
                mean, variance = (Sum(axes, times, *inside) for inside in style)
                for sums in ((mean, variance), (mean, Sum(right.cache.axes)), (Sum(right.cache.axes), variance)):
                    yield applied(Formula._replace, sums=sums)

    return changes


STYLES = (((1, 1), (1, 3)), ((0, 0), (0, 1)), ((1, 0), (1, 1)), ((1, 1), (1, 0)))
"""Whether γ, and which power of rstd, is in the two sums: in the graph, the formula in dy, in dxhat, a late dvar."""
