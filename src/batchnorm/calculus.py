"""Derivatives beyond the gradient: tangents (forward mode), and the gradient of the gradient.

Decisions:

- They need no kernels of their own. Per channel, a tangent of y is γ·rstd·ẋ plus a multiple of x − μ plus a constant.
  The output of `backward` has the same form, because P, the projection in both, is its own transpose. The gradient of
  dx has one array more, which the kernel adds as a residual.
- Between passes over memory there are only a few float64 numbers per channel. Compiled functions compute those of
  tangents, and `_Second` those of second gradients; each formula is written once.
- `through=` switches off the paths through mean and variance, as in `backward`. Without both, statistics are fixed.
- 16-bit floats are computed in float32, because intermediate results between passes would lose digits.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _arrays, _kernels, _threads, functional
from ._arrays import Array, Float, Float_co, Gradient_co, MaybeNone
from ._kernels import Chosen
from ._kernels.per_channel import moment_tangents, y_tangent
from ._kernels.runtime import (
    GAMMA,
    GRADIENT_ROWS,
    RSTD,
    STATISTICS_ROWS,
    SUM_DY,
    SUM_DY_XMU,
    THROUGH_MEAN,
    THROUGH_VARIANCE,
    UPSTREAM,
    UPSTREAM_DMEAN,
    UPSTREAM_DVAR,
)
from .functional import THROUGH, Through
from .saved import Saved

if TYPE_CHECKING:
    from . import _keywords
    from ._kernels.kernels import Kernels

Numbers = NDArray[np.float64]

_SecondNeedName = Literal["dy", "x", "gamma"]
SecondNeed = _SecondNeedName | tuple[_SecondNeedName, ...] | Collection[_SecondNeedName]

_SECOND_NEED: tuple[_SecondNeedName, ...] = ("dy", "x", "gamma")
_NOWHERE: list[Numbers | None] = [None] * 4
"""Parameters and moments do not move."""


class Tangents(NamedTuple, Generic[Float_co]):
    """Derivatives along a direction: of y, with x's shape and dtype, and of mean and var, float64 of shape (C,)."""

    dy: NDArray[Float_co]
    dmean: Numbers
    dvar: Numbers


class SecondGradients(NamedTuple, Generic[Gradient_co]):
    """Gradients with respect to dy, x and gamma; None if not requested or if there was no gamma."""

    dy: Gradient_co
    x: Gradient_co
    gamma: Array | MaybeNone


def _n(saved: Saved) -> float:
    """n, or with weights their sum; 1 where that is 0."""
    return (saved._layout.values if saved._counted is None else saved._counted.weight) or 1


def _of_moments(
    sums: Numbers, n: float, paths: int, dmean: Numbers | None = None, dvar: Numbers | None = None
) -> Numbers:
    """μ̇ and σ̇², including the given dmean and dvar, in place of the sums."""
    moment_tangents(sums, n, paths)
    if dmean is not None:
        sums[0] += dmean
    if dvar is not None:
        sums[1] += dvar
    return sums


def _of_y(saved: Saved, tangents: Numbers, dgamma: Numbers | None, dbeta: Numbers | None) -> Numbers:
    """Slope and offset of ẏ = γ·rstd·ẋ + slope·(x − μ) + offset, with μ̇ and σ̇² in `tangents`."""
    along = np.empty(tangents.shape)
    y_tangent(saved._statistics, tangents, along, dgamma, dbeta)
    return along


def _scale(saved: Saved) -> Numbers:
    """γ·rstd"""
    scale: Numbers = saved._statistics[GAMMA] * saved._statistics[RSTD]
    return scale


