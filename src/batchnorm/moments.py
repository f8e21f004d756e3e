"""Statistics that add up: count, mean and sum of squared deviations per channel, merged by Chan's rule.

Decisions:

- The mean is a pair, `mean + mean_low`, as in the kernels: near a large mean one float64 would cost float64 data its
  last digits, and that mean is subtracted from every value later.
- The only arithmetic here is addition: the kernels make the numbers and merge them.
- Objects are immutable: a merge is a new object, so the caller alone decides the order of merging.
- `population` cuts its stream anew, into blocks that depend on the shape of a sample alone. The same samples in the
  same order give the same bits, however they came.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _arrays, _kernels, _threads
from ._arrays import Array
from ._extras import with_progress
from ._kernels import per_channel
from ._kernels.runtime import M2, MEAN, MEAN_LOW, STATISTICS_ROWS

Numbers = NDArray[np.float64]

BLOCK_VALUES = 1 << 20


def _joined(n_a: int, a: Numbers, n_b: int, b: Numbers) -> Numbers:
    """Chan's rule, by the kernels; an empty side leaves the other as it is."""
    if not n_a or not n_b:
        return a if n_a else b
    merged = a.copy()
    per_channel.merge(merged, n_a, b, n_b)
    return merged


def _as_data(value: ArrayLike, name: str) -> Array:
    """The argument as `np.mean` takes it: also of integers, which become float64, and of one channel alone."""
    array = _arrays.as_float(value, name, integers=True)
    return array if array.ndim > 1 else array.reshape(-1, 1)


class _Mergeable:
    """A count and a table with one column per channel, of some of the values; `+` is `merge`, and `sum` adds up."""

    __slots__ = ("_count", "_table")

    def __init__(self, count: int, rows: ArrayLike) -> None:
        self._count = count
        self._table = np.array(rows, np.float64)
        self._table.flags.writeable = False

    @property
    def count(self) -> int:
        return self._count

    def _row(self, row: int) -> Numbers:
        numbers: Numbers = self._table[row]
        return numbers

    def _check(self, other: Any) -> None:
        if type(other) is not type(self):
            raise TypeError(f"other must be {type(self).__name__}, got {type(other).__name__}")
        if other._table.shape != self._table.shape:
            raise ValueError(f"other must have {self._table.shape[1]} channels, got {other._table.shape[1]}")

    def __add__(self, other: Self) -> Self:
        return self.merge(other) if type(other) is type(self) else NotImplemented

    def __radd__(self, other: object) -> Self:
        """0 + self, with which `sum` begins."""
        return self if type(other) is int and other == 0 else NotImplemented

    def merge(self, other: Self) -> Self:
        """The object of both parts together, like `+`.

        Raises
        ------
        TypeError
            If `other` is of another type.
        ValueError
            If it has another number of channels.
        """
        raise NotImplementedError


