"""The effects of slips on the right formula: factors of its pathways, or a wrong piece instead of a right one.

Each function here is one kind of mistake; its arguments distinguish the slips of that kind. If one slip may be in
several places, each of them is said in words.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import combinations, product
from typing import Any, NamedTuple

from ..reference import Array
from .deviations import UNBIASED, Deviation, of_spread
from .formula import Formula, Sum, number_of
from .right import Right

Factors = tuple[float, float, float]


class Change(NamedTuple):
    """What makes a formula wrong, and where, such as "in the mean pathway", if the slip has several places."""

    make: Callable[[Formula], Formula]
    where: str = ""

    def __call__(self, formula: Formula) -> Formula:
        return self.make(formula)


NO_AXIS = "sum over the channels too"
DIAGONAL = "only the diagonal of the Jacobian"
WITHOUT_BATCH = "sum without the batch axis"
OVER_CHANNELS = "sum over the channel axis"
WRONG_AXES = "sum over the wrong axes"
COMMON_FACTOR = "common factor forgotten in a term"


def applied(method: Callable[..., Formula], *arguments: Any, where: str = "", **pieces: Any) -> Change:
    """A change that calls a method of the formula with these arguments."""
    return Change(lambda formula: method(formula, *arguments, **pieces), where)


def pathways_of(changed: Iterable[Any]) -> str:
    """The names of these pathways; nothing for all of dx."""
    names = [name for name, of in zip(("direct", "mean", "variance"), changed, strict=True) if of]
    if len(names) == 3:
        return ""
    return f"the {' and '.join(names)} pathway{'s' if len(names) > 1 else ''}"


def place_of(factors: Factors) -> str:
    """Which pathways have such a factor."""
    changed, sizes = pathways_of(k != 1 for k in factors), {k for k in factors if k != 1}
    how = {2: "doubled", 0.5: "halved"}.get(*sizes) if len(sizes) == 1 else None
    if how:
        return f"{changed or 'dx'} {'are' if ' and ' in changed else 'is'} {how}"
    return f"in {changed or 'all of dx'}"


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
    return lambda _: [applied(Formula.more_gamma, *more, where=_in(pathways_of(more))) for more in powers]


def rstd(*powers: tuple[int, int, int]) -> Callable[[Right], Iterable[Change]]:
    """More powers of rstd in the pathways."""
    return lambda _: [applied(Formula.more_rstd, *more, where=_power(more)) for more in powers]


def _in(places: str) -> str:
    return places and f"in {places}"


def _power(more: tuple[int, int, int]) -> str:
    """Which power of rstd is in the changed pathways, and which should be; nothing for all of dx."""
    if all(more):
        return ""
    right = 3 if more[2] else 1
    found = ("no rstd", "rstd", "rstd²", "rstd³", "rstd⁴", "rstd⁵")
    return f"{found[right + max(more, key=abs)]} in place of {found[right]} in {pathways_of(more)}"


def common_factor(right: Right) -> Iterator[Change]:
    """Terms without γ·rstd/n, or without some of it."""
    for terms in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)):
        for name, in_gamma, in_rstd, in_n in (
            ("gamma·rstd/n", 1, 1, 1),
            ("rstd/n", 0, 1, 1),
            ("gamma·rstd", 1, 1, 0),
            ("1/n", 0, 0, 1),
        ):
            if in_rstd or terms[0]:  # 1/n forgotten in the other terms has a name of its own
                yield _without(terms, in_gamma, in_rstd, right.n**in_n, f"{name} is missing in {pathways_of(terms)}")


def _without(terms: tuple[int, int, int], gamma: int, rstd: int, n: int, where: str) -> Change:
    d, m, v = terms

    def make(formula: Formula) -> Formula:
        formula = formula.more_gamma(-gamma * d, -gamma * m, -gamma * v).more_rstd(-rstd * d, -rstd * m, -rstd * v)
        return formula.times(n**d, n**m, n**v)

    return Change(make, where)


def with_rstd(wrong: Array, derivative: float = 1) -> Iterator[Change]:
    """Another number instead of rstd: everywhere, in the factor before the bracket, in dvar."""
    yield Change(lambda formula: formula._replace(rstd=(wrong,) * 3).times(1, 1, derivative))
    yield Change(lambda formula: formula.times(*[wrong / formula.parts.cache.rstd] * 3), "before the bracket")
    yield Change(lambda formula: formula._replace(rstd=(*formula.rstd[:2], wrong)), "in dvar")


def rstds(deviation: Deviation) -> Callable[[Right], Iterator[Change]]:
    """A wrong rstd, possibly in only one or two of the three factors of dvar."""

    def changes(right: Right) -> Iterator[Change]:
        for form in deviation.rstds:
            number = form(right.var, right.eps)
            yield from with_rstd(number)
            for power in (1, 2) if deviation.partly else ():
                where = f"in {power} of the 3 factors rstd of dvar"
                yield applied(Formula.times, 1, 1, (number / right.cache.rstd) ** power, where=where)

    return changes


def sample_variance(right: Right) -> Iterator[Change]:
    """n − 1 in the variance, with and without n − 1 in its derivative."""
    (rstd,) = of_spread(UNBIASED, right)
    yield from with_rstd(rstd)
    yield next(with_rstd(rstd, right.correction))


def shifted(*times: tuple[int, int]) -> Callable[[Right], Iterable[Change]]:
    """μ added to x − μ so many times, in the sum of the variance pathway and after it."""
    places = {(1, 0): "in dvar", (0, 1): "in ∂σ²/∂x", (1, 1): "in dvar and in ∂σ²/∂x"}

    def changes(right: Right) -> Iterator[Change]:
        for of in times:
            shifts = tuple(k and k * right.mean for k in of)
            yield applied(Formula._replace, shifts=shifts, where=places.get(of, ""))

    return changes


def without(power: int, inside: str, after: str) -> Callable[[Right], Iterator[Change]]:
    """x − μ times this power of rstd forgotten, in the sum of the variance pathway or after it."""

    def changes(right: Right) -> Iterator[Change]:
        instead = right.cache.rstd**-power - right.cache.xmu
        yield applied(Formula._replace, shifts=(instead, 0), where=inside)
        yield applied(Formula._replace, shifts=(0, instead), where=after)

    return changes


def mean_not_summed(right: Right) -> Iterator[Change]:
    """dmean without its sum, or in both of its terms."""
    yield from summed(DIAGONAL, BOTH[1:2])(right)
    sums = Sum(()), Sum(right.cache.axes)
    yield Change(lambda formula: formula._replace(sums=sums).times(1, 1, 1 - 1 / right.n))


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


BOTH = (1, 1), (1, 0), (0, 1)
"""Whether the sums of the mean and of the variance pathway are wrong."""


def summed(name: str, which: Iterable[tuple[int, int]] = BOTH) -> Callable[[Right], Iterator[Change]]:
    """Other axes in both sums or in one, as sums or means, for each way to write the formula that then differs."""

    def changes(right: Right) -> Iterator[Change]:
        shape, own = right.dy.shape, Sum(right.cache.axes)
        for axes in over_other_axes(right)[name]:
            mixes = right.axis in axes and shape[right.axis] > 1
            for style, times in product(STYLES if mixes else STYLES[:1], (1, right.n / number_of(shape, axes))):
                mean, variance = (Sum(axes, times, *inside) for inside in style)
                for in_mean, in_variance in which:
                    sums = mean if in_mean else own, variance if in_variance else own
                    where = f"in {pathways_of((0, in_mean, in_variance))}, over the axes {axes}" if axes else ""
                    yield applied(Formula._replace, sums=sums, where=where)

    return changes


STYLES = (((1, 1), (1, 3)), ((0, 0), (0, 1)), ((1, 0), (1, 1)), ((1, 1), (1, 0)))
"""Whether γ, and which power of rstd, is in the two sums: in the graph, the formula in dy, in dxhat, a late dvar."""
