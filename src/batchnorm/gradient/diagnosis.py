"""What is wrong with a gradient of batch normalization that somebody derived by hand.

Decisions:

- Of the right formula and those of the catalogue, the one nearest to what came is named, the first of those that are
  alike. If none is near, the sum of pathways that fits best is told.
- Differences are fractions of the largest term of their channel, so that small channels count. What differs from the
  right dx by no more than rounding is correct, whatever else would explain it better.
- Some upstream gradients hide mistakes. A dy that is constant per channel or proportional to xhat makes the right dx
  vanish, and where gamma is 1 nobody sees that gamma is missing. The answer says what it could not have seen.
"""

import math
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import ArrayLike

from .. import _arrays
from ..functional import Saved
from ..reference import Array
from .slips import PARAMETER_SLIPS, SLIPS, Right, Slip

CORRECT = "correct"
CANNOT_TELL = "this dy cannot tell"
TRANSPOSED = "transposed layout"
UNKNOWN = "unknown"

ROUNDING = 4
"""Differences of this many eps of the dtype (root mean square) are nobody's mistake."""

NEARLY = 1e-3
"""What may be left of a difference that a slip explains, and of a dy that is a constant plus a multiple of xhat."""


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; `str()` of it is the answer in words.

    Attributes
    ----------
    slip : str
        The mistake in dx by its name; or "correct", "this dy cannot tell", "unknown".
    error : float
        The largest difference between dx and the right one, over the largest term of its channel; infinite where dx has
        another shape.
    pathways : tuple of three floats
        How often dx has the direct pathway and those through the mean and the variance in it, by least squares; 1, 1, 1
        if it is right.
    unseen : tuple of str
        Slips that would have given a correct dx with these data.
    dgamma, dbeta : str or None
        As `slip`, of the gradients of the parameters; None where they were not given.
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
    dvar = Σdxhat·(x − μ)·(−½)·rstd³. dx is compared with it and with every formula of a catalogue of slips; if none is
    near, the sum of the three pathways that fits best is told.

    Parameters
    ----------
    dx : array_like of float32 or float64
        The result in question: of x's shape, or with its axes in another order, which is one of the slips.
    dy : array_like
        Upstream gradient it was computed from, of x's shape and dtype. Take random numbers: where dy is constant per
        channel or proportional to xhat, as ones or y are, the right dx is 0 up to eps and hides mistakes.
    saved : Saved
        From `forward` of the same x, gamma, axis and eps.
    dgamma, dbeta : array_like, shape (C,), optional
        Gradients of the parameters, looked at too.

    Returns
    -------
    Diagnosis
        `str()` of it is the answer in words.

    Raises
    ------
    TypeError
        If `saved` is not from `forward`, or a dtype does not fit.
    ValueError
        If a shape does not fit, a value is not finite, or a channel has fewer than two values.

    Notes
    -----
    Every formula is worked out in float64 over the whole array: a second for a million values.

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
    right = Right(dy, saved)
    if not right.x.size:
        raise ValueError(f"x must have channels, got shape {right.x.shape} with axis={saved.axis}")
    dx = _arrays.as_float(dx, "dx")
    if sorted(dx.shape) != sorted(right.dx.shape):
        raise ValueError(f"dx must have the shape of x, {right.dx.shape}, or its axes in another order, got {dx.shape}")
    given = {
        name: None if value is None else _arrays.as_channels(value, name, saved.mean.size)
        for name, value in (("dgamma", dgamma), ("dbeta", dbeta))
    }
    for name, values in {"x": right.x, "dy": right.dy, "dx": dx, **given}.items():
        if values is not None and not np.isfinite(values).all():
            where = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise ValueError(f"{name} must be finite, got {values[where]} at {where}")
    return _diagnose(dx, given, right)


def _diagnose(dx: Array, given: dict[str, Array | None], right: Right) -> Diagnosis:
    eps = float(max(np.finfo(array.dtype).eps for array in (right.x, dx)))
    error, pathways = math.inf, (math.nan, math.nan, math.nan)
    unseen: tuple[str, ...] = ()
    if dx.shape != right.dx.shape:
        slip, words = _transposed(dx, right, eps) or (UNKNOWN, "no order of x's axes makes dx right")
    else:
        error = float((abs(dx - right.dx) / right.largest).max())
        pathways = _fit(dx, right)
        slip, words = _of_dx(dx, right, eps, error, pathways)
        if slip in (CORRECT, CANNOT_TELL):
            unseen = tuple(other.name for other in SLIPS if _unseen(other, right, eps))
    if slip == CORRECT:
        words += _about_unseen(unseen)
    found = {
        name: None if values is None else _of_parameter(name, values, right, eps) for name, values in given.items()
    }
    words = " ".join([f"{slip}: {words}.", *(f"{name}: {what}." for name, what in found.items() if what)])
    return Diagnosis(slip, error, pathways, unseen, found["dgamma"], found["dbeta"], words)


