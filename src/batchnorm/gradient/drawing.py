"""A picture of one channel: the given gradient, the right one, and the pathways whose sum is the right one.

It shows the channel with the largest error. If there are many values, only the first are drawn: more would blur.
"""

from os import PathLike
from typing import Any

import numpy as np

from ..reference import Array
from .right import Right

MANY = 48
"""The most values of a channel that are drawn."""

COLOURS = {"given": "#d62728", "right": "0.2", "direct": "#1f77b4", "mean": "#ff7f0e", "variance": "#2ca02c"}


def worst_channel(dx: Array, right: Right) -> int:
    """The channel with the largest error, as a fraction of the largest term; the first if dx has another shape."""
    if dx.shape != right.dx.shape:
        return 0
    off = np.nan_to_num(abs(dx - right.dx) / right.largest, nan=np.inf)
    return int(off.max(axis=right.cache.axes).argmax())


def draw(dx: Array, right: Right, slip: str, sure: bool, path: str | PathLike[str] | None) -> Any:
    """The figure; if there is a path, it is written and closed."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ImportError("plot needs matplotlib, install it with python -m pip install matplotlib") from None
    channel = worst_channel(dx, right)

    def of_channel(values: Array) -> Array:
        rows = np.moveaxis(np.broadcast_to(values, right.dx.shape), right.axis, 0)
        first: Array = rows[channel].ravel()[:MANY]
        return first

    figure, (above, below) = pyplot.subplots(2, figsize=(8, 5.5), sharex=True, layout="constrained")
    places = np.arange(min(right.n, MANY))
    above.plot(places, of_channel(right.dx), "o-", color=COLOURS["right"], fillstyle="none", label="right", linewidth=1)
    if dx.shape == right.dx.shape:
        given = of_channel(dx)
        above.vlines(places, of_channel(right.dx), given, color=COLOURS["given"], alpha=0.4)
        above.plot(places, given, ".", color=COLOURS["given"], label="given", markersize=8)
    for name, term in zip(("direct", "mean", "variance"), right.terms[:3], strict=True):
        below.plot(places, of_channel(term), ".-", color=COLOURS[name], label=name, linewidth=1)
    above.set(ylabel="dx")
    below.set(ylabel="pathways; their sum is right", xlabel="value of the channel, in C order")
    for axes in (above, below):
        axes.axhline(0, color="0.85", linewidth=1, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    shown = f"the first {MANY} of {right.n:,} values" if right.n > MANY else f"all {right.n} values"
    above.set_title(f"channel {channel} of {right.channels}, {shown}", fontsize="small", color="0.35")
    figure.suptitle(slip if sure else f"{slip} (not sure)", fontweight="bold")
    if path is not None:
        try:
            figure.savefig(path, dpi=150)
        finally:
            pyplot.close(figure)
    return figure
