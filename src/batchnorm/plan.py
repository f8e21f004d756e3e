"""Inference that is prepared once: fixed statistics, and calls that only write y.

Decisions:

- The coefficients of y are computed when the plan is made. A call checks x, finds its channels and runs one kernel.
  The bits are those of `inference`.
- 8-bit integers have 256 values, so their y is looked up in a table per channel. The first such x makes the table, in
  float64 and with the activation, so y is rounded once.
- If the types of x and y differ, y is computed in the wider one; another memory order needs a copy. Each is one more
  pass over memory, unless x has 8 bits.
- Users cannot change a plan. What it caches is stored in one step, so threads can share a plan and a forked child can
  use it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

import batchnorm as bn  # for annotations: what they name is imported when they are evaluated

from . import _activation, _arrays, _kernels, _threads
from ._activation import Activation
from ._arrays import Array, Layout
from ._foreign import as_array
from ._kernels import Limits, Three, lookup
from ._kernels.runtime import BETA, COEFFICIENT_ROWS, GAMMA, MEAN, VAR
from .fixed import table_of
from .functional import normalize
from .moments import Moments

Order = Literal["C", "K"]

_FLOAT32 = np.dtype(np.float32)
_FLOAT64 = np.dtype(np.float64)

_VALUES = {"B": np.arange(256, dtype=np.float64), "b": np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float64)}
"""The values of uint8 and int8 in table order, by NumPy's character for the type."""

_MOST_VIEWS = 64


