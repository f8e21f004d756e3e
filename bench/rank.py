"""The measurements of one rank of `bench.distributed`: `mpiexec -n 2 python -m bench.rank all`, or only `steps`.

Steps can be measured with any build of the package that has a `SyncBatchNorm`; the rest needs this build. Times are the
minimum of many rounds, which all ranks begin together, because other programs use the machine too.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import batchnorm as bn
from batchnorm.mpi import SyncBatchNorm

SHAPES = ((8, 64, 56, 56), (8, 256, 14, 14), (8, 2048, 7, 7), (32, 64))
CHANNELS = (64, 128, 256, 512, 1024, 2048)
CALLS, ROUNDS = 10, 300


def packet_of(channels: int) -> Any:
    """A packet of moments, with a count of 1."""
    packet = np.ones(4 + 3 * channels)
    packet[0] = 0
    return packet


def least(call: Callable[[], Any], barrier: Callable[[], Any] = lambda: None, calls: int = CALLS) -> float:
    """The least seconds that a call takes."""
    times = []
    call()
    for _ in range(ROUNDS):
        barrier()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    return min(times)


def steps(comm: Any) -> dict[str, list[float]]:
    """The times of `BatchNorm` and `SyncBatchNorm`, forward and backward, by the shape of x."""
    found = {}
    for shape in SHAPES:
        x = np.random.default_rng(comm.rank).standard_normal(shape, dtype=np.float32)

        def step(layer: bn.BatchNorm, x: Any = x) -> None:
            layer(x, num_threads=1)
            layer.backward(x, num_threads=1)

        layers, calls = (bn.BatchNorm(shape[1]), SyncBatchNorm(shape[1], comm)), 1 if x.size > 10_000 else CALLS
        found["x".join(map(str, shape))] = [
            least(lambda layer=layer: step(layer), comm.Barrier, calls) for layer in layers
        ]
    return found


def exchanges(comm: Any) -> dict[str, dict[int, float]]:
    """The times of an exchange of moments, in both ways, by the number of channels."""
    from batchnorm._kernels.per_channel import merge_moments
    from batchnorm.mpi import exchange

    found: dict[str, dict[int, float]] = {"doubling": {}, "Allgather": {}}
    merging = exchange.Exchange(comm)
    for channels in CHANNELS:
        own, packet = packet_of(channels), packet_of(channels)

        def call(own: Any = own, packet: Any = packet) -> None:
            packet[...] = own
            merging.merge_all(packet, merge_moments)

        for way, exchange.GATHERED in (("doubling", 0), ("Allgather", comm.size)):
            found[way][channels] = least(call, comm.Barrier)
    return found


def messages(comm: Any) -> dict[int, float]:
    """The times of messages in both directions at once, with packets of these channels, written anew each time."""
    found, other = {}, 1 - comm.rank
    for channels in (0, *CHANNELS):
        own, sent, received = (packet_of(channels) for _ in range(3))

        def call(own: Any = own, sent: Any = sent, received: Any = received) -> None:
            sent[...] = own
            comm.Sendrecv(sent, other, 0, received, other)

        found[channels] = least(call, comm.Barrier)
    return found


def main(what: str) -> None:
    """Measure; rank 0 prints the results."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    found: dict[str, Any] = {"ranks": comm.size, "mpi": " ".join(MPI.Get_library_version().split()[:3])}
    found["steps"] = steps(comm)
    if what == "all":
        found |= exchanges(comm)
        found["messages"] = messages(comm) if comm.size == 2 else {}
    if comm.rank == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
