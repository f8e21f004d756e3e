"""What an array must be, and how it is seen by the kernels.

Everything is checked here before anything is written, and every message says which argument, what was wanted and what
came. An array that is dense in memory is used where it lies, whatever the order of its axes: its axes are put in the
order of its memory, and the result gets the same order. Only other arrays (gaps, negative strides, foreign byte order,
misaligned) are copied.
"""

import math
import operator
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

if np.lib.NumpyVersion(np.__version__) < "1.26.0":
    raise ImportError(f"batchnorm needs NumPy 1.26 or newer, found {np.__version__}")

Array = NDArray[np.floating[Any]]

_FLOAT32 = np.dtype(np.float32)
_FLOAT64 = np.dtype(np.float64)


class Layout(NamedTuple):
    """Where the channels of an array are: the (N, C, S) view, and the order of axes that makes it contiguous."""

    shape: tuple[int, ...]
    axis: int
    view: tuple[int, int, int]
    order: tuple[int, ...] | None

    @property
    def values(self) -> int:
        """Values of one channel."""
        return self.view[0] * self.view[2]

    def fits(self, array: Array) -> bool:
        """Whether the array lies in memory as this layout says."""
        flags = array.flags if self.order is None else array.transpose(self.order).flags
        return flags.c_contiguous and flags.aligned

    def copy(self, array: Array) -> Array:
        """A copy that fits."""
        copy = self.empty(array.dtype)
        copy[...] = array
        return copy

    def bring(self, array: Array) -> Array:
        """An array of this shape as a kernel can read it, a copy where it does not fit."""
        return array if self.fits(array) else self.copy(array)

    def empty(self, dtype: np.dtype[Any]) -> Array:
        """A new array of this shape and order in memory."""
        if self.order is None:
            return np.empty(self.shape, dtype)
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return np.empty([self.shape[axis] for axis in self.order], dtype).transpose(inverse)

    def room(self, out: Array, dtype: np.dtype[Any]) -> Array:
        """Where a kernel can write a result: `out` if it fits, else a new array."""
        return out if self.fits(out) else self.empty(dtype)


def deliver(result: Array, out: Array) -> Array:
    """The result where the caller wants it."""
    if out is not result:
        np.copyto(out, result)
    return out


@lru_cache(maxsize=256)
def layout_of(shape: tuple[int, ...], axis: int, order: tuple[int, ...] | None = None) -> Layout:
    """The layout of an array whose axes lie in memory in that order."""
    if len(shape) < 2:
        raise ValueError(f"x must have at least 2 dimensions, got shape {shape}")
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis must be between {-len(shape)} and {len(shape) - 1} for shape {shape}, got {axis}")
    channel = axis % len(shape)
    where = channel if order is None else order.index(channel)
    lengths = shape if order is None else tuple(shape[i] for i in order)
    view = (math.prod(lengths[:where]), lengths[where], math.prod(lengths[where + 1 :]))
    return Layout(shape, channel, view, order)


def as_float(value: ArrayLike, name: str) -> Array:
    """The argument as an ndarray of native float32 or float64, without a copy where it is one."""
    if type(value) is np.ndarray and value.dtype in (_FLOAT32, _FLOAT64):
        return value
    ma = sys.modules.get("numpy.ma")
    if ma is not None and isinstance(value, ma.MaskedArray):
        raise TypeError(f"{name} must not be a masked array: masks are not supported")
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} must be an array of numbers: {error}") from None
    if array.dtype.kind != "f" or array.dtype.itemsize not in (4, 8):
        raise TypeError(f"{name} must have dtype float32 or float64, got {array.dtype}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def lay_out(x: Array, axis: int) -> tuple[Array, Layout]:
    """Find the (N, C, S) view of x; a copy of x where it has none."""
    if type(axis) is not int:
        axis = as_index(axis, "axis")
    flags = x.flags
    if flags.c_contiguous and flags.aligned:
        return x, layout_of(x.shape, axis, None)
    order = tuple(sorted(range(x.ndim), key=lambda i: -abs(x.strides[i])))
    layout = layout_of(x.shape, axis, order)
    return (x, layout) if layout.fits(x) else (layout.copy(x), layout)


def as_channels(value: ArrayLike, name: str, channels: int) -> Array:
    """The argument as an array with one number a channel."""
    array = as_float(value, name)
    if array.shape != (channels,):
        raise ValueError(f"{name} must have shape ({channels},), got {array.shape}")
    return array


def as_index(value: int, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None


def _as_number(value: float, name: str) -> float:
    if not isinstance(value, (float, int, np.floating, np.integer)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def as_eps(eps: float) -> float:
    value = eps if type(eps) is float else _as_number(eps, "eps")
    if not 0 <= value < math.inf:
        raise ValueError(f"eps must be finite and at least 0, got {value}")
    return value


def as_momentum(momentum: float, weighs: str = "new batch") -> float:
    value = _as_number(momentum, "momentum")
    if not 0 <= value <= 1:
        raise ValueError(f"momentum, the weight of the {weighs}, must be between 0 and 1, got {value}")
    return value


def check_out(out: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """`out` must be able to hold the result."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be a numpy array, got {type(out).__name__}")
    if out.shape != shape:
        raise ValueError(f"out must have shape {shape}, got {out.shape}")
    if out.dtype != dtype:
        raise TypeError(f"out must have dtype {dtype}, got {out.dtype}")
    if not out.flags.writeable:
        raise ValueError("out must be writeable, got a read-only array")


def _is_elsewhere(base: Any, out: Array) -> bool:
    """Whether the owner of a view's memory is known, and not `out`, which owns its own."""
    return type(base) is np.ndarray and base is not out and bool(base.flags.owndata)


def check_overlap(out: Array, inputs: Mapping[str, Any], may_be_same: str = "") -> None:
    """`out` must not share memory with an input, unless it is that very input and the result is written in step."""
    owner = out.flags.owndata
    for name, array in inputs.items():
        if array is None or (owner and array is not out and (array.flags.owndata or _is_elsewhere(array.base, out))):
            continue
        if not np.shares_memory(out, array):
            continue
        same = out.__array_interface__["data"] == array.__array_interface__["data"] and out.strides == array.strides
        if not (name == may_be_same and same and out.shape == array.shape and out.dtype == array.dtype):
            allowed = f" (out={name} itself is allowed)" if name == may_be_same else ""
            raise ValueError(f"out must not overlap {name}{allowed}")
