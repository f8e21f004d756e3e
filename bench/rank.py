"""What one rank of `bench.distributed` measures: `mpiexec -n 2 python -m bench.rank all`, or `steps` alone.

Steps are measured with any build of the package that has a `SyncBatchNorm`; the rest belongs to this one. Times are the
least of many rounds, which all ranks begin together, because others use the machine too.
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
BYTES = (8, 512, 4096, 16384, 65536, 262144)
CALLS, ROUNDS = 10, 100


def least(call: Callable[[], Any], barrier: Callable[[], Any] = lambda: None) -> float:
    """Seconds that a call takes."""
    times = []
    call()
    for _ in range(ROUNDS):
        barrier()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS)
    return min(times)


def steps(comm: Any) -> dict[str, list[float]]:
    """Of `BatchNorm` and `SyncBatchNorm`, forward and backward, by the shape of x."""
    found = {}
    for shape in SHAPES:
        x = np.random.default_rng(comm.rank).standard_normal(shape, dtype=np.float32)

        def step(layer: bn.BatchNorm, x: Any = x) -> None:
            layer(x, num_threads=1)
            layer.backward(x, num_threads=1)

        layers = bn.BatchNorm(shape[1]), SyncBatchNorm(shape[1], comm)
        found["x".join(map(str, shape))] = [least(lambda layer=layer: step(layer), comm.Barrier) for layer in layers]
    return found


def exchanges(comm: Any) -> dict[str, dict[int, float]]:
    """Of moments by the number of channels, both ways."""
    from batchnorm._kernels.per_channel import merge_moments
    from batchnorm.mpi import exchange

    found: dict[str, dict[int, float]] = {"doubling": {}, "Allgather": {}}
    merging = exchange.Exchange(comm)
    for channels in CHANNELS:
        own = np.ones(4 + 3 * channels)
        own[0] = 0
        packet = np.empty_like(own)

        def call(own: Any = own, packet: Any = packet) -> None:
            packet[...] = own
            merging.merge(packet, merge_moments)

        for way, exchange.GATHERED in (("doubling", 0), ("Allgather", comm.size)):
            found[way][channels] = least(call, comm.Barrier)
    return found


def messages(comm: Any) -> dict[int, float]:
    """Between two ranks, both ways at once, by the bytes of each."""
    found, other = {}, 1 - comm.rank
    for size in BYTES:
        sent, received = np.zeros(size // 8), np.empty(size // 8)
        found[size] = least(lambda a=sent, b=received: comm.Sendrecv(a, other, 0, b, other), comm.Barrier)
    return found


def main(what: str) -> None:
    """Rank 0 prints what it found."""
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