class _Second(NamedTuple):
    """g_x = of_dy·dy + weight·(of_ddx·ddx + slope·(x − μ) + offset), with weight 1 if there are no weights."""

    gamma: Numbers
    of_dy: Numbers
    of_ddx: Numbers
    slope: Numbers
    offset: Numbers

    @classmethod
    def of(cls, sums: Numbers, saved: Saved, paths: int, ddgamma: Numbers | None) -> _Second:
        n, gamma, rstd = _n(saved), saved._statistics[GAMMA], saved._statistics[RSTD]
        mean, variance = bool(paths & THROUGH_MEAN), bool(paths & THROUGH_VARIANCE)  # numbers: 0 without the path
        a = 0.0 if ddgamma is None else ddgamma
        mean_ddx, mean_ddx_xhat = sums[0] / n, rstd * sums[1] / n
        dbeta, dgamma, product = sums[2], rstd * sums[3], sums[4]
        inner = product - mean * mean_ddx * dbeta - variance * mean_ddx_xhat * dgamma
        of_dy = rstd * (a - variance * gamma * rstd * mean_ddx_xhat)
        of_ddx = -variance * gamma * rstd**2 * dgamma
        slope = -variance * rstd * (of_dy * dgamma + of_ddx * mean_ddx_xhat + gamma * rstd**2 * inner)
        offset = -mean * (of_dy * dbeta + of_ddx * mean_ddx)
        return cls(rstd * inner, of_dy, of_ddx / n, slope / n, offset / n)


class _Passes:
    """The passes over the values of one batch, without its activation; arrays have the memory layout of x."""

    def __init__(self, saved: Saved, num_threads: int | None) -> None:
        x, self._layout = saved.x, saved._layout
        self._statistics = saved._statistics
        self._given = x.dtype
        self._x = x if x.itemsize > 2 else self._layout.copy(x, np.dtype(np.float32))
        self._threads = _threads.threads_for(x.size, num_threads)
        self._kernels: Kernels = _kernels.of_type[self._x.dtype.char]
        selection = saved._selection
        weights = None if selection is None else selection.weights
        self.weights = None if weights is None else self._by_place(weights)
        self.unit = 1.0 if selection is None else math.ldexp(1.0, selection.exponent)
        self._chosen: Chosen | None = None if selection is None or weights is not None else selection.chosen()

    def _by_place(self, weights: Array) -> Array:
        N, _, S = self._layout.view
        by_place: Array = weights[: N * S].reshape(N, 1, S)
        return by_place

    def like_x(self, value: ArrayLike, name: str) -> Array:
        """The argument in the layout and type that the kernels read."""
        array = _arrays.as_like(value, name, self._layout.shape, self._given)
        return self._layout.copy(array, self._x.dtype) if self._given != self._x.dtype else self._layout.bring(array)

    def weighted(self, array: Array, out: Array | None = None) -> Array:
        """The array times its weights, in units of `unit`, as a copy or in `out`; unchanged without weights."""
        if self.weights is None:
            return array
        out = self._layout.copy(array) if out is None else out
        seen = self._layout.seen(out)
        seen *= self.weights
        return out

    def weighted_sums(self, array: Array) -> Numbers:
        """Σw·array and Σw·array·(x − μ)."""
        return self.unit * self.sums(self.weighted(array))

    def sums(self, array: Array, x: Array | None = None) -> Numbers:
        """Σarray and Σarray·(x − μ), or Σarray·x for another x."""
        table = np.zeros((GRADIENT_ROWS, self._layout.view[1]))
        statistics = self._statistics if x is None else np.zeros_like(self._statistics)
        if array.size:
            views = self._layout.seen(array), self._layout.seen(self._x if x is None else x)
            self._kernels.grad_sums(*views, statistics, table, None, None, self._threads, None, self._chosen)
        return table[SUM_DY : SUM_DY_XMU + 1]

    def combined(self, array: Array, factor: Numbers, slope: Numbers, offset: Numbers) -> Array:
        """factor·array + slope·(x − μ) + offset."""
        statistics, table = self._statistics.copy(), np.zeros((GRADIENT_ROWS, self._layout.view[1]))
        statistics[GAMMA], statistics[RSTD] = factor, 1
        table[UPSTREAM_DMEAN], table[UPSTREAM_DVAR] = offset, slope / 2
        out = self._layout.empty(self._x.dtype)
        if out.size:
            u, x, to = map(self._layout.seen, (array, self._x, out))
            self._kernels.grad_apply(u, x, to, statistics, table, UPSTREAM, 1.0, self._threads, None, self._chosen)
        return out

    def add(self, out: Array, factor: Numbers, array: Array) -> None:
        """out ← out + factor·array."""
        statistics = np.zeros((STATISTICS_ROWS, self._layout.view[1]))
        statistics[GAMMA], statistics[RSTD] = factor, 1
        if out.size:
            after = None, self._layout.seen(out), None
            functional.normalize(array, out, self._layout, statistics, self._threads, after, self._chosen)

    def finished(self, result: Array) -> Array:
        """The result in the type of x."""
        return result if result.dtype == self._given else self._layout.copy(result, self._given)


