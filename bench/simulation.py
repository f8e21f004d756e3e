"""The cost of synchronising many ranks: the messages of the real exchange on a virtual clock.

Decisions:

- Each rank is the generator that the exchange itself runs, so the simulation cannot drift from the real thing.
- A message of m bytes takes α + m·β, in both directions at once, and a call of mpi4py. The work of the software between
  two messages is measured here, with an exchange that has no transport.
- A rank waits only for its partner: no network is shared, nothing is hidden behind other work, and all ranks arrive
  together.
- If packets are given, they are really merged, so that every rank ends with its own packet for comparison.
"""

import math
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from batchnorm import Moments
from batchnorm._kernels import per_channel
from batchnorm.moments import Numbers
from batchnorm.mpi.exchange import Exchange, Merge, doubling
from batchnorm.mpi.sync import read_moments, write_moments
from batchnorm.profile.networks import NETWORKS

from . import rank
from .rank import CHANNELS, least

LAYERS = {
    channels: sum(layers for (other, _), layers in NETWORKS["resnet50"].items() if other == channels)
    for channels in CHANNELS
}
"""The number of layers of ResNet-50, by their number of channels."""

CLUSTER = (1.5e-6, 8 / 100e9)
"""α and β of a cluster for comparison, as stated by vendors of InfiniBand."""

MANY = 4096

Kind = tuple[int, str]
"""A packet: its number of channels, and "moments" or "sums"."""


def packet_of(kind: Kind) -> Numbers:
    channels, name = kind
    packet: Numbers = rank.packet_of(channels) if name == "moments" else np.zeros(1 + 2 * channels)
    return packet


MERGES: dict[str, Merge] = {"moments": per_channel.merge_moments, "sums": per_channel.merge_sums}
KINDS = [(channels, name) for channels in LAYERS for name in MERGES]


class Software(NamedTuple):
    """Seconds of a merge and of all work between two messages, by kind of packet, and of a call of mpi4py."""

    merging: dict[Kind, float]
    between: dict[Kind, float]
    call: float


class _Nowhere:
    """One of many ranks, all of which send the same as this one."""

    def Get_rank(self) -> int:  # noqa: N802
        return 0

    def Get_size(self) -> int:  # noqa: N802
        return MANY

    def Sendrecv(self, sendbuf: Numbers, dest: int, tag: int, recvbuf: Numbers, source: int) -> None:  # noqa: N802, ARG002
        recvbuf[...] = sendbuf


def software() -> Software:
    sent, received = np.zeros(1), np.zeros(1)
    call_alone = least(lambda: MPI.COMM_SELF.Sendrecv(sent, 0, 0, received, 0))
    exchange, found = Exchange(_Nowhere()), Software({}, {}, call_alone)  # type: ignore[arg-type]
    for kind in KINDS:
        own, packet, merge = packet_of(kind), packet_of(kind), MERGES[kind[1]]

        def call(own: Numbers = own, packet: Numbers = packet, merge: Merge = merge) -> None:
            packet[...] = own
            exchange.merge_all(packet, merge)

        found.between[kind] = least(call) / math.log2(MANY)
        found.merging[kind] = least(lambda a=packet, b=own, merge=merge: merge(a, b))
    return found


def simulate(ranks: int, message: Numbers, between: Numbers, merge: Merge, packets: list[Numbers]) -> Numbers:
    """The time at which the last rank is done, if all begin at 0; packets that are given become those of all ranks."""
    clock = np.zeros((ranks, message.size))

    def at(one: int) -> Merge:
        def timed(lower: Numbers, upper: Numbers) -> None:
            merge(lower, upper)
            clock[one] += between

        return timed

    going = [doubling(packet, at(one), one, ranks) for one, packet in enumerate(packets)]
    waiting = [next(messages, None) for messages in going]
    ready = list(range(ranks))
    while ready:
        one = ready.pop()
        mine = waiting[one]
        theirs = mine and waiting[mine[0]]
        if mine is None or theirs is None or theirs[0] != one:
            continue  # waits for its partner
        other = mine[0]
        for sent, received in ((mine[1], theirs[2]), (theirs[1], mine[2])):
            if sent is not None and received is not None:
                received[...] = sent
        clock[one] = clock[other] = np.maximum(clock[one], clock[other]) + message
        for each in (one, other):
            waiting[each] = next(going[each], None)
            ready.append(each)
    assert not any(waiting), f"of {ranks} ranks some wait forever"
    last: Numbers = clock.max(axis=0)
    return last


def by_doubling(ranks: int, alpha: float, beta: float, soft: Software) -> float:
    """Seconds that synchronising all layers of ResNet-50 adds to a step."""
    message = np.array([soft.call + alpha + packet_of(kind).nbytes * beta for kind in KINDS])
    between = np.array([soft.between[kind] for kind in KINDS])
    taken = simulate(ranks, message, between, lambda *_: None, [np.empty(0)] * ranks)
    return float(taken @ [LAYERS[channels] for channels, _ in KINDS])


def by_allgather(ranks: int, alpha: float, beta: float, soft: Software) -> float:
    """The same, if every rank gets the packets of all ranks in ⌈log₂P⌉ messages, and merges them."""
    seconds = 0.0
    for kind in KINDS:
        others = (ranks - 1) * (packet_of(kind).nbytes * beta + soft.merging[kind])
        seconds += LAYERS[kind[0]] * (soft.call + math.ceil(math.log2(ranks)) * alpha + others)
    return seconds


def bits_are_equal(ranks: int, channels: int = 64) -> bool:
    """Whether all ranks, merging real packets, get the same bits as one process with all parts."""
    rng, packets = np.random.default_rng(ranks), []
    parts = [Moments.of(rng.standard_normal((one % 7, channels)) + 3) for one in range(ranks)]
    for part in parts:
        packets.append(packet_of((channels, "moments")))
        write_moments(packets[-1], part)
    simulate(ranks, np.zeros(1), np.zeros(1), per_channel.merge_moments, packets)
    return len({packet.tobytes() for packet in packets}) == 1 and read_moments(packets[0]) == Moments.merge_all(parts)
