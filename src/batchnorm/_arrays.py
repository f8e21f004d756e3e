"""What an array must be, and how the kernels see it.

Everything is checked here before anything is written, and every message says which argument, what was wanted and what
came. An array that is dense in memory is used in place, whatever the order of its axes: they are put in memory order,
and the result gets the same order. Only other arrays (gaps, negative strides, foreign byte order, misaligned) are
copied.
"""

import math
import operator
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ._foreign import as_array, way_to_floats

if np.lib.NumpyVersion(np.__version__) < "1.26.0":
    raise ImportError(f"batchnorm needs NumPy 1.26 or newer, found {np.__version__}")

Array = NDArray[np.floating[Any]]
MaybeNone: TypeAlias = Any
"""None only if the caller chose so, which type checkers cannot know: `Any` asks for no check, as in typeshed."""

if TYPE_CHECKING:
    from typing_extensions import TypeVar  # type checkers bring it along
else:

    def TypeVar(name, *, default, **how):  # noqa: ARG001, N802
        """A TypeVar without the default, which only type checkers need and Python has from 3.13 on."""
        return typing.TypeVar(name, **how)


Float = TypeVar("Float", bound=np.floating[Any], default=np.floating[Any])
Float_co = TypeVar("Float_co", bound=np.floating[Any], default=np.floating[Any], covariant=True)
Gradient_co = TypeVar("Gradient_co", bound=Array | None, default=Array | None, covariant=True)

_UINT16 = np.dtype(np.uint16)
_FLOAT32 = np.dtype(np.float32)
_FLOAT64 = np.dtype(np.float64)
_known = {_FLOAT32, _FLOAT64, np.dtype(np.float16)}
"""Types that need no conversion; bfloat16 is added when it is first seen."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the channels of an array are: the (N, C, S) view, and the order of axes that makes it contiguous."""

    shape: tuple[int, ...]
    axis: int
    view: tuple[int, int, int]
    order: tuple[int, ...] | None
    values: int
    """The number of values per channel."""

    def fits(self, array: Array) -> bool:
        """Whether the array has this memory layout."""
        flags = array.flags if self.order is None else array.transpose(self.order).flags
        return flags.c_contiguous and flags.aligned

    def copy(self, array: Array, dtype: np.dtype[Any] | None = None) -> Array:
        """A copy that fits this layout."""
        copy = self.empty(array.dtype if dtype is None else dtype)
        copy[...] = array
        return copy

    def bring(self, array: Array) -> Array:
        """The array, or a copy if it does not fit this layout."""
        return array if self.fits(array) else self.copy(array)

    def lying(self, array: Array) -> Array:
        """A fitting array with its axes in memory order, and the bits of 16-bit values as integers."""
        if array.itemsize == 2:
            array = array.view(_UINT16)
        return array if self.order is None else array.transpose(self.order)

    def memory(self, *arrays: Array) -> tuple[Array, ...]:
        """The same for several arrays of one type."""
        return arrays if self.order is None and arrays[0].itemsize > 2 else tuple(map(self.lying, arrays))

    def seen(self, array: Array) -> Array:
        """The array as a view of shape (N, C, S)."""
        return self.lying(array).reshape(self.view)

    def empty(self, dtype: np.dtype[Any]) -> Array:
        """A new array of this shape and memory order."""
        if self.order is None:
            return np.empty(self.shape, dtype)
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return np.empty([self.shape[axis] for axis in self.order], dtype).transpose(inverse)

    def room(self, out: Array, dtype: np.dtype[Any]) -> Array:
        """An array for a kernel's result: `out` if it fits, else a new one."""
        return out if self.fits(out) else self.empty(dtype)


def deliver(result: Array, out: Array) -> Array:
    """Copy the result to `out`, unless it is there already, and return `out`."""
    if out is not result:
        np.copyto(out, result)
    return out


@lru_cache(maxsize=256)
def layout_of(shape: tuple[int, ...], axis: int, order: tuple[int, ...] | None = None) -> Layout:
    """The layout of an array whose axes have this memory order."""
    if len(shape) < 2:
        raise ValueError(f"x must have at least 2 dimensions, got shape {shape}")
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis must be between {-len(shape)} and {len(shape) - 1} for shape {shape}, got {axis}")
    channel = axis % len(shape)
    where = channel if order is None else order.index(channel)
    lengths = shape if order is None else tuple(shape[i] for i in order)
    view = (math.prod(lengths[:where]), lengths[where], math.prod(lengths[where + 1 :]))
    return Layout(shape, channel, view, order, view[0] * view[2])