def per_channel(channels: int, **given: ArrayLike | None) -> list[Numbers | None]:
    """The arguments, by name, as float64 numbers per channel."""
    return [
        None if value is None else _arrays.as_channels(value, name, channels).astype(np.float64)
        for name, value in given.items()
    ]


def _check_saved(saved: Saved) -> None:
    if not isinstance(saved, Saved):
        raise TypeError(f"saved must be what forward returned, got {type(saved).__name__}")


def check(
    saved: Saved,
    like_x: dict[str, ArrayLike],
    numbers: dict[str, ArrayLike | None],
    added: dict[str, ArrayLike | None],
    out: Array | None = None,
) -> list[Numbers | None]:
    """The numbers per channel; raises the errors of `jvp` and `double_backward`, with the names of their arguments."""
    _check_saved(saved)
    x, layout = saved.x, saved._layout
    given = {name: value for name, value in added.items() if value is not None}
    if given and not saved._added:
        raise ValueError(f"{next(iter(given))} must be None if forward had no add")
    arrays = {"x": x}
    for name, value in (like_x | given).items():
        arrays[name] = _arrays.as_like(value, name, layout.shape, x.dtype)
    if out is not None:
        _arrays.check_out(out, layout.shape, x.dtype)
        _arrays.check_overlap(out, arrays, tuple(like_x))
    return per_channel(layout.view[1], **numbers)


def _check_sums(sums: Numbers, rows: int, channels: int) -> Numbers:
    array = np.array(sums, order="C")  # a copy, which may be changed
    if array.shape != (rows, channels) or array.dtype != np.float64:
        raise ValueError(f"sums must be float64 of shape ({rows}, {channels}), got {array.dtype} {array.shape}")
    return array


def tangent_sums(dx: ArrayLike, saved: Saved, *, num_threads: int | None = None) -> Numbers:
    """The sums that `jvp` needs, Σẋ and Σẋ·(x − μ) per channel; with weights, Σwẋ and Σwẋ·(x − μ).

    For a batch in parts, call `forward(..., moments=)` for each part, add up their sums and pass them to
    `jvp(..., sums=)`.

    Parameters
    ----------
    dx : array_like
        The direction ẋ, of x's shape and dtype.
    saved : Saved
        From `forward`.
    num_threads : int, optional
        Threads for this call. The result does not depend on it.

    Returns
    -------
    ndarray of float64, shape (2, C)

    Raises
    ------
    TypeError, ValueError
        As for `jvp`.

    Examples
    --------
    >>> import numpy as np, batchnorm as bn
    >>> y, saved = bn.forward(np.array([[1.0], [2.0], [6.0]]))
    >>> bn.tangent_sums(np.array([[1.0], [0.0], [1.0]]), saved)
    array([[2.],
           [1.]])
    """
    _check_saved(saved)
    passes = _Passes(saved, num_threads)
    return passes.weighted_sums(passes.like_x(dx, "dx"))


