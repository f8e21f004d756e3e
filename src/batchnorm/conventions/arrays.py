"""Find the arrays of one layer in a user's state, and check them.

Decisions:

- An error about a missing name lists what is there: names, and the paths of layers.
- A negative variance is refused with the question whether mean and variance are swapped, which is the usual reason.
- Dimensions of length 1 around the channels, which Haiku and old versions of Caffe and MLX keep, are dropped.
- bfloat16 is read without the package that defines it, even as `np.load` returns it: two bytes without a type.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._arrays import Array
from .._foreign import as_array
from . import names, systems
from .systems import Convention


def found(state: Any, system: Convention, prefix: str) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Arrays of real numbers by their role, and the name of each in the state."""
    of_layer, called = (_by_name if isinstance(state, Mapping) else _by_order)(state, system, prefix)
    return {role: numbers(value, called[role]) for role, value in of_layer.items()}, called


def _by_order(state: Any, system: Convention, prefix: str) -> tuple[dict[str, Any], dict[str, str]]:
    if isinstance(state, (str, bytes)) or not isinstance(state, Sequence):
        raise TypeError(f"state must be a mapping or a sequence of arrays, got {type(state).__name__}")
    if not system.order:
        raise ValueError(f"state must be a mapping, got a sequence: {system.name} has no order of arrays")
    if prefix:
        raise ValueError(f"prefix must come with a mapping, got {prefix!r} with a sequence")
    optional = () if system.always_affine else ("gamma", "beta")
    orders = {len(system.order): system.order}
    for left_out in (("num_batches_tracked",), ("beta",) * (system.order[-1] == "beta"), optional):
        order = tuple(role for role in system.order if role not in left_out)
        orders.setdefault(len(order), order)
    if len(state) not in orders:
        wanted = " or ".join(f"({', '.join(order)})" for order in orders.values())
        raise ValueError(f"state must be {wanted} in {system.name}, got {len(state)} arrays")
    order = orders[len(state)]
    return dict(zip(order, state, strict=True)), {role: role for role in systems.ROLES}


def _by_name(state: Mapping[Any, Any], system: Convention, prefix: str) -> tuple[dict[str, Any], dict[str, str]]:
    # The result of np.load reads an array from the file at each access.
    leaves = state if isinstance(state, np.lib.npyio.NpzFile) else names.flat(state)
    there = names.by_canonical(leaves)
    wanted = system.names(prefix.strip("/."))
    called = {role: there.get(names.canonical(name), name) for role, name in wanted.items()}
    needed = ["running_mean", "running_var", *["factor"] * (system.factor is not None)]
    missing = [wanted[role] for role in needed if called[role] not in leaves]
    if missing:
        known = [name for name in called.values() if name in leaves]
        among = f"only {', '.join(map(repr, known))} of that layer; " if known else ""
        raise ValueError(
            f"state must have {', '.join(map(repr, missing))} ({system.name}, prefix {prefix!r}), "
            f"got {among}{names.what_is_there(leaves, system, prefix)}"
        )
    return {role: leaves[name] for role, name in called.items() if name in leaves}, called


def numbers(value: Any, name: str) -> NDArray[Any]:
    """The value as real numbers; 16-bit floats become float32."""
    array = as_array(value, name)
    if array.dtype == "V2":  # what np.load makes of bfloat16
        array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must hold real numbers, got dtype {array.dtype}")
    return array


def per_channel(array: NDArray[Any], name: str) -> NDArray[Any]:
    """The array with one number per channel, as shape (C,)."""
    if array.ndim == 0 or array.size != max(array.shape):
        raise ValueError(f"{name} must have one number per channel, shape (C,), got shape {array.shape}")
    return array.reshape(-1)


def counter_of(array: NDArray[Any], name: str) -> int:
    """The number of batches."""
    if array.dtype.kind not in "iu" or array.size != 1 or array.item() < 0:
        raise ValueError(f"{name} must be one integer, at least 0, got {array}")
    return int(array.item())


def factor_of(array: NDArray[Any], name: str) -> float:
    """The number by which Caffe's statistics must be divided."""
    if array.size != 1 or not 0 <= array.item() < math.inf:
        raise ValueError(f"{name} must be one number, at least 0, got {array}")
    return float(array.item())


def check_variance(var: Array, name: str) -> None:
    """Check that no variance is negative."""
    if (var < 0).any():
        worst = int(var.argmin())
        raise ValueError(
            f"running_var must not be negative, got {var[worst]:g} in channel {worst} of {name}; "
            "are mean and var swapped?"
        )