class Plan:
    """Inference prepared once: `plan(x)` is y = act(gamma·(x − mean)/√(var + eps) + beta), like `inference`.

    Parameters
    ----------
    mean, var : array_like, shape (C,)
        Fixed statistics, usually running ones; var is not negative. Integers become float64.
    gamma, beta : array_like, shape (C,), optional
        Scale and shift; 1 and 0 where None.
    axis : int, default 1
        The channel axis of x.
    eps : float, default 1e-5
        Added to the variance, under the root. A channel with var + eps = 0 gives beta.
    activation : "relu", ("leaky_relu", slope) or ("clip", low, high), optional
        Activation after the normalization; see `forward`.
    dtype : dtype, optional
        Dtype of y: float64, float32, float16 or bfloat16. By default that of x, and float32 for integers.

    Attributes
    ----------
    mean, var, gamma, beta : ndarray of float64, shape (C,)
        Read-only; gamma is 1 and beta 0 where they were None.
    num_features : int
        C.
    axis : int
    eps : float
    activation : str or tuple, or None
    dtype : dtype or None

    Raises
    ------
    TypeError
        If an argument is not numeric, or `dtype` is not supported.
    ValueError
        If shapes differ, `eps` or `activation` is invalid, or a variance is negative.

    See Also
    --------
    fold : moves the normalization into the weights of the layer before it, so that inference needs no extra step.

    Notes
    -----
    For floats y has the bits of `inference`; for 8-bit integers it is computed in float64 and rounded once. The bits
    of one sample do not depend on the other samples of a batch, on the memory layout of x or on the number of threads.
    A plan is immutable. It can be pickled, and threads can share it.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, algorithm 2, step 11.

    Examples
    --------
    >>> import numpy as np, batchnorm as bn
    >>> plan = bn.Plan(mean=[2.0, 0.0], var=[4.0, 25.0], eps=0.0, activation="relu")
    >>> plan
    Plan(2 channels along axis 1: y = relu((x − mean)·gamma/√(var + 0.0) + beta))
    >>> plan(np.array([[1.0, 10.0], [3.0, 30.0]]))
    array([[0. , 2. ],
           [0.5, 6. ]])
    """

    __slots__ = (
        "_axis",
        "_dtype",
        "_eps",
        "_kernels",
        "_limits",
        "_small",
        "_statistics",
        "_tables",
    )

    _statistics: NDArray[np.float64]
    _axis: int
    _eps: float
    _limits: Limits | None
    _dtype: np.dtype[Any] | None
    _kernels: dict[str, tuple[Callable[..., None], NDArray[np.float64], bool]]
    _small: dict[tuple[int, ...], Three]
    _tables: dict[tuple[str, np.dtype[Any], bool], Array]

    def __init__(
        self,
        mean: ArrayLike,
        var: ArrayLike,
        gamma: ArrayLike | None = None,
        beta: ArrayLike | None = None,
        *,
        axis: int = 1,
        eps: float = 1e-5,
        activation: Activation | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        mean = _arrays.as_float(mean, "mean", True)
        if mean.ndim != 1:
            raise ValueError(f"mean must have shape (C,), got {mean.shape}")
        statistics, _ = table_of(mean, var, gamma, beta, eps, mean.size)
        self._axis = _arrays.as_index(axis, "axis")
        self._eps = float(eps)
        self._limits = _activation.as_limits(activation)
        self._dtype = None if dtype is None else _arrays.as_dtype(dtype, "dtype")
        self._remember(statistics)

    def _remember(self, statistics: NDArray[np.float64]) -> None:
        statistics.flags.writeable = False
        self._statistics, self._kernels, self._small, self._tables = statistics, {}, {}, {}
        for char in "fd":
            self._prepared(char)

    def _prepared(self, char: str) -> tuple[Callable[..., None], NDArray[np.float64], bool]:
        """The kernel of a type, its coefficients, and whether all of them fit the type."""
        if char not in self._kernels:
            kernels = _kernels.of_type[char]
            table = np.empty((COEFFICIENT_ROWS, self.num_features))
            fit = kernels.coefficients(self._statistics, table)
            self._kernels[char] = kernels.normalize_prepared, table, fit
        return self._kernels[char]

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self._statistics, self._axis, self._eps, self._limits, self._dtype)

    @classmethod
    def of(cls, layer: bn.BatchNorm, *, dtype: DTypeLike | None = None) -> Self:
        """The plan of a layer in evaluation, with its axis, eps and activation and copies of its arrays.

        Parameters
        ----------
        layer : BatchNorm
            A layer with running statistics. Later changes to it do not affect the plan.
        dtype : dtype, optional
            Dtype of y; see `Plan`.

        Raises
        ------
        ValueError
            If the layer has no running statistics, or a variance is negative.

        Examples
        --------
        >>> import numpy as np, batchnorm as bn
        >>> layer = bn.BatchNorm(3).eval()
        >>> x = np.ones((2, 3), np.float32)
        >>> bool((bn.Plan.of(layer)(x) == layer(x)).all())
        True
        """
        mean, var, gamma, beta = layer._state.snapshot()
        if mean is None or var is None:
            raise ValueError(f"layer must have running statistics, got {layer!r}")
        return cls(mean, var, gamma, beta, axis=layer.axis, eps=layer.eps, activation=layer.activation, dtype=dtype)

    @classmethod
    def normalizer(
        cls,
        mean: ArrayLike,
        std: ArrayLike,
        *,
        scale: float = 1 / 255,
        axis: int = -1,
        activation: Activation | None = None,
        dtype: DTypeLike | None = None,
    ) -> Self:
        """The plan of y = (scale·x − mean)/std, which normalizes images as in the training of a network.

        With the default scale it is torchvision's `Normalize(mean, std)` after `ToTensor()`.

        Parameters
        ----------
        mean, std : array_like, shape (C,)
            In units of scale·x; std must be above 0.
        scale : float, default 1/255
            Above 0.
        axis : int, default -1
            The channel axis of x.
        activation, dtype
            As in `Plan`.

        Raises
        ------
        TypeError, ValueError
            As for `Plan`; ValueError also if a std or `scale` is not finite and above 0.

        Examples
        --------
        >>> import numpy as np, batchnorm as bn
        >>> plan = bn.Plan.normalizer(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
        >>> image = np.full((1, 2, 2, 3), 128, np.uint8)  # channels last
        >>> plan(image)[0, 0, 0]
        array([0.07406456, 0.20518208, 0.42649236], dtype=float32)

        The same with channels first, (N, C, H, W), in one pass:

        >>> plan = bn.Plan.normalizer([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], axis=1)
        >>> plan(image.transpose(0, 3, 1, 2), order="C").flags.c_contiguous
        True
        """
        scale = _arrays.as_number(scale, "scale")
        mean = _arrays.as_float(mean, "mean", True).astype(np.float64)
        std = _arrays.as_channels(std, "std", mean.size).astype(np.float64)
        if not 0 < scale < np.inf:
            raise ValueError(f"scale must be finite and above 0, got {scale}")
        if not ((std > 0) & (std < np.inf)).all():
            raise ValueError(f"std must be finite and above 0, got {std}")
        return cls(mean / scale, (std / scale) ** 2, axis=axis, eps=0.0, activation=activation, dtype=dtype)

    @property
    def mean(self) -> NDArray[np.float64]:
        return self._row(MEAN)

    @property
    def var(self) -> NDArray[np.float64]:
        return self._row(VAR)

    @property
    def gamma(self) -> NDArray[np.float64]:
        return self._row(GAMMA)

    @property
    def beta(self) -> NDArray[np.float64]:
        return self._row(BETA)

    def _row(self, row: int) -> NDArray[np.float64]:
        array: NDArray[np.float64] = self._statistics[row]
        return array

    @property
    def num_features(self) -> int:
        channels: int = self._statistics.shape[1]
        return channels

    @property
    def axis(self) -> int:
        return self._axis

    @property
    def eps(self) -> float:
        return self._eps

    @property
    def activation(self) -> Activation | None:
        return _activation.activation_of(self._limits)

    @property
    def dtype(self) -> np.dtype[Any] | None:
        return self._dtype

    def __repr__(self) -> str:
        activation = self.activation
        name, *numbers = (activation,) if isinstance(activation, str) else activation or ("",)
        y = f"(x − mean)·gamma/√(var + {self._eps}) + beta"
        y = f"{name}({', '.join([y, *map(str, numbers)])})" if name else y
        dtype = "" if self._dtype is None else f", in {self._dtype}"
        return f"{type(self).__name__}({self.num_features} channels along axis {self._axis}: y = {y}{dtype})"

    def __call__(
        self,
        x: ArrayLike,
        *,
        out: Array | None = None,
        add: ArrayLike | None = None,
        order: Order = "K",
        num_threads: int | None = None,
    ) -> Array:
        """Normalize x: y = act(gamma·(x − mean)/√(var + eps) + beta + add).

        Parameters
        ----------
        x : array_like of float64, float32, float16, bfloat16, uint8 or int8, at least 2-D
            Channels along `axis`.
        out : ndarray, optional
            Where to write y, in any memory order. `out=x` and `out=add` are allowed, other overlaps are not.
        add : array_like, optional
            A residual, of y's shape and dtype, added before the activation.
        order : {"K", "C"}, default "K"
            Memory order of y if there is no `out`: "K" keeps that of x, "C" is C order. If x is a transposed view of
            channels-last memory, "C" writes y with channels first.
        num_threads : int, optional
            Threads for this call. The result does not depend on it.

        Returns
        -------
        ndarray
            With x's shape.

        Raises
        ------
        TypeError
            If x, `add` or `out` has a wrong dtype.
        ValueError
            If a shape, `order` or `out` is invalid. Nothing is written then.
        """
        if type(x) is np.ndarray and out is None and add is None and order == "K" and num_threads is None:
            # The most common call. For small x, the checks below would take longer than the kernel.
            flags, dtype, view = x.flags, x.dtype, self._small.get(x.shape)
            if view is not None and (dtype is _FLOAT32 or dtype is _FLOAT64) and flags.c_contiguous and flags.aligned:
                normalize, table, fit = self._kernels["f" if dtype is _FLOAT32 else "d"]
                fast = np.empty(x.shape, dtype)
                normalize(x, fast, view, table, fit, 1, self._limits)
                return fast
        array = _as_input(x)
        _arrays.check_channels(array.shape, self._axis, self.num_features)
        given, layout = _arrays.lay_out(array, self._axis)
        dtype = self._dtype or (_FLOAT32 if given.itemsize == 1 else given.dtype)
        if order not in ("C", "K"):
            raise ValueError(f"order must be 'C' or 'K', got {order!r}")
        residual = None if add is None else _arrays.as_like(add, "add", given.shape, dtype, "y")
        plain = _arrays.layout_of(layout.shape, layout.axis, None)
        if out is None:
            target = layout if order == "K" else plain
            y = target.empty(dtype)
        else:
            _arrays.check_out(out, given.shape, dtype)
            _arrays.check_overlap(out, {"x": array, "add": residual}, ("x", "add"))
            target = plain if plain.fits(out) else layout
            y = target.room(out, dtype)
        threads = _threads.threads_for(given.size, num_threads, once=True)
        if not given.size:
            return y
        if given.dtype == dtype and target.order == layout.order:
            self._write(given, y, layout, residual, threads)
        else:
            if residual is not None and np.may_share_memory(residual, y):
                residual = residual.copy()  # before y is written: it is added to y in a second step
            if given.itemsize == 1:
                self._look_up(given, y, layout, target, residual, threads)
            else:
                self._write_elsewhere(given, y, target, residual, threads)
        if given.size < 4 * _threads.SERIAL_VALUES and self._dtype is None:
            self._small = dict([*self._small.items(), (layout.shape, plain.view)][-_MOST_VIEWS:])
        return y if out is None else _arrays.deliver(y, out)

    def drift(
        self,
        x: ArrayLike | Moments,
        *,
        mask: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        plot: str | os.PathLike[str] | None = None,
        num_threads: int | None = None,
    ) -> bn.Drift:
        """Measure how far data have moved from the plan's statistics: shift, variance ratio, divergence per channel.

        Parameters
        ----------
        x : array_like, or Moments
            Data that `Moments.of` takes, or their moments, for example those of many batches.
        mask, lengths, weights : array_like, optional
            Which values of x count; see `forward`.
        plot : path-like, optional
            File for a plot of the shift and ratio of all channels; needs matplotlib.
        num_threads : int, optional
            Threads for this call. The result does not depend on it.

        Returns
        -------
        Drift
            `print` shows it as a table.

        Raises
        ------
        TypeError, ValueError
            As for `Moments.of`; ValueError also if the number of channels differs, or there is no value.

        Examples
        --------
        >>> import numpy as np, batchnorm as bn
        >>> plan = bn.Plan.normalizer(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], scale=1.0)
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], (16, 32, 32, 3))
        >>> plan.drift(x).hints
        ()
        >>> plan.drift(255 * x).hints
        ('the data are about 255 times as large as expected: divide x by 255?',)
        >>> plan.drift(x[..., ::-1]).hints
        ('channels taken in the order (2, 1, 0) fit better (BGR for RGB?)',)
        """
        from .drift import drift  # here, because few programs need it

        if isinstance(x, Moments):
            if mask is not None or lengths is not None or weights is not None:
                raise ValueError("mask, lengths and weights must come with data, but x is Moments")
            moments = x
        else:
            moments = Moments.of(x, self._axis, mask=mask, lengths=lengths, weights=weights, num_threads=num_threads)
        if moments.mean.size != self.num_features:
            raise ValueError(f"x must have {self.num_features} channels, got {moments.mean.size}")
        if not moments.count:
            raise ValueError("x must have at least one value per channel, got none")
        found = drift(moments, self.mean, self.var, self._eps)
        if plot is not None:
            found.plot(plot)
        return found

    def _write(self, x: Array, y: Array, layout: Layout, add: Array | None, threads: int) -> None:
        """Write y of x's type and layout, with the kernel."""
        normalize, table, fit = self._prepared(x.dtype.char)
        residual = None if add is None else layout.lying(layout.bring(add))
        x, y = layout.memory(x, y)
        normalize(x, y, layout.view, table, fit, threads, self._limits, residual)

    def _write_elsewhere(self, x: Array, y: Array, target: Layout, add: Array | None, threads: int) -> None:
        """Write y of another type or layout, in place in the wider type."""
        wide = max(x.dtype, y.dtype, _FLOAT32, key=lambda dtype: dtype.itemsize)
        if x.dtype == y.dtype:
            wide = x.dtype
        if y.dtype == wide:
            np.copyto(y, x)
            self._write(y, y, target, add, threads)
        else:
            calculated = target.copy(x, wide)
            self._write(calculated, calculated, target, None if add is None else target.copy(add, wide), threads)
            np.copyto(y, calculated, casting="same_kind")

    def _look_up(self, x: Array, y: Array, layout: Layout, target: Layout, add: Array | None, threads: int) -> None:
        """Write y of 8-bit integers, from a table; with `add`, a kernel then adds it and applies the activation."""
        if not _side_by_side(layout, target):
            x, layout = target.copy(x), target
        table, view = self._table(x.dtype.char, y.dtype, add is None), _common_view(layout, target)
        walks = _strides(layout, view), _strides(target, view)
        lookup.look_up(layout.lying(x), target.lying(y), table, view, *walks, threads)
        if add is not None:
            zeros = np.zeros(self.num_features)
            Plan(zeros, zeros + 1, axis=self._axis, eps=0.0, activation=self.activation)(y, add=add, out=y)

    def _table(self, char: str, dtype: np.dtype[Any], activated: bool) -> Array:
        """y for each of the 256 values of a channel, computed in float64."""
        table = self._tables.get((char, dtype, activated))
        if table is None:
            values = np.repeat(_VALUES[char][:, None], self.num_features, axis=1)
            after = (self._limits if activated else None, None, None)
            normalize(values, values, _arrays.layout_of(values.shape, 1), self._statistics, 1, after)
            table = np.ascontiguousarray(values.T).astype(dtype)
            table = self._tables[char, dtype, activated] = table.view(np.uint16) if dtype.itemsize == 2 else table
        return table


