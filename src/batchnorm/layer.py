"""The layer: parameters, running statistics and what the last call left for `backward`. Its semantics are PyTorch's.

Decisions:

- The layer does no arithmetic itself.
- State changes in one step, after everything that can fail. An exception, even one raised by a signal handler, leaves
  parameters, running statistics and the counter all old or all new.
- A layer's arrays stay the same objects as long as it lives. An assignment copies values into them, in the layer's
  dtype.
- Threads that share a layer take turns to copy its O(C) numbers, but work on their batches at the same time.
- Evaluation keeps no x unless asked to, because `backward` usually follows only training.
- Training with the running statistics uses the code of evaluation; other ways of training are in `training`.
- `save` writes only what `load` accepts, so a diverged layer does not replace the file of a sound one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

import batchnorm as bn  # for annotations: what they name is imported when they are evaluated

from . import _activation, _arrays, fixed, functional, training
from ._activation import Activation
from ._arrays import Array, Float, MaybeNone
from ._foreign import as_array
from ._selection import Tally, one_of_three
from ._state import ARRAYS, MOST_BATCHES, State
from .functional import Need, Through
from .moments import Batch, Moments, Numbers, population
from .saved import Gradients, Saved
from .training import Ghosts, Renormed, Statistics, Way

if TYPE_CHECKING:
    from . import _keywords

# The settings in a file. A missing momentum means None; the names after `float_bits` are written only if they differ
# from the default. An activation is written as (low, high, slope), renorm as (rmax, dmax).
_SETTINGS: dict[str, type[np.generic]] = {
    "num_features": np.int64,
    "axis": np.int64,
    "eps": np.float64,
    "momentum": np.float64,
    "affine": np.int64,
    "track_running_stats": np.int64,
    "float_bits": np.int64,
    "has_bias": np.int64,
    "unbiased": np.int64,
    "update": np.int64,
    "ghost": np.int64,
    "trains_with_running": np.int64,
}
_OPTIONAL = ("momentum", "has_bias", "unbiased", "update", "ghost", "trains_with_running")

# PyTorch's names for the arrays, in its order.
_NAMES = {"weight": "gamma", "bias": "beta", "running_mean": "running_mean", "running_var": "running_var"}
_IN_A_FILE = (*_SETTINGS, *_NAMES, "num_batches_tracked", "activation", "renorm")

# Why there is no gradient.
_NOT_CALLED = "backward needs a call of the layer before it"
_NOT_KEPT = "backward needs x, which evaluation does not keep: call layer.eval(keep_input=True) before the layer"
_OVERWRITTEN = "backward needs x and add, but the last call wrote y over one of them: call the layer without out="


def _settings(found: Mapping[str, Array]) -> dict[str, Any]:
    """The constructor's arguments from a file's arrays, checked before anything of that size is allocated."""
    settings: dict[str, Any] = {}
    for name, dtype in _SETTINGS.items():
        if name in found:
            if found[name].shape != () or found[name].dtype != dtype:
                raise ValueError(f"{name} must be one {dtype.__name__}, got {found[name]!r}")
            settings[name] = found[name].item()
        elif name not in _OPTIONAL:
            raise ValueError(f"{name} is missing")
    bits = settings.pop("float_bits")
    if bits not in (32, 64):
        raise ValueError(f"float_bits must be 32 or 64, got {bits}")
    own = np.dtype(f"f{bits // 8}")
    arrays = {name: found[name] for name in _NAMES if name in found}
    lengths = {array.shape for array in arrays.values()}
    expected = bool(arrays) or settings["affine"] or settings["track_running_stats"]
    if lengths != ({(settings["num_features"],)} if expected else set()):
        raise ValueError(f"num_features is {settings['num_features']}, but arrays have shapes {lengths}")
    for name, array in arrays.items():
        if array.dtype != own:
            raise TypeError(f"{name} must have dtype {own}, got {array.dtype}")
    if "activation" in found:
        limits = found["activation"]
        if limits.shape != (3,) or limits.dtype != np.float64:
            raise ValueError(f"activation must be three float64 numbers, got {limits!r}")
        low, high, slope = limits.tolist()
        settings["activation"] = _activation.activation_of((low, high, slope))
        if _activation.as_limits(settings["activation"]) != (low, high, slope):
            raise ValueError(f"activation must be (low, high, slope) of a known one, got {limits}")
    if "renorm" in found:
        bounds = found["renorm"]
        if bounds.shape != (2,) or bounds.dtype != np.float64:
            raise ValueError(f"renorm must be two float64 numbers, got {bounds!r}")
        settings["renorm"] = tuple(bounds.tolist())
    if "has_bias" in settings:
        settings["bias"] = settings.pop("has_bias")
    if settings.pop("trains_with_running", 0):
        settings["statistics"] = "running"
    return {"momentum": None, "dtype": own} | settings


class _Array:
    """One of the layer's arrays, always the same object: an assignment copies values into it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, layer: None, owner: type) -> Self: ...
    @overload
    def __get__(self, layer: BatchNorm, owner: type) -> Array | MaybeNone: ...
    def __get__(self, layer: BatchNorm | None, owner: type) -> Self | Array | None:
        if layer is None:
            return self
        array: Array | None = getattr(layer._state, self._name)
        return array

    def __set__(self, layer: BatchNorm, value: ArrayLike | None) -> None:
        own = getattr(layer._state, self._name)
        if own is None and value is not None:
            raise ValueError(f"this layer was made without {self._name}, got {type(value).__name__}")
        if value is not own:
            layer._state.assign(self._name, layer._converted(self._name, value))


