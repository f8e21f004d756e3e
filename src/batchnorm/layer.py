"""The layer: parameters, running statistics and what the last call left for `backward`. Its semantics are PyTorch's.

No arithmetic of its own, and state changes only after everything that can fail has been done, so an exception leaves
parameters, running statistics and the counter as they were. Threads that share a layer take turns at its state alone:
batches are worked on at the same time, and evaluation takes no lock.
"""

import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from . import _arrays, _threads, functional
from ._arrays import Array
from .functional import Gradients, Saved
from .moments import Moments, population

# What a file says of a layer besides its state; no momentum is None.
_SETTINGS: dict[str, type[np.generic]] = {
    "num_features": np.int64,
    "axis": np.int64,
    "eps": np.float64,
    "momentum": np.float64,
    "affine": np.int64,
    "track_running_stats": np.int64,
    "float_bits": np.int64,
}
_PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")
_IN_A_FILE = (*_SETTINGS, *_PER_CHANNEL, "num_batches_tracked")


def _settings(found: Mapping[str, Array]) -> dict[str, Any]:
    """Arguments of the constructor from what a file holds, checked before anything is made of that size."""
    settings: dict[str, Any] = {}
    for name, dtype in _SETTINGS.items():
        if name in found:
            if found[name].shape != () or found[name].dtype != dtype:
                raise ValueError(f"{name} must be one {dtype.__name__}, got {found[name]!r}")
            settings[name] = found[name].item()
        elif name != "momentum":
            raise ValueError(f"{name} is missing")
    bits = settings.pop("float_bits")
    if bits not in (32, 64):
        raise ValueError(f"float_bits must be 32 or 64, got {bits}")
    lengths = {found[name].shape for name in _PER_CHANNEL if name in found}
    if lengths != ({(settings["num_features"],)} if settings["affine"] or settings["track_running_stats"] else set()):
        raise ValueError(f"num_features is {settings['num_features']}, but arrays have shapes {lengths}")
    return {"momentum": None, "dtype": np.dtype(f"f{bits // 8}")} | settings


