"""Parameters, running statistics and counter of a layer: one block of memory, which changes in one step.

Decisions:

- The arrays that a user sees are views of the block as long as the layer lives, so an optimizer may hold them. Nothing
  is rebound: new values are copied into the block.
- New values are prepared elsewhere, and one assignment to a memoryview copies them. Unlike NumPy's assignment, it holds
  the GIL during the whole copy: signal handlers, other threads and forks run before it or after it.
- The lock is for threads that read before they write, and for Python without a GIL. A signal handler may use the layer
  while its own thread holds the lock, so the lock is reentrant.
"""

import struct
import threading
from typing import Any

import numpy as np

from . import _threads
from ._arrays import Array

ARRAYS = ("running_mean", "running_var", "gamma", "beta")
"""The arrays in the order of the block, after the counter."""

_COUNTER = struct.Struct("=q")
MOST_BATCHES = 2**62
"""The largest counter that a loaded state may have, so that it does not overflow later."""


class State:
    """The block, and its arrays by name; None if the layer has no such array."""

    __slots__ = (
        "_arrays",
        "_block",
        "_first",
        "_rows",
        "_statistics",
        "_statistics_bytes",
        "beta",
        "gamma",
        "lock",
        "names",
        "running_mean",
        "running_var",
    )

    running_mean: Array | None
    running_var: Array | None
    gamma: Array | None
    beta: Array | None

    def __init__(self, channels: int, dtype: np.dtype[Any], names: tuple[str, ...]) -> None:
        self.names: tuple[str, ...] = names
        self._first = start = _COUNTER.size // dtype.itemsize
        self._block = np.zeros(start + len(names) * channels, dtype)
        self._rows = self._block[start:].reshape(len(names), channels)
        self._statistics = self._block[: start + channels * sum(name.startswith("running") for name in names)]
        self._statistics_bytes = self._statistics.data
        rows = dict(zip(names, self._rows, strict=True))
        self._arrays = tuple(rows.get(name) for name in ARRAYS)
        self.running_mean, self.running_var, self.gamma, self.beta = self._arrays
        self.lock: threading.RLock = _threads.new_lock()

    def __reduce__(self) -> tuple[Any, ...]:
        with self.lock:
            block = self._block.copy()
        return _restored, (self._rows.shape[1], block.dtype, self.names, block)

    def copy(self) -> "State":
        """An independent state with the same values."""
        _, arguments = self.__reduce__()
        return _restored(*arguments)

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = self._block.dtype
        return dtype

    @property
    def counter(self) -> int:
        """The number of batches that have moved the running statistics."""
        counter: int = _COUNTER.unpack_from(self._block.data)[0]
        return counter

    @counter.setter
    def counter(self, counter: int) -> None:
        with self.lock:
            _COUNTER.pack_into(self._block.data, 0, counter)

    def snapshot(self) -> tuple[Array | None, Array | None, Array | None, Array | None]:
        """Copies of running_mean, running_var, gamma and beta, all taken at one moment."""
        mean, var, gamma, beta = self._arrays
        with self.lock:
            return (
                mean if mean is None else mean.copy(),
                var if var is None else var.copy(),
                gamma if gamma is None else gamma.copy(),
                beta if beta is None else beta.copy(),
            )

    def assign(self, name: str, values: Array) -> None:
        """Copy values of the block's dtype into one array."""
        with self.lock:
            getattr(self, name).data[:] = values.data

    def replace(self, values: dict[str, Array], counter: int) -> None:
        """Copy values into all arrays, and set the counter, in one step."""
        new = np.empty_like(self._block)
        for name, row in zip(self.names, new[self._first :].reshape(self._rows.shape), strict=True):
            row[...] = values[name]
        _COUNTER.pack_into(new.data, 0, counter)
        with self.lock:
            self._block.data[:] = new.data

    def following(self) -> tuple[int, Array, Array, Array]:
        """The counter, a copy of counter and running statistics, and its arrays, to be moved and given to `follow`."""
        moved = self._statistics.copy()
        middle = self._first + self._rows.shape[1]
        return _COUNTER.unpack_from(self._statistics_bytes)[0], moved, moved[self._first : middle], moved[middle:]

    def follow(self, counter: int, moved: Array) -> None:
        """Put a counter and moved running statistics in place, in one step."""
        _COUNTER.pack_into(moved.data, 0, counter)
        self._statistics_bytes[:] = moved.data


def _restored(channels: int, dtype: np.dtype[Any], names: tuple[str, ...], block: Array) -> State:
    state = State(channels, dtype, names)
    state._block[...] = block
    return state