def _of_dx(dx: Array, right: Right, eps: float, error: float, pathways: tuple[float, float, float]) -> tuple[str, str]:
    """The name of what is wrong with dx, and the rest of the sentence."""
    off = f"dx is off by {error:.2g} of its largest term"
    if _hides_mistakes(right):
        few = " (with two values in a channel every dy does)" if right.n == 2 else ""
        wrong = f"; {off} all the same" if error > math.sqrt(eps) else ""
        return CANNOT_TELL, (
            f"in every channel it is a constant plus a multiple of xhat{few}, for which the right dx is 0 up to eps "
            f"and many a wrong one too; take a random one{wrong}"
        )
    name, distance = _closest(dx, right, eps)
    if name == CORRECT:
        return name, f"dx agrees with the exact gradient to {error:.1g} of its largest term"
    if name == UNKNOWN:
        direct, mean, variance = pathways
        return _transposed(dx, right, eps) or (
            UNKNOWN,
            (
                f"{off} and no slip of the catalogue explains it; nearest is {direct:.3g}·direct + {mean:.3g}·mean + "
                f"{variance:.3g}·variance (1, 1, 1 would be right), which leaves "
                f"{_distance(right, dx, right.paths(*pathways)):.1g}"
            ),
        )
    remedy = next(slip.remedy for slip in SLIPS if slip.name == name)
    return name, f"{remedy}; {off}, of which this leaves {distance:.1g} unexplained"


def _hides_mistakes(right: Right) -> bool:
    """Whether dy is a constant plus a multiple of xhat in every channel, nearly."""
    xhat, axes = right.cache.xhat, right.cache.axes
    norm = (xhat * xhat).sum(axes, keepdims=True)
    rest = right.dy - right.dy.mean(axes, keepdims=True)
    rest = rest - xhat * (rest * xhat).sum(axes, keepdims=True) / np.where(norm > 0, norm, 1)
    return bool((abs(rest).max(axes) <= NEARLY * abs(right.dy).max(axes)).all())


def _distance(right: Right, dx: Array, other: Array) -> float:
    """Root mean square of the difference, over the largest terms or over `other` where that is larger."""
    size = np.sqrt(np.mean((other / right.largest) ** 2))
    distance = np.sqrt(np.mean(((dx - other) / right.largest) ** 2)) / max(1.0, size)
    return float(distance) if np.isfinite(distance) else math.inf


def _closest(dx: Array, right: Right, eps: float) -> tuple[str, float]:
    """The formula that dx is nearest to, and how near it is."""
    distances = {CORRECT: _distance(right, dx, right.dx)}
    if distances[CORRECT] > ROUNDING * eps:
        for slip in SLIPS:
            distances[slip.name] = min(_distance(right, dx, form) for form in slip.forms(right))
    nearest = min(distances.values())
    name = next(name for name, distance in distances.items() if distance <= 2 * nearest + eps / 2)
    believed = max(math.sqrt(eps), 0 if name == CORRECT else NEARLY * distances[CORRECT])
    return (name if distances[name] <= believed else UNKNOWN), distances[name]


def _transposed(dx: Array, right: Right, eps: float) -> tuple[str, str] | None:
    """Whether dx is the right one with its axes in another order, or read in that order with x's shape."""
    for order in permutations(range(dx.ndim)):
        turned = right.dx.transpose(order)
        if order != tuple(range(dx.ndim)) and dx.shape in (turned.shape, right.dx.shape):
            rest = dx - turned.reshape(dx.shape)
            if np.linalg.norm(rest) <= math.sqrt(eps) * np.linalg.norm(right.dx):
                return (
                    TRANSPOSED,
                    f"the values are right, but lie in the order {order} of x's axes; transpose them back",
                )
    return None


def _fit(dx: Array, right: Right) -> tuple[float, float, float]:
    """How often each pathway is in dx, by least squares."""
    terms = np.broadcast_arrays(right.terms.direct, right.terms.mean, right.terms.variance)
    columns = np.stack([(term / right.largest).ravel() for term in terms], axis=1)
    direct, mean, variance = np.linalg.lstsq(columns, (dx / right.largest).ravel(), rcond=None)[0].tolist()
    return direct, mean, variance


def _unseen(slip: Slip, right: Right, eps: float) -> bool:
    """Whether a slip changes no more with these data than rounding may, its own and that of the right dx."""
    return any(_distance(right, form, right.dx) <= 2 * ROUNDING * eps for form in slip.forms(right))


def _about_unseen(unseen: tuple[str, ...]) -> str:
    harmless = [f"; {slip.name}: {slip.remedy}" for slip in SLIPS if slip.harmless]
    others = [name for name in unseen if not any(slip.harmless and slip.name == name for slip in SLIPS)]
    return "".join(harmless) + (f"; these data would not have shown: {', '.join(others)}" if others else "")


def _of_parameter(name: str, values: Array, right: Right, eps: float) -> str:
    """The name of what is wrong with dgamma or dbeta."""
    which = ("dgamma", "dbeta").index(name)
    terms = right.sums(abs(right.dy), abs(right.cache.xhat))[which]
    largest = np.where(terms > 0, terms, 1)

    def distance(other: Array) -> float:
        other = other / largest
        return float(abs(values / largest - other).max() / max(1.0, abs(other).max()))

    exact = distance((right.terms.dgamma, right.terms.dbeta)[which])
    if exact <= math.sqrt(eps):
        return CORRECT
    distances = {slip.name: distance(slip.gradients(right)[which]) for slip in PARAMETER_SLIPS}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] <= max(math.sqrt(eps), NEARLY * exact) else UNKNOWN