_Value = TypeVar("_Value")


class _Setting(Generic[_Value]):
    """One setting of the way in which the layer trains: an assignment is checked together with the other settings."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, layer: None, owner: type) -> Self: ...
    @overload
    def __get__(self, layer: BatchNorm, owner: type) -> _Value: ...
    def __get__(self, layer: BatchNorm | None, owner: type) -> Self | _Value:
        if layer is None:
            return self
        value: _Value = getattr(layer._way, self._name)
        return value

    def __set__(self, layer: BatchNorm, value: _Value) -> None:
        change: dict[str, Any] = {self._name: value}
        layer._way = layer._checked_way(layer._way._replace(**change))


class BatchNorm:
    """Batch normalization with state: y = act(gamma·(x − μ)/√(σ² + eps) + beta + add).

    In training, μ and σ² are those of the batch and the running statistics move towards them,
    r ← (1 − momentum)·r + momentum·batch; in evaluation they are the running statistics.

    Parameters
    ----------
    num_features : int
        Channels, C.
    axis : int, default 1
        The channel axis of x.
    eps : float, default 1e-5
        Added to the variance, under the root.
    momentum : float or None, default 0.1
        Weight of the NEW batch in the running statistics, as in PyTorch (in Keras and Flax it is that of the old
        value). With None the running statistics are the cumulative mean over all batches.
    affine : bool, default True
        Whether there are gamma (initially 1) and beta (initially 0).
    bias : bool, default True
        False leaves beta out.
    track_running_stats : bool, default True
        Whether there are running_mean (initially 0), running_var (initially 1) and num_batches_tracked. Without them
        evaluation uses the statistics of the batch too. Setting it to False later stops their updates, as in PyTorch.
    unbiased : bool, default True
        Whether the running variance follows the unbiased variance of each batch, n/(n − 1) times the one that
        normalizes it, as in PyTorch. Keras, Flax and ONNX use the biased one.
    activation : "relu", ("leaky_relu", slope) or ("clip", low, high), optional
        Activation after the normalization, in the same pass over x; see `forward`.
    statistics : {"batch", "running"}, default "batch"
        The statistics that training normalizes with: those of each batch, or the running ones as in evaluation.
    update : bool, default True
        Whether training moves the running statistics. `statistics="running", update=False` is a frozen layer: y and
        all gradients are those of evaluation.
    renorm : (rmax, dmax), optional
        Batch renormalization: training corrects xhat towards that of evaluation, y = gamma·(xhat·ρ + d) + beta with
        ρ = σ_batch/σ limited to 1/rmax … rmax and d = (μ_batch − μ)/σ limited to ±dmax, where μ = running_mean and
        σ = √(running_var + eps) before this batch moves them. The gradient treats ρ and d as constants. (1, 0) is plain
        batch normalization.
    ghost : int, optional
        Ghost batches: training cuts a batch of N samples into ⌈N/ghost⌉ nearly equal parts along the first axis that is
        not the channel axis, and normalizes each part by itself. The running statistics follow the whole batch.
    dtype : float32 or float64, default float32
        Dtype of the parameters, their gradients and the running statistics. x may have another, also 16-bit, dtype.

    Attributes
    ----------
    gamma, beta, running_mean, running_var : ndarray of shape (C,), or None
        The same objects as long as the layer lives. `layer.gamma = values` copies values into gamma, converted to the
        layer's dtype; it raises an error for a wrong shape or None.
    num_batches_tracked : int
    momentum, activation, statistics, update, renorm, ghost
        As given; they can be changed later.
    training : bool
    keep_input : bool
        Whether evaluation keeps x for `backward`; see `eval`.
    dgamma, dbeta : ndarray of shape (C,), or None
        Set by `backward`, which does not accumulate them.
    dadd : ndarray, or None
        Gradient with respect to the `add` of the last call; set by `backward`.

    Notes
    -----
    `backward` needs the x of the last call. In training the layer keeps a reference to it, not a copy, so x must not
    change before `backward`. Training needs more than one value per channel. An empty batch gives an empty y and zero
    gradients, and does not change the running statistics or the counter.

    A pickle or a copy of a layer holds its state and settings, but no batch.

    docs/variants.md explains `statistics`, `update`, `renorm` and `ghost`. All four apply only in training.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, algorithms 1 and 2. Ioffe, "Batch
    Renormalization", 2017, arXiv:1702.03275, algorithm 1. Hoffer, Hubara and Soudry, "Train longer, generalize better",
    2017, arXiv:1705.08741, algorithm 1 (ghost batches).

    Examples
    --------
    >>> import numpy as np, batchnorm as bn
    >>> layer = bn.BatchNorm(2, dtype=np.float64)
    >>> layer
    BatchNorm(2, axis=1, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, dtype=float64)
    >>> y = layer(np.array([[1.0, 10.0], [3.0, 30.0]]))
    >>> dx = layer.backward(np.ones((2, 2)))
    >>> layer.dbeta
    array([2., 2.])
    >>> layer.running_mean
    array([0.2, 2. ])
    >>> bn.BatchNorm(2, renorm=(3, 5)).renorm
    (3.0, 5.0)
    """

    dgamma: Array | MaybeNone
    dbeta: Array | MaybeNone
    dadd: Array | MaybeNone
    gamma: _Array = _Array()
    beta: _Array = _Array()
    running_mean: _Array = _Array()
    running_var: _Array = _Array()
    statistics: _Setting[Statistics] = _Setting()
    update: _Setting[bool] = _Setting()
    renorm: _Setting[tuple[float, float] | None] = _Setting()
    ghost: _Setting[int | None] = _Setting()
    num_features: int
    axis: int
    eps: float
    affine: bool
    track_running_stats: bool
    unbiased: bool
    dtype: np.dtype[Any]
    training: bool
    keep_input: bool

    def __init__(
        self,
        num_features: int,
        *,
        axis: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        bias: bool = True,
        track_running_stats: bool = True,
        unbiased: bool = True,
        activation: Activation | None = None,
        statistics: Statistics = "batch",
        update: bool = True,
        renorm: tuple[float, float] | None = None,
        ghost: int | None = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.num_features = _arrays.as_index(num_features, "num_features")
        if self.num_features < 0:
            raise ValueError(f"num_features must be at least 0, got {self.num_features}")
        self.axis = _arrays.as_index(axis, "axis")
        self.eps = _arrays.as_eps(eps)
        self.momentum = momentum
        self.affine = bool(affine)
        self.track_running_stats = bool(track_running_stats)
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise TypeError(f"dtype must be float32 or float64, got {self.dtype}")
        self.unbiased = bool(unbiased)
        self.activation = activation
        self.training = True
        self.keep_input = False
        self.dgamma = None
        self.dbeta = None
        self.dadd = None
        there = {
            "running_mean": self.track_running_stats,
            "running_var": self.track_running_stats,
            "gamma": self.affine,
            "beta": self.affine and bool(bias),
        }
        self._state = State(self.num_features, self.dtype, tuple(name for name in ARRAYS if there[name]))
        self._way = self._checked_way(Way(statistics, update, renorm, ghost))
        self._kept: Saved | Renormed | Ghosts | dict[str, Any] | str = _NOT_CALLED
        BatchNorm.reset_parameters(self)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_state": self._state.copy(), "_kept": _NOT_CALLED}

    def __repr__(self) -> str:
        more = ", bias=False" * (self.affine and self.beta is None) + ", unbiased=False" * (not self.unbiased)
        more += ("" if self.activation is None else f", activation={self.activation!r}") + str(self._way)
        return (
            f"{type(self).__name__}({self.num_features}, axis={self.axis}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats}, dtype={self.dtype}{more})"
        )

    @property
    def momentum(self) -> float | None:
        """Weight of the new batch in the running statistics; None for the mean of all batches."""
        return self._momentum

    @momentum.setter
    def momentum(self, momentum: float | None) -> None:
        self._momentum = None if momentum is None else _arrays.as_momentum(momentum)

    @property
    def activation(self) -> Activation | None:
        """The activation after the normalization."""
        return self._activation

    @activation.setter
    def activation(self, activation: Activation | None) -> None:
        self._activation = _activation.activation_of(_activation.as_limits(activation))

    def _checked_way(self, way: Way) -> Way:
        return way.checked(self._state.running_mean is not None)

    @property
    def num_batches_tracked(self) -> int:
        """The number of batches that have moved the running statistics."""
        return self._state.counter

    @num_batches_tracked.setter
    def num_batches_tracked(self, value: int) -> None:
        self._state.counter = self._checked_counter(value)

    def train(self, mode: bool = True) -> Self:
        """Switch to training: normalize with the statistics of each batch and follow them. Returns the layer.

        Parameters
        ----------
        mode : bool, default True
            False is `eval()`.
        """
        self.training = bool(mode)
        self.keep_input = False
        return self

    def eval(self, *, keep_input: bool = False) -> Self:
        """Switch to evaluation: normalize with the running statistics. Returns the layer.

        Parameters
        ----------
        keep_input : bool, default False
            Keep a reference to each x, so that `backward` can compute gradients with respect to the input.
            Otherwise x is released after the call. For a frozen layer inside a network in training, see `statistics`
            and `update`.

        Examples
        --------
        >>> import numpy as np, batchnorm as bn
        >>> layer = bn.BatchNorm(1, eps=0.0).eval(keep_input=True)
        >>> y = layer(np.array([[1.0], [2.0]]))
        >>> layer.backward(np.array([[1.0], [0.0]])).tolist()
        [[1.0], [0.0]]
        """
        self.train(False)
        self.keep_input = bool(keep_input)
        return self

    def reset_running_stats(self) -> None:
        """Set running_mean to 0, running_var to 1 and num_batches_tracked to 0, if the layer has them."""
        if self._state.running_mean is not None:
            self._state.set_statistics(0, 1, counter=0)

    def reset_parameters(self) -> None:
        """Set gamma to 1 and beta to 0, and the running statistics as `reset_running_stats` does."""
        initial = {"running_mean": 0, "running_var": 1, "gamma": 1, "beta": 0}
        values = {name: np.full(self.num_features, initial[name], self.dtype) for name in self._state.names}
        self._state.replace(values, 0)

    @overload
    def __call__(
        self, x: NDArray[Float], *, out: NDArray[Float] | None = None, **how: Unpack[_keywords.Layer]
    ) -> NDArray[Float]: ...
    @overload
    def __call__(self, x: ArrayLike, *, out: Array | None = None, **how: Unpack[_keywords.Layer]) -> Array: ...
    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        fill: float = 0.0,
        add: ArrayLike | None = None,
        out: Array | None = None,
        num_threads: int | None = None,
    ) -> Array:
        """Normalize x, and move the running statistics in training.

        Parameters
        ----------
        x : array_like of float64, float32, float16 or bfloat16
            With `num_features` channels along `axis`.
        mask, lengths, weights, fill, add, out, num_threads
            As in `forward` and `inference`. In evaluation weights change nothing, because the statistics are given.

        Raises
        ------
        TypeError, ValueError
            As for `forward` and `inference`; ValueError also if statistics of the batch are needed but only one value
            per channel counts. The layer is unchanged then.
        """
        selects = one_of_three(mask, lengths, weights)
        by_running = self._fixed
        if by_running and not self._follows:
            return self._normalize_by_running(x, selects, fill, add, out, num_threads)
        x = _arrays.as_float(x, "x")
        _arrays.check_channels(x.shape, self.axis, self.num_features)
        training.check_spread(x.shape, x.dtype, self.axis, selects)
        if by_running:
            moments = Moments.of(x, self.axis, num_threads=num_threads, **selects)  # before y can overwrite x
            y = self._normalize_by_running(x, selects, fill, add, out, num_threads)
            self._follow(training.statistics_of(moments, self.eps), moments._tally)
            return y
        state, way = self._state, self._way if self.training else training.PLAIN
        how: dict[str, Any] = {
            "axis": self.axis,
            "eps": self.eps,
            "fill": fill,
            "activation": self._activation,
            "add": add,
            "out": out,
            "num_threads": num_threads,
            **selects,
        }
        kept: Saved | Renormed | Ghosts
        if way.bounds is not None:
            moments = Moments.of(x, self.axis, num_threads=num_threads, **selects)
            y, kept = training.renormed(x, moments, state, way.bounds, **how)
        elif way.ghost is not None:
            y, kept = training.in_ghosts(x, state, way.ghost, **how)
        else:
            y, kept = functional.forward(x, state.gamma, state.beta, **how)
        self._keep(kept)
        return y

    @property
    def _fixed(self) -> bool:
        """Whether a call normalizes with the running statistics."""
        return self._state.running_mean is not None and (not self.training or self._way.statistics == "running")

    @property
    def _follows(self) -> bool:
        """Whether a call moves the running statistics."""
        if not (self.training and self._way.update and self.track_running_stats):
            return False
        return self._state.running_mean is not None

    def _normalize_by_running(
        self,
        x: ArrayLike,
        selects: Mapping[str, Any],
        fill: float,
        add: ArrayLike | None,
        out: Array | None,
        num_threads: int | None,
    ) -> Array:
        """y with the running statistics; keeps what `backward` needs in training, or if asked to."""
        mean, var, gamma, beta = self._state.snapshot()
        keeps = self.training or self.keep_input
        if keeps:
            x = _arrays.as_float(x, "x")
            add = None if add is None else _arrays.as_float(add, "add")
        given: dict[str, Any] = {
            "mean": mean,
            "var": var,
            "gamma": gamma,
            "beta": beta,
            "axis": self.axis,
            "eps": self.eps,
            "activation": self._activation,
            "add": add,
        }
        if selects:
            given |= {name: value for name, value in selects.items() if name != "weights"}
        try:
            y = fixed.inference(x, fill=fill, out=out, num_threads=num_threads, **given)
        except ValueError:
            _arrays.check_channels(_arrays.as_float(x, "x").shape, self.axis, self.num_features)
            raise
        if not keeps:
            self._kept = _NOT_KEPT
        elif out is not None and any(np.shares_memory(out, kept) for kept in (x, add) if kept is not None):
            self._kept = _OVERWRITTEN
        else:
            self._kept = given | {"x": x}
        return y

    def _follow(self, statistics: Numbers, tally: Tally) -> None:
        """Move the running statistics towards those of a batch, unless it was empty."""
        if tally.values:
            self._state.follow(statistics, self._momentum, tally.correction() if self.unbiased else 1.0)

    def _keep(self, kept: Saved | Renormed | Ghosts) -> None:
        """Follow the statistics of a batch that was normalized by them, and keep what `backward` needs."""
        saved = kept if isinstance(kept, Saved) else kept.saved
        if self._follows:
            self._follow(saved._statistics, saved._tally)
        self._kept = kept if self.training or self.keep_input else _NOT_KEPT

    @overload
    def backward(
        self,
        dy: NDArray[Float],
        *,
        need: Literal["dx"] = ...,
        out: NDArray[Float] | None = None,
        num_threads: int | None = None,
    ) -> NDArray[Float]: ...
    @overload
    def backward(
        self,
        dy: ArrayLike,
        *,
        need: Literal["dx"] = ...,
        out: Array | None = None,
        num_threads: int | None = None,
    ) -> Array: ...
    @overload
    def backward(
        self,
        dy: NDArray[Float],
        *,
        need: Need,
        out: NDArray[Float] | None = None,
        num_threads: int | None = None,
    ) -> NDArray[Float] | None: ...
    @overload
    def backward(
        self,
        dy: ArrayLike,
        *,
        need: Need,
        out: Array | None = None,
        num_threads: int | None = None,
    ) -> Array | None: ...
    def backward(
        self,
        dy: ArrayLike,
        *,
        need: Need = functional.NEED,
        out: Array | None = None,
        num_threads: int | None = None,
    ) -> Array | None:
        """Gradients of the last call: returns dx and sets `dgamma` and `dbeta`, and `dadd` if the call had `add`.

        Parameters
        ----------
        dy : array_like
            Upstream gradient, with the shape and dtype of the last x.
        need, out, num_threads
            As in `batchnorm.backward`.

        Returns
        -------
        dx : ndarray, or None if `need` does not name it

        Raises
        ------
        RuntimeError
            If the layer has not been called yet, or its last call was in evaluation without `keep_input`, or wrote y
            over x.
        TypeError, ValueError
            As for `batchnorm.backward`.
        """
        kept = self._kept
        if isinstance(kept, str):
            raise RuntimeError(kept)
        gradients: Gradients
        if isinstance(kept, Saved):
            gradients = self._backward(dy, kept, need, out, num_threads)
        elif isinstance(kept, Renormed):
            gradients = kept.corrected(self._backward(dy, kept.saved, kept.needs(need), out, num_threads), need)
        elif isinstance(kept, Ghosts):
            gradients = kept.backward(dy, need, out, num_threads)
        else:
            gradients = fixed.inference_backward(dy, need=need, out=out, num_threads=num_threads, **kept)
        state = self._state
        self.dgamma = None if state.gamma is None else gradients.dgamma
        self.dbeta = None if state.beta is None else gradients.dbeta
        self.dadd = gradients.dadd
        return gradients.dx

    def _backward(
        self, dy: ArrayLike, saved: Saved, need: Need, out: Array | None, num_threads: int | None
    ) -> Gradients:
        return functional.backward(dy, saved, need=need, out=out, num_threads=num_threads)

    @overload
    def jvp(
        self, dx: NDArray[Float], *, out: NDArray[Float] | None = None, **how: Unpack[_keywords.LayerJvp]
    ) -> bn.Tangents[Float]: ...
    @overload
    def jvp(self, dx: ArrayLike, *, out: Array | None = None, **how: Unpack[_keywords.LayerJvp]) -> bn.Tangents: ...
    def jvp(
        self,
        dx: ArrayLike,
        *,
        dgamma: ArrayLike | None = None,
        dbeta: ArrayLike | None = None,
        dadd: ArrayLike | None = None,
        out: Array | None = None,
        num_threads: int | None = None,
    ) -> bn.Tangents:
        """Derivative of the last call along a direction; see `batchnorm.jvp`.

        Parameters
        ----------
        dx, dgamma, dbeta, dadd, out, num_threads
            As in `batchnorm.jvp`.

        Returns
        -------
        Tangents

        Raises
        ------
        RuntimeError
            As for `backward`, and after renorm or ghost batches.
        TypeError, ValueError
            As for `batchnorm.jvp`.
        """
        from . import calculus  # here, because few programs need it

        saved, through = self._last()

        def own() -> Numbers:
            calculus.check(saved, {"dx": dx}, {"dgamma": dgamma, "dbeta": dbeta}, {"dadd": dadd}, out)
            return calculus.tangent_sums(dx, saved, num_threads=num_threads)

        sums = self._over_all(own, 2) if through else None
        return calculus.jvp(
            dx,
            saved,
            dgamma=dgamma,
            dbeta=dbeta,
            dadd=dadd,
            through=through,
            sums=sums,
            out=out,
            num_threads=num_threads,
        )

    @overload
    def double_backward(
        self, ddx: NDArray[Float], dy: ArrayLike, **how: Unpack[_keywords.LayerDoubleBackward]
    ) -> bn.SecondGradients[NDArray[Float]]: ...
    @overload
    def double_backward(
        self, ddx: ArrayLike, dy: ArrayLike, **how: Unpack[_keywords.LayerDoubleBackward]
    ) -> bn.SecondGradients[Array]: ...
    def double_backward(
        self,
        ddx: ArrayLike,
        dy: ArrayLike,
        *,
        ddgamma: ArrayLike | None = None,
        ddbeta: ArrayLike | None = None,
        ddadd: ArrayLike | None = None,
        num_threads: int | None = None,
    ) -> bn.SecondGradients:
        """Gradients of what `backward` returned for dy; see `batchnorm.double_backward`.

        Parameters
        ----------
        ddx, dy, ddgamma, ddbeta, ddadd, num_threads
            As in `batchnorm.double_backward`.

        Returns
        -------
        SecondGradients

        Raises
        ------
        RuntimeError
            As for `backward`, and after renorm or ghost batches.
        TypeError, ValueError
            As for `batchnorm.double_backward`.
        """
        from . import calculus

        saved, through = self._last()

        def own() -> Numbers:
            numbers = {"ddgamma": ddgamma, "ddbeta": ddbeta}
            calculus.check(saved, {"ddx": ddx, "dy": dy}, numbers, {"ddadd": ddadd})
            return calculus.second_sums(ddx, dy, saved, num_threads=num_threads)

        sums = self._over_all(own, 5) if through else None
        return calculus.double_backward(
            ddx,
            dy,
            saved,
            ddgamma=ddgamma,
            ddbeta=ddbeta,
            ddadd=ddadd,
            through=through,
            sums=sums,
            num_threads=num_threads,
        )

    def _over_all(self, own: Callable[[], Numbers], rows: int) -> Numbers | None:
        """Sums over everything that was normalized together; None if that is only this layer's x."""
        del own, rows
        return None

    def _last(self) -> tuple[Saved, Through]:
        """What the last call left, and the statistics that depend on x."""
        kept = self._kept
        if isinstance(kept, str):
            raise RuntimeError(kept)
        if isinstance(kept, Saved):
            return kept, ("mean", "variance")
        if not isinstance(kept, dict):
            raise RuntimeError("only backward is available after renorm or ghost batches")
        given = dict(kept)
        moments = Moments(1, given.pop("mean"), given.pop("var"))
        return functional.forward(**given, moments=moments)[1], ()

    def recalibrate(
        self,
        batches: Iterable[Batch],
        *,
        mask: Iterable[ArrayLike] | None = None,
        lengths: Iterable[ArrayLike] | None = None,
        weights: Iterable[ArrayLike] | None = None,
        progress: bool = True,
        num_threads: int | None = None,
    ) -> None:
        """Set the running statistics to those of a data set: running_mean ← μ, running_var ← Σ(x − μ)²/(n − 1).

        Unlike the moving average from training, these are the statistics of all of the data for one set of network
        weights, as the paper uses them for inference. `num_batches_tracked` does not change.

        Parameters
        ----------
        batches : iterable of array_like
            The inputs of the layer, batch by batch; see `population`.
        mask, lengths, weights, progress, num_threads
            As in `population`.

        Raises
        ------
        RuntimeError
            If the layer has no running statistics.
        TypeError, ValueError
            As for `population`; ValueError also if the number of channels is not `num_features`, or there are fewer
            than two values per channel. The layer is unchanged then.

        References
        ----------
        Ioffe and Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, algorithm 2, steps 8 to 11.

        Examples
        --------
        >>> import numpy as np, batchnorm as bn
        >>> layer = bn.BatchNorm(1, dtype=np.float64)
        >>> layer.recalibrate([np.array([[1.0], [2.0]]), np.array([[6.0]])])
        >>> layer.running_mean, layer.running_var
        (array([3.]), array([7.]))
        """
        state = self._state
        if state.running_mean is None:
            raise RuntimeError("recalibrate needs a layer with running statistics")
        selects = {"mask": mask, "lengths": lengths, "weights": weights}
        moments = self._population(batches, progress=progress, num_threads=num_threads, **selects)
        if moments.count < 2:
            raise ValueError(f"batches must hold at least 2 values per channel, got {moments.count}")
        state.set_statistics(moments.mean, moments.var(ddof=1))

    def _population(self, batches: Iterable[Batch], **how: Any) -> Moments:
        moments = population(batches, self.axis, **how)
        if moments.mean.size != self.num_features:
            raise ValueError(f"batches must have {self.num_features} channels, got {moments.mean.size}")
        return moments

    def state_dict(self) -> dict[str, Any]:
        """Copies of the state under PyTorch's names: weight, bias, running_mean, running_var, num_batches_tracked.

        Examples
        --------
        >>> import batchnorm as bn
        >>> list(bn.BatchNorm(3).state_dict())
        ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
        """
        own = self._state
        state: dict[str, Any] = {}
        with own.lock:
            mean, var, gamma, beta = own.snapshot()
            counter = own.counter
        if gamma is not None:
            state["weight"] = gamma
        if beta is not None:
            state["bias"] = beta
        if mean is not None:
            state |= {"running_mean": mean, "running_var": var, "num_batches_tracked": np.array(counter, np.int64)}
        return state

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Copy a state into the layer, after checking all of it.

        Parameters
        ----------
        state : mapping
            Exactly the names of `state_dict`, with the layer's shapes. Values are copied and converted to the layer's
            dtype, as in PyTorch; float16 and integers are accepted too. `num_batches_tracked` may be missing, as in
            files of old versions of PyTorch, and is then 0.

        Raises
        ------
        ValueError
            If another name is missing or unknown, a shape differs, a value is not finite in the layer's dtype, or a
            variance or the counter is negative.
        TypeError
            If values are not real numbers.
        """
        own = self._state
        arrays = {name: array for name, array in _NAMES.items() if array in own.names}
        counted = ["num_batches_tracked"] if own.running_mean is not None else []
        missing = [name for name in arrays if name not in state]
        unknown = [name for name in state if name not in (*arrays, *counted)]
        if missing or unknown:
            expected = [*arrays, *counted]
            raise ValueError(f"state must have the names {expected}, got missing {missing} and unknown {unknown}")
        loaded = {array: self._checked_state(name, state[name]) for name, array in arrays.items()}
        batches = self._checked_counter(state.get("num_batches_tracked", 0))
        own.replace(loaded, batches)
        self._kept = _NOT_CALLED

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the settings and the state of the layer to an npz file, which contains nothing executable.

        Only what `load` accepts is written, so a layer whose values are no longer finite does not replace the file of a
        good one (`state_dict` and pickle keep such values). The file appears in one step: if `save` is interrupted, an
        old file of that name is unchanged. `np.load` reads the file.

        Parameters
        ----------
        path : path-like
            The name of the file; no suffix is appended.

        Raises
        ------
        TypeError, ValueError
            If `load` would refuse the layer, or the path exists and is not a regular file. No file is touched then.
        OSError
            If the file cannot be written.

        See Also
        --------
        load : reads the file.
        state_dict : the arrays alone.

        Examples
        --------
        >>> import os, tempfile, batchnorm as bn
        >>> path = os.path.join(tempfile.mkdtemp(), "layer.npz")
        >>> bn.BatchNorm(3, momentum=None).save(path)
        >>> bn.BatchNorm.load(path)
        BatchNorm(3, axis=1, eps=1e-05, momentum=None, affine=True, track_running_stats=True, dtype=float32)
        """
        values = {name: getattr(self, name, None) for name in _SETTINGS} | {"float_bits": 8 * self.dtype.itemsize}
        values["has_bias"] = False if self.affine and self.beta is None else None
        values["unbiased"] = None if self.unbiased else False
        values["update"] = None if self.update else False
        values["trains_with_running"] = True if self.statistics == "running" else None
        limits = _activation.as_limits(self._activation)
        try:
            found = {name: np.array(value, _SETTINGS[name]) for name, value in values.items() if value is not None}
            found |= self.state_dict()
            if limits is not None:
                found["activation"] = np.array(limits)
            if self.renorm is not None:
                found["renorm"] = np.array(self.renorm)
            BatchNorm._restored(found)
        except (TypeError, ValueError) as error:
            raise type(error)(f"the layer must be one that load accepts: {error}; no file was written") from None
        # Here, because importing zipfile takes longer than importing all of this package.
        from . import state_file

        state_file.write(path, found)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, max_bytes: int = 1 << 28, **arguments: Any) -> Self:
        """The layer that `save` wrote, in training mode like every new layer: a call moves its running statistics.

        For evaluation use `BatchNorm.load(path).eval()`.

        Parameters
        ----------
        path : path-like
        max_bytes : int, default 268435456
            The most data to read.
        **arguments
            Further arguments of a derived class, such as `comm` of `SyncBatchNorm`.

        Raises
        ------
        ValueError
            If the file is larger or truncated, or holds anything but a layer: pickled objects, wrong names, dtypes
            or shapes, values that are not finite, a negative variance.
        OSError
            If it cannot be read.

        See Also
        --------
        save : with an example.
        load_state_dict : accepts, for example, the mapping that `safetensors.numpy.load_file` returns.
        """
        from . import state_file

        found = state_file.read(path, _IN_A_FILE, max_bytes)
        try:
            return cls._restored(found, **arguments)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)!r} must be a file that BatchNorm.save wrote: {error}") from None

    @classmethod
    def _restored(cls, found: Mapping[str, Array], **arguments: Any) -> Self:
        """The layer whose file holds these arrays."""
        settings = _settings(found)
        state = {name: found[name] for name in found if name not in (*_SETTINGS, "activation", "renorm")}
        tracked = bool(settings["track_running_stats"])
        settings["track_running_stats"] = tracked or "running_mean" in state
        layer = cls(**settings, **arguments)
        layer.load_state_dict(state)
        layer.track_running_stats = tracked
        return layer

    def _converted(self, name: str, value: ArrayLike | None) -> Array:
        """Numbers per channel in the layer's dtype."""
        array = as_array(value, name)
        if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
            raise TypeError(f"{name} must hold real numbers, got {'None' if value is None else f'dtype {array.dtype}'}")
        if array.shape != (self.num_features,):
            raise ValueError(f"{name} must have shape ({self.num_features},), got {array.shape}")
        with np.errstate(all="ignore"):
            return array.astype(self.dtype, copy=False)

    def _checked_state(self, name: str, value: ArrayLike) -> Array:
        array = self._converted(name, value)
        if not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite, got {array[~np.isfinite(array)][0]} in {self.dtype}")
        if name == "running_var" and (array < 0).any():
            raise ValueError(f"running_var must not be negative, got {array.min()}")
        return array

    @staticmethod
    def _checked_counter(value: ArrayLike) -> int:
        counter = np.asarray(value)
        if counter.dtype.kind not in "iu":
            raise TypeError(f"num_batches_tracked must be an integer, got dtype {counter.dtype}")
        if math.prod(counter.shape) != 1 or counter.ndim > 1 or not 0 <= int(counter.item()) <= MOST_BATCHES:
            raise ValueError(f"num_batches_tracked must be one number, 0 to 2**62, got {counter}")
        return int(counter.item())