def jvp(
    dx: ArrayLike,
    saved: Saved[Float],
    *,
    dgamma: ArrayLike | None = None,
    dbeta: ArrayLike | None = None,
    dmean: ArrayLike | None = None,
    dvar: ArrayLike | None = None,
    dadd: ArrayLike | None = None,
    through: Through = THROUGH,
    sums: Numbers | None = None,
    out: NDArray[Float] | None = None,
    num_threads: int | None = None,
) -> Tangents[Float]:
    """The derivative of `forward` along a direction: ẏ = γ·rstd·(ẋ − μ̇ − ½·rstd·x̂·σ̇²) + γ̇·x̂ + β̇.

    The moments move by μ̇ = Σẋ/n and σ̇² = 2·Σ(x − μ)ẋ/n, so ẏ = γ·rstd·P(ẋ) + γ̇·x̂ + β̇ with
    P(v) = v − Σv/n − x̂·Σv·x̂/n. This P is that of dx = γ·rstd·P(dy): the Jacobian is symmetric. With an activation, ẏ
    is multiplied by act′.

    Parameters
    ----------
    dx : array_like
        The direction ẋ, of x's shape and dtype.
    saved : Saved
        From `forward`.
    dgamma, dbeta : array_like, shape (C,), optional
        Directions of gamma and beta; 0 where None.
    dmean, dvar : array_like, shape (C,), optional
        Directions of the moments, besides how they move with x. With `through=()` the moments move by these alone.
    dadd : array_like, optional
        The direction of `add`, of x's shape and dtype.
    through : {"mean", "variance"} or collection of them, optional
        The statistics that move with x, both by default. `through=()` is for fixed statistics: `forward` with
        `moments=Moments(1, mean, var)` has the bits of `inference`.
    sums : ndarray of float64, shape (2, C), optional
        `tangent_sums` over all values in the statistics, instead of those of dx alone.
    out : ndarray, optional
        Where to write ẏ: an array of x's shape and dtype. `out=dx` is allowed, other overlaps are not.
    num_threads : int, optional
        Threads for this call. The result does not depend on it.

    Returns
    -------
    Tangents
        A named tuple (dy, dmean, dvar): ẏ, μ̇ and σ̇².

    Raises
    ------
    TypeError
        If `saved` is not from `forward`, or the dtype of an array differs from x's.
    ValueError
        If a shape, `through`, `sums` or `out` is invalid, or `dadd` is given but `forward` had no `add`.

    See Also
    --------
    backward : the transposed derivative, vᵀẏ = dxᵀẋ for dx = backward(v).

    References
    ----------
    Griewank and Walther, "Evaluating Derivatives", 2008, chapter 3: forward mode.

    Examples
    --------
    >>> import numpy as np, batchnorm as bn
    >>> x, dx = np.array([[1.0], [2.0], [6.0]]), np.array([[1.0], [0.0], [0.0]])
    >>> y, saved = bn.forward(x)
    >>> tangents = bn.jvp(dx, saved)
    >>> moved = (bn.forward(x + 1e-6 * dx)[0] - y) / 1e-6
    >>> bool(np.allclose(tangents.dy, moved, atol=1e-5))
    True
    >>> dy = np.array([[1.0], [2.0], [0.0]])  # both ways to the same number
    >>> bool(np.isclose((dy * tangents.dy).sum(), (bn.backward(dy, saved).dx * dx).sum()))
    True
    """
    _check_saved(saved)
    selection, C, n, paths = saved._selection, saved._layout.view[1], _n(saved), functional.paths_through(through)
    given = dgamma is not None or dbeta is not None or dmean is not None or dvar is not None
    numbers = per_channel(C, dgamma=dgamma, dbeta=dbeta, dmean=dmean, dvar=dvar) if given else _NOWHERE
    of_gamma, of_beta, of_mean, of_var = numbers
    dy: Any
    if sums is None and dadd is None and (selection is None or selection.weights is None):
        table = np.empty((GRADIENT_ROWS, C))
        if given:
            slope, offset = _of_y(saved, _of_moments(np.zeros((2, C)), n, 0, of_mean, of_var), of_gamma, of_beta)
            table[UPSTREAM_DMEAN], table[UPSTREAM_DVAR] = n * offset, n * slope / 2
            paths |= UPSTREAM
        alone = functional.normalization_of(saved)
        dy = functional.gradients_of(dx, alone, paths, ("dx",), table, out, num_threads, named="dx").dx
        tangents = _of_moments(table[SUM_DY : SUM_DY_XMU + 1], n, paths, of_mean, of_var)
    else:
        check(saved, {"dx": dx}, {}, {"dadd": dadd}, out)
        passes = _Passes(saved, num_threads)
        sums = tangent_sums(dx, saved, num_threads=num_threads) if sums is None else _check_sums(sums, 2, C)
        tangents = _of_moments(sums, n, paths, of_mean, of_var)
        dy = passes.combined(passes.like_x(dx, "dx"), _scale(saved), *_of_y(saved, tangents, of_gamma, of_beta))
        if dadd is not None:
            passes.add(dy, np.ones(C), passes.like_x(dadd, "dadd"))
        dy = passes.finished(dy)
    if saved._limits is not None:
        dy = functional.upstream(dy, saved)
    if out is not None and dy is not out:
        dy = _arrays.deliver(dy, out)
    return tuple.__new__(Tangents, (dy, tangents[0], tangents[1]))  # takes half as long as Tangents(…)


