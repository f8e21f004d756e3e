"""What is wrong with a gradient of batch normalization that somebody derived by hand.

Decisions:

- `search` finds the formula that gives dx, the right one or one of the catalogue. If none is near, the answer is the
  sum of pathways that fits best.
- What is no gradient at all is named too: a wrong shape, NaN, 0 everywhere.
- Some upstream gradients hide mistakes. A dy that is constant per channel or proportional to xhat makes the right dx
  vanish, and where gamma is 1 nobody sees that gamma is missing. The answer says what it could not have seen.
- What is no mistake is not called one: neither rounding (see `right`) nor leaving out a term that is 0.
"""

import math
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import ArrayLike

from .. import _arrays
from ..functional import Saved
from ..reference import Array
from .parameters import explain_parameter
from .right import Right
from .search import CORRECT, NEARLY, NOT_FINITE, UNKNOWN, ZERO, Search
from .slips import SLIPS

CANNOT_TELL = "this dy cannot tell"
X_CANNOT_TELL = "this x cannot tell"
TRANSPOSED = "transposed layout"


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; `str()` of it is the answer in words.

    Attributes
    ----------
    slip : str
        The mistake in dx by its name, two of them as "one + other"; or "correct", "unknown", "this dy cannot tell",
        "this x cannot tell".
    error : float
        The largest difference between dx and the right one, over the largest term of its channel; infinite where dx has
        another shape or is not finite.
    pathways : tuple of three floats
        The factors with which dx contains the direct pathway and those through the mean and the variance, by least
        squares; 1, 1, 1 if it is right, NaN where `error` is infinite.
    unseen : tuple of str
        Slips that would have given a correct dx with these data.
    dgamma, dbeta : str or None
        As `slip`, for the gradients of the parameters; None where they were not given.
    """

    slip: str
    error: float
    pathways: tuple[float, float, float]
    unseen: tuple[str, ...]
    dgamma: str | None
    dbeta: str | None
    words: str

    @property
    def correct(self) -> bool:
        """Whether everything that was given is right."""
        return all(found in (CORRECT, None) for found in (self.slip, self.dgamma, self.dbeta))

    def __str__(self) -> str:
        return self.words


@np.errstate(all="ignore")
def diagnose(
    dx: ArrayLike,
    dy: ArrayLike,
    saved: Saved,
    dgamma: ArrayLike | None = None,
    dbeta: ArrayLike | None = None,
) -> Diagnosis:
    """Say which slip makes a hand-written gradient differ from the right one.

    The right one is dx = dxhat·rstd + dmean/n + dvar·2(x − μ)/n with dxhat = dy·gamma, dmean = −rstd·Σdxhat and
    dvar = Σdxhat·(x − μ)·(−½)·rstd³. dx is compared with it and with every formula of a catalogue of slips. If none is
    near, the answer is the sum of the three pathways that fits best.

    Parameters
    ----------
    dx : array_like of floats
        The result in question, of x's shape. Axes in another order are one of the slips.
    dy : array_like
        Upstream gradient it was computed from, of x's shape and dtype. Take random numbers: where dy is constant per
        channel or proportional to xhat, as ones or y are, the right dx is 0 up to eps and hides mistakes.
    saved : Saved
        From `forward` of the same x, gamma, axis and eps.
    dgamma, dbeta : array_like of floats, optional
        Gradients of the parameters, which are checked too. A shape that is not (C,) is one of the slips.

    Returns
    -------
    Diagnosis
        `str()` of it is the answer in words.

    Raises
    ------
    TypeError
        If `saved` is not from `forward`, or a dtype does not fit.
    ValueError
        If dx has other axes than x, x or dy is not finite, or a channel has fewer than two values.

    Notes
    -----
    A dx is right if rounding in its dtype explains its error. A plain formula knows the mean of a channel only to
    eps·|x|, so float32 data far from 0 hides small slips; the answer says which.

    Every formula is worked out in float64 over the whole array: up to ten seconds for a million values.

    Examples
    --------
    >>> import numpy as np, batchnorm as bn
    >>> rng = np.random.default_rng(0)
    >>> x, dy, gamma = rng.standard_normal((8, 3)), rng.standard_normal((8, 3)), np.array([0.5, 1.0, 2.0])
    >>> y, saved = bn.forward(x, gamma)
    >>> dx = gamma * saved.rstd * (dy - dy.mean(axis=0))
    >>> bn.diagnose(dx, dy, saved).slip
    'variance pathway missing'
    >>> print(bn.diagnose(dx, np.ones_like(dy), saved).slip)
    this dy cannot tell
    >>> bn.diagnose(bn.backward(dy, saved).dx, dy, saved).correct
    True
    """
    right = Right.of(dy, saved)
    if not right.x.size:
        raise ValueError(f"x must have channels, got shape {right.x.shape} with axis={saved.axis}")
    dx = _arrays.as_float(dx, "dx")
    if sorted(dx.shape) != sorted(right.dx.shape):
        raise ValueError(f"dx must have the shape of x, {right.dx.shape}, or its axes in another order, got {dx.shape}")
    for name, values in {"x": right.x, "dy": right.dy}.items():
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite, got {_first_not_finite(values)}")
    slip, remedy, error, pathways, unseen = _of_dx(dx, right)
    words = [f"{slip}: {remedy}."]
    found: dict[str, str | None] = {"dgamma": None, "dbeta": None}
    for name, value in (("dgamma", dgamma), ("dbeta", dbeta)):
        if value is not None:
            found[name], remedy = explain_parameter(name, _arrays.as_float(value, name), right)
            words.append(f"{name}: {found[name]}{remedy and ': '}{remedy}.")
    return Diagnosis(slip, error, pathways, unseen, found["dgamma"], found["dbeta"], " ".join(words))


def _first_not_finite(values: Array) -> str:
    where = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
    return f"{values[where]} at {where}"


Found = tuple[str, str, float, tuple[float, float, float], tuple[str, ...]]


def _of_dx(dx: Array, right: Right) -> Found:
    """What is wrong with dx, the rest of the sentence, and the numbers of the answer."""
    eps = max(_arrays.precision_of(array) for array in (right.x, dx))
    nothing = math.inf, (math.nan, math.nan, math.nan), ()
    if not np.isfinite(dx).all():
        many = np.count_nonzero(~np.isfinite(dx))
        return NOT_FINITE, f"dx is {_first_not_finite(dx)}, one of {many:,} such values", *nothing
    search = Search(dx, right, eps) if dx.shape == right.dx.shape else None
    if search is None:
        return *(_transposed(dx, right, eps) or (UNKNOWN, "no order of x's axes makes dx right")), *nothing
    error = float((abs(dx - right.dx) / right.largest).max())
    slip, words = _explain(search, error)
    unseen: tuple[str, ...] = ()
    if slip in (CORRECT, CANNOT_TELL):
        unseen = tuple(other.name for other in SLIPS if any(map(search.unseen, other.forms(right))))
    if slip == CORRECT and unseen:
        words += f"; these data would not have shown: {', '.join(unseen)}"
    return slip, words, error, _fit(dx, right, right.largest)[0], unseen


def _explain(search: Search, error: float) -> tuple[str, str]:
    """The name of what is wrong with dx, and the rest of the sentence."""
    dx, right = search.dx, search.right
    off = f"dx is off by {error:.2g} × its largest term"
    if _hides_mistakes(right):
        few = " (with two values in a channel every dy does)" if right.n == 2 else ""
        wrong = "" if search.correct() else f"; {off} all the same"
        return CANNOT_TELL, (
            f"in every channel it is a constant plus a multiple of xhat{few}, for which the right dx is 0 up to eps "
            f"and many a wrong one too; take a random one{wrong}"
        )
    if search.correct() and (error <= NEARLY or not search.explains_anything()):
        return CORRECT, f"dx agrees with the exact gradient to {error:.1g} × its largest term"
    if not dx.any():
        return ZERO, (
            "∂(x − μ)/∂x is not 1 − 1 = 0 but the matrix I − 11ᵀ/n: each x moves its own deviation by 1 − 1/n and the "
            "others by −1/n"
        )
    if search.correct():
        return X_CANNOT_TELL, (
            f"it lies up to {right.offset.max():.2g} σ from 0, where {right.x.dtype} arithmetic may lose all of dx; "
            f"{off}; take x nearer to 0, or float64"
        )
    found = search.explain()
    if found:
        return found.name, f"{found.remedy}; {off}, and mending this leaves {found.left:.1g}"
    return _transposed(dx, right, search.eps) or (
        UNKNOWN,
        f"{off} and no slip of the catalogue explains it; {_nearest_sum(search)}",
    )


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
    """Whether dy is a constant plus a multiple of xhat in every channel, nearly."""
    xhat, axes = right.cache.xhat, right.cache.axes
    norm = (xhat * xhat).sum(axes, keepdims=True)
    rest = right.dy - right.dy.mean(axes, keepdims=True)
    rest = rest - xhat * (rest * xhat).sum(axes, keepdims=True) / np.where(norm > 0, norm, 1)
    return bool((abs(rest).max(axes) <= NEARLY * abs(right.dy).max(axes)).all())


def _transposed(dx: Array, right: Right, eps: float) -> tuple[str, str] | None:
    """Whether dx is the right one with its axes in another order, or read in that order with x's shape."""
    noise = min(math.sqrt(eps), max(lost.max() for lost in right.rounding(eps)))
    for order in permutations(range(dx.ndim)):
        turned = right.dx.transpose(order)
        if order != tuple(range(dx.ndim)) and dx.shape in (turned.shape, right.dx.shape):
            rest = dx - turned.reshape(dx.shape)
            if np.linalg.norm(rest) <= noise * np.linalg.norm(np.broadcast_to(right.largest, right.dx.shape)):
                return (
                    TRANSPOSED,
                    f"the values are right, but lie in the order {order} of x's axes; transpose them back",
                )
    return None


def _fit(dx: Array, right: Right, largest: Array) -> tuple[tuple[float, float, float], float]:
    """The factor of each pathway in dx, by least squares, and what that leaves (root mean square)."""
    terms = np.broadcast_arrays(right.terms.direct, right.terms.mean, right.terms.variance)
    columns, values = np.stack([(term / largest).ravel() for term in terms], axis=1), (dx / largest).ravel()
    fitted = np.linalg.lstsq(columns, values, rcond=None)[0]
    direct, mean, variance = fitted.tolist()
    return (direct, mean, variance), float(np.sqrt(np.mean((values - columns @ fitted) ** 2)))
