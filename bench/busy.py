"""`python -m bench.busy`: calls on a busy machine, compared to the same calls on a quiet one.

An endless loop runs on every processor. The contestants take turns, each in its own process, on one thread and on all
processors. On a busy machine the median and the slowest tenth say more than the best time: a team waits for its last
thread, and a thread that spins takes the processor from it.
"""

import argparse
import os
import statistics
import subprocess
import sys

from batchnorm.profile.measure import OURS, busy

from .contestants import missing
from .team import Team

SHAPE, AXIS = (32, 256, 14, 14), 1
ROUNDS = 8
LABELS = {OURS: f"{OURS}, out=", "torch": "torch"}


def times(teams, rounds):
    """The seconds of every call, by contestant and number of threads."""
    found = {}
    for _ in range(rounds):
        for threads, team in teams.items():
            for name, taken in team.ask("times", "forward", SHAPE, AXIS, "float32").items():
                found.setdefault((name, threads), []).extend(taken)
    return {(name, threads): taken for (name, threads), taken in found.items() if name in LABELS.values()}


def report(quiet, crowded):
    lines = [
        f"forward of {SHAPE}, float32, {len(os.sched_getaffinity(0))} processors",
        "",
        "| | threads | quiet, ms: median | slowest tenth | busy: median | slowest tenth |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, threads in quiet:
        cells = [
            f"{1e3 * figure:.2f}"
            for taken in (quiet[name, threads], crowded[name, threads])
            for figure in (statistics.median(taken), statistics.quantiles(taken, n=10)[-1])
        ]
        lines.append(f"| {name} | {threads} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.busy", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"turns of each contestant, {ROUNDS} by default")
    chosen = parser.parse_args()
    if chosen.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {chosen.rounds}")
    if not hasattr(os, "sched_getaffinity"):
        parser.error("this system does not say which processors a process may use")
    if warning := busy(os.getloadavg()[0]):
        print(f"python -m bench.busy: {warning}", file=sys.stderr)
    processors = len(os.sched_getaffinity(0))
    names = [name for name in LABELS if not missing(name)]
    teams = {threads: Team({name: (name,) for name in names}, threads) for threads in sorted({1, processors})}
    loops = []
    try:
        quiet = times(teams, chosen.rounds)
        loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processors)]
        crowded = times(teams, chosen.rounds)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    for team in teams.values():
        team.close()
    print(report(quiet, crowded))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