def second_sums(ddx: ArrayLike, dy: ArrayLike, saved: Saved, *, num_threads: int | None = None) -> Numbers:
    """The sums that `double_backward` needs: Σu, Σu·(x − μ), Σdy, Σdy·(x − μ) and Σu·dy per channel, with u for ddx.

    With weights the first two are Σwu and Σwu·(x − μ). For a batch in parts, call `forward(..., moments=)` for each
    part, add up their sums and pass them to `double_backward(..., sums=)`.

    Parameters
    ----------
    ddx, dy : array_like
        Of x's shape and dtype; see `double_backward`.
    saved : Saved
        From `forward`.
    num_threads : int, optional
        Threads for this call. The result does not depend on it.

    Returns
    -------
    ndarray of float64, shape (5, C)

    Raises
    ------
    TypeError, ValueError
        As for `double_backward`.

    Examples
    --------
    >>> import numpy as np, batchnorm as bn
    >>> y, saved = bn.forward(np.array([[1.0], [2.0], [6.0]]))
    >>> bn.second_sums(np.array([[1.0], [0.0], [1.0]]), np.array([[2.0], [1.0], [0.0]]), saved).ravel()
    array([ 2.,  1.,  3., -5.,  2.])
    """
    _check_saved(saved)
    passes = _Passes(saved, num_threads)
    return _second_sums(passes, passes.like_x(ddx, "ddx"), passes.like_x(functional.upstream(dy, saved), "dy"))


def _second_sums(passes: _Passes, ddx: Array, dy: Array) -> Numbers:
    return np.concatenate([passes.weighted_sums(ddx), passes.sums(dy), passes.sums(ddx, dy)[1:]])


