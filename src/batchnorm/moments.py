"""Statistics that add up: count, mean and sum of squared deviations per channel, merged by Chan's rule.

Decisions:

- The mean is a pair, `mean + mean_low`, as in the kernels. It is subtracted from every value later: if it is large, a
  single float64 would cost float64 data their last digits.
- The only arithmetic here is addition: the kernels make the numbers and merge them.
- Objects are immutable: a merge is a new object, so the caller alone decides the order of merging.
- `population` cuts its stream anew, into blocks whose size depends only on the shape of a sample. The same samples in
  the same order give the same bits, however they arrive, even from Dask's workers, which send the moments of blocks.
- Parts and futures are merged in the order in which they are given, not in the order of arrival.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain, zip_longest
from typing import Any, NamedTuple, Protocol, Self, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _arrays, _dask, _kernels, _threads, _tree
from ._arrays import Array, Layout
from ._extras import with_progress
from ._kernels import per_channel
from ._kernels.runtime import M2, STATISTICS_ROWS
from ._selection import Selection, Tally, by_sample, one_of_three, selection_of

Numbers = NDArray[np.float64]

BLOCK_VALUES = 1 << 20


def _as_data(value: ArrayLike, name: str) -> Array:
    """The argument as `np.mean` takes it: integers become float64, and a 1-D array is one channel."""
    array = _arrays.as_float(value, name, integers=True)
    return array if array.ndim > 1 else array.reshape(-1, 1)


class _Mergeable:
    """A tally and a table with one column per channel, over some of the values; `+` is `merge`, and `sum` works."""

    __slots__ = ("_table", "_tally")

    def __init__(self, tally: Tally, rows: ArrayLike) -> None:
        self._tally = tally
        self._table = np.array(rows, np.float64)
        self._table.flags.writeable = False

    @classmethod
    def _made(cls, tally: Tally, rows: ArrayLike) -> Self:
        """The object with these numbers, which need no check."""
        made = cls.__new__(cls)
        _Mergeable.__init__(made, tally, rows)
        return made

    @property
    def count(self) -> int:
        return self._tally.values

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
        """0 + self, the first addition of `sum`."""
        return self if type(other) is int and other == 0 else NotImplemented

    def merge(self, other: Self) -> Self:
        """The object for both parts together, like `+`.

        Parameters
        ----------
        other : object of the same type

        Raises
        ------
        TypeError
            If `other` is of another type.
        ValueError
            If `other` has a different number of channels.
        """
        raise NotImplementedError

    @classmethod
    def merge_all(cls, parts: Iterable[Self]) -> Self:
        """The object for all parts together, merged in pairs, in the same order as over several ranks.

        The leading parts are paired, 0 with 1, 2 with 3, …, until a power of two is left; then neighbours are merged,
        then pairs of neighbours, and so on.

        Parameters
        ----------
        parts : iterable of Moments or GradientSums
            At least one.
        """
        merged = list(parts)
        if not merged:
            raise ValueError("parts must hold at least one part, got none")
        for lower, upper in _tree.merges(len(merged)):
            merged[lower] = merged[lower].merge(merged[upper])
        return merged[0]


class Moments(_Mergeable):
    """Count, mean μ = Σx/n and m2 = Σ(x − μ)² of each channel, with n values per channel; merged with `+`.

    Two parts a and b of the data together have n = n_a + n_b, μ = μ_a + δ·n_b/n and m2 = m2_a + m2_b + δ²·n_a·n_b/n,
    where δ = μ_b − μ_a. A part may have any size, even 0. For values with weights, μ = Σwx/W and m2 = Σw(x − μ)² with
    W = Σw, and W replaces n.

    Parameters
    ----------
    count : int
        n, at least 0; the same for all channels.
    mean, m2 : array_like, shape (C,)
        m2 is not negative.
    mean_low : array_like, shape (C,), optional
        Low-order part of μ: the mean is mean + mean_low. None means 0.
    weight, weight_squares : float, optional
        Σw and Σw² for values with weights. None means n, as for weights of 1.

    Attributes
    ----------
    count : int
        With weights, the number of values whose weight is not 0.
    weight, weight_squares : float
    mean, m2, mean_low : ndarray of float64, shape (C,)
        Read-only.

    Raises
    ------
    TypeError
        If `count` is not an integer or an array is not numeric.
    ValueError
        If `count`, a weight or a value of m2 is negative, or shapes differ.

    See Also
    --------
    population : the moments of a data set that does not fit into memory.
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
        *,
        weight: float | None = None,
        weight_squares: float | None = None,
    ) -> None:
        count = _arrays.as_index(count, "count")
        tally = Tally(
            count,
            count if weight is None else _arrays.as_number(weight, "weight"),
            count if weight_squares is None else _arrays.as_number(weight_squares, "weight_squares"),
        )
        for name, number in zip(("count", "weight", "weight_squares"), tally, strict=True):
            if not 0 <= number < math.inf:
                raise ValueError(f"{name} must be at least 0, got {number}")
        mean = _arrays.as_float(mean, "mean", integers=True)
        if mean.ndim != 1:
            raise ValueError(f"mean must have shape (C,), got {mean.shape}")
        m2 = _arrays.as_channels(m2, "m2", mean.size)
        low = np.zeros(mean.size) if mean_low is None else _arrays.as_channels(mean_low, "mean_low", mean.size)
        if (m2 < 0).any():
            raise ValueError(f"m2 must not be negative, got {m2.min()}")
        super().__init__(tally, [mean, low, m2])

    @classmethod
    def of(
        cls,
        x: ArrayLike,
        axis: int = 1,
        *,
        mask: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        num_threads: int | None = None,
    ) -> Moments:
        """The moments of each channel of x, the same as those that `forward` normalizes with.

        Parameters
        ----------
        x : array_like of floats, integers or booleans
            Channels along `axis`. A 1-D array of n values is one channel, like shape (n, 1). Integers and booleans
            become float64, as in `np.mean`.
        axis : int, default 1
            The channel axis.
        mask, lengths, weights : array_like, optional
            Which values count, or how much; see `forward`.
        num_threads : int, optional
            Threads for this call. The result does not depend on it.

        Returns
        -------
        Moments

        Raises
        ------
        TypeError, ValueError
            As for `forward`.

        Examples
        --------
        >>> import batchnorm as bn
        >>> bn.Moments.of([1, 2, 6])
        Moments(count=3, mean=[3.], var=[4.66666667])
        >>> bn.Moments.of([1, 2, 6], weights=[1, 1, 2])
        Moments(count=3, mean=[3.75], var=[5.1875], weight=4.0)
        """
        x, layout = _arrays.lay_out(_as_data(x, "x"), axis)
        selection = selection_of(layout, x.dtype, mask, lengths, weights)
        return moments_of(x, layout, selection, num_threads)

    @property
    def mean(self) -> Numbers:
        return self._row(0)

    @property
    def mean_low(self) -> Numbers:
        return self._row(1)

    @property
    def m2(self) -> Numbers:
        return self._row(2)

    @property
    def weight(self) -> float:
        return self._tally.weight

    @property
    def weight_squares(self) -> float:
        return self._tally.squares

    def var(self, ddof: int = 0) -> Numbers:
        """m2/(n − ddof): the biased variance for ddof = 0, the unbiased one for ddof = 1; 0 if there are no data.

        With weights it is m2/(W − ddof·Σw²/W), as in `np.cov(aweights=)`.

        Parameters
        ----------
        ddof : int, default 0

        Raises
        ------
        ValueError
            If there are data and `ddof` is not less than the count.
        """
        divisor = self._tally.divisor(ddof)
        if self.weight and not (0 <= ddof < self.count and divisor > 0):
            raise ValueError(f"ddof must be at least 0 and less than count = {self.count}, got {ddof}")
        return self.m2 / (divisor if self.weight else 1)

    def std(self, ddof: int = 0) -> Numbers:
        """The standard deviation, √var.

        Parameters
        ----------
        ddof : int, default 0
            As in `var`.
        """
        return np.sqrt(self.var(ddof))

    def merge(self, other: Self) -> Self:
        """The moments of both parts together, by Chan's rule; an empty part changes nothing.

        Parameters
        ----------
        other : Moments
        """
        self._check(other)
        if not self.weight or not other.weight:
            return self if self.weight else other
        merged = self._table.copy()
        per_channel.merge(merged, self.weight, other._table, other.weight)
        return self._made(self._tally.merged(other._tally), merged)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Moments):
            return NotImplemented
        return self._tally == other._tally and np.array_equal(self._table, other._table)

    def to_bytes(self) -> bytes:
        """count, mean, mean_low and m2, one after the other, as 3C + 1 little-endian float64 numbers.

        With weights, Σw and Σw² follow the count, which makes 3C + 3 numbers.
        """
        weights = [] if self._tally == Tally.of_all(self.count) else [self.weight, self.weight_squares]
        return np.concatenate([[self.count, *weights], self._table.ravel()]).astype("<f8").tobytes()

    @classmethod
    def from_bytes(cls, data: Any) -> Moments:
        """The moments that `to_bytes` turned into these data.

        Parameters
        ----------
        data : bytes-like
            Any object with the buffer protocol.

        Raises
        ------
        ValueError
            If `data` does not hold 3C + 1 or 3C + 3 numbers, or these are not valid moments.
        """
        numbers = np.frombuffer(data, "<f8")
        if numbers.size % 3 == 2 or numbers.size == 0:
            raise ValueError(f"data must hold a count and three numbers per channel, got {numbers.size} numbers")
        if not float(numbers[0]).is_integer():
            raise ValueError(f"data must begin with a whole number, the count, got {numbers[0]}")
        head = 1 if numbers.size % 3 else 3
        mean, mean_low, m2 = numbers[head:].reshape(3, -1)
        weight, squares = numbers[1:3] if head == 3 else (None, None)
        return cls(int(numbers[0]), mean, m2, mean_low, weight=weight, weight_squares=squares)

    def __reduce__(self) -> tuple[Any, ...]:
        return Moments.from_bytes, (self.to_bytes(),)

    def __repr__(self) -> str:
        weight = "" if self._tally == Tally.of_all(self.count) else f", weight={self.weight}"
        return f"Moments(count={self.count}, mean={self.mean}, var={self.var()}{weight})"


