"""The mistakes that people make with dx: a slip replaces pieces of the right formula.

The catalogue has each slip once: its name, its remedy, and the replacements, in every way that people write it. A slip
is either a factor of each pathway (`factors`), or changes to other pieces (`changes`). Both can be combined, so a
formula with two slips needs no entry. If the data cannot distinguish slips, the first is the most likely.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from .changes import (
    BOTH,
    COMMON_FACTOR,
    DIAGONAL,
    NO_AXIS,
    OVER_CHANNELS,
    WITHOUT_BATCH,
    WRONG_AXES,
    Change,
    Factors,
    always,
    common_factor,
    counted,
    gamma,
    mean_not_summed,
    place_of,
    rstd,
    rstds,
    sample_variance,
    shifted,
    summed,
    with_rstd,
    without,
)
from .deviations import ABSOLUTE, DEVIATIONS, UNBIASED, Named, of_spread, placed
from .formula import Formula
from .right import Right


class Slip(NamedTuple):
    """One mistake: its name, its remedy, and its effect on the right formula."""

    name: str
    remedy: str
    factors: Callable[[Right], Iterable[Factors]] = lambda _: ()
    changes: Callable[[Right], Iterable[Change]] = lambda _: ()

    def named(self, where: str = "") -> Named:
        """The name and the remedy, which says where the mistake is."""
        return placed((self[:2],), where)

    def rows(self, right: Right) -> Iterator[tuple[Named, Factors]]:
        """The factors, with the places if there are several."""
        found = list(self.factors(right))
        for factors in found:
            yield self.named(place_of(factors) if len(found) > 1 else ""), factors

    def forms(self, right: Right) -> Iterator[Formula]:
        """The right formula with this slip, in every way to make it."""
        for factors in self.factors(right):
            yield right.formula.times(*factors)
        for change in self.changes(right):
            yield change(right.formula)


GAMMA_FORGOTTEN = "gamma forgotten"

SLIPS = (
    Slip(
        "mean pathway missing",
        "x reaches y through μ too: add dmean/n with dmean = −rstd·Σdxhat",
        always((1, 0, 1)),
    ),
    Slip(
        "variance pathway missing",
        "x reaches y through σ² too: add dvar·2(x − μ)/n with dvar = Σdxhat·(x − μ)·(−½)·rstd³",
        always((1, 1, 0)),
    ),
    Slip(
        "mean and variance pathways missing",
        "μ and σ² are functions of the batch, not constants: add dmean/n + dvar·2(x − μ)/n",
        always((1, 0, 0)),
    ),
    Slip("direct pathway missing", "add dxhat·rstd to the paths through μ and σ²", always((0, 1, 1))),
    Slip(GAMMA_FORGOTTEN, "y is gamma·xhat + beta, so dxhat = dy·gamma", changes=gamma((-1, -1, -1))),
    Slip("gamma applied twice", "dxhat = dy·gamma has gamma already", changes=gamma((1, 1, 1))),
    Slip("divided by gamma", "dxhat = dy·gamma, as y = gamma·xhat + beta", changes=gamma((-2, -2, -2))),
    Slip(
        "gamma forgotten in a pathway",
        "every pathway begins with dxhat = dy·gamma",
        changes=gamma((0, 0, -1), (0, -1, 0), (-1, 0, 0), (0, -1, -1), (-1, 0, -1), (-1, -1, 0)),
    ),
    Slip(
        "gamma applied twice in a pathway",
        "every pathway begins with dxhat = dy·gamma, which has gamma already",
        changes=gamma((0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)),
    ),
    Slip(
        "1/n forgotten",
        "μ and σ² are means of n values, so ∂μ/∂x = 1/n and ∂σ²/∂x = 2(x − μ)/n",
        lambda right: [(1, right.n, right.n), (right.n, right.n, right.n)],
    ),
    Slip("1/n forgotten in the mean pathway", "μ = Σx/n, so ∂μ/∂x = 1/n", lambda right: [(1, right.n, 1)]),
    Slip(
        "1/n forgotten in the variance pathway",
        "σ² = Σ(x − μ)²/n, so ∂σ²/∂x = 2(x − μ)/n",
        lambda right: [(1, 1, right.n)],
    ),
    Slip(
        "1/n twice in a pathway",
        "a sum is divided by n once",
        lambda right: [(1, 1 / right.n, 1), (1, 1, 1 / right.n), (1, 1 / right.n, 1 / right.n)],
    ),
    Slip(
        "n forgotten before dy",
        "the compact formula is gamma·rstd/n·(n·dy − dbeta − xhat·dgamma)",
        lambda right: [(1 / right.n, 1, 1)],
    ),
    Slip(
        COMMON_FACTOR,
        "gamma·rstd/n multiplies all terms of the bracket (n·dy − dbeta − xhat·dgamma)",
        changes=common_factor,
    ),
    Slip(
        "n - 1 in place of n", "μ and σ² are divided by n, so both pathways are too", counted(lambda right: right.n - 1)
    ),
    Slip(
        "batch size in place of n",
        "n counts the values of a channel: the batch size times the positions",
        counted(lambda right: right.batch),
    ),
    Slip(
        "rstd not cubed",
        "dvar = Σdxhat·(x − μ)·(−½)·rstd³, from the derivative of (σ² + eps)^(−½)",
        changes=rstd((0, 0, -2), (0, 0, -1), (0, 0, -3)),
    ),
    Slip("rstd forgotten", "xhat = (x − μ)·rstd, so every pathway has the factor rstd", changes=rstd((-1, -1, -1))),
    Slip(
        "rstd forgotten in a pathway",
        "xhat = (x − μ)·rstd: dxhat·rstd is the direct pathway, and dmean = −rstd·Σdxhat",
        changes=rstd((-1, 0, 0), (0, -1, 0), (-1, -1, 0)),
    ),
    Slip(
        "rstd applied twice in a pathway",
        "xhat = (x − μ)·rstd: dxhat·rstd is the direct pathway, and dmean = −rstd·Σdxhat",
        changes=rstd((0, 1, 0), (1, 0, 0), (1, 1, 0)),
    ),
    Slip(
        "xhat in place of x - μ",
        "dvar = Σdxhat·(x − μ)·(−½)·rstd³ and ∂σ²/∂x = 2(x − μ)/n",
        changes=rstd((0, 0, 1), (0, 0, 2)),
    ),
    Slip(*UNBIASED[:2], changes=sample_variance),
    Slip(*ABSOLUTE[:2], changes=lambda right: [next(with_rstd(rstd)) for rstd in of_spread(ABSOLUTE, right)]),
    *(Slip(*deviation[:2], changes=rstds(deviation)) for deviation in DEVIATIONS),
    Slip(
        NO_AXIS,
        "sum over all axes but the channel axis; np.sum without axis= adds up everything",
        changes=summed(NO_AXIS),
    ),
    Slip(
        DIAGONAL,
        "every y of the channel depends on x_i through μ and σ², so both pathways are sums over the channel",
        changes=summed(DIAGONAL, BOTH[:1]),
    ),
    Slip(
        "sum forgotten in the mean pathway",
        "dmean = −rstd·Σdxhat is one number per channel: every y of it depends on x_i through μ",
        changes=mean_not_summed,
    ),
    Slip(
        "sum forgotten in the variance pathway",
        "dvar = Σdxhat·(x − μ)·(−½)·rstd³ is one number per channel: every y of it depends on x_i through σ²",
        changes=summed(DIAGONAL, BOTH[2:]),
    ),
    Slip(
        WITHOUT_BATCH,
        "sum over all axes but the channel axis, the batch axis among them",
        changes=summed(WITHOUT_BATCH),
    ),
    Slip(OVER_CHANNELS, "sum over all axes but the channel axis", changes=summed(OVER_CHANNELS)),
    Slip(WRONG_AXES, "sum over all axes but the channel axis, and no other", changes=summed(WRONG_AXES)),
    Slip(
        "x in place of x - μ",
        "dvar = Σdxhat·(x − μ)·(−½)·rstd³ and ∂σ²/∂x = 2(x − μ)/n",
        changes=shifted((1, 0), (0, 1), (1, 1)),
    ),
    Slip(
        "x in place of x - μ in the second term of dmean",
        "it is dvar·(−2/n)·Σ(x − μ), which is 0 and may be left out",
        changes=shifted((0, -1)),
    ),
    Slip(
        "xhat forgotten in the variance pathway",
        "dx = gamma·rstd/n·(n·dy − dbeta − xhat·dgamma) with dgamma = Σdy·xhat",
        changes=without(1, "in the sum", "before the sum"),
    ),
    Slip(
        "x - μ forgotten in the variance pathway",
        "dvar = Σdxhat·(x − μ)·(−½)·rstd³ and ∂σ²/∂x = 2(x − μ)/n",
        changes=without(0, "in dvar", "in ∂σ²/∂x"),
    ),
    Slip(
        "factor 2 in the variance pathway",
        "dvar has the factor −½, ∂σ²/∂x the factor 2",
        always((1, 1, 2), (1, 1, 0.5)),
    ),
    Slip("pathway counted twice", "dx is the sum of the three pathways, each once", always((2, 1, 1), (1, 2, 1))),
    Slip("wrong sign", "flip the sign of dx", always((-1, -1, -1))),
    Slip("wrong sign of the mean pathway", "dmean = −rstd·Σdxhat", always((1, -1, 1))),
    Slip("wrong sign of the variance pathway", "dvar = Σdxhat·(x − μ)·(−½)·rstd³", always((1, 1, -1))),
    Slip("wrong sign of both pathways", "dmean and dvar both begin with a minus", always((1, -1, -1))),
    Slip(
        "second term of dmean not summed",
        "it is dvar·(−2/n)·Σ(x − μ), one number per channel, and 0",
        lambda right: [(1, 1, 1 - 1 / right.n)],
    ),
    Slip(
        "number of channels in place of n",
        "n counts the values of a channel, not the channels",
        counted(lambda right: right.channels),
    ),
    Slip(
        "number of positions in place of n",
        "n counts the values of a channel: the batch size times the positions",
        counted(lambda right: right.n // right.batch if right.n > right.batch else right.n),
    ),
    Slip(
        "number of all values in place of n", "n counts the values of one channel", counted(lambda right: right.dy.size)
    ),
)

FACTOR = "constant factor"


def constant_factors(right: Right) -> Iterator[Slip]:
    """Numbers by which people multiply or divide all of dx once too often."""
    counts = {"2": 2, "n": right.n}
    if right.n > right.batch:
        counts |= {"the batch size": right.batch, "the number of positions": right.n // right.batch}
    if right.channels > 1:
        counts |= {"the number of channels": right.channels, "the size of x": right.dy.size}
    for name, k in counts.items():
        if k != 1 and name in ("2", "the number of channels", "the size of x"):
            yield Slip(f"{FACTOR} {name}", f"divide dx by {name}", always((k, k, k)))
        if k != 1:
            yield Slip(f"{FACTOR} 1/{name}", f"multiply dx by {name}", always((1 / k, 1 / k, 1 / k)))