def as_float(value: ArrayLike, name: str, integers: bool = False) -> Array:
    """The argument as an ndarray of native floats of 16, 32 or 64 bits, without a copy if it is one.

    If `integers` is true, integers and booleans become float64, as in NumPy's own arithmetic.
    """
    if type(value) is np.ndarray and ((dtype := value.dtype) is _FLOAT32 or dtype is _FLOAT64 or dtype in _known):
        return value
    array = as_array(value, name)
    if integers and array.dtype.kind in "iub":
        return array.astype(np.float64)
    if array.dtype.kind == "V" and array.dtype.name == "bfloat16" and array.dtype.itemsize == 2:
        _known.add(array.dtype)  # from a package like ml_dtypes, which need not be imported here
        return array
    if array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4, 8):
        hint = way_to_floats(value, name) if array.dtype == object else ""
        if array.dtype == "V2":
            hint = f"; if that is bfloat16 from a file: {name}.view(ml_dtypes.bfloat16)"
        raise TypeError(f"{name} must have dtype float64, float32, float16 or bfloat16, got {array.dtype}{hint}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def precision_of(array: Array) -> float:
    """The distance from 1 to the next larger number of the array's type."""
    return float(np.finfo(array.dtype).eps) if array.dtype.kind == "f" else 2.0**-7  # bfloat16


def lay_out(x: Array, axis: int) -> tuple[Array, Layout]:
    """Find the (N, C, S) view of x, or of a copy if x has none."""
    if type(axis) is not int:
        axis = as_index(axis, "axis")
    flags = x.flags
    if flags.c_contiguous and flags.aligned:
        return x, layout_of(x.shape, axis, None)
    order = tuple(sorted(range(x.ndim), key=lambda i: -abs(x.strides[i])))
    layout = layout_of(x.shape, axis, order)
    return (x, layout) if layout.fits(x) else (layout.copy(x), layout)


def as_dtype(dtype: DTypeLike, name: str) -> np.dtype[Any]:
    """The argument as a data type that the kernels can write."""
    return as_float(np.empty(0, dtype), name).dtype


def check_channels(shape: tuple[int, ...], axis: int, channels: int) -> None:
    """Check that x has this many channels."""
    if not -len(shape) <= axis < len(shape) or shape[axis] != channels:
        other = -1 if axis == 1 else 1
        hint = f"; axis={other}?" if len(shape) > 1 and shape[other] == channels else ""
        raise ValueError(f"x must have {channels} channels along axis {axis}, got shape {shape}{hint}") from None


def as_like(value: ArrayLike, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], like: str = "x") -> Array:
    """The argument as an array of the shape and dtype of x, or of another one."""
    if type(value) is np.ndarray and value.dtype is dtype and value.shape == shape:
        return value
    array = as_float(value, name)
    if array.shape != shape:
        raise ValueError(f"{name} must have the shape of {like}, {shape}, got {array.shape}")
    if array.dtype != dtype:
        raise TypeError(f"{name} must have the dtype of {like}, {dtype}, got {array.dtype}")
    return array


def as_channels(value: ArrayLike, name: str, channels: int, layout: Layout | None = None) -> Array:
    """The argument as an array with one number per channel; integers become float64."""
    if type(value) is np.ndarray and (value.dtype is _FLOAT32 or value.dtype is _FLOAT64):
        array: Array = value  # the usual case, without a call
    else:
        array = as_float(value, name, True)
    if array.shape != (channels,):
        raise ValueError(f"{name} must have shape ({channels},), got {array.shape}{_other_axis(array, layout)}")
    return array


def _other_axis(array: Array, layout: Layout | None) -> str:
    """A question for the error message, if the numbers fit the channels along another axis."""
    if layout is None or array.ndim != 1 or array.size not in layout.shape:
        return ""
    axis = -1 if layout.shape[-1] == array.size else layout.shape.index(array.size)
    return f"; x of shape {layout.shape} has length {array.size} along axis {axis}: axis={axis}?"


def as_index(value: Any, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        if name == "axis" and isinstance(value, (tuple, list)):
            raise TypeError(
                f"axis must be the channel axis, one integer, got {value}: statistics are taken over all other axes"
            ) from None
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None


def as_number(value: Any, name: str) -> float:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if not isinstance(value, (float, int, np.floating, np.integer)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def as_eps(eps: float) -> float:
    value = eps if type(eps) is float else as_number(eps, "eps")
    if not 0 <= value < math.inf:
        raise ValueError(f"eps must be finite and at least 0, got {value}")
    return value


def as_momentum(momentum: float, weighs: str = "new batch") -> float:
    value = as_number(momentum, "momentum")
    if not 0 <= value <= 1:
        raise ValueError(f"momentum, the weight of the {weighs}, must be between 0 and 1, got {value}")
    return value


def check_out(out: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Check that `out` can hold the result."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be a numpy array, got {type(out).__name__}")
    if out.shape != shape:
        raise ValueError(f"out must have shape {shape}, got {out.shape}")
    if out.dtype != dtype:
        raise TypeError(f"out must have dtype {dtype}, got {out.dtype}")
    if not out.flags.writeable:
        raise ValueError("out must be writeable, got a read-only array")


def _is_elsewhere(base: Any, out: Array) -> bool:
    """Whether the owner of a view's memory is known and is not `out`, which owns its own."""
    return type(base) is np.ndarray and base is not out and bool(base.flags.owndata)


def check_overlap(out: Array, inputs: Mapping[str, Any], may_be_same: Collection[str] = ()) -> None:
    """Check that `out` shares memory with no input, unless it is an input that may be overwritten in step."""
    owner = out.flags.owndata
    for name, array in inputs.items():
        if array is None or (owner and array is not out and (array.flags.owndata or _is_elsewhere(array.base, out))):
            continue
        if not np.shares_memory(out, array):
            continue
        same = out.__array_interface__["data"] == array.__array_interface__["data"] and out.strides == array.strides
        if not (name in may_be_same and same and out.shape == array.shape and out.dtype == array.dtype):
            allowed = f" (out={name} itself is allowed)" if name in may_be_same else ""
            raise ValueError(f"out must not overlap {name}{allowed}")
