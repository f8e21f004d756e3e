"""Slips with an unknown number: it is estimated from dx, and then the formula is compared to dx like any other.

Decisions:

- Only the direct pathway contains the part of dy that is neither constant nor a multiple of xhat. Its factor there is
  gamma·rstd, so dx reveals the rstd with which it was made, and from that the μ.
- One number for all of x, such as an eps, may fit by chance in one channel, but never in many. A number per channel
  that only scales dx could be anything, and is reported as unsure.
- So could a μ or a σ per channel. They are sure to be running statistics only if both are others, σ is no function of
  the batch's own, and μ is not the same in all channels.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from ..reference import Array
from .changes import with_rstd
from .deviations import Named, pairs, placed, singles, with_any_eps
from .formula import Formula
from .right import Right
from .slips import FACTOR

ANOTHER_EPS = "another eps"
LOST = "variance lost to cancellation"
RUNNING = "running statistics"
PER_SAMPLE = "a factor per sample"
PER_CHANNEL = "a factor per channel"

SAME = 1e-3
"""Means that differ by fewer σ are the same, and so are deviations that differ by a smaller fraction."""

EPS_IN_USE = tuple(10.0**-power for power in range(1, 17))
"""Values that people choose for eps."""


ANY_FACTOR = "any such factor could be fitted"
ANY_STATISTIC = "any μ or σ per channel could be fitted"


class Estimate(NamedTuple):
    """Slips, their formula with the best fitting number, and the doubt if anything could have been fitted."""

    slips: Named
    formula: Formula
    doubt: str = ""


def orthonormal(right: Right) -> tuple[Array, Array, Array]:
    """A constant, xhat and dy in every channel, each made orthogonal to those before it, of length 1 or 0."""
    found: list[Array] = []
    for part in (np.ones_like(right.dy), right.cache.xhat, right.dy):
        rest = part
        for before in found:
            rest = rest - before * (rest * before).sum(right.cache.axes, keepdims=True)
        norm = np.sqrt((rest * rest).sum(right.cache.axes, keepdims=True))
        found.append(rest / np.where(norm > 0, norm, 1))
    return found[0], found[1], found[2]


def direct_of(dx: Array, right: Right) -> tuple[Array, Array]:
    """The factor by which the direct pathway of dx is too large, and its share of the largest term, per channel."""
    axes, own = right.cache.axes, orthonormal(right)[2]
    weight = (right.terms.direct * own).sum(axes, keepdims=True)
    return (dx * own).sum(axes, keepdims=True) / weight, abs(weight) / right.largest


def rstd_of(dx: Array, right: Right, formula: Formula) -> Array:
    """The rstd in the direct pathway of dx, if gamma is in dx as it is in the formula."""
    _, _, rstd, gamma, _ = right.cache
    fitted = direct_of(dx, right)[0] * rstd * gamma ** (1 - formula.gamma[0])
    return np.where(np.isfinite(fitted) & (fitted > 0), fitted, rstd)


def another_eps(dx: Array, right: Right, formula: Formula, noise: Array) -> Iterator[Estimate]:
    """rstd = 1/√(σ² + another eps), or that with another mistake."""
    for slips, eps, rstd in of_any_eps(rstd_of(dx, right, formula), right, noise):
        doubt = "" if right.channels > 1 or eps in EPS_IN_USE else ANY_FACTOR
        for change in with_rstd(rstd):
            yield Estimate(placed(slips, change.where), change(formula), doubt)


def lost_variance(dx: Array, right: Right, formula: Formula, eps: float) -> Iterator[Estimate]:
    """A different rstd in each channel, as far as rounding of E[x²] − μ² with this eps can explain it."""
    rstd = rstd_of(dx, right, formula)
    if (abs((right.cache.rstd / rstd) ** 2 - 1) <= right.cancellation(eps)).all():
        far = f"where x lies up to {float(right.offset.max()):.3g} σ from 0"
        for change in with_rstd(rstd):
            yield Estimate(((LOST, f"E[x²] − μ² loses σ² {far}: take the mean of (x − μ)²"),), change(formula))


def running_statistics(dx: Array, right: Right, formula: Formula, noise: Array) -> Iterator[Estimate]:
    """A different σ² in each channel, and a different μ, which shows only if dx has a variance pathway."""
    xmu, _, _, gamma, axes = right.cache
    rstd = rstd_of(dx, right, formula)
    scale = gamma ** formula.gamma[0] * rstd
    rest = dx - scale * right.dy
    slope = (rest * xmu).sum(axes, keepdims=True) / (xmu * xmu).sum(axes, keepdims=True)
    sums = [values.sum(axes, keepdims=True) for values in (right.dy * xmu, right.dy)]
    shift = (-slope * right.n / (scale * rstd**2) - sums[0]) / sums[1]
    seen = (abs(slope) * abs(xmu).max(axes, keepdims=True) > 4 * noise * right.largest).any()
    for moved in [np.zeros_like(shift), np.where(np.isfinite(shift), shift, 0)][: 1 + seen]:
        of, mean = f"√(σ² + eps) = {float(1 / rstd.flat[0]):.4g}", right.mean - moved
        if moved.any():
            remedy = f"training takes μ and σ² of the batch; channel 0 has {of} and μ = {float(mean.flat[0]):.4g} here"
        else:
            remedy = f"σ is another, of running statistics perhaps; channel 0 has {of} here, but training takes the σ "
            remedy += "of the batch"
        wrong = formula._replace(rstd=(rstd,) * 3, shifts=(moved, moved))
        yield Estimate(((RUNNING, remedy),), wrong, "" if _of_other_data(mean, rstd, right) else ANY_STATISTIC)


def _of_other_data(mean: Array, rstd: Array, right: Right) -> bool:
    """Whether these statistics are no function of the batch that people take for its own."""
    known = chain([right.cache.rstd], (wrong for _, wrong in chain(singles(right), pairs(right))))
    if any((abs(rstd / other - 1) <= SAME).all() for other in known):
        return False
    alike = mean.flat[0] if right.channels > 1 else 0
    return all((abs(mean - other) * right.cache.rstd > SAME).any() for other in (right.mean, alike))


def factors(dx: Array, right: Right, formula: Formula) -> Iterator[Estimate]:
    """dx times one number, times one per sample, times one per channel."""
    form = formula.dx(dx.shape)
    batch, axes = right.cache.axes[0], right.cache.axes
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        FACTOR: ("dx is {} times what it should be", tuple(range(dx.ndim))),
        PER_SAMPLE: ("the samples of dx are multiplied by {} …", tuple(i for i in range(dx.ndim) if i != batch)),
        PER_CHANNEL: ("the channels of dx are multiplied by {} …", axes),
    }
    for name, (remedy, over) in found.items():
        if form.size >= 2 * right.batch and (name != PER_CHANNEL or right.channels > 1):
            weight = (form / right.largest) / right.largest
            k: Any = (dx * weight).sum(over, keepdims=True) / (form * weight).sum(over, keepdims=True)
            first = ", ".join(f"{value:.6g}" for value in k.flat[:3])
            doubt = ANY_FACTOR if name == PER_CHANNEL else ""
            yield Estimate(((name, remedy.format(first)),), formula.times(k, k, k), doubt)


def of_any_eps(fitted: Array, right: Right, noise: Array) -> Iterator[tuple[Named, float, Array]]:
    """Each eps that gives this rstd in every channel, alone or with another mistake: a usual value, and the estimate.

    `noise` is the rounding of the fitted rstd, as a fraction of it.
    """
    for slips, base, power in with_any_eps(right):
        spread = fitted**-power
        weight = 1 / (spread * noise) ** 2
        eps = float(((spread - base) * weight).sum() / weight.sum())
        usual = [value for value in EPS_IN_USE if abs(eps - value) <= 0.03 * value + 1 / float(np.sqrt(weight.sum()))]
        for value in (*sorted(usual, key=lambda value: abs(eps - value))[:1], eps):
            remedy = f"rstd is made with eps = {value:.3g}, but `forward` was given {right.eps:.3g}"
            if value >= 0:
                yield (*slips, (ANOTHER_EPS, remedy)), value, (base + value) ** (-1 / power)
