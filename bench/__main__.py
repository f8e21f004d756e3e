"""`python -m bench`: batchnorm against the frameworks, oneDNN, numba and NumPy, on the same arrays, in one run.

- Contestants have their own processes and take turns, a short burst each, round after round: other programs share the
  machine's cache and memory, and a slow second must affect all contestants. Rounds go on until the two best turns of
  each agree, or a maximum is reached. The table has the best time, the JSON also the median.
- The limit takes its turns too, in batchnorm's process and on the same arrays, because their pages matter.
- Every result is compared to the reference in float64 before it is timed.
- `--build NAME=DIRECTORY` compares builds of batchnorm (`pip install --target DIRECTORY`), to measure a change of a
  kernel. They share a process and its arrays, and visit all shapes twice, minutes apart, in a new process and so on new
  pages.
- This is a command and not pytest-benchmark, which times its cases one after the other in one process.
"""

import argparse
import itertools
import json
import shlex
import statistics
import sys
from importlib import metadata
from pathlib import Path

from rich.progress import track

from batchnorm.profile import measure
from batchnorm.profile.measure import LIMITS, OURS, PASSES

from . import comparison, report
from .cases import SETS
from .contestants import BUILDS, PACKAGES, RIVALS, WITH_RELU, missing
from .team import Team

# Errors of others: NumPy's sums over a million rows, torch's with the channels last; ONNX Runtime's eps is a float32.
# 16-bit floats are rounded by half a step of their type.
MOST_ERROR = {"float32": 1e-3, "float64": 1e-12, "float16": 2e-3, "bfloat16": 8e-3}
INSTALLED = "installed"
VISITS, LEAST_ROUNDS, AGREE = 2, 3, 1.02
DIGITS = 9  # the clock counts nanoseconds


def check(team, case, dtype, which, relu):
    """End the run if a result is wrong. With ReLU, gradients are not checked: near 0, types differ in the sign."""
    if relu and which == "backward":
        return
    for name, error in team.ask("errors", *about(case, dtype, which, relu), together=True).items():
        if not error <= MOST_ERROR[dtype]:
            raise SystemExit(f"{name} is wrong in {which} of {case.label} {dtype}: error {error}")


def take_turns(team, case, dtype, which, relu, rounds):
    """The seconds of each contestant's calls, turn by turn."""
    turns = {}
    for done in range(rounds):
        for name, taken in team.ask("times", *about(case, dtype, which, relu), backwards=done % 2 == 1).items():
            turns.setdefault(name, []).append(taken)
        if done + 1 >= LEAST_ROUNDS and all(agree(map(min, of_name)) for of_name in turns.values()):
            break
    return turns


def about(case, dtype, which, relu):
    return which, case.shape, case.axis % len(case.shape), dtype, relu


def agree(bests):
    """Whether the two best times nearly agree."""
    first, second, *_ = sorted(bests)
    return second < AGREE * first


def row_of(case, dtype, which, relu, threads, visits):
    """The result of a cell: the turns of each contestant, visit by visit."""
    best, median, settled = {}, {}, []
    for name in visits[0]:
        turns = [turn for visit in visits for turn in visit[name]]
        best[name] = round(min(map(min, turns)), DIGITS)
        median[name] = round(statistics.median(itertools.chain(*turns)), DIGITS)
        if agree(min(map(min, visit[name])) for visit in visits) if len(visits) > 1 else agree(map(min, turns)):
            settled.append(name)
    limits = [best.pop(name) for name in LIMITS if name in best]
    best |= {"limit": min(limits)} if limits else {}
    facts = {"case": case.label, "layout": case.layout, "dtype": dtype, "pass": which, "threads": threads}
    facts |= {"relu": True} if relu else {}
    facts |= {"network": case.network, "layers": case.layers}
    return report.Row(**facts, megabytes=case.megabytes(dtype), best=best, median=median, settled=settled)


def measured(cells, members, builds, threads, rounds):
    """A row for each cell, and each build's description of itself."""
    found = {cell: [] for cell in cells}
    visits = VISITS if builds else 1
    for visit in range(visits):
        team = Team(members, threads)
        versions = team.ask_one(BUILDS, "descriptions") if builds else {}
        description = f"measuring, {threads} thread{'s' if threads > 1 else ''}, visit {visit + 1} of {visits}"
        for cell in track(cells, description=description):
            if visit == 0:
                check(team, *cell)
            found[cell].append(take_turns(team, *cell, rounds))
        team.close()
    return [row_of(*cell, threads, found[cell]) for cell in cells], versions


def some_of(known):
    """A parser for names out of `known`, joined by commas."""

    def parse(text):
        names = list(dict.fromkeys(text.split(","))) if text else []
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


