"""The gradient taken apart: the three paths by which x reaches the loss, and the matrix that they form.

Decisions:

- The statistics are those that `forward` saved. The rest is the textbook of `reference` in float64, whatever the dtype
  of x. Results are float64 too, because people read and check them. For float64 data, pathways and moment gradients are
  computed in long double, so that their last digits are right.
- The code is readable rather than fast: it allocates whole arrays. `backward` computes the same sum in two passes
  without them, or a part of it with `through=`.
- Arrays are laid out channel by channel, because NumPy sums pairwise along memory but one by one across it.
- A channel needs two values. One value is its own mean: y is beta for any x, and there is nothing to take apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .. import _arrays, functional, reference
from ..reference import Array, MomentGradients
from ..saved import Saved

MAX_BYTES = 1 << 30


class Pathways(NamedTuple):
    """The three terms of dx, each of x's shape."""

    direct: Array
    mean: Array
    variance: Array


def textbook(saved: Saved, dtype: DTypeLike = np.float64) -> reference.Cache:
    """The cache for the textbook's backward pass; an error if there is nothing to explain."""
    if not isinstance(saved, Saved):
        raise TypeError(f"saved must be what forward returned, got {type(saved).__name__}")
    if saved._selection is not None:
        raise ValueError("saved must be of a batch whose values all count the same, without mask, lengths or weights")
    if saved.count < 2:
        raise ValueError(
            f"x must have at least 2 values per channel, got shape {saved.x.shape} with axis={saved.axis}: "
            "one value is its own mean, so y is beta and dx is 0"
        )
    axes = tuple(i for i in range(saved.x.ndim) if i != saved.axis)
    mean, mean_low, rstd, gamma = (
        np.expand_dims(row.astype(dtype), axes) for row in (saved.mean, saved.mean_low, saved.rstd, saved.gamma)
    )
    xmu = _by_channel(saved.x, saved, dtype) - mean - mean_low
    return reference.Cache(xmu, xmu * rstd, rstd, gamma, axes)


def upstream(dy: ArrayLike, saved: Saved, dtype: DTypeLike = np.float64) -> Array:
    """dy, or dy·act′ with an activation, laid out channel by channel."""
    return _by_channel(functional.upstream(dy, saved), saved, dtype)


def _by_channel(array: Array, saved: Saved, dtype: DTypeLike) -> Array:
    """A copy of the same shape, with the values of a channel next to each other in memory."""
    rows = np.array(np.moveaxis(array, saved.axis, 0), dtype, order="C")
    return np.moveaxis(rows, 0, saved.axis)


def _in_full(dy: ArrayLike, saved: Any) -> tuple[Array, reference.Cache]:
    """dy and the textbook's cache, with more digits than the results."""
    dtype = np.longdouble if isinstance(saved, Saved) and saved.x.dtype == np.float64 else np.float64
    cache = textbook(saved, dtype)
    return upstream(dy, saved, dtype), cache


def _like_x(array: Array, saved: Saved) -> Array:
    """A float64 copy in x's memory order."""
    return saved._layout.copy(array.astype(np.float64))


def pathways(dy: ArrayLike, saved: Saved) -> Pathways:
    """The three paths of the gradient: dx = dxhat·rstd + dmean/n + dvar·2(x − μ)/n.

    x reaches the loss directly, through the mean and through the variance of its channel; μ and σ² are functions of
    the batch, not constants. dxhat = dy·gamma, and dmean and dvar are those of `moment_gradients`.

    Parameters
    ----------
    dy, saved
        As in `backward`.

    Returns
    -------
    Pathways
        A named tuple (direct, mean, variance) of float64 arrays with x's shape and memory order. Their sum is dx.

    Raises
    ------
    TypeError, ValueError
        As for `backward`; ValueError also if a channel has fewer than two values.

    See Also
    --------
    backward : the sum; `through=` leaves out the path through the mean or the variance.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, section 3, ∂ℓ/∂x_i.

    Examples
    --------
    >>> import numpy as np, batchnorm as bn
    >>> y, saved = bn.forward(np.array([[-1.0], [-1.0], [1.0], [1.0]]), eps=0.0)
    >>> direct, mean, variance = bn.pathways(np.array([[4.0], [0.0], [0.0], [0.0]]), saved)
    >>> np.hstack([direct, mean, variance, direct + mean + variance])
    array([[ 4., -1., -1.,  2.],
           [ 0., -1., -1., -2.],
           [ 0., -1.,  1.,  0.],
           [ 0., -1.,  1.,  0.]])
    """
    terms = reference.backward_terms(*_in_full(dy, saved))
    parts = np.broadcast_arrays(terms.direct, terms.mean, terms.variance)
    return Pathways(*(_like_x(part, saved) for part in parts))