def moments_of(x: Array, layout: Layout, selection: Selection | None, num_threads: int | None) -> Moments:
    """The moments of an array that fits the layout."""
    table = np.zeros((STATISTICS_ROWS, layout.view[1]))
    tally = Tally.of_all(layout.values) if selection is None else selection.tally
    if x.size and tally.weight:
        if x.itemsize == 2 and selection is not None and selection.weights is not None:
            x = layout.copy(x, np.dtype(np.float32))  # weighted deviations need more than 16 bits
        chosen = None if selection is None else selection.chosen()
        threads = _threads.threads_for(x.size, num_threads, once=True)
        _kernels.of_type[x.dtype.char].moments(layout.seen(x), table, 0.0, threads, chosen)
        if selection is not None:
            np.ldexp(table[M2], selection.exponent, out=table[M2])
    return Moments._made(tally, table[: M2 + 1])


class GradientSums(_Mergeable):
    """Σdy and Σdy·(x − μ) of each channel over some of its values; merged with `+`.

    dbeta is the first sum, dgamma is the second times rstd, and dx needs only these two.

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
        super().__init__(Tally.of_all(_arrays.as_index(count, "count")), [first, second])

    @property
    def sum_dy(self) -> Numbers:
        return self._row(0)

    @property
    def sum_dy_xmu(self) -> Numbers:
        return self._row(1)

    @np.errstate(invalid="ignore", over="ignore")
    def merge(self, other: Self) -> Self:
        self._check(other)
        return self._made(self._tally.merged(other._tally), self._table + other._table)

    def __repr__(self) -> str:
        return f"GradientSums(count={self.count}, sum_dy={self.sum_dy}, sum_dy_xmu={self.sum_dy_xmu})"


def block_rows(shape: tuple[int, ...]) -> int:
    """The number of samples of this shape in a block."""
    return max(1, BLOCK_VALUES // max(1, math.prod(shape)))


class Part(NamedTuple):
    """Some samples along axis 0, and the mask, lengths or weights for them, along axis 0 too, with their name."""

    array: Array
    channel: int
    selecting: NDArray[Any] | None = None
    name: str = ""

    def kind(self) -> tuple[Any, ...]:
        """Properties that may not change within a block."""
        shape = None if self.selecting is None else self.selecting.shape[1:]
        return self.array.shape[1:], self.array.dtype, self.channel, shape, self.name

    def cut(self, start: int, stop: int) -> Part:
        selecting = None if self.selecting is None else self.selecting[start:stop]
        return Part(self.array[start:stop], self.channel, selecting, self.name)

    def room(self) -> Part:
        """An empty block for such samples."""
        rows = block_rows(self.array.shape[1:])
        own = self.selecting
        selecting = None if own is None else np.empty((rows, *own.shape[1:]), own.dtype)
        return Part(np.empty((rows, *self.array.shape[1:]), self.array.dtype), self.channel, selecting, self.name)

    def moments(self, num_threads: int | None) -> Moments:
        chosen: dict[str, Any] = {self.name: self.selecting} if self.name else {}
        return Moments.of(self.array, self.channel, num_threads=num_threads, **chosen)

    def take(self, filled: int, part: Part) -> None:
        stop = filled + len(part.array)
        self.array[filled:stop] = part.array
        if self.selecting is not None:
            self.selecting[filled:stop] = part.selecting


def _part_of(batch: ArrayLike, axis: int, name: str = "", selects: Any = None) -> Part:
    array = _as_data(batch, "a batch")
    layout = _arrays.layout_of(array.shape, axis)
    part = Part(array, layout.axis) if layout.axis else Part(np.moveaxis(array, 1, 0), 1)
    return part._replace(selecting=by_sample(name, selects, layout), name=name) if name else part


def _check_nothing_selects(name: str, where: str) -> None:
    if name:
        raise TypeError(f"{name} must be None where {where}: select within each part, with Moments.of")


def _samples(batches: Iterable[Any], axis: int, name: str, selecting: Iterable[ArrayLike]) -> Iterator[Part | Moments]:
    """Each batch with samples along axis 0, with its mask, lengths or weights; moments as they are."""
    channels = None
    for batch, selects in _pairs(batches, name, selecting):
        part: Part | Moments
        if isinstance(batch, Moments):
            _check_nothing_selects(name, "a batch is Moments")
            part, own = batch, batch.mean.size
        else:
            part = _part_of(batch, axis, name, selects)
            own = part.array.shape[part.channel]
        if channels not in (None, own):
            raise ValueError(f"a batch must have {channels} channels along axis {axis}, got {own}")
        channels = own
        yield part


def _pairs(batches: Iterable[Any], name: str, selecting: Iterable[ArrayLike]) -> Iterator[tuple[Any, Any]]:
    """The batches, each with its mask, lengths or weights; there must be one per batch."""
    if not name:
        yield from ((batch, None) for batch in batches)
        return
    missing = object()
    for batch, selects in zip_longest(batches, selecting, fillvalue=missing):
        if batch is missing or selects is missing:
            raise ValueError(f"{name} must have one item per batch, got {'more' if batch is missing else 'fewer'}")
        yield batch, selects


class Stream:
    """The moments of samples that come in parts, cut anew into blocks that depend only on their shape and dtype.

    Samples are held until they fill a block; a change of shape or dtype ends a block. A copy or a pickle ends it too:
    it holds moments and no data.
    """

    def __init__(self, moments: Moments | None = None) -> None:
        self._ended = moments
        self._held: Part | None = None
        self._filled = 0
        self._known: Moments | None = None

    def add(self, part: Part | Moments, num_threads: int | None = None) -> None:
        """Add samples, or moments of samples, which form a block of their own."""
        if isinstance(part, Moments):
            self.end(num_threads)
            self._add_block(part)
            return
        if self._held is None or part.kind() != self._held.kind():
            room = part.room()
            self.end(num_threads)
            self._held = room
        rows, start, self._known = len(self._held.array), 0, None
        while start < len(part.array):
            own = part.cut(start, start + rows - self._filled)
            start += len(own.array)
            if len(own.array) == rows and own.array.flags.c_contiguous:
                self._add_block(own.moments(num_threads))
                continue
            self._held.take(self._filled, own)
            self._filled += len(own.array)
            if self._filled == rows:
                self._add_block(self._held.moments(num_threads))
                self._filled = 0

    def _add_block(self, moments: Moments) -> None:
        self._ended = moments if self._ended is None else self._ended + moments

    def end(self, num_threads: int | None = None) -> None:
        """Let the next sample begin a block."""
        self._ended, self._held, self._filled = self.moments(num_threads), None, 0

    def moments(self, num_threads: int | None = None) -> Moments | None:
        """The moments of all samples so far; None if there was no part."""
        if self._held is None:
            return self._ended
        if self._known is None:
            moments = self._held.cut(0, self._filled).moments(num_threads)
            self._known = moments if self._ended is None else self._ended + moments
        return self._known

    def __reduce__(self) -> tuple[Any, ...]:
        return Stream, (self.moments(),)


class Pending(Protocol):
    """A future: `result` waits for the value and returns it."""

    def result(self) -> Any: ...


Batch: TypeAlias = ArrayLike | Moments | Pending


def _arrived(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches in order; for a future, its result."""
    for batch in batches:
        yield batch.result() if callable(getattr(batch, "result", None)) else batch


