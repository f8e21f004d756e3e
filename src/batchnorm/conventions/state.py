"""A layer from another system's arrays, and arrays for another system from a layer.

Decisions:

- Predictions stay the same. A change of eps goes into gamma, γ′ = γ·√((σ² + eps′)/(σ² + eps)): unlike a change of the
  variance, σ² + eps − eps′, it has no negative result. It is calculated in float64 and rounded once; where eps does not
  change, neither does a bit of gamma. In training gamma′ acts a little differently, because the variances of batches
  are not the running one.
- Running statistics are never recalculated: biased and unbiased variances differ by n/(n − 1), and n is not known. What
  the system does from now on is the layer's `unbiased`.
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
"""So that Haiku's int32 counter has room for one more."""


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
    """The layer that predicts what another system's layer predicts: same γ, β, μ, σ² and eps.

    Only Darknet's gamma is changed, γ′ = γ·√(σ² + eps)/(√σ² + eps), because its eps is not under the root. Caffe's
    statistics are divided by their factor.

    Parameters
    ----------
    state : mapping or sequence
        Arrays by name, nested or flat, of one layer or of a network, such as a `state_dict`, Flax's variables, the
        result of `np.load` or `safetensors.numpy.load_file`; or the arrays of one layer in the system's order, such as
        the result of Keras's `get_weights`. Arrays have shape (C,), or ones around it, and are anything that
        `np.asarray` takes.
    convention : str or Convention
        The system; see `convention`.
    prefix : str, optional
        The path of the layer, such as "layer1.0.bn1".
    eps, momentum : float, optional
        Of the layer, in the system's words: momentum has the system's direction. The system's defaults unless given.
    axis : int, optional
        The channel axis of x, the system's default unless given.
    dtype : float32 or float64, optional
        Of the layer: float64 if an array is, else float32.
    activation : optional
        As in `BatchNorm`.

    Returns
    -------
    BatchNorm
        In training mode; its running variance is biased or unbiased as the system's. gamma and beta are there if the
        state has them; beta alone gets a gamma of 1.

    Raises
    ------
    ValueError
        If names are missing or there twice, shapes differ, values are not finite or a variance is negative.
    TypeError
        If values are not real numbers.

    See Also
    --------
    to_state : the way back.

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
    """Arrays by another system's names, with which its layer predicts what this one predicts.

    Where eps differs, γ′ = γ·√((σ² + eps′)/(σ² + eps)), in float64 and rounded once. In training that layer then acts a
    little differently, because variances of batches are not the running variance.

    Parameters
    ----------
    layer : BatchNorm
        A layer with running statistics. Its activation is not part of the state.
    convention : str or Convention
        The system; see `convention`.
    prefix : str, optional
        The path of the layer in the names.
    eps : float, optional
        Of the layer that will load the state; the system's default unless given. With `eps=layer.eps` gamma keeps its
        bits (not in Darknet).

    Returns
    -------
    dict of str to ndarray
        Arrays of shape (C,) and the layer's dtype; a counter has shape (). A gamma appears where eps needs one, and
        gamma and beta where the system always has them.

    Raises
    ------
    ValueError
        If the layer has no running statistics, or no gamma does it: a variance of 0 has no equal where eps is 0.

    See Also
    --------
    from_state : the way here.
    Convention.arguments : what to make the other layer with.

    Notes
    -----
    Haiku's `hidden` is average·(1 − decay^counter). Statistics of a layer whose counter is 0, because they come from a
    system that does not count, get the counter after which decay^counter is below 2^-53; otherwise Haiku would replace
    them by the next batch's. Caffe's factor is 1: if its training goes on, they weigh as one batch.

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
    """What x − μ is divided by in a system."""
    return np.sqrt(var) + eps if system.eps_outside else np.sqrt(var + eps)


def _ratio(new: Array, old: Array) -> Array:
    """What gamma is multiplied by when x − μ is divided by `new`, where it was divided by `old`."""
    if (new == 0).any():
        raise ValueError(f"eps must be positive where a running variance is 0, as in channel {new.argmin()}, got 0")
    # Without eps a variance of 0 gives y = beta: a gamma of 0.
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