def moment_gradients(dy: ArrayLike, saved: Saved) -> MomentGradients:
    """The gradients of the loss with respect to xhat, σ² and μ, in the paper's notation.

    dxhat = dy·gamma, dvar = Σdxhat·(x − μ)·(−½)·rstd³ and dmean = −rstd·Σdxhat + dvar·(−2/n)·Σ(x − μ), with sums over
    all axes but the channel axis. The second term of dmean is 0, because Σ(x − μ) is; the paper keeps it.

    Parameters
    ----------
    dy, saved
        As in `backward`.

    Returns
    -------
    MomentGradients
        A named tuple (dxhat, dvar, dmean) of float64 arrays: of x's shape, (C,) and (C,).

    Raises
    ------
    TypeError, ValueError
        As for `pathways`.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, section 3, ∂ℓ/∂x̂_i, ∂ℓ/∂σ² and ∂ℓ/∂μ.

    Examples
    --------
    >>> import numpy as np, batchnorm as bn
    >>> y, saved = bn.forward(np.array([[-1.0], [-1.0], [1.0], [1.0]]), eps=0.0)
    >>> dxhat, dvar, dmean = bn.moment_gradients(np.array([[4.0], [0.0], [0.0], [0.0]]), saved)
    >>> dvar, dmean
    (array([2.]), array([-4.]))
    """
    dxhat, dvar, dmean = reference.moment_gradients(*_in_full(dy, saved))
    return MomentGradients(_like_x(dxhat, saved), *(row.reshape(-1).astype(np.float64) for row in (dvar, dmean)))


def centering_matrix(n: int, *, max_bytes: int = MAX_BYTES) -> Array:
    """∂(x − μ)/∂x = I − 11ᵀ/n: the matrix that subtracts the mean from n values.

    It is why the gradient does not vanish: every x moves its own deviation by 1 − 1/n, not by 1 − 1 = 0, and all the
    others by −1/n. It is symmetric, idempotent (the mean of deviations is 0) and of rank n − 1.

    Parameters
    ----------
    n : int
        The number of values, at least 1.
    max_bytes : int, default 2**30
        The most memory that the matrix may use.

    Returns
    -------
    ndarray of float64, shape (n, n)

    Raises
    ------
    TypeError
        If n is not an integer.
    ValueError
        If n is less than 1, or the matrix would need more than `max_bytes`.

    Examples
    --------
    >>> import batchnorm as bn
    >>> bn.centering_matrix(2)
    array([[ 0.5, -0.5],
           [-0.5,  0.5]])
    """
    n = _arrays.as_index(n, "n")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    _check_bytes(n * n, f"a matrix for n = {n}", max_bytes)
    return np.eye(n) - 1 / n


def jacobian(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    max_bytes: int = MAX_BYTES,
) -> Array:
    """Every derivative of y by x: ∂y_j/∂x_i = gamma·rstd·(δ_ij − 1/n − xhat_j·xhat_i/n), one matrix per channel.

    Its product with dy is dx, dx_i = Σ_j dy_j·∂y_j/∂x_i; `backward` never builds it. Each row and each column adds up
    to 0, because adding a constant to a channel of x does not change y. For eps = 0 it also maps xhat to 0, because
    scaling x does not change y.

    Parameters
    ----------
    x : array_like of float64, float32, float16 or bfloat16, at least 2-D
        Channels along `axis`.
    gamma : array_like, shape (C,), optional
        Scale; None means 1, which gives the derivatives of xhat. They do not depend on beta.
    axis, eps
        As in `forward`.
    max_bytes : int, default 2**30
        The most memory that the result may use; it needs 8·C·n² bytes.

    Returns
    -------
    ndarray of float64, shape (C, n, n)
        Element [c, j, i] is ∂y_j/∂x_i of channel c; i and j count its values in C order of the other axes.

    Raises
    ------
    TypeError
        If a dtype is not supported.
    ValueError
        If a shape, `axis` or `eps` is invalid, a channel has fewer than two values, or the result would need more
        than `max_bytes`.

    Examples
    --------
    >>> import numpy as np, batchnorm as bn
    >>> bn.jacobian(np.array([[-1.0], [-1.0], [1.0], [1.0]]), eps=0.0)
    array([[[ 0.5, -0.5,  0. ,  0. ],
            [-0.5,  0.5,  0. ,  0. ],
            [ 0. ,  0. ,  0.5, -0.5],
            [ 0. ,  0. , -0.5,  0.5]]])
    """
    _, saved = functional.forward(x, gamma, axis=axis, eps=eps)
    xhat = textbook(saved).xhat
    n, channels = saved.count, saved.mean.size
    _check_bytes(channels * n * n, f"the Jacobian of x of shape {saved.x.shape} with axis={axis}", max_bytes)
    scale = saved.gamma * saved.rstd
    rows = np.moveaxis(xhat, saved.axis, 0).reshape(channels, n)
    result = np.empty((channels, n, n))
    for c in range(channels):
        result[c] = scale[c] * (centering_matrix(n, max_bytes=max_bytes) - np.outer(rows[c], rows[c]) / n)
    return result


def _check_bytes(values: int, what: str, max_bytes: int) -> None:
    if 8 * values > max_bytes:
        raise ValueError(
            f"{what} needs {8 * values / 2**20:,.0f} MiB, more than max_bytes = {max_bytes / 2**20:,.0f} MiB"
        )
