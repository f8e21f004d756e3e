"""A layer from another system's arrays, and arrays for another system from a layer.

Decisions:

- Predictions stay the same. A change of eps is compensated in gamma, γ′ = γ·√((σ² + eps′)/(σ² + eps)): unlike a changed
  variance, σ² + eps − eps′, this is never negative. It is computed in float64 and rounded once; if eps does not change,
  gamma keeps its bits. In training γ′ acts a little differently, because the variance of a batch is not the running
  variance.
- Running statistics are never converted: biased and unbiased variances differ by n/(n − 1), and n is not known. The
  layer's `unbiased` follows the system, for later updates.
- Everything is checked before a layer is made, and errors use the system's names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .. import _arrays
from .._activation import Activation
from .._arrays import Array
from ..layer import BatchNorm
from . import arrays, systems
from .systems import Convention

_FROM_LAYER = {"gamma": "weight", "beta": "bias", "running_mean": "running_mean", "running_var": "running_var"}
_MOST_COUNTED = 2**31 - 2
"""The largest counter: Haiku's int32 must have room for one more."""


def from_state(
    state: Mapping[Any, Any] | Sequence[ArrayLike],
    convention: str | Convention,
    *,
    prefix: str = "",
    eps: float | None = None,
    momentum: float | None = None,
    axis: int | None = None,
    dtype: DTypeLike | None = None,
    activation: Activation | None = None,
) -> BatchNorm:
    """Make a layer that predicts the same as another system's layer: same γ, β, μ, σ² and eps.

    Only Darknet's gamma is changed, γ′ = γ·√(σ² + eps)/(√σ² + eps), because its eps is not under the root. Caffe's
    statistics are divided by their factor.

    Parameters
    ----------
    state : mapping or sequence
        Arrays by name, nested or flat, of one layer or of a network, such as a `state_dict`, Flax's variables, or the
        result of `np.load` or `safetensors.numpy.load_file`; or the arrays of one layer in the system's order, such as
        the result of Keras's `get_weights`. Arrays are anything that `np.asarray` takes, with shape (C,) or with
        further dimensions of length 1.
    convention : str or Convention
        The system; see `convention`.
    prefix : str, optional
        The path of the layer, such as "layer1.0.bn1".
    eps, momentum : float, optional
        The other layer's, as written there: momentum has the system's direction. The system's defaults unless given.
    axis : int, optional
        The channel axis of x, the system's default unless given.
    dtype : float32 or float64, optional
        Dtype of the layer; by default float64 if an array is float64, else float32.
    activation : optional
        As in `BatchNorm`.

    Returns
    -------
    BatchNorm
        In training mode. Its running variance is biased or unbiased, as in the system. It has gamma and beta if the
        state has them; for beta without gamma, gamma is 1.

    Raises
    ------
    ValueError
        If names are missing or appear twice, shapes differ, values are not finite or a variance is negative.
    TypeError
        If values are not real numbers.

    See Also
    --------
    to_state : the reverse.

    Examples
    --------
    >>> import numpy as np, batchnorm as bn
    >>> gamma, beta, mean, var = np.array([[2.0], [0.5], [3.0], [4.0]], np.float32)
    >>> layer = bn.from_state([gamma, beta, mean, var], "keras", momentum=0.9)
    >>> layer.eps, layer.momentum, layer.unbiased, layer.axis
    (0.001, 0.1, False, -1)
    >>> network = {"params": {"bn": {"scale": gamma, "bias": beta}}, "batch_stats": {"bn": {"mean": mean, "var": var}}}
    >>> bn.from_state(network, "flax", prefix="bn").eval()([[3.0]])
    array([[0.5]])
    """
    system = systems.convention(convention)
    eps = system.eps if eps is None else _arrays.as_eps(eps)
    momentum = system.momentum if momentum is None else _arrays.as_momentum(momentum, system.momentum_weighs)
    found, called = arrays.found(state, system, prefix)
    counter = arrays.counter_of(found.pop("num_batches_tracked", np.array(0)), called.get("num_batches_tracked", ""))
    divisor = arrays.factor_of(found.pop("factor", np.array([1.0])), called.get("factor", ""))
    found = {role: arrays.per_channel(array, called[role]) for role, array in found.items()}
    if len({array.size for array in found.values()}) > 1:
        shapes = ", ".join(f"{called[role]} {array.shape}" for role, array in found.items())
        raise ValueError(f"the arrays of a layer must have the same number of channels, got {shapes}")
    own = np.dtype(_widest(found.values()) if dtype is None else dtype)
    wide = {role: array.astype(np.float64) for role, array in found.items()}
    arrays.check_variance(wide["running_var"], called["running_var"])
    for role in ("running_mean", "running_var"):
        with np.errstate(over="ignore"):
            wide[role] = wide[role] / divisor if divisor else np.zeros_like(wide[role])
    if system.eps_outside or "beta" in wide:
        wide.setdefault("gamma", np.ones_like(wide["running_var"]))
    if system.eps_outside:
        kept = _rounded(wide["running_var"], own, called["running_var"]).astype(np.float64)
        ratio = _ratio(np.sqrt(kept + eps), _spread(wide["running_var"], eps, system))
        wide["gamma"] = wide["gamma"] * ratio
    rounded = {role: _rounded(values, own, called.get(role, role)) for role, values in wide.items()}
    layer = BatchNorm(
        rounded["running_var"].size,
        axis=system.axis if axis is None else axis,
        eps=eps,
        momentum=system.weight_of_new(momentum),
        affine="gamma" in rounded,
        bias="beta" in rounded,
        unbiased=system.unbiased,
        activation=activation,
        dtype=own,
    )
    theirs: dict[str, ArrayLike] = {_FROM_LAYER[role]: values for role, values in rounded.items()}
    layer.load_state_dict(theirs | {"num_batches_tracked": counter})
    return layer