def _moments_of_blocks(array: ArrayLike, axis: int, num_threads: int | None) -> list[Moments]:
    """The moments that a stream would merge, for samples that begin a block."""
    part = _part_of(array, axis)
    rows = block_rows(part.array.shape[1:])
    blocks = (part.cut(start, start + rows) for start in range(0, max(1, len(part.array)), rows))
    return [block._replace(array=np.ascontiguousarray(block.array)).moments(num_threads) for block in blocks]


def _moments_of_dask(array: Any, axis: int, num_threads: int | None) -> Iterator[Moments]:
    """The same for a dask array, computed by its workers."""
    channel = _arrays.layout_of(array.shape if array.ndim > 1 else (*array.shape, 1), axis).axis
    sample = 0 if channel else 1
    _dask.check_chunks(array, sample)
    rows = block_rows(array.shape[:sample] + array.shape[sample + 1 :])
    return chain(*_dask.of_pieces(array, sample, rows, _moments_of_blocks, axis, num_threads))


def population(
    batches: Iterable[Batch],
    axis: int = 1,
    *,
    mask: Iterable[ArrayLike] | None = None,
    lengths: Iterable[ArrayLike] | None = None,
    weights: Iterable[ArrayLike] | None = None,
    progress: bool = True,
    num_threads: int | None = None,
) -> Moments:
    """The moments of a data set that comes in batches: μ = Σx/n and Σ(x − μ)², over all of it.

    Unlike an average of the batches' variances, this is the variance of the whole data set. The same samples in the
    same order give the same bits, however they are cut into batches. Memory holds one batch and one block of a million
    values.

    Parameters
    ----------
    batches : iterable of array_like, or dask array
        Arrays that `Moments.of` takes, each with the same number of channels along `axis`: a list, a generator, chunks
        of a memory-mapped file. All other sizes may differ. A batch may also be the Moments of its data, or a future,
        whose `result()` returns either. All are merged in the order given, whenever they arrive. The data of a dask
        array stay with its workers.
    axis : int, default 1
        The channel axis. Samples lie along the first of the other axes.
    mask, lengths, weights : iterable of array_like, optional
        For each batch, which of its values count, or how much; see `forward`. Not for Moments and dask arrays.
    progress : bool, default True
        Show a bar if standard error is a terminal, `batches` has a length and rich is installed.
    num_threads : int, optional
        Threads for this call. The result does not depend on it.

    Returns
    -------
    Moments

    Raises
    ------
    TypeError
        If a batch is not numeric.
    ValueError
        If there is no batch, the number of channels changes, a mask, lengths or weights do not fit, or a dask array
        has chunks of unknown size or along an axis that is not the sample axis.

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
    one_of_three(mask, lengths, weights)
    given = {"mask": mask, "lengths": lengths, "weights": weights}
    name, selecting = next(((name, value) for name, value in given.items() if value is not None), ("", ()))
    axis = _arrays.as_index(axis, "axis")
    in_chunks = _dask.array_in(batches)
    if in_chunks is not None:
        _check_nothing_selects(name, "batches are a dask array")
        batches = _moments_of_dask(in_chunks, axis, num_threads)
    if hasattr(batches, "__array__"):
        shape = getattr(batches, "shape", "unknown")
        raise TypeError(f"batches must be an iterable of batches, got one array of shape {shape}; pass [x]")
    arrived = _arrived(with_progress(batches, "population") if progress else batches)
    stream = Stream()
    for part in _samples(arrived, axis, name, selecting):
        stream.add(part, num_threads)
    moments = stream.moments(num_threads)
    if moments is None:
        raise ValueError("batches must hold at least one batch, got none")
    return moments