@overload
def double_backward(
    ddx: ArrayLike,
    dy: ArrayLike,
    saved: Saved[Float],
    *,
    through: Through = ...,
    **how: Unpack[_keywords.DoubleBackward],
) -> SecondGradients[NDArray[Float]]: ...
@overload
def double_backward(
    ddx: ArrayLike,
    dy: ArrayLike,
    saved: Saved[Float],
    *,
    through: Through = ...,
    need: SecondNeed,
    **how: Unpack[_keywords.DoubleBackward],
) -> SecondGradients[NDArray[Float] | None]: ...
def double_backward(
    ddx: ArrayLike,
    dy: ArrayLike,
    saved: Saved,
    *,
    ddgamma: ArrayLike | None = None,
    ddbeta: ArrayLike | None = None,
    ddadd: ArrayLike | None = None,
    through: Through = THROUGH,
    need: SecondNeed = _SECOND_NEED,
    sums: Numbers | None = None,
    num_threads: int | None = None,
) -> SecondGradients:
    """Gradients of what `backward` returns: with respect to dy, x and gamma, from upstream gradients u of dx, a and b.

    With P(v) = v − Σv/n − x̂·Σv·x̂/n and q = Σu·dy − Σu·Σdy/n − Σu·x̂·Σdy·x̂/n, per channel,

    - g_dy = γ·rstd·P(u) + a·x̂ + b, which is `jvp` of u, a and b,
    - g_gamma = rstd·q,
    - g_x = −(γ·rstd²/n)·(x̂·q + Σdy·x̂·P(u) + Σu·x̂·P(dy)) + a·rstd·P(dy).

    Parameters
    ----------
    ddx : array_like
        u, the upstream gradient of dx, of x's shape and dtype.
    dy : array_like
        As given to `backward`.
    saved : Saved
        From `forward`.
    ddgamma, ddbeta : array_like, shape (C,), optional
        a and b, the upstream gradients of dgamma and dbeta; 0 where None.
    ddadd : array_like, optional
        The upstream gradient of dadd, of x's shape and dtype.
    through : {"mean", "variance"} or collection of them, optional
        As given to `backward`; `through=()` means fixed statistics.
    need : {"dy", "x", "gamma"} or collection of them, optional
        The gradients to compute, all by default; the others are None.
    sums : ndarray of float64, shape (5, C), optional
        `second_sums` over all values in the statistics, instead of those of ddx and dy alone.
    num_threads : int, optional
        Threads for this call. The result does not depend on it.

    Returns
    -------
    SecondGradients
        A named tuple (dy, x, gamma). The first two have x's shape and dtype, the last has gamma's, or is None if there
        was no gamma. Beta has no gradient: it only decides where an activation is closed.

    Raises
    ------
    TypeError
        If `saved` is not from `forward`, or the dtype of an array differs from x's.
    ValueError
        If a shape, `through`, `need` or `sums` is invalid, or `ddadd` is given but `forward` had no `add`.

    Notes
    -----
    With an activation, dy·act′ replaces dy, and g_dy is multiplied by act′; act″ is 0.

    References
    ----------
    The formulas are derived in docs/derivation.md.

    Examples
    --------
    >>> import numpy as np, batchnorm as bn
    >>> x, dy, u = np.array([[1.0], [2.0], [6.0]]), np.array([[1.0], [0.0], [0.0]]), np.array([[0.0], [1.0], [0.0]])
    >>> loss = lambda x: (u * bn.backward(dy, bn.forward(x)[1]).dx).sum()
    >>> second = bn.double_backward(u, dy, bn.forward(x)[1])
    >>> step = np.array([[0.0], [0.0], [1e-5]])
    >>> bool(np.isclose(second.x[2, 0], (loss(x + step) - loss(x - step)) / 2e-5, rtol=1e-6))
    True
    """
    a, b = check(saved, {"ddx": ddx, "dy": dy}, {"ddgamma": ddgamma, "ddbeta": ddbeta}, {"ddadd": ddadd})
    C, paths, passes = saved._layout.view[1], functional.paths_through(through), _Passes(saved, num_threads)
    u, dy = passes.like_x(ddx, "ddx"), passes.like_x(functional.upstream(dy, saved), "dy")
    need = functional.as_names(need, "need", _SECOND_NEED)
    sums = _second_sums(passes, u, dy) if sums is None else _check_sums(sums, 5, C)
    second = _Second.of(sums, saved, paths, a)
    g_dy = g_x = g_gamma = None
    if "dy" in need:
        along = _of_y(saved, _of_moments(sums[:2], _n(saved), paths), a, b)
        g_dy = passes.combined(u, _scale(saved), *along)
        if ddadd is not None:
            passes.add(g_dy, np.ones(C), passes.like_x(ddadd, "ddadd"))
        g_dy = functional.upstream(passes.finished(g_dy), saved)
    if "x" in need:
        g_x = passes.combined(u, *(passes.unit * part for part in (second.of_ddx, second.slope, second.offset)))
        passes.weighted(g_x, g_x)
        passes.add(g_x, second.of_dy, dy)
        g_x = passes.finished(g_x)
    if "gamma" in need and saved._dtypes[1] is not None:
        g_gamma = second.gamma.astype(saved._dtypes[1])
    return SecondGradients(g_dy, g_x, g_gamma)
