"""Batch normalization of values that are not grouped by channel: over other axes, or after a reshape.

These are not slips in the right formula but the right formula for something else, so each is a formula of its own.
"""

import math
from collections.abc import Iterator

import numpy as np

from ..reference import Array, Cache
from .changes import over_other_axes
from .formula import Formula, Parts
from .right import Right

OTHER_AXES = "normalized over the wrong axes"
RESHAPED = "reshaped without transposing"
DY_RESHAPED = "dy reshaped without transposing"
DY_TRANSPOSED = "transpose the channels of dy before the reshape too, as those of x, because reshape moves no values"
GAMMA_ELSEWHERE = "gamma along the wrong axis"


def regrouped(right: Right) -> Iterator[tuple[str, str, Formula]]:
    """The name, remedy and formula of each mistake."""
    gamma = right.cache.gamma
    for axes in {axes for sets in over_other_axes(right).values() for axes in sets if axes}:
        remedy = f"the statistics of a channel are over the axes {right.cache.axes}, not over {axes}"
        yield OTHER_AXES, remedy, _normalized(right.x.astype(np.float64), right.dy * gamma, axes, right.eps)
    if right.axis not in (0, right.dy.ndim - 1):
        x, dy = (np.asarray(array, np.float64).reshape(-1, right.channels) for array in (right.x, right.dy))
        remedy = "transpose the channels to the end before reshape(-1, C), which moves no values"
        yield RESHAPED, remedy, _normalized(x, dy * gamma.ravel(), (0,), right.eps)
    for moved in misread(right):
        yield DY_RESHAPED, DY_TRANSPOSED, Formula.right(Parts(moved, right.cache))
    for axis, size in enumerate(right.dy.shape):
        if axis != right.axis and size == right.channels > 1:
            along = np.moveaxis(gamma, right.axis, axis)
            remedy = f"gamma belongs to the axis {right.axis}, not {axis}: reshape it before it is multiplied"
            cache = right.cache._replace(gamma=np.ones_like(gamma))
            yield GAMMA_ELSEWHERE, remedy, Formula.right(Parts(right.dy * along, cache))


def misread(right: Right) -> Iterator[Array]:
    """dy after reshape(-1, C) or reshape(C, -1) without a transpose, beside an x that was transposed."""
    for place in {0, right.dy.ndim - 1} - {right.axis}:
        shape = np.moveaxis(right.dy, right.axis, place).shape
        moved = np.moveaxis(right.dy.reshape(shape), place, right.axis)
        if (moved != right.dy).any():
            yield moved


def _normalized(x: Array, dxhat: Array, axes: tuple[int, ...], eps: float) -> Formula:
    """The right formula for values that are normalized over these axes."""
    n = math.prod(x.shape[axis] for axis in axes)
    xmu = x - x.sum(axes, keepdims=True) / n
    rstd = 1 / np.sqrt((xmu * xmu).sum(axes, keepdims=True) / n + eps)
    return Formula.right(Parts(dxhat, Cache(xmu, xmu * rstd, rstd, np.ones_like(rstd), axes)))
