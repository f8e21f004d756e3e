"""`python -m bench.distributed`: what synchronising costs, measured on a few ranks and modelled for many.

- Measured: a step (forward and backward) of `BatchNorm` and of `SyncBatchNorm` on each rank's part, one thread per
  rank, and an Allgather by the bytes that each rank sends. Ranks are started with mpiexec. Those of one machine talk
  through its memory, and more ranks than processors wait for each other, so this is the latency of the software, not a
  network.
- Fitted: α, the time of a message without content, and β, the time of a byte, to the Allgathers of two ranks.
- Modelled: an Allgather among P ranks by recursive doubling takes log₂P messages and receives (P − 1)·m bytes,
  log₂P·α + (P − 1)·m·β; one that could add up on the way, an Allreduce, log₂P·(α + m·β). Nothing is hidden behind
  other work, no network is shared, and ranks arrive together.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.profile.networks import NETWORKS

SHAPES = ((8, 64, 56, 56), (8, 256, 14, 14), (8, 2048, 7, 7), (32, 64))
BYTES = (8, 512, 4096, 16384, 65536, 262144)
RANKS = (1, 2, 4)
MODEL_RANKS = tuple(2**k for k in range(1, 13))
CALLS, ROUNDS = 20, 15

# A cluster for comparison: 1.5 µs and 100 Gb/s, as vendors of InfiniBand give them.
CLUSTER = (1.5e-6, 8 / 100e9)


def _best(call: Callable[[], Any], barrier: Callable[[], Any]) -> float:
    """Seconds that a call takes, the median over rounds that begin together."""
    times = []
    call()
    for _ in range(ROUNDS):
        barrier()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS)
    return statistics.median(times)


def worker() -> None:
    """What one rank measures; rank 0 prints it."""
    from mpi4py import MPI

    import batchnorm as bn
    from batchnorm.mpi import SyncBatchNorm

    comm = MPI.COMM_WORLD
    steps = {}
    for shape in SHAPES:
        x = np.random.default_rng(comm.rank).standard_normal(shape, dtype=np.float32)

        def step(layer: bn.BatchNorm, x: Any = x) -> None:
            layer(x, num_threads=1)
            layer.backward(x, num_threads=1)

        layers = bn.BatchNorm(shape[1]), SyncBatchNorm(shape[1], comm)
        steps["x".join(map(str, shape))] = [_best(lambda layer=layer: step(layer), comm.Barrier) for layer in layers]
    gathers = {}
    for size in BYTES:
        own, all_of_them = np.zeros(size // 8), np.empty((comm.size, size // 8))
        gathers[size] = _best(lambda own=own, room=all_of_them: comm.Allgather(own, room), comm.Barrier)
    if comm.rank == 0:
        print(
            json.dumps(
                {
                    "ranks": comm.size,
                    "steps": steps,
                    "gathers": gathers,
                    "mpi": " ".join(MPI.Get_library_version().split()[:3]),
                }
            )
        )


def measure(ranks: int) -> dict[str, Any]:
    """Start the ranks and read what they found."""
    command = [
        shutil.which("mpiexec") or "mpiexec",
        "-n",
        str(ranks),
        sys.executable,
        "-m",
        "bench.distributed",
        "--worker",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"python -m bench.distributed: {ranks} ranks did not finish\n{done.stderr}")
    return json.loads(done.stdout)


def fit(gathers: dict[str, float]) -> tuple[float, float]:
    """α and β of two ranks: time = α + β·bytes, weighted by 1/time."""
    size, taken = np.array(list(gathers), float), np.array(list(gathers.values()))
    beta, alpha = np.polyfit(size, taken, 1, w=1 / taken)
    return float(alpha), float(beta)


def packets(channels: int) -> tuple[int, int]:
    """Bytes that a rank sends in the forward and the backward pass."""
    return 8 * (3 * channels + 2), 8 * (2 * channels + 1)


def allgather(ranks: int, size: int, alpha: float, beta: float) -> float:
    return math.log2(ranks) * alpha + (ranks - 1) * size * beta


def allreduce(ranks: int, size: int, alpha: float, beta: float) -> float:
    return math.log2(ranks) * (alpha + size * beta)


def network(ranks: int, alpha: float, beta: float, collective: Callable[..., float], name: str = "resnet50") -> float:
    """Seconds that synchronising all layers of a network adds to a step."""
    return sum(
        layers * sum(collective(ranks, size, alpha, beta) for size in packets(channels))
        for (channels, _), layers in NETWORKS[name].items()
    )


def report(found: list[dict[str, Any]], alpha: float, beta: float) -> str:
    """The tables, in Markdown."""
    lines = [f"{found[0]['mpi']}, one thread per rank, float32; µs per step, forward and backward:", ""]
    lines += ["| a rank's x | ranks | BatchNorm | SyncBatchNorm | added |", "|---|---:|---:|---:|---:|"]
    for shape in found[0]["steps"]:
        for run in found:
            local, sync = (1e6 * seconds for seconds in run["steps"][shape])
            lines.append(
                f"| {shape.replace('x', '×')} | {run['ranks']} | {local:.0f} | {sync:.0f} | {sync - local:.0f} |"
            )
    lines += ["", "µs of an Allgather, by the bytes that each rank sends:", ""]
    lines += [f"| ranks | {' | '.join(str(size) for size in BYTES)} |", "|---" * (len(BYTES) + 1) + "|"]
    for run in found:
        lines.append(f"| {run['ranks']} | {' | '.join(f'{1e6 * taken:.1f}' for taken in run['gathers'].values())} |")
    lines += ["", f"α = {1e6 * alpha:.1f} µs, 1/β = {1e-9 / beta:.1f} GB/s (two ranks).", ""]
    lines += ["Modelled, ms per step for the 53 layers of ResNet-50:", ""]
    shown = [2, 8, 32, 128, 512, 4096]
    lines += [f"| | {' | '.join(f'{ranks} ranks' for ranks in shown)} |", "|---" * (len(shown) + 1) + "|"]
    for label, constants, collective in curves(alpha, beta):
        times = " | ".join(f"{1e3 * network(ranks, *constants, collective):.2g}" for ranks in shown)
        lines.append(f"| {label} | {times} |")
    return "\n".join(lines) + "\n"


def curves(alpha: float, beta: float) -> list[tuple[str, tuple[float, float], Callable[..., float]]]:
    """What is modelled: label, α and β, collective."""
    return [
        ("Allgather, as measured here", (alpha, beta), allgather),
        ("Allreduce, as measured here", (alpha, beta), allreduce),
        ("Allgather, 1.5 µs and 100 Gb/s", CLUSTER, allgather),
        ("Allreduce, 1.5 µs and 100 Gb/s", CLUSTER, allreduce),
    ]


def draw(alpha: float, beta: float, path: Path) -> None:
    """Time of a synchronised step over the number of ranks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    styles = [("#0072b2", "-"), ("#0072b2", "--"), ("#d55e00", "-"), ("#d55e00", "--")]
    for (label, constants, collective), (color, dashes) in zip(curves(alpha, beta), styles, strict=True):
        times = [1e3 * network(ranks, *constants, collective) for ranks in MODEL_RANKS]
        axes.loglog(MODEL_RANKS, times, dashes, color=color, label=label, linewidth=2, base=10)
    axes.set_xscale("log", base=2)
    axes.set_xticks(MODEL_RANKS, [str(ranks) for ranks in MODEL_RANKS])
    axes.set(xlabel="ranks", ylabel="ms per step", title="Synchronising the 53 batch norms of ResNet-50, modelled")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.distributed", description=__doc__.partition("\n")[0])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write the tables there, a picture beside it")
    chosen = parser.parse_args()
    if chosen.worker:
        worker()
        return
    if shutil.which("mpiexec") is None:
        sys.exit("python -m bench.distributed: there is no mpiexec; python -m pip install mpich has one")
    if chosen.output and (chosen.output.suffix != ".md" or not chosen.output.parent.is_dir()):
        parser.error(f"argument --output: must be a .md file in an existing folder, got {chosen.output}")
    found = [measure(ranks) for ranks in RANKS]
    alpha, beta = fit(next(run["gathers"] for run in found if run["ranks"] == 2))
    text = report(found, alpha, beta)
    print(text)
    if chosen.output:
        chosen.output.write_text(text)
        draw(alpha, beta, chosen.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
