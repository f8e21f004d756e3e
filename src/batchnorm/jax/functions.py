"""`forward` and `inference` for JAX: check the arguments while JAX traces, and call the primitives."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from .. import _arrays
from .._arrays import Array
from . import primitives

_DEFAULTS = {"gamma": 1.0, "beta": 0.0}


class Statistics(NamedTuple):
    """Mean and biased variance of a batch, per channel: float64 if x is float64, else float32."""

    mean: jax.Array
    var: jax.Array


def forward(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
) -> tuple[jax.Array, Statistics]:
    """y = gamma·(x − μ)/√(σ² + eps) + beta with μ and σ² of this batch, differentiable twice, in any mix of modes.

    Parameters
    ----------
    x : array_like of float64, float32, float16 or bfloat16, at least 2-D
        Channels along `axis`.
    gamma, beta : array_like, shape (C,), optional
        Scale and shift; 1 and 0 where None. They are used as float64 if one of them is float64, else as float32.
    axis : int, default 1
        The channel axis, as everywhere in this package; axes of `vmap` do not count.
    eps : float, default 1e-5
        Added to the variance, under the root; known when JAX traces.

    Returns
    -------
    y : jax.Array
        With x's shape and dtype, and the bits of `batchnorm.forward`.
    statistics : Statistics
        A named tuple (mean, var), for running statistics. They have no derivative, as after `jax.lax.stop_gradient`.

    Raises
    ------
    TypeError, ValueError
        As for `batchnorm.forward`, while JAX traces.
    NotImplementedError
        For a third derivative.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from batchnorm.jax import forward
    >>> x, gamma, beta = jnp.array([[1.0], [3.0]]), jnp.array([2.0]), jnp.array([0.5])
    >>> y, (mean, var) = jax.jit(forward, static_argnames="eps")(x, gamma, beta, eps=0.0)
    >>> y.ravel(), mean, var
    (Array([-1.5,  2.5], dtype=float32), Array([2.], dtype=float32), Array([1.], dtype=float32))
    >>> jax.grad(lambda gamma: (forward(x, gamma, beta, eps=0.0)[0] ** 2).sum())(gamma)  # Σ2y·x̂ = 2·gamma·n
    Array([8.], dtype=float32)
    """
    x, options, parameters = _checked(x, axis, eps, gamma=gamma, beta=beta)
    y, mean, var, _ = primitives.forward.bind(x, *parameters, **options)
    return y, Statistics(mean, var)


def inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
) -> jax.Array:
    """y = gamma·(x − mean)/√(var + eps) + beta with given statistics.

    JAX itself differentiates this formula, to any order and also with respect to mean and var.

    Parameters
    ----------
    x : array_like of float64, float32, float16 or bfloat16, at least 2-D
        Channels along `axis`.
    mean, var : array_like, shape (C,)
        Usually the running statistics. A channel whose variance is negative becomes NaN.
    gamma, beta, axis, eps
        As in `forward`.

    Returns
    -------
    jax.Array
        With x's shape and dtype, and the bits of `batchnorm.inference`.

    Raises
    ------
    TypeError, ValueError
        As for `batchnorm.inference`, while JAX traces.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from batchnorm.jax import inference
    >>> x, mean, var = jnp.array([[1.0, 10.0], [3.0, 30.0]]), jnp.array([2.0, 0.0]), jnp.array([4.0, 25.0])
    >>> inference(x, mean, var, eps=0.0)
    Array([[-0.5,  2. ],
           [ 0.5,  6. ]], dtype=float32)
    """
    x, options, (mean, var, *parameters) = _checked(x, axis, eps, mean=mean, var=var, gamma=gamma, beta=beta)
    (y,) = primitives.inference.bind(x, *parameters, mean, var, **options)
    return y


def _checked(x: ArrayLike, axis: int, eps: float, **given: Any) -> tuple[jax.Array, dict[str, Any], list[jax.Array]]:
    """x, and the arguments of the primitives: the axis counted from the end, numbers per channel in one type."""
    x = jnp.asarray(x)
    _arrays.as_float(_without_values(x), "x")
    layout = _arrays.layout_of(x.shape, _arrays.as_index(axis, "axis"))
    channels, numbers = layout.view[1], []
    for name, value in given.items():
        filled = value is None and name in _DEFAULTS
        array = jnp.full(channels, _DEFAULTS[name], jnp.float32) if filled else jnp.asarray(value)
        _arrays.as_channels(_without_values(array), name, channels, layout)
        numbers.append(array)
    dtype = jnp.result_type(jnp.float32, *numbers)
    options = {"axis": layout.axis - x.ndim, "eps": _arrays.as_eps(eps)}
    return x, options, [array.astype(dtype) for array in numbers]


def _without_values(x: jax.Array) -> Array:
    """A NumPy array of the same shape and dtype for the checks, without memory."""
    return np.broadcast_to(np.zeros((), x.dtype), x.shape)