class Moments(_Mergeable):
    """Count, mean μ = Σx/n and m2 = Σ(x − μ)² of each channel, with n values per channel; merged with `+`.

    Two parts a and b of the data have together n = n_a + n_b, μ = μ_a + δ·n_b/n and m2 = m2_a + m2_b + δ²·n_a·n_b/n,
    where δ = μ_b − μ_a. A part may have any size, also 0.

    Parameters
    ----------
    count : int
        n, at least 0; the same for all channels.
    mean, m2 : array_like, shape (C,)
        m2 is not negative.
    mean_low : array_like, shape (C,), optional
        Low-order part of μ: the mean is mean + mean_low. 0 where None.

    Attributes
    ----------
    count : int
    mean, m2, mean_low : ndarray of float64, shape (C,)
        Read-only.

    Raises
    ------
    TypeError
        If `count` is not an integer or an array is not of numbers.
    ValueError
        If `count` or a value of m2 is negative, or shapes differ.

    See Also
    --------
    population : of a data set that does not fit into memory.
    forward : `moments=` normalizes with merged statistics.

    References
    ----------
    Chan, Golub, LeVeque, "Algorithms for computing the sample variance", The American Statistician 37 (1983) 242.

    Examples
    --------
    >>> import numpy as np, batchnorm as bn
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0], [8.0, 80.0]])
    >>> moments = bn.Moments.of(x[:1]) + bn.Moments.of(x[1:])
    >>> moments
    Moments(count=3, mean=[ 4. 40.], var=[  8.66666667 866.66666667])
    >>> bool(np.allclose(moments.var(), x.var(axis=0)))
    True
    """

    __slots__ = ()

    def __init__(
        self,
        count: int,
        mean: ArrayLike,
        m2: ArrayLike,
        mean_low: ArrayLike | None = None,
    ) -> None:
        count = _arrays.as_index(count, "count")
        if count < 0:
            raise ValueError(f"count must be at least 0, got {count}")
        mean = _arrays.as_float(mean, "mean", integers=True)
        if mean.ndim != 1:
            raise ValueError(f"mean must have shape (C,), got {mean.shape}")
        m2 = _arrays.as_channels(m2, "m2", mean.size)
        low = np.zeros(mean.size) if mean_low is None else _arrays.as_channels(mean_low, "mean_low", mean.size)
        if (m2 < 0).any():
            raise ValueError(f"m2 must not be negative, got {m2.min()}")
        super().__init__(count, [mean, low, m2])

    @classmethod
    def of(cls, x: ArrayLike, axis: int = 1, *, num_threads: int | None = None) -> "Moments":
        """The moments of the channels of x, by the compiled kernel: those that `forward` normalizes with.

        Parameters
        ----------
        x : array_like of floats, integers or booleans
            Channels along `axis`. A 1-D array of n values is taken as (n, 1), the values of one channel. Integers and
            booleans become float64, as in `np.mean`.
        axis : int, default 1
            The channel axis.
        num_threads : int, optional
            Threads for this call. Its results do not depend on it.

        Returns
        -------
        Moments

        Raises
        ------
        TypeError, ValueError
            As `forward`.

        Examples
        --------
        >>> import batchnorm as bn
        >>> bn.Moments.of([1, 2, 6])
        Moments(count=3, mean=[3.], var=[4.66666667])
        """
        x, layout = _arrays.lay_out(_as_data(x, "x"), axis)
        threads = _threads.threads_for(x.size, num_threads)
        table = np.zeros((STATISTICS_ROWS, layout.view[1]))
        if x.size:
            _kernels.of_type[x.dtype.char].moments(layout.seen(x), table, 0.0, threads)
        return cls(layout.values, table[MEAN], table[M2], table[MEAN_LOW])

    @property
    def mean(self) -> Numbers:
        return self._row(0)

    @property
    def mean_low(self) -> Numbers:
        return self._row(1)

    @property
    def m2(self) -> Numbers:
        return self._row(2)

    def var(self, ddof: int = 0) -> Numbers:
        """m2/(n − ddof): the biased variance for 0, the unbiased one for 1; 0 for an empty count.

        Raises
        ------
        ValueError
            If `ddof` is not less than the count, where there are data.
        """
        if self._count and not 0 <= ddof < self._count:
            raise ValueError(f"ddof must be at least 0 and less than count = {self._count}, got {ddof}")
        return self.m2 / max(self._count - ddof, 1)

    def std(self, ddof: int = 0) -> Numbers:
        """The root of `var`."""
        return np.sqrt(self.var(ddof))

    def merge(self, other: Self) -> Self:
        self._check(other)
        return type(self).merge_all([self._count, other._count], np.stack([self._table, other._table]))

    @classmethod
    def merge_all(cls, counts: Iterable[float], tables: Iterable[Numbers]) -> Self:
        """The moments of many parts: neighbours are merged, then pairs of neighbours, and so on.

        Parameters
        ----------
        counts : iterable of int, P of them
        tables : ndarray of float64, shape (P, 3, C)
            mean, mean_low and m2 of each part.

        Returns
        -------
        Moments
        """
        parts = [(int(count), table) for count, table in zip(counts, tables, strict=True)]
        while len(parts) > 1:
            pairs = zip(parts[0::2], parts[1::2], strict=False)
            joined = [(n_a + n_b, _joined(n_a, a, n_b, b)) for (n_a, a), (n_b, b) in pairs]
            parts = joined + parts[2 * len(joined) :]
        count, (mean, mean_low, m2) = parts[0]
        return cls(count, mean, m2, mean_low)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Moments):
            return NotImplemented
        return self._count == other._count and np.array_equal(self._table, other._table)

    __hash__ = None  # type: ignore[assignment]

    def to_bytes(self) -> bytes:
        """count, mean, mean_low and m2, one after the other, as 3C + 1 little-endian float64 numbers."""
        return np.concatenate([[self._count], self._table.ravel()]).astype("<f8").tobytes()

    @classmethod
    def from_bytes(cls, data: Any) -> "Moments":
        """The object whose `to_bytes` gave `data`, which may be anything with a buffer.

        Raises
        ------
        ValueError
            If `data` does not hold 3C + 1 numbers, or they are no moments.
        """
        numbers = np.frombuffer(data, "<f8")
        if numbers.size % 3 != 1:
            raise ValueError(f"data must hold a count and three numbers per channel, got {numbers.size} numbers")
        if not float(numbers[0]).is_integer():
            raise ValueError(f"data must begin with a whole number, the count, got {numbers[0]}")
        mean, mean_low, m2 = numbers[1:].reshape(3, -1)
        return cls(int(numbers[0]), mean, m2, mean_low)

    def __reduce__(self) -> tuple[Any, ...]:
        return Moments.from_bytes, (self.to_bytes(),)

    def __repr__(self) -> str:
        return f"Moments(count={self._count}, mean={self.mean}, var={self.var()})"


