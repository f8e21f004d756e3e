"""What is wrong with a hand-derived gradient of batch normalization: the question and its answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .. import _arrays
from ..reference import Array
from ..saved import Saved
from .parameters import explain_parameter
from .right import Right
from .search import CORRECT
from .verdict import first_not_finite, of_dx


@dataclass(frozen=True)
class Diagnosis:
    """The result of `diagnose`; `str()` gives the answer in words.

    Attributes
    ----------
    slip : str
        The name of the mistake in dx alone, two of them as "one + other"; or "correct", "unknown", "this dy cannot
        tell", "this x cannot tell". `correct` is about all gradients that were given.
    sure : bool
        Whether nothing else explains dx as well. If False, `str()` of the answer says why.
    rivals : tuple of str
        Other slips that explain dx as well with these data.
    error : float
        The largest difference between dx and the right one, divided by the largest term of its channel; infinite if dx
        has another shape or is not finite.
    pathways : tuple of three floats
        The factors of the direct, mean and variance pathways in dx, by least squares; 1, 1, 1 if dx is right, NaN if
        `error` is infinite.
    unseen : tuple of str
        Slips that would have given a correct dx with these data.
    dgamma, dbeta : str or None
        Like `slip`, for the gradients of the parameters; None if they were not given.
    """

    slip: str
    sure: bool
    rivals: tuple[str, ...]
    error: float
    pathways: tuple[float, float, float]
    unseen: tuple[str, ...]
    dgamma: str | None
    dbeta: str | None
    words: str = field(repr=False)
    _dx: Array = field(repr=False, compare=False)
    _right: Right = field(repr=False, compare=False)

    @property
    def correct(self) -> bool:
        """Whether all given gradients are right."""
        return all(found in (CORRECT, None) for found in (self.slip, self.dgamma, self.dbeta))

    def __str__(self) -> str:
        return self.words

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """Draw the channel with the largest error: the given gradient, the right one and the three pathways.

        Parameters
        ----------
        path : path-like, optional
            The file to write, as PNG, PDF or SVG by its suffix. Without it nothing is written.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        ImportError
            If matplotlib is missing.
        ValueError
            If matplotlib has no format for this suffix.
        """
        from .drawing import draw  # here, because only this needs matplotlib

        return draw(self._dx, self._right, self.slip, self.sure, path)


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
    dvar = Σdxhat·(x − μ)·(−½)·rstd³. dx is compared to it, and to variants with one or two slips of a catalogue. If
    none is near, the answer is the sum of the three pathways that fits best.

    The catalogue has pathways that are missing, counted twice or of the wrong sign; gamma, rstd, n, a factor 2 or an
    eps forgotten, misplaced or used too often, everywhere or in some pathways; terms without gamma·rstd/n; n − 1, the
    batch size and other counts instead of n; sums that are forgotten or over the wrong axes, as statistics may be; x
    instead of x − μ; wrong standard deviations, running statistics; constant factors, and factors per sample.

    Parameters
    ----------
    dx : array_like of floats
        The gradient to check, of x's shape. Axes in another order are one of the slips.
    dy : array_like
        The upstream gradient from which dx was computed, of x's shape and dtype. Use random numbers: if dy is constant
        per channel or proportional to xhat, like ones or y, the right dx is 0 up to eps and hides mistakes.
    saved : Saved
        From `forward` of the same x, gamma, axis and eps.
    dgamma, dbeta : array_like of floats, optional
        Gradients of the parameters, to be checked too. A shape that is not (C,) is one of the slips.

    Returns
    -------
    Diagnosis
        `str()` gives the answer in words.

    Raises
    ------
    TypeError
        If `saved` is not from `forward`, or a dtype is wrong.
    ValueError
        If the axes of dx differ from those of x, x or dy is not finite, or a channel has fewer than two values.

    Notes
    -----
    A dx is right if rounding in its dtype explains its error. A plain formula knows the mean of a channel only to
    `eps·|x|`, so float32 data far from 0 hide small slips; the answer says which.

    Two slips are named as "one + other". If these data do not distinguish a slip from another, or if nothing explains
    dx down to rounding, `sure` is False, and the answer says so.

    Thousands of formulas are tried at a few hundred positions, and those that come near over all of x, in float64.

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
            raise ValueError(f"{name} must be finite, got {first_not_finite(values)}")
    verdict = of_dx(dx, right)
    words = [f"{verdict.slip}: {verdict.words}."]
    if dgamma is not None or dbeta is not None:
        words = [f"dx: {words[0]}"]
    found: dict[str, str | None] = {"dgamma": None, "dbeta": None}
    for name, value in (("dgamma", dgamma), ("dbeta", dbeta)):
        if value is not None:
            found[name], remedy = explain_parameter(name, _arrays.as_float(value, name), right, verdict.statistics)
            words.append(f"{name}: {found[name]}{remedy and ': '}{remedy}.")
    slip, _, sure, rivals, error, pathways, unseen, _ = verdict
    parameters = found["dgamma"], found["dbeta"]
    return Diagnosis(slip, sure, rivals, error, pathways, unseen, *parameters, " ".join(words), dx, right)
