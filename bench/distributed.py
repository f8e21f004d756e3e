"""`python -m bench.distributed`: the cost of synchronising, measured on a few ranks and modelled for many.

- Measured: a step (forward and backward) of `BatchNorm` and of `SyncBatchNorm` on each rank's part, one thread per
  rank, and the same with another build of the package (`--before`); one exchange, in both ways; and the work of the
  software between two messages. mpiexec starts the ranks. Ranks on one machine communicate through its memory, and more
  ranks than processors wait for each other, so this does not measure a network.
- Fitted to messages between two ranks: α, the time of an empty message without the call of mpi4py, and β, the time per
  byte.
- Modelled by `simulation`: all layers of ResNet-50 on 2 to 65,536 ranks.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from . import simulation
from .rank import CHANNELS, packet_of
from .simulation import CLUSTER, Software

RANKS = (1, 2, 4)
MODELLED = tuple(2**k for k in range(1, 17))
SHOWN = (2, 3, 4, 5, 6, 7, 8, 32, 128, 512, 4096, 65536)
MERGED = tuple(ranks for ranks in sorted({*MODELLED, *SHOWN}) if ranks <= 4096)

Found = dict[str, Any]
"""The results of one number of ranks."""


def measure(ranks: int, build: str | None = None) -> Found:
    """Start the ranks and read their results; for another build, only its steps."""
    program = [sys.executable, "-m", "bench.rank", "all" if build is None else "steps"]
    command = [shutil.which("mpiexec") or "mpiexec", "-n", str(ranks), *program]
    environment = os.environ if build is None else os.environ | {"PYTHONPATH": build}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"python -m bench.distributed: {ranks} ranks did not finish\n{done.stderr}")
    found: Found = json.loads(done.stdout)
    return found


def least_of(found: list[Any]) -> Any:
    """The minimum of each number over several measurements."""
    first = found[0]
    if isinstance(first, dict):
        return {name: least_of([each[name] for each in found]) for name in first}
    if isinstance(first, list):
        return [least_of(list(each)) for each in zip(*found, strict=True)]
    return min(found)


def fit(messages: dict[str, float]) -> tuple[float, float]:
    """α and β: time = α + β·bytes, weighted by 1/time."""
    size, taken = [packet_of(int(channels)).nbytes for channels in messages], np.array(list(messages.values()))
    beta, alpha = np.polyfit(size, taken, 1, w=1 / taken)
    return float(alpha), float(beta)


def _table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> list[str]:
    head = list(head)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return [*(f"| {' | '.join(map(str, line))} |" for line in lines), ""]


def _micros(times: Iterable[float], digits: int = 1) -> list[str]:
    return [f"{1e6 * seconds:.{digits}f}" for seconds in times]


def of_steps(found: list[Found], before: list[Found]) -> list[str]:
    head = ["a rank's x", "ranks", "BatchNorm", "SyncBatchNorm", "added", *(["added before"] if before else [])]
    rows = []
    for shape in found[0]["steps"]:
        for at, run in enumerate(found):
            local, sync = run["steps"][shape]
            times = [local, sync, sync - local]
            if before:
                local, sync = before[at]["steps"][shape]
                times.append(sync - local)
            rows.append([shape.replace("x", "×"), run["ranks"], *_micros(times)])
    return _table(head, rows)


def of_exchanges(found: list[Found], soft: Software) -> list[str]:
    rows = []
    for run in found:
        if run["ranks"] > 1:
            rows += [[f"{run['ranks']} ranks, {way}", *_micros(run[way].values())] for way in ("doubling", "Allgather")]
        if run["ranks"] == 2:
            alone = [run["messages"][str(channels)] for channels in CHANNELS]
            software = [soft.between[channels, "moments"] for channels in CHANNELS]
            rows += [["2 ranks, a message alone", *_micros(alone)]]
            rows += [["2 ranks, a message and the software", *_micros(map(sum, zip(alone, software, strict=True)))]]
    for what, times in (("a merge", soft.merging), ("all between two messages", soft.between)):
        for name in simulation.MERGES:
            rows.append([f"{what}, {name}", *_micros((times[channels, name] for channels in CHANNELS), 2)])
    return _table(["channels", *CHANNELS], rows)


def draw(modelled: dict[str, dict[int, float]], path: Path) -> None:
    """Draw the time of a synchronised step over the number of ranks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    styles = [("#0072b2", "--"), ("#0072b2", "-"), ("#d55e00", "--"), ("#d55e00", "-")]
    for (label, times), (color, dashes) in zip(modelled.items(), styles, strict=True):
        heights = [1e3 * times[ranks] for ranks in MODELLED]
        axes.loglog(MODELLED, heights, dashes, color=color, label=label, linewidth=2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(MODELLED, [f"{ranks:,}" for ranks in MODELLED], rotation=45)
    axes.set(xlabel="ranks", ylabel="ms per step", title="Synchronising the 53 batch norms of ResNet-50, modelled")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.distributed", description=__doc__.partition("\n")[0])
    parser.add_argument("--before", metavar="DIRECTORY", help="another build of the package, to be measured beside it")
    parser.add_argument(
        "--visits", type=int, default=1, metavar="N", help="measure so often, in turns; the least counts"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write the tables there, a picture beside it")
    chosen = parser.parse_args()
    if shutil.which("mpiexec") is None:
        sys.exit("python -m bench.distributed: there is no mpiexec; python -m pip install mpich has one")
    if chosen.output and (chosen.output.suffix != ".md" or not chosen.output.parent.is_dir()):
        parser.error(f"argument --output: must be a .md file in an existing folder, got {chosen.output}")
    visits: dict[str | None, list[list[Found]]] = {build: [] for build in {None, chosen.before}}
    for _ in range(chosen.visits):
        for build, runs in visits.items():
            runs.append([measure(ranks, build) for ranks in RANKS])
    found = least_of(visits[None])
    before = least_of(visits[chosen.before]) if chosen.before else []
    soft = simulation.software()
    alpha, beta = fit(found[RANKS.index(2)]["messages"])
    alpha -= soft.call
    modelled = {
        f"{way}, {where}": {ranks: time(ranks, *constants, soft) for ranks in sorted({*MODELLED, *SHOWN})}
        for where, constants in (("as measured here", (alpha, beta)), ("1.5 µs and 100 Gb/s", CLUSTER))
        for way, time in (("Allgather", simulation.by_allgather), ("doubling", simulation.by_doubling))
    }
    rows = [[label, *(f"{1e3 * times[ranks]:.3g}" for ranks in SHOWN)] for label, times in modelled.items()]
    wrong = [ranks for ranks in MERGED if not simulation.bits_are_equal(ranks)]
    lines = [f"{found[0]['mpi']}, one thread per rank, float32; µs per step, forward and backward:", ""]
    lines += of_steps(found, before)
    lines += ["µs of an exchange of moments, and what of it is software:", ""]
    lines += of_exchanges(found, soft)
    lines += [
        f"α = {1e6 * alpha:.1f} µs, 1/β = {1e-9 / beta:.1f} GB/s, of messages between two ranks. "
        f"A call of mpi4py takes {1e6 * soft.call:.1f} µs more.",
        "",
    ]
    lines += ["Modelled, ms per step for the 53 layers of ResNet-50:", ""]
    lines += _table(["ranks", *SHOWN], rows)
    lines += [f"All packets merged for real, up to {MERGED[-1]} ranks: {wrong or 'the same bits on every rank'}.", ""]
    print("\n".join(lines))
    if chosen.output:
        chosen.output.write_text("\n".join(lines))
        draw(modelled, chosen.output.with_suffix(".png"))
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
