"""`python -m bench`: batchnorm against the frameworks, numba and NumPy, on the same arrays, in one run.

- Each contestant has a process of its own, because OpenMP runtimes in one process disturb each other. It may run on as
  many processors as it has threads.
- They take turns, a short burst each, round after round: the machine's cache and memory are shared with strangers,
  and a slow second must hit everybody. The best time of all rounds is reported, the median beside it in the JSON.
- The limit takes its turns too, in batchnorm's process and on its very arrays, whose pages decide much.
- Every result is held against the reference in float64 before it is timed.
- `--build DIRECTORY` lets another build of batchnorm take part (`pip install --target DIRECTORY`), which is how a
  change of a kernel is measured.
- This is a command and not pytest-benchmark, because that one times its cases one after the other in one process.
"""

import argparse
import itertools
import json
import multiprocessing
import shlex
import statistics
import sys
from importlib import metadata
from pathlib import Path

from rich.progress import track

from batchnorm import profile

from . import report
from .cases import SETS
from .contestants import LIMITS, MODULES, OURS, OURS_OUT, PASSES, PROCESSES, missing, serve

# What others leave: NumPy's sums over a million rows, torch's with the channels last; ONNX Runtime's eps is a float32.
MOST_ERROR = {"float32": 1e-3, "float64": 1e-12}


class Team:
    """The contestants' processes, for one number of threads."""

    def __init__(self, names, builds, threads):
        context = multiprocessing.get_context("spawn")
        self.processes, self.pipes = [], {}
        places = {name: (name, []) for name in names} | {f"{OURS} {path.name}": (OURS, [str(path)]) for path in builds}
        before = sys.path
        for label, (name, place) in places.items():
            self.pipes[label], far = context.Pipe()
            process = context.Process(target=serve, args=(name, far, threads), daemon=True)
            try:
                sys.path = [*place, *before]  # a spawned process gets the path of its parent
                process.start()
            finally:
                sys.path = before
            far.close()
            self.processes.append(process)

    def ask(self, label, *request):
        self.pipes[label].send(request)
        try:
            answer = self.pipes[label].recv()
        except (EOFError, ConnectionResetError):
            raise SystemExit(f"{label} has died at {request}") from None
        if label == OURS or not label.startswith(OURS):
            return answer
        return {label: answer[OURS], f"{label}, out=": answer[OURS_OUT]}  # another build, under its own name

    def measure(self, case, dtype, which, rounds):
        """The times of each contestant."""
        request = (case.shape, case.axis % len(case.shape), dtype, which)
        times = {}
        for label in self.pipes:
            for name, error in self.ask(label, *request, True).items():
                if not error <= MOST_ERROR[dtype]:
                    raise SystemExit(f"{name} is wrong in {which} of {case.label} {dtype}: error {error}")
        for _, label in itertools.product(range(rounds), self.pipes):
            for name, taken in self.ask(label, *request, False).items():
                times.setdefault(name, []).extend(taken)
        return times

    def close(self):
        for pipe in self.pipes.values():
            pipe.close()
        for process in self.processes:
            process.join()


def row_of(case, dtype, which, threads, times):
    best = {name: min(taken) for name, taken in times.items()}
    best["limit"] = min(best.pop(name) for name in LIMITS)
    median = {name: statistics.median(taken) for name, taken in times.items()}
    facts = {"case": case.label, "layout": case.layout, "dtype": dtype, "pass": which, "threads": threads}
    return report.Row(**facts, megabytes=case.megabytes(dtype), best=best, median=median)


def measure(cases, threads, dtypes, names, builds, rounds):
    cells = [cell for cell in itertools.product(dtypes, cases, PASSES) if cell[0] in cell[1].dtypes]
    if not cells:
        raise SystemExit(f"nothing to measure: none of the shapes is for {' or '.join(dtypes) or 'no dtype'}")
    rows = []
    for count in threads:
        team = Team(names, builds, count)
        for dtype, case, which in track(cells, description=f"measuring, {count} threads"):
            rows.append(row_of(case, dtype, which, count, team.measure(case, dtype, which, rounds)))
        team.close()
    return rows


def some_of(known):
    """Names out of `known`, joined by commas."""

    def parse(text):
        names = text.split(",") if text else []
        if not set(names) <= set(known):
            raise argparse.ArgumentTypeError(f"must be names out of {', '.join(known)} joined by commas, got {text!r}")
        return names

    return parse


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def teams(text):
    return [positive(part) for part in text.split(",")]


def parse():
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--set", choices=SETS, default="core", help="the shapes (default %(default)s)")
    parser.add_argument("--threads", type=teams, default=[2], help="one or more, such as 1,2 (default 2)")
    parser.add_argument("--dtype", type=some_of(MOST_ERROR), default=["float32"], help="(default float32)")
    parser.add_argument("--rounds", type=positive, default=8, help="turns of each contestant (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small shapes, two rounds, to see that it works")
    parser.add_argument("--only", help="shapes whose name holds this text")
    rivals = [name for name in PROCESSES if name != OURS]
    parser.add_argument("--without", type=some_of(rivals), default=[], help=f"leave out some of {', '.join(rivals)}")
    parser.add_argument("--build", type=Path, action="append", default=[], help="directory of another build")
    parser.add_argument("--output", type=Path, help="write to this Markdown file, the figures and a plot beside it")
    arguments = parser.parse_args()
    cases = SETS["quick" if arguments.quick else arguments.set]
    arguments.cases = [case for case in cases if not arguments.only or arguments.only in case.label]
    if not arguments.cases:
        labels = ", ".join(case.label for case in cases)
        parser.error(f"argument --only: no shape's name holds {arguments.only!r}; there are: {labels}")
    for path in arguments.build:
        if not (path / "batchnorm").is_dir():
            parser.error(f"argument --build: must be a directory with a package batchnorm in it, got {str(path)!r}")
    return arguments


def main():
    arguments = parse()
    names = [name for name in PROCESSES if name not in arguments.without]
    for name in names:
        if missing(name):
            raise SystemExit(f"{name} needs {', '.join(missing(name))}; install it or leave it out: --without '{name}'")
    rounds = 2 if arguments.quick else arguments.rounds
    rows = measure(arguments.cases, arguments.threads, arguments.dtype, names, arguments.build, rounds)
    machine = profile.machine_facts([])
    machine["versions"] |= {module: metadata.version(module) for name in names for module in MODULES.get(name, ())}
    facts = f"{machine['processor']}, {machine['kernels']['level']} kernels, " + ", ".join(
        f"{name} {version}" for name, version in machine["versions"].items()
    )
    shown = [name for name in dict.fromkeys(name for row in rows for name in row.best) if name != "limit"]
    text = report.markdown(rows, shown, facts, shlex.join(["python", "-m", "bench", *sys.argv[1:]]))
    print(text)
    if arguments.output:
        arguments.output.write_text(text)
        arguments.output.with_suffix(".json").write_text(
            json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n"
        )
        report.draw(arguments.output.with_suffix(".png"), rows, shown, facts)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