class BatchNorm:
    """Batch normalization with state: y = gamma·(x − μ)/√(σ² + eps) + beta.

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
        Weight of the NEW batch in the running statistics, as in PyTorch (Keras and Flax name the weight of the old
        value). None keeps the cumulative mean of all batches.
    affine : bool, default True
        Whether there are gamma (created as 1) and beta (as 0).
    track_running_stats : bool, default True
        Whether there are running_mean (created as 0), running_var (as 1) and num_batches_tracked. Without them
        evaluation uses the statistics of the batch too.
    dtype : float32 or float64, default float32
        Of parameters, their gradients and running statistics. x may have either dtype.

    Attributes
    ----------
    gamma, beta, running_mean, running_var : ndarray of shape (C,), or None
    num_batches_tracked : int
    training : bool
    dgamma, dbeta : ndarray of shape (C,), or None
        Set, not added to, by `backward`.

    Notes
    -----
    The batch is normalized with the biased variance, the running variance takes the unbiased one, n/(n − 1) times as
    large. Training needs more than one value per channel. An empty batch gives an empty y and zero gradients, and
    leaves running statistics and counter alone.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, algorithms 1 and 2.

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
    """

    gamma: Array | None
    beta: Array | None
    running_mean: Array | None
    running_var: Array | None
    dgamma: Array | None
    dbeta: Array | None

    def __init__(
        self,
        num_features: int,
        *,
        axis: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.num_features = _arrays.as_index(num_features, "num_features")
        if self.num_features < 0:
            raise ValueError(f"num_features must be at least 0, got {self.num_features}")
        self.axis = _arrays.as_index(axis, "axis")
        self.eps = _arrays.as_eps(eps)
        self.momentum = None if momentum is None else _arrays.as_momentum(momentum)
        self.affine = bool(affine)
        self.track_running_stats = bool(track_running_stats)
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise TypeError(f"dtype must be float32 or float64, got {self.dtype}")
        self.training = True
        self.gamma = np.ones(self.num_features, self.dtype) if self.affine else None
        self.beta = np.zeros(self.num_features, self.dtype) if self.affine else None
        self.running_mean = np.zeros(self.num_features, self.dtype) if self.track_running_stats else None
        self.running_var = np.ones(self.num_features, self.dtype) if self.track_running_stats else None
        self.num_batches_tracked = 0
        self.dgamma = None
        self.dbeta = None
        self._backward: Callable[..., Gradients] | None = None
        self._lock = _threads.new_lock()

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {
                name: value.copy() if isinstance(value, np.ndarray) else value
                for name, value in self.__dict__.items()
                if name != "_lock"
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = _threads.new_lock()

    def __repr__(self) -> str:
        return (
            f"BatchNorm({self.num_features}, axis={self.axis}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats}, dtype={self.dtype})"
        )

    def train(self, mode: bool = True) -> "BatchNorm":
        """Use the statistics of each batch and follow them; `train(False)` is `eval()`. Returns the layer."""
        self.training = bool(mode)
        return self

    def eval(self) -> "BatchNorm":
        """Use the running statistics. Returns the layer."""
        return self.train(False)

    def __call__(self, x: ArrayLike, *, out: Array | None = None, num_threads: int | None = None) -> Array:
        """Normalize x, and in training move the running statistics.

        Parameters
        ----------
        x : array_like of float32 or float64
            With `num_features` channels along `axis`.
        out, num_threads
            As in `forward` and `inference`.

        Raises
        ------
        TypeError, ValueError
            As `forward` and `inference`; ValueError also if x has one value per channel where its own statistics are
            needed. The layer is as it was then.
        """
        x = _arrays.as_float(x, "x")
        self._check_channels(x)
        if self.training or self.running_mean is None or self.running_var is None:
            return self._forward_batch(x, out, num_threads)
        y = functional.inference(
            x,
            self.running_mean,
            self.running_var,
            self.gamma,
            self.beta,
            axis=self.axis,
            eps=self.eps,
            out=out,
            num_threads=num_threads,
        )
        self._backward = partial(
            functional.inference_backward,
            x=x,
            mean=self.running_mean.copy(),
            var=self.running_var.copy(),
            gamma=None if self.gamma is None else self.gamma.copy(),
            axis=self.axis,
            eps=self.eps,
        )
        return y

    def _check_channels(self, x: Array) -> None:
        if not -x.ndim <= self.axis < x.ndim or x.shape[self.axis] != self.num_features:
            raise ValueError(f"x must have {self.num_features} channels along axis {self.axis}, got shape {x.shape}")

    def _forward_batch(self, x: Array, out: Array | None, num_threads: int | None) -> Array:
        if x.size == self.num_features > 0:
            raise ValueError(
                f"training needs more than one value per channel, got x of shape {x.shape} with axis={self.axis}; "
                "use a larger batch, or eval() for the running statistics"
            )
        y, saved = functional.forward(
            x, self.gamma, self.beta, axis=self.axis, eps=self.eps, out=out, num_threads=num_threads
        )
        self._follow(saved, partial(functional.backward, saved=saved))
        return y

    def _follow(self, saved: Saved, backward: Callable[..., Gradients]) -> None:
        """Move the running statistics towards a batch, in training; remember how to go back."""
        with self._lock:
            if self.training and self.running_mean is not None and self.running_var is not None and saved.count:
                momentum = 1 / (self.num_batches_tracked + 1) if self.momentum is None else self.momentum
                functional.update_running(self.running_mean, self.running_var, saved, momentum=momentum)
                self.num_batches_tracked += 1
            self._backward = backward

    def backward(
        self,
        dy: ArrayLike,
        *,
        need: Collection[str] = ("dx", "dgamma", "dbeta"),
        out: Array | None = None,
        num_threads: int | None = None,
    ) -> Array | None:
        """Gradient of the last call; sets `dgamma` and `dbeta`.

        Parameters
        ----------
        dy : array_like
            Upstream gradient, of the shape and dtype of the last x.
        need, out, num_threads
            As in `batchnorm.backward`.

        Returns
        -------
        dx : ndarray, or None where `need` does not name it

        Raises
        ------
        RuntimeError
            If the layer has not been called yet.
        TypeError, ValueError
            As `batchnorm.backward`.
        """
        backward = self._backward
        if backward is None:
            raise RuntimeError("backward needs a call of the layer before it")
        gradients = backward(dy, need=need, out=out, num_threads=num_threads)
        with self._lock:
            self.dgamma = gradients.dgamma if self.affine else None
            self.dbeta = gradients.dbeta if self.affine else None
        return gradients.dx

    def recalibrate(
        self, batches: Iterable[ArrayLike], *, progress: bool = True, num_threads: int | None = None
    ) -> None:
        """Set the running statistics to those of a data set: running_mean ← μ, running_var ← Σ(x − μ)²/(n − 1).

        Other than the moving average that training leaves, these are the statistics of all of the data, for one set of
        weights: the paper's inference. `num_batches_tracked` stays.

        Parameters
        ----------
        batches : iterable of array_like
            What the layer is given, batch by batch; see `population`.
        progress, num_threads
            As in `population`.

        Raises
        ------
        RuntimeError
            If the layer has no running statistics.
        TypeError, ValueError
            As `population`; ValueError also if there are other than `num_features` channels or less than two values
            a channel. The layer is as it was then.

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
        if self.running_mean is None or self.running_var is None:
            raise RuntimeError("recalibrate needs a layer with running statistics")
        moments = self._population(batches, progress, num_threads)
        if moments.count < 2:
            raise ValueError(f"batches must hold at least 2 values per channel, got {moments.count}")
        with self._lock:
            self.running_mean[...], self.running_var[...] = moments.mean, moments.var(ddof=1)

    def _population(self, batches: Iterable[ArrayLike], progress: bool, num_threads: int | None) -> Moments:
        moments = population(batches, self.axis, progress=progress, num_threads=num_threads)
        if moments.mean.size != self.num_features:
            raise ValueError(f"batches must have {self.num_features} channels, got {moments.mean.size}")
        return moments

    def _state(self) -> dict[str, Array]:
        """The layer's own arrays under PyTorch's names."""
        named = {
            "weight": self.gamma,
            "bias": self.beta,
            "running_mean": self.running_mean,
            "running_var": self.running_var,
        }
        return {name: array for name, array in named.items() if array is not None}

    def state_dict(self) -> dict[str, Any]:
        """Copies of the state under PyTorch's names: weight, bias, running_mean, running_var, num_batches_tracked.

        Examples
        --------
        >>> import batchnorm as bn
        >>> list(bn.BatchNorm(3).state_dict())
        ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
        """
        with self._lock:
            state: dict[str, Any] = {name: array.copy() for name, array in self._state().items()}
            if self.track_running_stats:
                state["num_batches_tracked"] = np.array(self.num_batches_tracked, np.int64)
            return state

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Take over a state, after all of it has been checked.

        Parameters
        ----------
        state : mapping
            The names of `state_dict`, no more and no fewer, with the layer's shapes and dtype. Values are copied.

        Raises
        ------
        ValueError
            If a name is missing or unknown, a shape differs, a value is not finite, a variance or the counter is
            negative.
        TypeError
            If a dtype differs.
        """
        own = self._state()
        expected = [*own, *(["num_batches_tracked"] if self.track_running_stats else [])]
        missing = [name for name in expected if name not in state]
        unknown = [name for name in state if name not in expected]
        if missing or unknown:
            raise ValueError(f"state must have the names {expected}, got missing {missing} and unknown {unknown}")
        loaded = {name: self._checked_state(name, state[name]) for name in own}
        batches = self._checked_counter(state["num_batches_tracked"]) if self.track_running_stats else 0
        with self._lock:
            for name, array in own.items():
                array[...] = loaded[name]
            self.num_batches_tracked = batches
            self._backward = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the settings and the state of the layer to an npz file, in which nothing is executable.

        The file appears in one step: interrupted anywhere, the old file of that name is as it was. `np.load` reads it.

        Parameters
        ----------
        path : path-like
            The name as it is; nothing is appended.

        Raises
        ------
        ValueError
            If there is something at the path that is not a regular file.
        OSError
            If the file cannot be written.

        See Also
        --------
        load, state_dict

        Examples
        --------
        >>> import os, tempfile, batchnorm as bn
        >>> path = os.path.join(tempfile.mkdtemp(), "layer.npz")
        >>> bn.BatchNorm(3, momentum=None).save(path)
        >>> bn.BatchNorm.load(path)
        BatchNorm(3, axis=1, eps=1e-05, momentum=None, affine=True, track_running_stats=True, dtype=float32)
        """
        values = {name: getattr(self, name, None) for name in _SETTINGS} | {"float_bits": 8 * self.dtype.itemsize}
        settings = {name: np.array(value, _SETTINGS[name]) for name, value in values.items() if value is not None}
        # Here, because zip files cost an import more than all of this package.
        from . import state_file

        state_file.write(path, settings | self.state_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, max_bytes: int = 1 << 28, **arguments: Any) -> Self:
        """The layer that `save` wrote, in training mode, as every new layer.

        Parameters
        ----------
        path : path-like
        max_bytes : int, default 268435456
            The most data to read.
        **arguments
            Those that a derived class has besides the settings of this one, as `comm` of `SyncBatchNorm`.

        Raises
        ------
        ValueError
            If the file is larger, truncated, or holds anything else than a layer: pickled objects, other names, dtypes
            or shapes, values that are not finite, a negative variance.
        OSError
            If it cannot be read.

        See Also
        --------
        save : with an example.
        load_state_dict : takes the mapping that `safetensors.numpy.load_file` returns, too.
        """
        from . import state_file

        found = state_file.read(path, _IN_A_FILE, max_bytes)
        try:
            settings = _settings(found)
            layer = cls(**settings, **arguments)
            layer.load_state_dict({name: found[name] for name in found if name not in _SETTINGS})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)!r} must be a file that BatchNorm.save wrote: {error}") from None
        return layer

    def _checked_state(self, name: str, value: ArrayLike) -> Array:
        array = _arrays.as_channels(value, name, self.num_features)
        if array.dtype != self.dtype:
            raise TypeError(f"{name} must have dtype {self.dtype}, got {array.dtype}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite, got {array[~np.isfinite(array)][0]}")
        if name == "running_var" and (array < 0).any():
            raise ValueError(f"running_var must not be negative, got {array.min()}")
        return array

    @staticmethod
    def _checked_counter(value: ArrayLike) -> int:
        counter = np.asarray(value)
        if counter.dtype.kind not in "iu":
            raise TypeError(f"num_batches_tracked must be an integer, got dtype {counter.dtype}")
        if math.prod(counter.shape) != 1 or counter.ndim > 1 or not 0 <= int(counter.item()) <= 2**62:
            raise ValueError(f"num_batches_tracked must be one number, 0 to 2**62, got {counter}")
        return int(counter.item())
