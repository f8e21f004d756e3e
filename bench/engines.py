"""`python -m bench.engines`: the statistics of a data set that is distributed over the workers of Dask.

Each worker is a process with one thread and a memory limit below the size of the data. Times include making the data.
For comparison, one process takes the same chunks one after the other; its result must have the same bits. Memory is
measured as Linux reports it.
"""

import argparse
import time
from pathlib import Path

import batchnorm as bn

COLUMNS = 8
ROWS, CHUNK, WORKERS, LIMIT = 10**8, 10**6, 2, "1GB"


def most_memory():
    """The peak memory of this process so far, in MB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def timed(call):
    begin = time.perf_counter()
    result = call()
    return result, time.perf_counter() - begin


def measure(rows, chunk, workers):
    import dask
    import dask.array
    from dask.distributed import Client, LocalCluster

    x = dask.array.random.default_rng(0).standard_normal((rows, COLUMNS), chunks=(chunk, COLUMNS), dtype="float32")
    alone, seconds_alone = timed(
        lambda: bn.population((block.compute(scheduler="synchronous") for block in x.blocks), num_threads=1)
    )
    cluster = LocalCluster(
        n_workers=workers, threads_per_worker=1, processes=True, memory_limit=LIMIT, dashboard_address=None
    )
    with cluster, Client(cluster) as client:
        before = client.run(most_memory)
        client_before = most_memory()
        together, seconds = timed(lambda: bn.population(x, num_threads=1))
        after = client.run(most_memory)
        grown = most_memory() - client_before
    return {
        "data, GB": f"{x.nbytes / 1e9:.1f}",
        "one process, s": f"{seconds_alone:.1f}",
        f"{workers} workers, s": f"{seconds:.1f}",
        "most memory of a worker, MB": f"{max(after.values()):.0f}",
        "of which idle": f"{max(before.values()):.0f}",
        "more in the client, MB": f"{grown:.0f}",
        "the same bits": "yes" if together == alone else "NO",
    }


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.engines", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows of {COLUMNS} float32, {ROWS:.0e} by default")
    parser.add_argument("--chunk", type=int, default=CHUNK, help=f"rows in a chunk, {CHUNK:.0e} by default")
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"processes, {WORKERS} by default")
    chosen = parser.parse_args()
    figures = measure(chosen.rows, chosen.chunk, chosen.workers)
    print(f"{chosen.rows:.0e} rows of {COLUMNS} float32 columns in chunks of {chosen.chunk:.0e}\n")
    print(f"| {' | '.join(figures)} |\n|{'---:|' * len(figures)}\n| {' | '.join(figures.values())} |")
    if figures["the same bits"] != "yes":
        raise SystemExit("python -m bench.engines: the workers gave other bits than one process")


if __name__ == "__main__":
    main()
