"""Batch normalization over several processes, on mpi4py: each rank has a part of one batch.

Decisions:

- Statistics are merged, not averaged: each rank sends count, mean and Σ(x − μ)² of its part. Parts may differ in size,
  be empty or hold one sample.
- A step has two exchanges, after which every rank has the same bits; `exchange` does them, even if a rank raises.
- On one rank the layer runs the code of `BatchNorm`.
- Whatever can fail on one rank alone, such as allocating y, comes before the exchange; layers change after it.
- The mean is sent as a pair, as the kernels hold it: without its low-order part, float64 data at 1e6 would lose five
  digits of it.
- Neither evaluation nor a frozen layer needs communication: running statistics have the same bits everywhere.
- Ghost batches are refused: they cut a batch into parts, and this layer makes one batch of all parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .. import _arrays, _kernels, functional, training
from .._activation import Activation
from .._arrays import Array, Float
from .._kernels import per_channel
from .._kernels.runtime import HEAD, M2, STATUS, VALUES
from .._selection import Tally, one_of_three, selection_of
from ..functional import Need
from ..layer import BatchNorm
from ..moments import Batch, GradientSums, Moments, Numbers, moments_of
from ..saved import Gradients, Saved
from ..training import Ghosts, Renormed, Statistics, Way
from .exchange import Communicator, Exchange, world

if TYPE_CHECKING:
    from .. import _keywords

# The first number of a packet, if no rank refused its arguments: the dtypes of x on the ranks, as bits.
_BIT = {char: 1 << number for number, char in enumerate(_kernels.NAMES)}


_Made = TypeVar("_Made")


def write_moments(packet: Numbers, moments: Moments) -> None:
    packet[VALUES:HEAD] = moments._tally
    packet[HEAD:] = moments._table.ravel()


def read_moments(packet: Numbers) -> Moments:
    count, weight, squares = packet[VALUES:HEAD].tolist()
    return Moments._made(Tally(int(count), weight, squares), packet[HEAD:].reshape(M2 + 1, -1))


class SyncBatchNorm(BatchNorm):
    """`BatchNorm` with the statistics of all ranks: y = gamma·(x − μ)/√(σ² + eps) + beta.

    In training, μ = Σx/n and σ² = Σ(x − μ)²/n over the x of all ranks, with n values per channel in all. The
    running variance follows σ²·n/(n − 1). Every rank must call the layer and its `backward` in every step, even if its
    x has no samples. Evaluation uses the running statistics and sends nothing.

    Parameters
    ----------
    num_features : int
        Channels, C.
    comm : mpi4py.MPI.Comm, optional
        The ranks that share a batch; COMM_WORLD if None. Creating the layer is a collective call, too.
    reduce : {"local", "sum"}, default "local"
        What `dgamma` and `dbeta` are. "local": sums over this rank's values, to be added up over the ranks like the
        other gradients of the network. "sum": sums over all values, which must not be added up again.
    axis, eps, momentum, affine, bias, track_running_stats, unbiased, activation, statistics, update, renorm, dtype
        As in `BatchNorm`. Later changes must be made on all ranks. `statistics="running"` needs `reduce="local"`,
        because then no gradient passes through the statistics and nothing is sent in the backward pass.
    ghost : None
        Ghost batches are refused. The part of a rank already is one: use `BatchNorm` on each rank for that.

    Raises
    ------
    ImportError
        If mpi4py or its MPI library is missing.
    ValueError
        On every rank, if the ranks disagree about an argument.

    Notes
    -----
    A packet has 3C + 4 numbers of 8 bytes in the forward pass and 2C + 1 in the backward pass. An exception elsewhere
    in the program of one rank leaves the others waiting, as always with MPI: start programs with
    ``mpiexec -n 4 python -m mpi4py program.py``, which then ends all of them.

    Examples
    --------
    On one rank, as here, it is `BatchNorm`; `mpiexec -n 4 python -m batchnorm.mpi` compares four ranks to it.

    >>> import numpy as np
    >>> from batchnorm.mpi import SyncBatchNorm
    >>> layer = SyncBatchNorm(2, dtype=np.float64)
    >>> y = layer(np.array([[1.0, 10.0], [3.0, 30.0]]))
    >>> layer.running_mean
    array([0.2, 2. ])
    """

    def __init__(
        self,
        num_features: int,
        comm: Communicator | None = None,
        *,
        reduce: str = "local",
        axis: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        bias: bool = True,
        track_running_stats: bool = True,
        unbiased: bool = True,
        activation: Activation | None = None,
        statistics: Statistics = "batch",
        update: bool = True,
        renorm: tuple[float, float] | None = None,
        ghost: int | None = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self._exchange = Exchange(world() if comm is None else comm)
        self.reduce = reduce
        error: BaseException | None = None
        try:
            super().__init__(
                num_features,
                axis=axis,
                eps=eps,
                momentum=momentum,
                affine=affine,
                bias=bias,
                track_running_stats=track_running_stats,
                unbiased=unbiased,
                activation=activation,
                statistics=statistics,
                update=update,
                renorm=renorm,
                ghost=ghost,
                dtype=dtype,
            )
            if reduce not in ("local", "sum"):
                raise ValueError(f"reduce must be 'local' or 'sum', got {reduce!r}")
        except BaseException as refused:
            error = refused
        described = self.comm.allgather(repr(self) if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, other in enumerate(described):
            if other != described[0]:
                raise ValueError(
                    f"all ranks must agree about the layer, got {described[0]} on rank 0, {other} on {rank}"
                )

    @property
    def comm(self) -> Communicator:
        """The ranks that share a batch."""
        return self._exchange.comm

    @property
    def _alone(self) -> bool:
        return self._exchange.ranks == 1

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, reduce={self.reduce!r})"

    def _checked_way(self, way: Way) -> Way:
        if way.ghost is not None:
            raise ValueError(
                f"ghost must be None, got {way.ghost}: SyncBatchNorm makes one batch of the ranks' parts; "
                "for ghost batches, use BatchNorm on each rank"
            )
        if way.statistics == "running" and self.reduce == "sum":
            raise ValueError(
                "statistics='running' needs reduce='local': with fixed statistics the backward pass sends nothing"
            )
        return super()._checked_way(way)

    @overload
    def __call__(
        self, x: NDArray[Float], *, out: NDArray[Float] | None = None, **how: Unpack[_keywords.Layer]
    ) -> NDArray[Float]: ...
    @overload
    def __call__(self, x: ArrayLike, *, out: Array | None = None, **how: Unpack[_keywords.Layer]) -> Array: ...
    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        fill: float = 0.0,
        add: ArrayLike | None = None,
        out: Array | None = None,
        num_threads: int | None = None,
    ) -> Array:
        """Normalize x, and move the running statistics in training, in which all ranks must take part.

        Parameters
        ----------
        x : array_like of float64, float32, float16 or bfloat16
            This rank's part, with `num_features` channels along `axis` and possibly no samples. All ranks need the same
            dtype.
        mask, lengths, weights, fill, add, out, num_threads
            As in `BatchNorm`, for this rank's part. Weights must have the same scale on all ranks.

        Raises
        ------
        TypeError, ValueError
            As for `BatchNorm`, on the rank whose argument is wrong; on every rank if dtypes differ or there is only one
            value per channel in all.
        RuntimeError
            On the other ranks, if one rank raises an error of its own. The layers are unchanged then.
        """
        selects: dict[str, Any] = {"mask": mask, "lengths": lengths, "weights": weights}
        if self._alone or (self._fixed and not self._follows):
            return super().__call__(x, fill=fill, add=add, out=out, num_threads=num_threads, **selects)

        def own(packet: Numbers) -> tuple[Array, Array | None, Array]:
            array = _arrays.as_float(x, "x")
            _arrays.check_channels(array.shape, self.axis, self.num_features)
            _arrays.as_eps(self.eps)
            residual = None if add is None else _arrays.as_like(add, "add", array.shape, array.dtype)
            if out is not None:
                _arrays.check_out(out, array.shape, array.dtype)
                inputs = {"x": array, "gamma": self.gamma, "beta": self.beta, "add": residual}
                _arrays.check_overlap(out, inputs, ("add",))
            given, layout = _arrays.lay_out(array, self.axis)
            y = layout.empty(given.dtype) if out is None else layout.room(out, given.dtype)
            residual = None if residual is None else layout.bring(residual)
            _arrays.as_number(fill, "fill")
            write_moments(packet, moments_of(given, layout, selection_of(layout, given.dtype, **selects), num_threads))
            packet[STATUS] = _BIT[given.dtype.char]
            return given, residual, y

        packet, (given, residual, y) = self._moments_of_all(own)
        if packet[STATUS] != _BIT[given.dtype.char]:
            names = [_kernels.NAMES[char] for char, bit in _BIT.items() if int(packet[STATUS]) & bit]
            raise TypeError(
                f"x must have the same dtype on all ranks, got {' and '.join(names)}, "
                f"{_kernels.NAMES[given.dtype.char]} on rank {self._exchange.rank}"
            )
        total = read_moments(packet)
        if total.count and not total._tally.has_spread:
            raise ValueError(f"training needs more than one value per channel on all ranks together, got {total.count}")
        if self._fixed:
            self._normalize_by_running(given, one_of_three(**selects), fill, residual, y, num_threads)
            self._follow(training.statistics_of(total, self.eps), total._tally)
        else:
            kept: Saved | Renormed | Ghosts
            how: dict[str, Any] = {
                "axis": self.axis,
                "eps": self.eps,
                "fill": fill,
                "activation": self.activation,
                "add": residual,
                "out": y,
                "num_threads": num_threads,
                **selects,
            }
            if self._way.bounds is not None:
                _, kept = training.renormed(given, total, self._state, self._way.bounds, **how)
            else:
                _, kept = functional.forward(given, self.gamma, self.beta, moments=total, **how)
            self._keep(kept)
        return y if out is None else _arrays.deliver(y, out)

    def _population(self, batches: Iterable[Batch], **how: Any) -> Moments:
        """The moments of the batches of all ranks, for `recalibrate`, which all ranks must call."""

        def own(packet: Numbers) -> None:
            write_moments(packet, super(SyncBatchNorm, self)._population(batches, **how))

        packet, _ = self._moments_of_all(own)
        return read_moments(packet)

    def _moments_of_all(self, own: Callable[[Numbers], _Made]) -> tuple[Numbers, _Made]:
        return self._exchange.of_all(own, HEAD + (M2 + 1) * self.num_features, per_channel.merge_moments)

    def _sums_of_all(self, own: Callable[[Numbers], _Made], rows: int) -> tuple[Numbers, _Made]:
        packet, made = self._exchange.of_all(own, STATUS + 1 + rows * self.num_features, per_channel.merge_sums)
        return packet[STATUS + 1 :].reshape(rows, -1), made

    def _over_all(self, own: Callable[[], Numbers], rows: int) -> Numbers | None:
        if self._alone:
            return None

        def filled(packet: Numbers) -> None:
            packet[STATUS + 1 :] = own().ravel()

        return self._sums_of_all(filled, rows)[0]

    def _backward(
        self, dy: ArrayLike, saved: Saved, need: Need, out: Array | None, num_threads: int | None
    ) -> Gradients:
        if self._alone:
            return super()._backward(dy, saved, need, out, num_threads)

        def own(packet: Numbers) -> tuple[GradientSums, Array, Array | None, Saved]:
            functional.check_backward(dy, saved, need, out)
            layout = saved._layout
            given, normalized = functional.before_addition(layout.bring(functional.like_x(dy, saved)), saved)
            dx = None
            if "dx" in need:
                dx = layout.empty(given.dtype) if out is None else layout.room(out, given.dtype)
            sums = functional.grad_sums(given, normalized, num_threads=num_threads)
            packet[STATUS + 1 :] = sums._table.ravel()
            return sums, given, dx, normalized

        sums, (local, given, dx, normalized) = self._sums_of_all(own, 2)
        total = GradientSums._made(Tally.of_all(max(saved.count, local.count)), sums)
        gradients = functional.backward(given, normalized, sums=total, need=need, out=dx, num_threads=num_threads)
        if out is not None and dx is not None:
            gradients = gradients._replace(dx=_arrays.deliver(dx, out))
        if self.reduce == "local":
            dgamma, dbeta = functional.own_parameters(local, saved)
            gradients = gradients._replace(
                dgamma=None if gradients.dgamma is None else dgamma, dbeta=None if gradients.dbeta is None else dbeta
            )
        if normalized is not saved and (need is functional.NEED or "dadd" in need):
            gradients.dadd = given
        return gradients
