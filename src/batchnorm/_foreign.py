"""Arrays of other libraries, read as NumPy arrays.

Decisions:

- No library is imported. An object is read through `__array__` or a buffer, or else through `__dlpack__`, whose errors
  are less clear. Its memory is used in place if its own library allows that.
- Nothing is lost silently. An array that would lose its gradient or mask, or must be copied from a device, is refused,
  with the call that does so explicitly.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_READABLE = {1, 3, 11}
"""DLPack's device numbers of the processor's own memory, including memory pinned by CUDA or ROCm."""

_WAYS = {
    "toarray": "toarray()",  # sparse matrices of SciPy
    "collect": "collect()",  # lazy frames of Polars
    "with_columns": "cast(polars.Float32)",  # its other frames
    "astype": "astype(np.float32)",  # frames of pandas
}
"""The call that returns floats, by an attribute that the object has."""


def as_array(value: Any, name: str) -> NDArray[Any]:
    """The argument as an ndarray of any type, without a copy if its memory can be read."""
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ndarray) and np.ma.isMaskedArray(value):
        raise TypeError(
            f"{name} must not be a masked array: pass {name}.filled(value), or {name}.data, and mask= where it counts"
        )
    if getattr(value, "requires_grad", False) is True:
        raise TypeError(f"{name} must not require grad, which would be lost: pass {name}.detach()")
    if _is_on_device(value):
        way = next((f"{name}.{method}()" for method in ("cpu", "get") if hasattr(value, method)), f"np.asarray({name})")
        raise TypeError(f"{name} must be in the processor's memory, got an array on another device: pass {way}")
    try:
        if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
            return np.from_dlpack(value)
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} must be an array of numbers: {error}") from None
    except (TypeError, RuntimeError, BufferError) as error:
        reason = str(error).partition("\n")[0]
        way = f"; pass {name}.float()" if "unsupported ScalarType" in reason else ""  # bfloat16 in torch
        raise TypeError(f"{name} must be readable as a NumPy array: {reason}{way}") from None


def _is_on_device(value: Any) -> bool:
    """Whether the object names a device whose memory the processor cannot read."""
    try:
        device, _ = value.__dlpack_device__()
    except Exception:  # no device, several, or no memory: reading the object gives a better error
        return False
    return device not in _READABLE


def way_to_floats(value: Any, name: str) -> str:
    """The hint for an object whose values NumPy would read as Python objects."""
    return next((f": pass {name}.{way}" for attribute, way in _WAYS.items() if hasattr(value, attribute)), "")
