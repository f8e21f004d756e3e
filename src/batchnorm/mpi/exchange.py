"""The transport of synchronised statistics: one packet per rank, merged for all ranks. It knows nothing about layers.

Decisions:

- Ranks exchange packets with one partner after another, by recursive doubling. A rank sends log₂P packets. If the
  number of ranks P is not a power of two, ranks are paired first, and the first of a pair sends one more.
- Among few ranks, one Allgather sends all packets to every rank, and every rank merges them. Its volume grows with P.
- Both ways follow the tree of `Moments.merge_all`, so they give the same bits on every rank and in every run. A
  reduction by MPI could choose any order.
- A rank that cannot make its packet still takes part: its packet says so, and so does every merged packet. It raises
  its own error, the others raise one that names it, and no rank is left waiting.
- Messages to one rank use a duplicate of the communicator, because the program may receive from any rank.
- Ranks are reached through a few methods, those of mpi4py, so that another transport can replace mpi4py.
"""

import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import numpy as np

from .. import _tree
from .._extras import requirements
from .._kernels.runtime import STATUS
from ..moments import Numbers

GATHERED = 6
"""The most ranks for which every rank gets all packets: docs/distributed.md has the times of both ways."""

Merge = Callable[[Numbers, Numbers], None]
"""Merges an upper packet into a lower one, like `per_channel.merge_moments`."""

_Made = TypeVar("_Made")


class Communicator(Protocol):
    """The part of mpi4py's `Comm` that an exchange needs; buffers are arrays of float64."""

    def Get_rank(self) -> int: ...  # noqa: N802
    def Get_size(self) -> int: ...  # noqa: N802
    def allgather(self, sendobj: Any, /) -> list[Any]: ...
    def Allgather(self, sendbuf: Numbers, recvbuf: Numbers, /) -> None: ...  # noqa: N802
    def Send(self, buf: Numbers, dest: int, /) -> None: ...  # noqa: N802
    def Recv(self, buf: Numbers, source: int, /) -> None: ...  # noqa: N802
    def Sendrecv(  # noqa: N802
        self, sendbuf: Numbers, dest: int, sendtag: int, recvbuf: Numbers, source: int, /
    ) -> None: ...


def world() -> Any:
    """MPI's communicator of all ranks."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        install = f"python -m pip install {requirements('mpi4py', 'mpi')} mpich"
        raise ImportError(f"batchnorm.mpi needs mpi4py and an MPI library: {install}") from error
    return MPI.COMM_WORLD


@lru_cache(maxsize=1)
def _key() -> int:
    """The key under which an MPI communicator stores its duplicate, which is freed with it."""
    from mpi4py import MPI

    key: int = MPI.Comm.Create_keyval(delete_fn=lambda _comm, _key, duplicate: duplicate.Free())
    return key


def _duplicate(comm: Any) -> Any:
    """A communicator of the same ranks for this package alone, one for all layers, because MPI limits their number."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not isinstance(comm, mpi.Comm):
        return comm
    duplicate = comm.Get_attr(_key())
    if duplicate is None:
        duplicate = comm.Dup()
        comm.Set_attr(_key(), duplicate)
    return duplicate


Message = tuple[int, Numbers | None, Numbers | None]
"""The partner's rank, the packet to send, and the buffer to receive into."""


def doubling(packet: Numbers, merge: Merge, rank: int, ranks: int) -> Iterator[Message]:
    """The messages of one rank, each to be sent before the next; its packet becomes that of all ranks."""
    mine, theirs, paired = packet, np.empty_like(packet), rank < 2 * _tree.leading_pairs(ranks)
    if paired and rank % 2:
        yield rank - 1, packet, None
        yield rank - 1, None, packet
        return
    if paired:
        yield rank + 1, None, theirs
        merge(mine, theirs)
    for partner in _tree.partners(rank, ranks):
        yield partner, mine, theirs
        if partner < rank:
            mine, theirs = theirs, mine
        merge(mine, theirs)
    if paired:
        yield rank + 1, mine, None
    if mine is not packet:
        packet[...] = mine


class Exchange:
    """Merges packets over the ranks of a communicator; all ranks must call it."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.rank: int = comm.Get_rank()
        self.ranks: int = comm.Get_size()
        self._carrier: Communicator | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Exchange, (self.comm,)

    def merge_all(self, packet: Numbers, merge: Merge) -> None:
        """Turn a rank's packet into that of all ranks."""
        if self.ranks <= GATHERED:
            packets = np.empty((self.ranks, packet.size), packet.dtype)
            self.comm.Allgather(packet, packets)
            for lower, upper in _tree.merges(self.ranks):
                merge(packets[lower], packets[upper])
            packet[...] = packets[0]
            return
        comm = self._carrier
        if comm is None:
            comm = self._carrier = _duplicate(self.comm)
        for partner, sent, received in doubling(packet, merge, self.rank, self.ranks):
            if sent is not None and received is not None:
                comm.Sendrecv(sent, partner, 0, received, partner)
            elif sent is not None:
                comm.Send(sent, partner)
            elif received is not None:
                comm.Recv(received, partner)

    def of_all(self, own: Callable[[Numbers], _Made], size: int, merge: Merge) -> tuple[Numbers, _Made]:
        """The packet of all ranks, and what `own`, which fills this rank's packet of zeros, returned.

        Raises
        ------
        RuntimeError
            If `own` raised an error on another rank.
        """
        packet, error = np.zeros(size), None
        try:
            made = own(packet)
        except BaseException as refused:
            error = refused
            packet[...] = 0
            packet[STATUS] = -1 - self.rank
        self.merge_all(packet, merge)
        if error is not None:
            raise error
        if packet[STATUS] < 0:
            raise RuntimeError(f"rank {-1 - int(packet[STATUS])} refused its arguments; its own error says why")
        return packet, made
