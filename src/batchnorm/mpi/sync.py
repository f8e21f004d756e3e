"""Batch normalization over several processes, on mpi4py: one batch, of which every rank has a part.

Decisions:

- Statistics are merged, not averaged: each rank sends count, mean and Σ(x − μ)² of its part. Parts may differ in size,
  be empty or hold one sample.
- A step has two collectives, both Allgather. Every rank adds up the parts in the order of ranks, so that all get the
  same bits on every run. A reduction would be free to choose its order.
- A rank whose arguments are wrong takes part nevertheless and says so in its packet. It raises its own error, the
  others raise one that names it, and no rank is left waiting.
- What can fail on one rank alone, such as finding room for y, comes before the exchange; layers move after it.
- The mean travels as a pair, as it is in the kernels: without its low-order part float64 data at 1e6 would lose five
  digits of it.
- Evaluation needs no communication: running statistics are the same bits everywhere. Nor does a frozen layer.
- Ghost batches are refused: they cut a batch into parts, and this layer makes one of all parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .. import _arrays, _kernels, functional, training
from .._activation import Activation
from .._arrays import Array, Float
from .._extras import requirements
from .._selection import Tally, selection_of
from ..functional import Gradients, Need, Saved
from ..layer import BatchNorm
from ..moments import GradientSums, Moments, Numbers, moments_of
from ..training import Ghosts, Renormed, Statistics, Way

if TYPE_CHECKING:
    from .. import _keywords

# What the first number of a packet says: the dtype of x, or that the rank raises an error.
_STATUS = {char: float(number) for number, char in enumerate(_kernels.NAMES)}
_REFUSED = -1.0


def world() -> Any:
    """MPI's communicator of all ranks."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        install = f"python -m pip install {requirements('mpi4py', 'mpi')} mpich"
        raise ImportError(f"batchnorm.mpi needs mpi4py and an MPI library: {install}") from error
    return MPI.COMM_WORLD


def _packed(moments: Moments) -> Numbers:
    return np.concatenate([moments._tally, moments._table.ravel()])


def _merged(packets: Numbers) -> Moments:
    return Moments.merge_all(
        Moments._made(Tally(int(count), weight, squares), np.reshape(numbers, (3, -1)))
        for _, count, weight, squares, *numbers in packets.tolist()
    )


