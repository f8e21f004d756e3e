"""How far data have moved from the statistics that a plan normalizes them with.

Decisions:

- Each channel is compared as one normal distribution with another. This is exact for mean and variance, and says
  nothing about the shape.
- There are no p-values: the values of a channel depend on each other, especially neighbouring pixels, so any test that
  counts them finds a difference.
- A hint names a common mistake if the numbers look like it: statistics that were never trained, data scaled by 255,
  channels in another order.
"""

import os
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from .moments import Moments

Numbers = NDArray[np.float64]

_SHOWN = 10
"""The number of channels in the table."""
_FEW = 4
"""The most channels for which all orders are tried."""
_BYTE = 255.0
_ABOUT = 4.0
"""Numbers within this factor are considered the same."""
_NOTABLE = 0.05
"""The least divergence for which a hint suggests another order of channels."""


@dataclass(frozen=True, slots=True, eq=False)
class Drift:
    """How the moments m, v of data differ from a plan's μ, σ²; `str()` gives a table of the worst channels.

    Attributes
    ----------
    shift : ndarray of float64, shape (C,)
        (m − μ)/√(σ² + eps), the mean of the normalized data.
    ratio : ndarray of float64, shape (C,)
        v/σ², 1 where both are 0.
    kl : ndarray of float64, shape (C,)
        ½(ratio + shift² − 1 − ln ratio), in nats: for eps = 0 the Kullback–Leibler divergence of the normal
        distribution of the data from that of the plan. It is 0 where nothing has moved.
    hints : tuple of str
        Common mistakes that would explain the numbers.
    data : Moments
        The moments of the data.
    mean, std : ndarray of float64, shape (C,)
        Mean and standard deviation of the plan.
    """

    shift: Numbers
    ratio: Numbers
    kl: Numbers
    hints: tuple[str, ...]
    data: Moments
    mean: Numbers
    std: Numbers

    def worst(self, k: int = 5) -> NDArray[np.intp]:
        """The channels with the largest divergence, the worst first; NaN is worst.

        Parameters
        ----------
        k : int, default 5
            The number of channels.
        """
        return np.argsort(np.where(np.isnan(self.kl), -np.inf, -self.kl), kind="stable")[:k]

    def __str__(self) -> str:
        rows = ["channel        mean    expected     shift         std    expected     ratio        kl"]
        rows += [
            f"{c:7d} {self.data.mean[c]:11.4g} {self.mean[c]:11.4g} {self.shift[c]:+8.2f}σ "
            f"{self.data.std()[c]:11.4g} {self.std[c]:11.4g} {self.ratio[c]:9.3g} {self.kl[c]:9.3g}"
            for c in self.worst(_SHOWN)
        ]
        left = len(self.kl) - _SHOWN
        if left > 0:
            rows.append(f"and {left} channels that have moved less")
        return "\n".join([*rows, *(f"hint: {hint}" for hint in self.hints)])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw shift and ratio of every channel into a file, with matplotlib.

        Parameters
        ----------
        path : path-like
            The picture. Its suffix chooses the format, such as PNG, PDF or SVG.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4.5), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        channels = np.arange(len(self.shift))
        upper.axhspan(-1, 1, color="0.93")
        upper.vlines(channels, 0, self.shift, color="#0b6e99")
        upper.plot(channels, self.shift, "o", color="#0b6e99", markersize=3)
        upper.set_ylabel("shift (σ)")
        lower.axhspan(0.5, 2, color="0.93")
        lower.set_yscale("log")
        lower.vlines(channels, 1, self.ratio, color="#d9730d")
        lower.plot(channels, self.ratio, "o", color="#d9730d", markersize=3)
        lower.set_ylabel("variance ratio")
        lower.set_xlabel("channel")
        for c in self.worst(3):
            upper.annotate(str(c), (c, self.shift[c]), xytext=(0, 4), textcoords="offset points", ha="center")
        for panel in (upper, lower):
            panel.spines[["top", "right"]].set_visible(False)
        figure.suptitle("\n".join(["How far the data have moved from the statistics", *self.hints]), fontsize=10)
        figure.savefig(path, dpi=150)


def divergence(shift: Numbers, ratio: Numbers) -> Numbers:
    """KL of N(shift, ratio) from N(0, 1): ½(ratio + shift² − 1 − ln ratio)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        kl: Numbers = np.where(ratio == np.inf, np.inf, (ratio + shift**2 - 1 - np.log(ratio)) / 2)
    return kl


def _moved(m: Numbers, v: Numbers, mean: Numbers, var: Numbers, eps: float) -> tuple[Numbers, Numbers]:
    """Shift and ratio."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.where(m == mean, 0.0, (m - mean) / np.sqrt(var + eps))
        ratio = np.where(v == var, 1.0, v / var)
    return shift, ratio


def drift(data: Moments, mean: Numbers, var: Numbers, eps: float) -> Drift:
    """Compare the moments of data with fixed statistics."""
    shift, ratio = _moved(data.mean, data.var(), mean, var, eps)
    hints = []
    if len(mean) and (mean == 0).all() and (var == 1).all():
        hints.append("mean 0 and var 1 in every channel are what a new layer has: were the statistics ever trained?")
    for factor, words in (
        (_BYTE, "255 times as large as expected: divide x by 255?"),
        (1 / _BYTE, "255 times as small as expected: was x divided by 255 once too often?"),
    ):
        if len(ratio) and ((ratio > (factor / _ABOUT) ** 2) & (ratio < (factor * _ABOUT) ** 2)).all():
            hints.append(f"the data are about {words}")
    order = _better_order(data, mean, var, eps)
    if order is not None:
        swapped = " (BGR for RGB?)" if order == (2, 1, 0) else ""
        hints.append(f"channels taken in the order {order} fit better{swapped}")
    return Drift(shift, ratio, divergence(shift, ratio), tuple(hints), data, mean, np.sqrt(var))


def _better_order(data: Moments, mean: Numbers, var: Numbers, eps: float) -> tuple[int, ...] | None:
    """An order of a few channels in which the data fit at least twice as well as in their own order."""
    if not 2 <= len(mean) <= _FEW:
        return None
    total = {}
    for order in permutations(range(len(mean))):
        taken = list(order)
        total[order] = float(divergence(*_moved(data.mean[taken], data.var()[taken], mean, var, eps)).sum())
    own, best = next(iter(total)), min(total, key=total.__getitem__)
    return best if total[own] > _NOTABLE and total[best] < total[own] / 2 else None
