"""What is wrong with dx, in words.

Decisions:

- `search` finds the formula that gives dx, the right one or one with slips. If none is near, the answer is the sum of
  pathways that fits best.
- A dx that cannot be a gradient is named too: a wrong shape, NaN, 0 everywhere.
- Some upstream gradients hide mistakes. A dy that is constant per channel or proportional to xhat makes the right dx
  vanish, and if gamma is 1, a missing gamma does not show. The answer lists the mistakes that these data hide.
- Neither rounding (see `right`) nor leaving out a term that is 0 is called a mistake.
- If another name is possible, the answer says so, and why.
"""

import math
from itertools import permutations
from typing import NamedTuple

import numpy as np

from .. import _arrays
from ..reference import Array
from .regrouped import regrouped
from .right import Right
from .search import CORRECT, NEARLY, NOT_FINITE, UNKNOWN, ZERO, Search, Statistics
from .slips import SLIPS

CANNOT_TELL = "this dy cannot tell"
X_CANNOT_TELL = "this x cannot tell"
TRANSPOSED = "transposed layout"


class Verdict(NamedTuple):
    """The name of the mistake, the rest of the sentence, and the numbers of the answer."""

    slip: str
    words: str
    sure: bool = True
    rivals: tuple[str, ...] = ()
    error: float = math.inf
    pathways: tuple[float, float, float] = (math.nan, math.nan, math.nan)
    unseen: tuple[str, ...] = ()
    statistics: Statistics | None = None


def first_not_finite(values: Array) -> str:
    """The first value that is not finite, and its index, such as "nan at (2, 3)"."""
    where = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
    return f"{values[where]} at {where}"


def of_dx(dx: Array, right: Right) -> Verdict:
    """What is wrong with dx."""
    eps = max(_arrays.precision_of(array) for array in (right.x, dx))
    if not np.isfinite(dx).all():
        many = np.count_nonzero(~np.isfinite(dx))
        return Verdict(NOT_FINITE, f"dx is {first_not_finite(dx)}, one of {many:,} such values")
    if dx.shape != right.dx.shape:
        return _transposed(dx, right, eps) or Verdict(UNKNOWN, "no order of x's axes makes dx right", sure=False)
    search = Search(dx, right, eps)
    error = float((abs(dx - right.dx) / right.largest).max())
    verdict = _explain(search, error)
    unseen: tuple[str, ...] = ()
    if verdict.slip in (CORRECT, CANNOT_TELL):
        unseen = tuple(slip.name for slip in SLIPS if any(map(search.unseen, slip.forms(right))))
        unseen += tuple({name: None for name, _, formula in regrouped(right) if search.unseen(formula)})
    if verdict.slip == CORRECT and unseen:
        words = f"{verdict.words}; these data would not have shown: {', '.join(unseen)}"
        verdict = verdict._replace(words=words)
    return verdict._replace(error=error, pathways=_fit(dx, right, right.largest)[0], unseen=unseen)


def _explain(search: Search, error: float) -> Verdict:
    """What is wrong with a dx of x's shape."""
    dx, right = search.dx, search.right
    off = f"dx is off by {error:.2g} × its largest term"
    if _hides_mistakes(right):
        few = " (with two values in a channel every dy does)" if right.n == 2 else ""
        wrong = "" if search.correct() else f"; {off} all the same"
        return Verdict(
            CANNOT_TELL,
            f"in every channel it is a constant plus a multiple of xhat{few}, for which the right dx is 0 up to eps "
            f"and so are many wrong ones; use a random dy{wrong}",
        )
    if search.correct() and (error <= NEARLY or not search.explains_anything()):
        return Verdict(CORRECT, f"dx agrees with the exact gradient to {error:.1g} × its largest term")
    if not dx.any():
        return Verdict(
            ZERO,
            "∂(x − μ)/∂x is not 1 − 1 = 0 but the matrix I − 11ᵀ/n: each x moves its own deviation by 1 − 1/n and the "
            "others by −1/n",
        )
    if search.correct():
        return Verdict(
            X_CANNOT_TELL,
            f"it lies up to {right.offset.max():.2g} σ from 0, where {right.x.dtype} arithmetic may lose all of dx; "
            f"{off}; use x closer to 0, or float64",
        )
    transposed = _transposed(dx, right, search.eps)
    if transposed:
        return transposed
    found = search.explain()
    if found:
        doubts = found.doubts and f"; not sure, as {', and '.join(found.doubts)}"
        words = f"{found.remedy}; {off}, and fixing this leaves {found.left:.1g}{doubts or ''}"
        return Verdict(found.name, words, not doubts, found.rivals, statistics=found.statistics)
    words = f"{off} and no slip of the catalogue explains it; {_nearest_sum(search)}"
    return Verdict(UNKNOWN, words, sure=False)


def _nearest_sum(search: Search) -> str:
    """The sum of pathways that fits best, with gamma or without."""
    largest, bare = search.right.largest, search.right.without_gamma()
    fits = {"": _fit(search.dx, search.right, largest), "without gamma, ": _fit(search.dx, bare, largest)}
    which, ((direct, mean, variance), left) = min(fits.items(), key=lambda fit: fit[1][1])
    return (
        f"{which}nearest is {direct:.3g}·direct + {mean:.3g}·mean + {variance:.3g}·variance (1, 1, 1 would be right), "
        f"which leaves {left:.1g}"
    )


def _hides_mistakes(right: Right) -> bool:
    """Whether dy is nearly a constant plus a multiple of xhat in every channel."""
    xhat, axes = right.cache.xhat, right.cache.axes
    norm = (xhat * xhat).sum(axes, keepdims=True)
    rest = right.dy - right.dy.mean(axes, keepdims=True)
    rest = rest - xhat * (rest * xhat).sum(axes, keepdims=True) / np.where(norm > 0, norm, 1)
    return bool((abs(rest).max(axes) <= NEARLY * abs(right.dy).max(axes)).all())


def _transposed(dx: Array, right: Right, eps: float) -> Verdict | None:
    """Check for the right dx with its axes in another order, possibly reshaped to x's shape."""
    noise = min(math.sqrt(eps), max(lost.max() for lost in right.rounding(eps)))
    for order in permutations(range(dx.ndim)):
        turned = right.dx.transpose(order)
        if order != tuple(range(dx.ndim)) and dx.shape in (turned.shape, right.dx.shape):
            rest = dx - turned.reshape(dx.shape)
            moved = dx.shape != right.dx.shape or (turned.reshape(dx.shape) != right.dx).any()
            if moved and np.linalg.norm(rest) <= noise * np.linalg.norm(np.broadcast_to(right.largest, right.dx.shape)):
                return Verdict(
                    TRANSPOSED,
                    f"the values are right, but in the order {order} of x's axes; transpose them back",
                )
    return None


def _fit(dx: Array, right: Right, largest: Array) -> tuple[tuple[float, float, float], float]:
    """The factor of each pathway in dx, by least squares, and the remaining difference (root mean square)."""
    terms = np.broadcast_arrays(right.terms.direct, right.terms.mean, right.terms.variance)
    columns, values = np.stack([(term / largest).ravel() for term in terms], axis=1), (dx / largest).ravel()
    fitted = np.linalg.lstsq(columns, values, rcond=None)[0]
    direct, mean, variance = fitted.tolist()
    return (direct, mean, variance), float(np.sqrt(np.mean((values - columns @ fitted) ** 2)))