class SyncBatchNorm(BatchNorm):
    """`BatchNorm` with the statistics of all ranks: y = gamma·(x − μ)/√(σ² + eps) + beta.

    In training, μ = Σx/n and σ² = Σ(x − μ)²/n over the x of all ranks, with n values per channel in all. The
    running statistics take the variance times n/(n − 1). Every rank has to call the layer, and its `backward`, in every
    step, also with an x of no samples. In evaluation the running statistics are used and nothing is sent.

    Parameters
    ----------
    num_features : int
        Channels, C.
    comm : mpi4py.MPI.Comm, optional
        The ranks that share a batch; COMM_WORLD where None. Creating the layer is a collective call, too.
    reduce : {"local", "sum"}, default "local"
        What `dgamma` and `dbeta` are. "local": the sums over this rank's values, to be added up over the ranks like the
        other gradients of the network. "sum": the sums over all values, which must not be added up again.
    axis, eps, momentum, affine, bias, track_running_stats, unbiased, activation, statistics, update, renorm, dtype
        As for `BatchNorm`. What is changed later must be changed on all ranks. `statistics="running"` needs
        `reduce="local"`, because no gradient goes through the statistics then, and nothing is sent for it.
    ghost : None
        Ghost batches are refused: a rank is one already, so use `BatchNorm` on each rank for them.

    Raises
    ------
    ImportError
        If mpi4py or its MPI library is missing.
    ValueError
        On every rank, if the ranks disagree about an argument.

    Notes
    -----
    A packet has 3C + 4 numbers in the forward pass and 2C + 1 in the backward pass, of 8 bytes. An exception elsewhere
    in the program of one rank leaves the others waiting, as always with MPI: start programs with
    ``mpiexec -n 4 python -m mpi4py program.py``, which ends all of them then.

    Examples
    --------
    On one rank, as here, it is `BatchNorm`; `mpiexec -n 4 python -m batchnorm.mpi` compares four with it.

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
        comm: Any = None,
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
        self.comm: Any = world() if comm is None else comm
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

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, reduce={self.reduce!r})"

    def _checked_way(self, way: Way) -> Way:
        if way.ghost is not None:
            raise ValueError(
                f"ghost must be None, got {way.ghost}: SyncBatchNorm makes one batch of the parts that ranks have; "
                "BatchNorm on each rank has ghost batches"
            )
        if way.statistics == "running" and self.reduce == "sum":
            raise ValueError(
                "statistics='running' needs reduce='local': nothing is sent in the backward pass of fixed statistics"
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
        """Normalize x, and in training move the running statistics; all ranks have to take part in training.

        Parameters
        ----------
        x : array_like of float64, float32, float16 or bfloat16
            This rank's part, with `num_features` channels along `axis` and possibly no samples. All ranks need the same
            dtype.
        mask, lengths, weights, fill, add, out, num_threads
            As in `BatchNorm`, of this rank's part. Weights of different ranks are compared as they are.

        Raises
        ------
        TypeError, ValueError
            As `BatchNorm`, on the rank whose argument is wrong; on every rank if dtypes differ or there is one value
            per channel in all.
        RuntimeError
            On the other ranks if one raises an error of its own. Then the layers are as they were.
        """
        selects: dict[str, Any] = {"mask": mask, "lengths": lengths, "weights": weights}
        if self._fixed and not self._follows:
            return super().__call__(x, fill=fill, add=add, out=out, num_threads=num_threads, **selects)

        def own() -> tuple[float, Numbers, tuple[Array, Array | None, Array, tuple[Array | None, Array | None]]]:
            array = _arrays.as_float(x, "x")
            _arrays.check_channels(array.shape, self.axis, self.num_features)
            _arrays.as_eps(self.eps)
            parameters = self.gamma, self.beta
            residual = None if add is None else _arrays.as_like(add, "add", array.shape, array.dtype)
            if out is not None:
                _arrays.check_out(out, array.shape, array.dtype)
                inputs = {"x": array, "gamma": self.gamma, "beta": self.beta, "add": residual}
                _arrays.check_overlap(out, inputs, ("add",))
            given, layout = _arrays.lay_out(array, self.axis)
            y = layout.empty(given.dtype) if out is None else layout.room(out, given.dtype)
            residual = None if residual is None else layout.bring(residual)
            _arrays.as_number(fill, "fill")
            moments = moments_of(given, layout, selection_of(layout, given.dtype, **selects), num_threads)
            return _STATUS[given.dtype.char], _packed(moments), (given, residual, y, parameters)

        packets, (given, residual, y, (gamma, beta)) = self._exchange(own, 3 + 3 * self.num_features)
        if len({packet[0] for packet in packets}) > 1:
            names = [list(_kernels.NAMES.values())[int(packet[0])] for packet in packets]
            raise TypeError(f"x must have the same dtype on all ranks, got {', '.join(names)}")
        total = _merged(packets)
        if total.count and not total._tally.has_spread:
            raise ValueError(f"training needs more than one value per channel on all ranks together, got {total.count}")
        if self._fixed:
            self._normalize_by_running(given, selects, fill, residual, y, num_threads)
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
                _, kept = functional.forward(given, gamma, beta, moments=total, **how)
            self._keep(kept)
        return y if out is None else _arrays.deliver(y, out)

    def _population(self, batches: Iterable[ArrayLike], **how: Any) -> Moments:
        """The moments of the batches of all ranks, for `recalibrate`, which all ranks have to call."""

        def own() -> tuple[float, Numbers, None]:
            return 0.0, _packed(super(SyncBatchNorm, self)._population(batches, **how)), None

        packets, _ = self._exchange(own, 3 + 3 * self.num_features)
        return _merged(packets)

    def _exchange(self, own: Callable[[], tuple[float, Numbers, Any]], size: int) -> tuple[Numbers, Any]:
        """The packets of all ranks in their order, and what this rank made besides its own."""
        packet, made, error = np.zeros(1 + size), None, None
        packets = np.empty((self.comm.Get_size(), packet.size))
        packet[0] = _REFUSED
        try:
            status, packet[1:], made = own()
            packet[0] = status
        except BaseException as refused:
            error = refused
        self.comm.Allgather(packet, packets)
        if error is not None:
            raise error
        refused_by = [rank for rank, other in enumerate(packets) if other[0] == _REFUSED]
        if refused_by:
            raise RuntimeError(f"rank {refused_by[0]} refused its arguments; its own error says why")
        return packets, made

    def _over_all(self, own: Callable[[], Numbers], rows: int) -> Numbers | None:
        packets, _ = self._exchange(lambda: (0.0, own().ravel(), None), rows * self.num_features)
        total: Numbers = packets[0, 1:].reshape(rows, -1)
        for other in packets[1:, 1:]:  # in the order of ranks: NumPy's own sums may take another one
            total = total + other.reshape(rows, -1)
        return total

    def _backward(
        self, dy: ArrayLike, saved: Saved, need: Need, out: Array | None, num_threads: int | None
    ) -> Gradients:
        def own() -> tuple[float, Numbers, tuple[GradientSums, Array, Array | None, Saved]]:
            functional.check_backward(dy, saved, need, out)
            layout = saved._layout
            given, normalized = functional.before_addition(layout.bring(functional.like_x(dy, saved)), saved)
            dx = None
            if "dx" in need:
                dx = layout.empty(given.dtype) if out is None else layout.room(out, given.dtype)
            sums = functional.grad_sums(given, normalized, num_threads=num_threads)
            return _STATUS[given.dtype.char], sums._table.ravel(), (sums, given, dx, normalized)

        packets, (local, given, dx, normalized) = self._exchange(own, 2 * self.num_features)
        total = GradientSums.merge_all(max(saved.count, local.count), packets[:, 1:].reshape(len(packets), 2, -1))
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
