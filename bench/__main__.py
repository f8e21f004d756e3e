"""`python -m bench`: batchnorm against torch and the NumPy baseline, on the same arrays, in one run.

- Each contestant has a process of its own, because OpenMP runtimes in one process disturb each other.
- They take turns, a short burst each, round after round: the machine's cache and memory are shared with strangers,
  and a slow second must hit everybody. The best time of all rounds is reported, the median beside it in the JSON.
- The copy limit takes its turns too: `np.copyto` for forward and inference, `np.add` for backward, on as many threads.
- Every result is held against the reference in float64 before it is timed.
- batchnorm is measured twice: writing into `out=`, and allocating its result on every call as torch and NumPy do.
- This is a command and not pytest-benchmark, because that one times its cases one after the other in one process.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import statistics
from pathlib import Path

from rich.progress import track

from batchnorm import profile

from .contestants import CONTESTANTS, serve

CASES = {
    "(32, 64, 56, 56) NCHW": ((32, 64, 56, 56), 1),
    "(32, 256, 14, 14) NCHW": ((32, 256, 14, 14), 1),
    "(8, 64, 112, 112) NCHW": ((8, 64, 112, 112), 1),
    "(32, 64, 56, 56) NHWC": ((32, 56, 56, 64), 3),
    "(32, 256, 14, 14) NHWC": ((32, 14, 14, 256), 3),
    "(8, 64, 112, 112) NHWC": ((8, 112, 112, 64), 3),
    "(256, 1024)": ((256, 1024), 1),
    "(32, 64)": ((32, 64), 1),
}
QUICK = {"(4, 8, 14, 14) NCHW": ((4, 8, 14, 14), 1), "(32, 64)": ((32, 64), 1)}
PASSES = ("forward", "backward", "inference")
MOST_ERROR = {"float32": 2e-5, "float64": 1e-13}  # that of torch in channels-last memory is the largest


def measure(cases, threads, dtypes, names, rounds):
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name in names:
        pipes[name], far = context.Pipe()
        context.Process(target=serve, args=(name, far), daemon=True).start()
        far.close()
    rows = []
    for (case, (shape, axis)), team, dtype, which in track(
        list(itertools.product(cases.items(), threads, dtypes, PASSES)), description="measuring"
    ):
        request = (shape, axis, dtype, team, which)
        times = {name: [] for name in names}
        for name in set(names) - {"limit"}:
            pipes[name].send((*request, True))
            if not (error := pipes[name].recv()) <= MOST_ERROR[dtype]:
                raise SystemExit(f"{name} is wrong in {which} of {case} {dtype}: error {error}")
        for _, name in itertools.product(range(rounds), names):
            pipes[name].send((*request, False))
            times[name] += pipes[name].recv()
        best = {name: min(taken) for name, taken in times.items()}
        median = {name: statistics.median(taken) for name, taken in times.items()}
        rows.append({"case": case, "threads": team, "dtype": dtype, "pass": which, "best": best, "median": median})
    return rows


def table(rows, names):
    """Markdown: microseconds, and how many times as long as batchnorm the others take."""
    rivals = [name for name in names if name in ("NumPy", "torch")]
    header = ["shape", "pass", "dtype", "threads", *(f"{name} µs" for name in names if name != "limit")]
    header += [f"{rival} / batchnorm" for rival in rivals] + ["over limit"]
    lines = [header, ["---"] * 4 + ["---:"] * (len(header) - 4)]
    for row in rows:
        best = row["best"]
        ours = min(best["batchnorm"], best["batchnorm, out="])
        lines.append(
            [row["case"], row["pass"], row["dtype"], str(row["threads"])]
            + [f"{best[name] * 1e6:.{1 if best[name] < 1e-4 else 0}f}" for name in names if name != "limit"]
            + [f"{best[rival] / best['batchnorm']:.2f}" for rival in rivals]
            + [f"{ours / best['limit']:.2f}"]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def means(rows, names):
    """Geometric means of the ratios, by pass and number of threads."""
    for (team, which), group in itertools.groupby(
        sorted(rows, key=lambda row: (row["threads"], PASSES.index(row["pass"]))),
        key=lambda row: (row["threads"], row["pass"]),
    ):
        logs = [row["best"] for row in group]
        ratios = {
            rival: math.exp(statistics.mean(math.log(best[rival] / best["batchnorm"]) for best in logs))
            for rival in names
            if rival in ("NumPy", "torch")
        }
        yield f"- {which}, {team} threads: " + ", ".join(f"{rival} {ratio:.2f} ×" for rival, ratio in ratios.items())


def main():
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=lambda text: [int(part) for part in text.split(",")], default=[2])
    parser.add_argument("--dtype", type=lambda text: text.split(","), default=["float32"])
    parser.add_argument("--rounds", type=int, default=8, help="turns of each contestant (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small shapes, two rounds, to see that it works")
    parser.add_argument("--without", default="", help="contestants to leave out, such as torch,NumPy")
    parser.add_argument("--output", type=Path, help="write the tables to this Markdown file and the figures beside it")
    arguments = parser.parse_args()
    names = [name for name in CONTESTANTS if name not in arguments.without.split(",")]
    cases, rounds = (QUICK, 2) if arguments.quick else (CASES, arguments.rounds)
    rows = measure(cases, arguments.threads, arguments.dtype, names, rounds)
    machine = profile.machine_facts([name for name in names if name == "torch"])
    facts = f"{machine['processor']}, {machine['kernels']['level']} kernels, " + ", ".join(
        f"{name} {version}" for name, version in machine["versions"].items()
    )
    text = "\n".join(
        [facts, "", table(rows, names), "", "Time of the others over that of batchnorm:", "", *means(rows, names), ""]
    )
    print(text)
    if arguments.output:
        arguments.output.write_text(text)
        report = json.dumps({"machine": machine, "rows": rows}, indent=1)
        arguments.output.with_suffix(".json").write_text(report + "\n")


if __name__ == "__main__":
    main()