def to_state(
    layer: BatchNorm, convention: str | Convention, *, prefix: str = "", eps: float | None = None
) -> dict[str, NDArray[Any]]:
    """The arrays, by another system's names, with which its layer predicts the same as this one.

    If eps differs, γ′ = γ·√((σ² + eps′)/(σ² + eps)), in float64 and rounded once. In training that layer then acts a
    little differently, because the variance of a batch is not the running variance.

    Parameters
    ----------
    layer : BatchNorm
        A layer with running statistics. Its activation is not part of the state.
    convention : str or Convention
        The system; see `convention`.
    prefix : str, optional
        The path of the layer in the names.
    eps : float, optional
        The eps of the layer that will load the state; the system's default unless given. With `eps=layer.eps` gamma
        keeps its bits (not in Darknet).

    Returns
    -------
    dict of str to ndarray
        Arrays of shape (C,) in the layer's dtype; a counter has shape (). A layer without gamma gets one if eps
        differs; gamma and beta are added if the system always has them.

    Raises
    ------
    ValueError
        If the layer has no running statistics, or no gamma gives the same predictions, because eps and a variance are
        both 0.

    See Also
    --------
    from_state : the reverse.
    Convention.arguments : the arguments with which to make the other layer.

    Notes
    -----
    Haiku's `hidden` is average·(1 − decay^counter). If the counter is 0, because the statistics come from a system that
    does not count, it is written as the first one with decay^counter below 2^-53; otherwise Haiku would replace the
    statistics by those of the next batch. Caffe's factor is 1: in further training, the statistics weigh as one batch.

    Examples
    --------
    >>> import batchnorm as bn
    >>> layer = bn.BatchNorm(2, affine=False)
    >>> list(bn.to_state(layer, "keras", prefix="bn", eps=layer.eps))
    ['bn/moving_mean', 'bn/moving_variance']
    >>> bn.to_state(layer, "keras", prefix="bn")["bn/gamma"].round(5)  # √((1 + 0.001)/(1 + 0.00001))
    array([1.00049, 1.00049], dtype=float32)
    """
    system = systems.convention(convention)
    eps = system.eps if eps is None else _arrays.as_eps(eps)
    own = layer.state_dict()
    if "running_var" not in own:
        raise ValueError("layer must have running statistics, got one with track_running_stats=False")
    values = {role: own[name] for role, name in _FROM_LAYER.items() if name in own}
    var = values["running_var"].astype(np.float64)
    if system.always_affine:
        values.setdefault("gamma", np.ones_like(values["running_var"]))
        values.setdefault("beta", np.zeros_like(values["running_var"]))
    if eps != layer.eps or system.eps_outside:
        ratio = _ratio(_spread(var, eps, system), np.sqrt(var + layer.eps))
        gamma = values.get("gamma", np.ones_like(var))
        values["gamma"] = _rounded(gamma * ratio, layer.dtype, "gamma")
    counter = int(own["num_batches_tracked"])
    if system.num_batches_tracked is not None and not system.debiased:
        values["num_batches_tracked"] = np.array(counter, np.int64)
    if system.factor is not None:
        values["factor"] = np.ones(1, layer.dtype)
    called = system.names(prefix.strip("/."))
    state = {called[role]: values[role] for role in systems.ROLES if role in values}
    if system.debiased:
        decay = system.momentum_of(layer)
        assert decay is not None
        state |= _debiased(values, called, decay, counter)
    return state


def _widest(arrays: Iterable[NDArray[Any]]) -> type[np.floating[Any]]:
    return np.float64 if any(array.dtype.kind == "f" and array.itemsize > 4 for array in arrays) else np.float32


def _rounded(values: Array, dtype: np.dtype[Any], name: str) -> Array:
    with np.errstate(all="ignore"):
        rounded = values.astype(dtype)
    if not np.isfinite(rounded).all():
        worst = int(np.isfinite(rounded).argmin())
        raise ValueError(f"{name} must be finite in {dtype}, got {values[worst]:g} in channel {worst}")
    return rounded


def _spread(var: Array, eps: float, system: Convention) -> Array:
    """The divisor of x − μ in a system."""
    return np.sqrt(var) + eps if system.eps_outside else np.sqrt(var + eps)


def _ratio(new: Array, old: Array) -> Array:
    """The factor of gamma when the divisor of x − μ changes from `old` to `new`."""
    if (new == 0).any():
        raise ValueError(f"eps must be positive if a running variance is 0, as in channel {new.argmin()}, got 0")
    # Without eps, a variance of 0 gives y = beta, like a gamma of 0.
    return np.divide(new, old, out=np.zeros_like(new), where=old != 0)


def _debiased(
    values: Mapping[str, NDArray[Any]], called: Mapping[str, str], decay: float, counter: int
) -> dict[str, NDArray[Any]]:
    """Haiku's hidden averages and counters."""
    initial = not values["running_mean"].any() and np.isin(values["running_var"], (0, 1)).all()
    if counter == 0 and not initial and 0 < decay < 1:
        counter = math.ceil(53 * math.log(2) / -math.log(decay))
    counter = min(counter, _MOST_COUNTED)
    state: dict[str, NDArray[Any]] = {}
    for role in ("running_mean", "running_var"):
        own = values[role]
        ema = called[role].removesuffix("average")
        state[f"{ema}hidden"] = (own * np.float64(1 - decay**counter)).astype(own.dtype)
        state[f"{ema}counter"] = np.array(counter, np.int32)
    return state
