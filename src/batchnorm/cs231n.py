"""The functions of Stanford's CS231n batch normalization assignment, under their names, on the compiled kernels.

    from batchnorm.cs231n import batchnorm_forward, batchnorm_backward, batchnorm_backward_alt
    from batchnorm.cs231n import spatial_batchnorm_forward, spatial_batchnorm_backward

Import these instead of your own, and everything around them runs as before: same arguments, same `bn_param`, same
results. The course differs from the rest of this package:

- Running statistics live in `bn_param`. The first call creates them as zeros, the variance too.
- Its momentum, 0.9, is the weight of the OLD value: running ← momentum·running + (1 − momentum)·batch.
- The running variance follows the biased variance of the batch.
- `mode` is "train" or "test"; in test mode there is no cache.
- Integers are accepted everywhere and become float64, as in NumPy's own arithmetic.
- Treat `cache` as opaque: it is what `batchnorm.forward` calls `saved`. Take both passes from here, or neither.

The course has two backward passes, one along the graph and one simplified on paper. They compute the same, so here
they share one kernel; `batchnorm.pathways` returns the terms of the graph.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import _arrays, fixed, functional
from ._arrays import Array
from .saved import Gradients, Saved

Cache = Saved | None


def batchnorm_forward(
    x: ArrayLike, gamma: ArrayLike, beta: ArrayLike, bn_param: MutableMapping[str, Any]
) -> tuple[Array, Cache]:
    """y = gamma·(x − μ)/√(σ² + eps) + beta for x of shape (N, D).

    In mode "train" μ and σ² are those of the batch, Σx/N and Σ(x − μ)²/N, and the running statistics move:
    running ← momentum·running + (1 − momentum)·batch. In mode "test" μ and σ² are the running statistics.

    Parameters
    ----------
    x : array_like, shape (N, D)
        Floats; integers become float64.
    gamma, beta : array_like, shape (D,)
    bn_param : dict
        "mode": "train" or "test". "eps": 1e-5 if missing. "momentum": the weight of the OLD value, 0.9 if missing.
        "running_mean", "running_var": shape (D,), zeros if missing; mode "train" stores new arrays there.

    Returns
    -------
    out : ndarray, shape (N, D)
    cache : Saved, or None in mode "test"
        For `batchnorm_backward`.

    Raises
    ------
    KeyError
        If `bn_param` has no "mode".
    TypeError
        If an array is not numeric.
    ValueError
        If a shape or an entry of `bn_param` is invalid. Nothing is changed then.

    References
    ----------
    Stanford CS231n, assignment 2, https://cs231n.github.io.

    Examples
    --------
    >>> import numpy as np
    >>> bn_param = {"mode": "train"}
    >>> out, cache = batchnorm_forward(np.array([[1.0], [3.0]]), np.ones(1), np.zeros(1), bn_param)
    >>> bn_param["running_mean"].round(12), bn_param["running_var"].round(12)
    (array([0.2]), array([0.1]))
    """
    return _forward(_with_dimensions(x, 2, "(N, D)"), gamma, beta, bn_param)


def batchnorm_backward(dout: ArrayLike, cache: Cache) -> Gradients[Array]:
    """dx = gamma·rstd·(dout − dbeta/N − xhat·dgamma/N), dgamma = Σdout·xhat, dbeta = Σdout.

    Parameters
    ----------
    dout : array_like, shape (N, D)
    cache : Saved
        From `batchnorm_forward` in mode "train".

    Returns
    -------
    dx, dgamma, dbeta : ndarray

    Raises
    ------
    TypeError, ValueError
        If `cache` is not from mode "train", or dout has a wrong shape or dtype.

    Examples
    --------
    >>> import numpy as np
    >>> out, cache = batchnorm_forward(np.array([[1.0], [2.0], [6.0]]), np.ones(1), np.zeros(1), {"mode": "train"})
    >>> dx, dgamma, dbeta = batchnorm_backward(np.array([[1.0], [0.0], [0.0]]), cache)
    >>> dbeta
    array([1.])
    """
    if not isinstance(cache, Saved):
        raise TypeError(
            "cache must be what the forward pass of batchnorm.cs231n returned in mode 'train', "
            f"got {type(cache).__name__}; pass the cache of your own forward pass to your own backward pass"
        )
    return functional.backward(_arrays.as_float(dout, "dout", integers=True), cache)


def batchnorm_backward_alt(dout: ArrayLike, cache: Cache) -> Gradients[Array]:
    """The same as `batchnorm_backward`, under the assignment's name for the simplified derivation.

    Parameters
    ----------
    dout, cache
        As in `batchnorm_backward`.
    """
    return batchnorm_backward(dout, cache)


def spatial_batchnorm_forward(
    x: ArrayLike, gamma: ArrayLike, beta: ArrayLike, bn_param: MutableMapping[str, Any]
) -> tuple[Array, Cache]:
    """`batchnorm_forward` for x of shape (N, C, H, W): the statistics of a channel are over N, H and W.

    Parameters
    ----------
    x : array_like, shape (N, C, H, W)
        Floats; integers become float64.
    gamma, beta : array_like, shape (C,)
    bn_param : dict
        As for `batchnorm_forward`, with running statistics of shape (C,).

    Returns
    -------
    out : ndarray, shape (N, C, H, W)
    cache : Saved, or None in mode "test"

    Raises
    ------
    KeyError, TypeError, ValueError
        As for `batchnorm_forward`.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(16.0).reshape(2, 2, 2, 2)
    >>> out, cache = spatial_batchnorm_forward(x, np.ones(2), np.zeros(2), {"mode": "train", "eps": 0.0})
    >>> out.mean(axis=(0, 2, 3)).round(12), out.var(axis=(0, 2, 3)).round(12)
    (array([0., 0.]), array([1., 1.]))
    """
    return _forward(_with_dimensions(x, 4, "(N, C, H, W)"), gamma, beta, bn_param)


def spatial_batchnorm_backward(dout: ArrayLike, cache: Cache) -> Gradients[Array]:
    """`batchnorm_backward` for dout of shape (N, C, H, W).

    Parameters
    ----------
    dout : array_like, shape (N, C, H, W)
    cache : Saved
        From `spatial_batchnorm_forward` in mode "train".
    """
    return batchnorm_backward(dout, cache)


def _with_dimensions(x: ArrayLike, dimensions: int, wanted: str) -> Array:
    array = _arrays.as_float(x, "x", integers=True)
    if array.ndim != dimensions:
        raise ValueError(f"x must have shape {wanted}, got {array.shape}")
    return array


def _forward(x: Array, gamma: ArrayLike, beta: ArrayLike, bn_param: MutableMapping[str, Any]) -> tuple[Array, Cache]:
    mode, eps = bn_param["mode"], bn_param.get("eps", 1e-5)
    if mode not in ("train", "test"):
        raise ValueError(f"bn_param['mode'] must be 'train' or 'test', got {mode!r}")
    weight_of_old = _arrays.as_momentum(bn_param.get("momentum", 0.9), "old value")
    mean, var = (
        bn_param.get(name, np.zeros(x.shape[1], x.dtype if x.itemsize > 2 else np.float32))
        for name in ("running_mean", "running_var")
    )
    if mode == "test":
        return fixed.inference(x, mean, var, gamma, beta, eps=eps), None
    running_mean = np.array(_arrays.as_float(mean, "running_mean", integers=True))
    running_var = np.array(_arrays.as_float(var, "running_var", integers=True))
    y, saved = functional.forward(x, gamma, beta, eps=eps)
    functional.update_running(running_mean, running_var, saved, momentum=1 - weight_of_old, unbiased=False)
    bn_param["running_mean"], bn_param["running_var"] = running_mean, running_var
    return y, saved