def build(text):
    """The name and the directory of a build; the name defaults to that of the directory."""
    name, equals, directory = text.rpartition("=")
    path = Path(directory)
    name = name if equals else path.resolve().name
    if not (path / "batchnorm").is_dir():
        raise argparse.ArgumentTypeError(f"must be NAME=DIRECTORY with a package batchnorm in it, got {text!r}")
    if not name or name in (OURS, INSTALLED, *LIMITS):
        raise argparse.ArgumentTypeError(f"must have a name of its own, got {text!r}")
    return name, str(path.resolve())


def parse():
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--set", choices=SETS, default="core", help="the shapes (default %(default)s)")
    parser.add_argument("--threads", type=teams, default=[2], help="one or more, such as 1,2 (default 2)")
    parser.add_argument("--dtype", type=some_of(MOST_ERROR), default=["float32"], help="(default float32)")
    parser.add_argument("--rounds", type=positive, default=8, help="turns of each at most (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds, to see that it works")
    parser.add_argument("--relu", action="store_true", help="followed by ReLU, against numpy, torch and onnxruntime")
    parser.add_argument("--only", help="shapes whose name holds this text")
    parser.add_argument(
        "--against", type=some_of(RIVALS), help=f"{', '.join(RIVALS)} (default: all, and none with --build)"
    )
    parser.add_argument(
        "--build",
        type=build,
        action="append",
        default=[],
        metavar="NAME=DIRECTORY",
        help="compare builds with the first that is named: the others that are named, or the batchnorm installed here",
    )
    parser.add_argument("--output", type=Path, help="write to this Markdown file, the figures and a plot beside it")
    arguments = parser.parse_args()
    cases = SETS["quick" if arguments.quick else arguments.set]
    arguments.cases = [case for case in cases if not arguments.only or arguments.only in case.label]
    if not arguments.cases:
        labels = ", ".join(case.label for case in cases)
        parser.error(f"argument --only: no shape's name holds {arguments.only!r}; there are: {labels}")
    if len(dict(arguments.build)) < len(arguments.build):
        parser.error("argument --build: two builds have the same name")
    if len({path for _, path in arguments.build}) < len(arguments.build):
        parser.error("argument --build: two builds have the same directory; a copy of it can be the other")
    able = [name for name in RIVALS if name in WITH_RELU or not arguments.relu]
    if arguments.against is None:
        arguments.against = [] if arguments.build else able
    if arguments.relu and (arguments.build or set(arguments.against) - set(able)):
        parser.error(f"argument --relu: not with --build, and against {', '.join(able)} alone")
    if arguments.output and not arguments.output.absolute().parent.is_dir():
        parser.error(f"argument --output: must be in a directory that exists, got {str(arguments.output)!r}")
    return arguments


def facts_of(machine):
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['processor']}, {machine['kernels']['level']} kernels, load {machine['load']:.1f}, {versions}"


def main():
    arguments = parse()
    for name in arguments.against:
        if missing(name):
            others = ",".join(other for other in arguments.against if other != name)
            raise SystemExit(f"{name} needs {', '.join(missing(name))}; install it or leave it out: --against {others}")
    builds = dict(arguments.build)
    if len(builds) == 1:
        builds[INSTALLED] = None
    members = {BUILDS: (BUILDS, builds, arguments.dtype)} if builds else {}
    if not builds or arguments.against:
        members |= {name: (name,) for name in (OURS, *arguments.against)}
    cells = [
        (case, dtype, which, arguments.relu)
        for dtype, case, which in itertools.product(arguments.dtype, arguments.cases, PASSES)
        if dtype in case.dtypes
    ]
    if not cells:
        raise SystemExit(f"none of the shapes is for {' or '.join(arguments.dtype) or 'no dtype'}")
    machine = measure.machine_facts()
    if warning := measure.busy(machine["load"]):
        print(f"python -m bench: {warning}", file=sys.stderr)
    rows, versions = [], {}
    for threads in arguments.threads:
        found, versions = measured(
            cells, members, list(builds), threads, LEAST_ROUNDS if arguments.quick else arguments.rounds
        )
        rows += found
    packages = [package for name in arguments.against for package in PACKAGES.get(name, ())]
    machine["versions"] |= {package: metadata.version(package) for package in packages}
    facts, command = facts_of(machine), shlex.join(["python", "-m", "bench", *sys.argv[1:]])
    shown = [
        name for name in dict.fromkeys(name for row in rows for name in row.best) if name not in {"limit", *builds}
    ]
    title = arguments.output.stem if arguments.output else "bench"
    text = f"# {title}\n\n{facts}\n\n```sh\n{command}\n```\n\n"
    if builds:
        text += comparison.markdown(rows, list(builds), versions)
    if shown:
        text += report.markdown(rows, shown)
    print(text)
    if arguments.output:
        arguments.output.write_text(text)
        kept = ",\n".join(map(json.dumps, rows))  # a row on a line
        about = json.dumps({"machine": machine, "builds": versions})
        arguments.output.with_suffix(".json").write_text(f'{about[:-1]}, "rows": [\n{kept}\n]}}\n')
        if shown:
            report.draw(arguments.output.with_suffix(".png"), rows, shown, facts)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