class GradientSums(_Mergeable):
    """Σdy and Σdy·(x − μ) of each channel over some of its values; merged with `+`.

    dbeta is the first sum, dgamma the second times rstd, and dx needs no more than the two.

    Parameters
    ----------
    count : int
        Values per channel that were summed.
    sum_dy, sum_dy_xmu : array_like, shape (C,)

    Attributes
    ----------
    count : int
    sum_dy, sum_dy_xmu : ndarray of float64, shape (C,)
        Read-only.

    See Also
    --------
    grad_sums : makes them, with an example.
    """

    __slots__ = ()

    def __init__(self, count: int, sum_dy: ArrayLike, sum_dy_xmu: ArrayLike) -> None:
        first = _arrays.as_float(sum_dy, "sum_dy", integers=True)
        second = _arrays.as_channels(sum_dy_xmu, "sum_dy_xmu", first.size)
        super().__init__(_arrays.as_index(count, "count"), [first, second])

    @property
    def sum_dy(self) -> Numbers:
        return self._row(0)

    @property
    def sum_dy_xmu(self) -> Numbers:
        return self._row(1)

    def merge(self, other: Self) -> Self:
        self._check(other)
        return self.merge_all(self._count + other._count, np.stack([self._table, other._table]))

    @classmethod
    @np.errstate(invalid="ignore", over="ignore")
    def merge_all(cls, count: int, tables: Numbers) -> Self:
        """The sums of many parts, added up one after the other.

        Parameters
        ----------
        count : int
            Values per channel in all of them.
        tables : ndarray of float64, shape (P, 2, C)
            sum_dy and sum_dy_xmu of each part.

        Returns
        -------
        GradientSums
        """
        total, *others = tables
        for other in others:
            total = total + other
        return cls(count, *total)

    def __repr__(self) -> str:
        return f"GradientSums(count={self._count}, sum_dy={self.sum_dy}, sum_dy_xmu={self.sum_dy_xmu})"


def _samples(batches: Iterable[ArrayLike], axis: int) -> Iterator[tuple[Array, int]]:
    """Each batch with its samples along axis 0, and the channel axis."""
    channels = None
    for batch in batches:
        array = _as_data(batch, "a batch")
        channel = _arrays.layout_of(array.shape, axis).axis
        if channels not in (None, array.shape[channel]):
            raise ValueError(f"a batch must have {channels} channels along axis {axis}, got shape {array.shape}")
        channels = array.shape[channel]
        yield (array, channel) if channel else (np.moveaxis(array, 1, 0), 1)


def _blocks(samples: Iterable[tuple[Array, int]]) -> Iterator[tuple[Array, int]]:
    """The same samples in blocks that depend on their shape and dtype alone; a change of those ends a block."""
    held, filled, channel = np.empty((0, 0)), 0, 0
    for array, axis in samples:
        if (array.shape[1:], array.dtype, axis) != (held.shape[1:], held.dtype, channel):
            if channel:
                yield held[:filled], channel
            rows = max(1, BLOCK_VALUES // max(1, math.prod(array.shape[1:])))
            held, filled, channel = np.empty((rows, *array.shape[1:]), array.dtype), 0, axis
        start = 0
        while start < len(array):
            take = min(len(held) - filled, len(array) - start)
            held[filled : filled + take] = array[start : start + take]
            start, filled = start + take, filled + take
            if filled == len(held):
                yield held, channel
                filled = 0
    if channel:
        yield held[:filled], channel


def population(
    batches: Iterable[ArrayLike],
    axis: int = 1,
    *,
    progress: bool = True,
    num_threads: int | None = None,
) -> Moments:
    """The moments of a data set that comes in batches: μ = Σx/n and Σ(x − μ)², over all of it.

    Unlike an average of the batches' variances, this is the variance of the whole, whatever the batches: the same
    samples in the same order give the same bits, however they are cut. Memory is that of one batch and one block of a
    million values.

    Parameters
    ----------
    batches : iterable of array_like
        Arrays that `Moments.of` takes, each with the same number of channels along `axis`: a list, a generator, chunks
        of a memory-mapped file. All other sizes may differ.
    axis : int, default 1
        The channel axis. Samples are cut along the first other one.
    progress : bool, default True
        Show a bar if standard error is a terminal, `batches` has a length and rich is installed.
    num_threads : int, optional
        Threads for this call. Its results do not depend on it.

    Returns
    -------
    Moments

    Raises
    ------
    TypeError
        If a batch is not of numbers.
    ValueError
        If there is no batch, or one has a different number of channels from the first.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, algorithm 2, step 10.

    Examples
    --------
    >>> import numpy as np, batchnorm as bn
    >>> x = np.random.default_rng(0).standard_normal((1000, 3))
    >>> bn.population(x[i : i + 64] for i in range(0, 1000, 64)) == bn.population([x[:1], x[1:]])
    True
    """
    if isinstance(batches, np.ndarray):
        raise TypeError(f"batches must be an iterable of batches, got one array of shape {batches.shape}; pass [x]")
    shown = with_progress(batches, "population") if progress else batches
    total = None
    for block, channel in _blocks(_samples(shown, _arrays.as_index(axis, "axis"))):
        part = Moments.of(block, channel, num_threads=num_threads)
        total = part if total is None else total + part
    if total is None:
        raise ValueError("batches must hold at least one batch, got none")
    return total
