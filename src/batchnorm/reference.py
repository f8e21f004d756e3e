"""The textbook: batch normalization in plain NumPy, the baseline that everything is profiled and tested against.

Nothing is clever here. The forward pass keeps a cache. The backward pass adds up the three paths by which x reaches
the loss: directly, through the mean and through the variance. It computes in the dtype of x, as people write it. NumPy
adds float32 values along the first axes one after the other, so a large batch loses digits.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


class Cache(NamedTuple):
    """Everything the backward pass reads."""

    xmu: Array
    xhat: Array
    rstd: Array
    gamma: Array
    axes: tuple[int, ...]

    @property
    def n(self) -> Any:
        """The number of values per channel, in the dtype of x."""
        return self.xmu.dtype.type(math.prod(self.xmu.shape[i] for i in self.axes))


class MomentGradients(NamedTuple):
    """Gradients with respect to xhat, σ² and μ, in the paper's notation."""

    dxhat: Array
    dvar: Array
    dmean: Array


class Terms(NamedTuple):
    """The three terms of dx (the one through the mean is constant within a channel), dgamma and dbeta."""

    direct: Array
    mean: Array
    variance: Array
    dgamma: Array
    dbeta: Array


def forward(x: Array, gamma: Array, beta: Array, axis: int = 1, eps: float = 1e-5) -> tuple[Array, Cache]:
    """y = gamma·(x − μ)/√(σ² + eps) + beta, and the cache for `backward`.

    Parameters
    ----------
    x : ndarray of floats
    gamma, beta : ndarray, shape (C,)
    axis : int, default 1
        The channel axis.
    eps : float, default 1e-5

    Examples
    --------
    >>> import numpy as np
    >>> y, cache = forward(np.array([[1.0], [3.0]]), np.ones(1), np.zeros(1), eps=0.0)
    >>> y.ravel()
    array([-1.,  1.])
    """
    axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    gamma, beta = np.expand_dims(gamma, axes), np.expand_dims(beta, axes)
    mean = x.mean(axis=axes, keepdims=True)
    xmu = x - mean
    var = (xmu**2).mean(axis=axes, keepdims=True)
    rstd = 1 / np.sqrt(var + np.asarray(eps, x.dtype))
    xhat = xmu * rstd
    return gamma * xhat + beta, Cache(xmu, xhat, rstd, gamma, axes)


def moment_gradients(dy: Array, cache: Cache) -> MomentGradients:
    """The paper's section 3: how the loss changes with xhat, with σ² and with μ."""
    xmu, _, rstd, gamma, axes = cache
    n = cache.n
    dxhat = dy * gamma
    dvar = (dxhat * xmu).sum(axis=axes, keepdims=True) * rstd**3 / -2
    dmean = -(dxhat * rstd).sum(axis=axes, keepdims=True) - dvar * 2 * xmu.sum(axis=axes, keepdims=True) / n
    return MomentGradients(dxhat, dvar, dmean)


def backward_terms(dy: Array, cache: Cache) -> Terms:
    """Each term of dx by itself: xhat, μ and σ² all depend on x."""
    xmu, xhat, rstd, _, axes = cache
    n = cache.n
    dxhat, dvar, dmean = moment_gradients(dy, cache)
    dbeta = dy.sum(axis=axes)
    dgamma = (dy * xhat).sum(axis=axes)
    return Terms(dxhat * rstd, dmean / n, dvar * 2 * xmu / n, dgamma, dbeta)


def backward(dy: Array, cache: Cache) -> tuple[Array, Array, Array]:
    """dx, dgamma and dbeta: dx = direct + mean + variance.

    Parameters
    ----------
    dy : ndarray
        The upstream gradient, of x's shape.
    cache : Cache
        From `forward`.

    Examples
    --------
    >>> import numpy as np
    >>> y, cache = forward(np.array([[1.0], [2.0], [6.0]]), np.ones(1), np.zeros(1))
    >>> dx, dgamma, dbeta = backward(np.array([[1.0], [0.0], [0.0]]), cache)
    >>> dbeta
    array([1.])
    """
    terms = backward_terms(dy, cache)
    return terms.direct + terms.mean + terms.variance, terms.dgamma, terms.dbeta


def inference(x: Array, mean: Array, var: Array, gamma: Array, beta: Array, axis: int = 1, eps: float = 1e-5) -> Array:
    """y = gamma·(x − mean)/√(var + eps) + beta with given statistics.

    Examples
    --------
    >>> import numpy as np
    >>> inference(np.array([[1.0], [3.0]]), np.array([2.0]), np.array([4.0]), np.ones(1), np.zeros(1), eps=0.0).ravel()
    array([-0.5,  0.5])
    """
    axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    mean, var, gamma, beta = (np.expand_dims(value, axes) for value in (mean, var, gamma, beta))
    return gamma * (x - mean) / np.sqrt(var + np.asarray(eps, x.dtype)) + beta
