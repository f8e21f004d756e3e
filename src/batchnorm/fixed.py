"""Batch normalization with given statistics, which do not depend on x: inference, and its gradients.

The statistics and parameters are checked where the kernels read them. Only if they are refused does Python look at each
of them, to convert it or to say what is wrong: four checks in Python would take a seventh of a small call.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _arrays, _kernels, _threads
from ._activation import Activation
from ._arrays import Array, Float, Layout
from ._kernels import per_channel
from ._kernels.runtime import DMEAN, DVAR, GRADIENT_ROWS, STATISTICS_ROWS
from ._selection import Tally, chosen_by, normalized_in, selection_of
from .functional import NEED, NOTHING, NeedName, after_of, as_names, closed_at, gradients_of, normalize
from .saved import InferenceGradients, Saved

if TYPE_CHECKING:
    from . import _keywords

_Fixed = tuple[Array, Array, Array | None, Array | None]
"""Given statistics and parameters: mean, var, gamma and beta."""

_InferenceNeedName = Literal[NeedName, "dmean", "dvar"]
InferenceNeed = _InferenceNeedName | tuple[_InferenceNeedName, ...] | Collection[_InferenceNeedName]

_INFERENCE_NEED = (*NEED, "dadd", "dmean", "dvar")


def table_of(
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    eps: float,
    channels: int,
    layout: Layout | None = None,
) -> tuple[NDArray[np.float64], _Fixed]:
    """The table of given statistics and parameters, and the arrays that filled it."""
    eps = _arrays.as_eps(eps)
    statistics = np.empty((STATISTICS_ROWS, channels))
    fixed: tuple[Any, Any, Any, Any] = mean, var, gamma, beta
    try:  # the kernel checks arrays of floats in less time, but it names no argument
        negative = _kernels.float64.fix_statistics(statistics, channels, *fixed, eps)
    except (TypeError, ValueError):
        mean = _arrays.as_channels(mean, "mean", channels, layout)
        var = _arrays.as_channels(var, "var", channels, layout)
        gamma = None if gamma is None else _arrays.as_channels(gamma, "gamma", channels, layout)
        beta = None if beta is None else _arrays.as_channels(beta, "beta", channels, layout)
        fixed = mean, var, gamma, beta
        negative = _kernels.float64.fix_statistics(statistics, channels, *fixed, eps)
    if negative >= 0:
        swapped = "; are mean and var swapped?" if (np.asarray(mean) >= 0).all() else ""
        raise ValueError(f"var must not be negative, got {fixed[1][negative]} in channel {negative}{swapped}")
    return statistics, fixed


def _check_fixed_out(out: Array, x: Array, fixed: _Fixed, add: Array | None, may_be_same: tuple[str, ...] = ()) -> None:
    mean, var, gamma, beta = fixed
    _arrays.check_out(out, x.shape, x.dtype)
    inputs = {"x": x, "mean": mean, "var": var, "gamma": gamma, "beta": beta, "add": add}
    _arrays.check_overlap(out, inputs, may_be_same)


@overload
def inference(
    x: NDArray[Float],
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    out: NDArray[Float] | None = None,
    **how: Unpack[_keywords.Inference],
) -> NDArray[Float]: ...
@overload
def inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    out: Array | None = None,
    **how: Unpack[_keywords.Inference],
) -> Array: ...
def inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    fill: float = 0.0,
    activation: Activation | None = None,
    add: ArrayLike | None = None,
    out: Array | None = None,
    num_threads: int | None = None,
) -> Array:
    """Normalize with given statistics: y = act(gamma·(x − mean)/√(var + eps) + beta + add).

    Parameters
    ----------
    x : array_like of float64, float32, float16 or bfloat16, at least 2-D
        Channels along `axis`.
    mean, var : array_like, shape (C,)
        Usually the running statistics; var is not negative. Integers become float64.
    gamma, beta : array_like, shape (C,), optional
        Scale and shift; 1 and 0 where None. Integers become float64.
    axis : int, default 1
        The channel axis.
    eps : float, default 1e-5
        Added to the variance, under the root; finite, at least 0. A channel with var + eps = 0 gives beta.
    mask, lengths, fill, activation, add
        As in `forward`.
    out : ndarray, optional
        Where to write y: an array of x's shape and dtype. `out=x` and `out=add` are allowed, other overlaps are not.
    num_threads : int, optional
        Threads for this call. The result does not depend on it.

    Returns
    -------
    ndarray
        With x's shape, dtype and memory order.

    Raises
    ------
    TypeError
        If x has an unsupported dtype, or another argument is not numeric.
    ValueError
        If a shape, `axis`, `eps`, a variance, `mask`, `lengths` or `out` is invalid. Nothing is written then.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, algorithm 2, step 11.

    Examples
    --------
    >>> import numpy as np, batchnorm as bn
    >>> bn.inference(np.array([[1.0, 10.0], [3.0, 30.0]]), mean=[2.0, 0.0], var=[4.0, 25.0], eps=0.0)
    array([[-0.5,  2. ],
           [ 0.5,  6. ]])
    """
    given = _arrays.as_float(x, "x")
    x, layout = _arrays.lay_out(given, axis)
    statistics, fixed = table_of(mean, var, gamma, beta, eps, layout.view[1], layout)
    residual, after = None, NOTHING
    if activation is not None or add is not None:
        residual, after = after_of(activation, add, x, layout, noted=False)
    chosen = None
    if mask is not None or lengths is not None:
        chosen = chosen_by(selection_of(layout, x.dtype, mask, lengths), _arrays.as_number(fill, "fill"))
    threads = _threads.threads_for(x.size, num_threads, once=True)
    if out is not None:
        _check_fixed_out(out, given, fixed, residual, ("x", "add"))
    y = layout.empty(x.dtype) if out is None else layout.room(out, x.dtype)
    if x.size:
        normalize(x, y, layout, statistics, threads, after, chosen)
    return y if out is None else _arrays.deliver(y, out)


@overload
def inference_backward(
    dy: ArrayLike,
    x: NDArray[Float],
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    need: Literal["dx"] = ...,
    out: NDArray[Float] | None = None,
    **how: Unpack[_keywords.InferenceBackward],
) -> InferenceGradients[NDArray[Float]]: ...
@overload
def inference_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    need: Literal["dx"] = ...,
    out: Array | None = None,
    **how: Unpack[_keywords.InferenceBackward],
) -> InferenceGradients[Array]: ...
@overload
def inference_backward(
    dy: ArrayLike,
    x: NDArray[Float],
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    need: InferenceNeed,
    out: NDArray[Float] | None = None,
    **how: Unpack[_keywords.InferenceBackward],
) -> InferenceGradients[NDArray[Float] | None]: ...
@overload
def inference_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    need: InferenceNeed,
    out: Array | None = None,
    **how: Unpack[_keywords.InferenceBackward],
) -> InferenceGradients[Array | None]: ...
def inference_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    beta: ArrayLike | None = None,
    axis: int = 1,
    eps: float = 1e-5,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    activation: Activation | None = None,
    add: ArrayLike | None = None,
    need: InferenceNeed = NEED,
    out: Array | None = None,
    num_threads: int | None = None,
) -> InferenceGradients:
    """Gradients of `inference`: dx = dy·gamma·rstd, because the statistics do not depend on x.

    dbeta = Σdy and dgamma = Σdy·(x − mean)·rstd over all axes but the channel axis, with rstd = 1/√(var + eps). The
    statistics have gradients too: dmean = −gamma·rstd·dbeta and dvar = −½·gamma·rstd²·dgamma. With an activation,
    dy·act′ replaces dy everywhere, as in `backward`.

    Parameters
    ----------
    dy : array_like
        Upstream gradient, of x's shape and dtype.
    x, mean, var, gamma, beta, axis, eps, mask, lengths, activation, add
        As given to `inference`. beta and add matter only with an activation.
    need : {"dx", "dgamma", "dbeta", "dadd", "dmean", "dvar"} or collection of them, optional
        The gradients to compute, by default the first three, and dadd if there is `add`; the others are None.
    out : ndarray, optional
        Where to write dx: an array of x's shape and dtype. `out=dy` is allowed, other overlaps are not.
    num_threads : int, optional
        Threads for this call. The result does not depend on it.

    Returns
    -------
    InferenceGradients
        A named tuple (dx, dgamma, dbeta) with the attributes dadd, dmean and dvar. dgamma and dbeta have gamma's dtype,
        or, if gamma is None, x's dtype but at least float32. dmean and dvar have the dtypes of mean and var.

    Raises
    ------
    TypeError, ValueError
        As for `inference` and `backward`.

    Examples
    --------
    >>> import numpy as np, batchnorm as bn
    >>> x, dy = np.array([[1.0], [3.0]]), np.array([[1.0], [2.0]])
    >>> dx, dgamma, dbeta = bn.inference_backward(dy, x, mean=[2.0], var=[4.0], gamma=[3.0], eps=0.0)
    >>> dx.ravel(), dgamma, dbeta
    (array([1.5, 3. ]), array([0.5]), array([3.]))
    >>> bn.inference_backward(dy, x, mean=[2.0], var=[4.0], gamma=[3.0], eps=0.0, need="dmean").dmean
    array([-4.5])
    """
    given = _arrays.as_float(x, "x")
    x, layout = _arrays.lay_out(given, axis)
    statistics, fixed = table_of(mean, var, gamma, beta, eps, layout.view[1], layout)
    mean, var, gamma, _ = fixed
    residual = limits = closed = None
    if activation is not None or add is not None:
        residual, (limits, seen, _) = after_of(activation, add, x, layout, noted=False)
        if limits is not None and seen is not None:
            threads = _threads.threads_for(x.size, num_threads)
            closed = closed_at(x, layout, statistics, limits, seen, threads)
    if out is not None:
        _check_fixed_out(out, given, fixed, residual)
    full = x.dtype if x.itemsize > 2 else np.dtype(np.float32)
    dtype = full if gamma is None else gamma.dtype
    dtypes = x.dtype, dtype, dtype
    selection = selection_of(layout, x.dtype, mask, lengths)
    tally = Tally.of_all(normalized_in(layout, selection))
    saved = Saved(x, eps, layout, statistics, dtypes, tally, selection, limits, add is not None, closed)
    table = np.empty((GRADIENT_ROWS, layout.view[1]))
    if need is not NEED:
        need = as_names(need, "need", _INFERENCE_NEED)
    found = gradients_of(dy, saved, 0, need, table, out, num_threads)
    gradients = InferenceGradients(*found)
    if found.dadd is not None:
        gradients.dadd = found.dadd
    if "dmean" in need or "dvar" in need:
        per_channel.channel_gradients(statistics, table)
    if "dmean" in need:
        gradients.dmean = table[DMEAN].astype(mean.dtype)
    if "dvar" in need:
        gradients.dvar = table[DVAR].astype(var.dtype)
    return gradients
