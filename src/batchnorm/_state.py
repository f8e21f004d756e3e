"""Parameters, running statistics and counter of a layer: one block of memory, which changes in one step.

Decisions:

- The arrays that a user sees are views of the block as long as the layer lives, so an optimizer may hold them. Nothing
  is rebound: new values are copied into the block.
- New values are prepared elsewhere. One assignment to a memoryview, or one compiled call, copies them. Unlike NumPy's
  assignment, it holds the GIL during the whole copy: signal handlers, other threads and forks run before or after it.
- The lock is for threads that read before they write, and for Python without a GIL. A signal handler may use the layer
  while its own thread holds the lock, so the lock is reentrant.
"""

import struct
import threading
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _threads
from ._arrays import Array, MaybeNone
from ._kernels import per_channel

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

    def snapshot(self) -> tuple[Array | MaybeNone, Array | MaybeNone, Array | MaybeNone, Array | MaybeNone]:
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

    def set_statistics(self, mean: ArrayLike, var: ArrayLike, counter: int | None = None) -> None:
        """Replace the running statistics, and the counter if one is given, in one step."""
        with self.lock:
            new = self._statistics.copy()
            rows = new[self._first :].reshape(2, -1)
            rows[0], rows[1] = mean, var
            if counter is not None:
                _COUNTER.pack_into(new.data, 0, counter)
            self._statistics.data[:] = new.data

    def follow(self, statistics: NDArray[np.float64], momentum: float | None, correction: float) -> None:
        """Move the running statistics towards those of a batch and count it, in one step."""
        with self.lock:
            per_channel.follow(self._statistics, statistics, momentum, correction)


def _restored(channels: int, dtype: np.dtype[Any], names: tuple[str, ...], block: Array) -> State:
    state = State(channels, dtype, names)
    state._block[...] = block
    return state