def _as_input(x: ArrayLike) -> Array:
    """x as native floats or 8-bit integers."""
    if type(x) is np.ndarray and (x.dtype is _FLOAT32 or x.dtype.char in _VALUES):
        return x
    array = as_array(x, "x")
    if array.dtype.char in _VALUES:
        return array
    try:
        return _arrays.as_float(x, "x")
    except TypeError as error:
        raise TypeError(f"{error}; uint8 and int8 are also accepted") from None


def _side_by_side(layout: Layout, target: Layout) -> bool:
    """Whether the positions of both follow each other in the same order."""
    axes = range(len(layout.shape))
    first, second = ([i for i in one.order or axes if i != one.axis] for one in (layout, target))
    return first == second and (layout.view[2] == target.view[2] or 1 in (layout.view[2], target.view[2]))


def _common_view(layout: Layout, target: Layout) -> Three:
    """The view (N, C, S) of two layouts, one of which may have the channels last."""
    S = max(layout.view[2], target.view[2])
    S = layout.values if S == 1 else S
    return layout.values // S, layout.view[1], S


def _strides(layout: Layout, view: Three) -> Three:
    """Distances in memory between neighbours in the view."""
    _, C, S = view
    return (S * C, 1, C) if layout.view[2] == 1 else (C * S, S, 1)


def _restored(cls: type[Plan], statistics: NDArray[np.float64], *rest: Any) -> Plan:
    plan = cls.__new__(cls)
    plan._axis, plan._eps, plan._limits, plan._dtype = rest
    plan._remember(statistics)
    return plan
