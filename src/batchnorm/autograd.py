"""`batch_norm` for HIPS autograd, with derivatives in both modes, twice.

Decisions:

- Statistics are computed once, from the value without tracing, and every derivative uses what `forward` saved.
- The derivative along a direction of x is `backward` of that direction, because the Jacobian is symmetric. Along a
  direction of gamma it is that direction times x̂, computed by another batch norm. So only `backward` needs derivatives
  of its own.
- Those of `backward` are `double_backward`, in both modes: second derivatives are symmetric. There are no third ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import calculus, functional
from ._arrays import Array
from ._extras import requirements
from .saved import Saved

try:
    import autograd.numpy as anp
    from autograd.builtins import tuple as traced_tuple
    from autograd.extend import defjvp_argnums, defvjp_argnums, primitive
    from autograd.tracer import getval
except ImportError as _error:
    _install = f"python -m pip install {requirements('autograd', 'autograd')}"
    raise ImportError(f"batchnorm.autograd needs HIPS autograd: {_install}") from _error


def batch_norm(x: Any, gamma: Any, beta: Any, axis: int = 1, eps: float = 1e-5) -> Any:
    """y = gamma·(x − mean)/√(var + eps) + beta, differentiable by autograd once or twice, in both modes.

    Parameters
    ----------
    x : ndarray
        Channels along `axis`; float64, float32 or float16.
    gamma, beta : ndarray, shape (C,)
        Scale and shift.
    axis : int, default 1
        The channel axis.
    eps : float, default 1e-5
        Added to the variance, under the root.

    Returns
    -------
    ndarray
        With x's shape and dtype, and the bits of `forward`.

    Raises
    ------
    TypeError, ValueError
        As for `forward`.
    ImportError
        On import of this module, if autograd is missing.

    Examples
    --------
    >>> import numpy as np
    >>> from autograd import grad
    >>> from batchnorm.autograd import batch_norm
    >>> x, gamma, beta = np.array([[1.0], [2.0], [6.0]]), np.array([2.0]), np.array([0.5])
    >>> grad(lambda gamma: (batch_norm(x, gamma, beta) ** 2).sum())(gamma).round(3)  # Σ2y·x̂ = 2·gamma·n
    array([12.])
    """
    y, saved = functional.forward(getval(x), getval(gamma), getval(beta), axis=axis, eps=eps)
    return _forward(x, gamma, beta, y, saved)


def _y(x: Array, gamma: Array, beta: Array, y: Array, saved: Saved) -> Array:
    return y


def _like_x(dy: Array, saved: Saved) -> Array:
    """dy in the dtype of x, because autograd adds gradients up in float64."""
    return np.asarray(dy, saved.x.dtype)


def _gradients(dy: Array, x: Array, gamma: Array, saved: Saved) -> tuple[Any, ...]:
    return tuple(functional.backward(_like_x(dy, saved), saved))


def _second_gradients(
    ddx: Array, ddgamma: Array, ddbeta: Array, dy: Array, x: Array, gamma: Array, saved: Saved
) -> tuple[Any, ...]:
    u, dy = _like_x(ddx, saved), _like_x(dy, saved)
    return tuple(calculus.double_backward(u, dy, saved, ddgamma=ddgamma, ddbeta=ddbeta))


_forward, _backward, _double_backward = map(primitive, (_y, _gradients, _second_gradients))


def _forward_vjp(argnums: Any, ans: Any, args: Any, kwargs: Any) -> Any:
    x, gamma, _, _, saved = args

    def product(dy: Any) -> Any:
        gradients = _backward(dy, x, gamma, saved)
        return [gradients[i] for i in argnums]

    return product


def _forward_jvp(argnums: Any, tangents: Any, ans: Any, args: Any, kwargs: Any) -> Any:
    x, gamma, beta, y, saved = args
    shape = [-1 if i == saved.axis else 1 for i in range(y.ndim)]
    total = anp.zeros_like(y)
    for i, tangent in zip(argnums, tangents, strict=True):
        if i == 0:
            total = total + _backward(tangent, x, gamma, saved)[0]
        elif i == 1:
            xhat = batch_norm(x, np.ones_like(getval(gamma)), np.zeros_like(getval(beta)), saved.axis, saved.eps)
            total = total + anp.reshape(tangent, shape) * xhat
        else:
            total = total + anp.reshape(tangent, shape)
    return total


def _backward_vjp(argnums: Any, ans: Any, args: Any, kwargs: Any) -> Any:
    def product(upstream: Any) -> Any:
        gradients = _double_backward(upstream[0], upstream[1], upstream[2], *args)
        return [gradients[i] for i in argnums]

    return product


def _backward_jvp(argnums: Any, tangents: Any, ans: Any, args: Any, kwargs: Any) -> Any:
    dy, x, gamma, saved = args
    given = dict(zip(argnums, tangents, strict=True))
    ddx, ddgamma = given.get(1, anp.zeros_like(x)), given.get(2, anp.zeros_like(gamma))
    _, of_x, of_gamma = _double_backward(ddx, ddgamma, anp.zeros_like(gamma), dy, x, gamma, saved)
    dx, dgamma, dbeta = _backward(given.get(0, anp.zeros_like(dy)), x, gamma, saved)
    return traced_tuple((dx + of_x, dgamma + of_gamma, dbeta))


defvjp_argnums(_forward, _forward_vjp)
defjvp_argnums(_forward, _forward_jvp)
defvjp_argnums(_backward, _backward_vjp)
defjvp_argnums(_backward, _backward_jvp)
