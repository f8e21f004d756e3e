"""`python -m bench.busy`: calls on a busy machine, compared to the same calls on a quiet one.

An endless loop runs on every processor. The contestants take turns, each in its own process, on one thread and on all
processors. On a busy machine the median and the slowest tenth say more than the best time: a team waits for its last
thread, and a thread that spins takes the processor from it. With a pause between calls, idle threads sleep and have to
be woken.
"""

import argparse
import os
import subprocess
import sys

import numpy as np

from batchnorm.profile.measure import OURS, busy

from .contestants import missing
from .team import Team

CASES = [((32, 256, 14, 14), 0.0), ((1, 576, 14, 14), 0.0), ((1, 576, 14, 14), 1e-3)]
"""Shapes, and the seconds between calls."""
ROUNDS = 8
LABELS = {OURS: f"{OURS}, out=", "torch": "torch"}


def times(teams, rounds):
    """The seconds of every call, by case, contestant and number of threads."""
    found = {}
    for case in CASES:
        shape, pause = case
        for _ in range(rounds):
            for threads, team in teams.items():
                for name, taken in team.ask("times_with_pauses", pause, "forward", shape, 1, "float32").items():
                    if name in LABELS.values():
                        found.setdefault((case, name, threads), []).extend(taken)
    return found


def report(quiet, crowded):
    lines = [
        f"forward, float32, {len(os.sched_getaffinity(0))} processors; µs",
        "",
        "| x | ms between calls | | threads | quiet: median | slowest tenth | busy: median | slowest tenth |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for (shape, pause), name, threads in quiet:
        cells = [
            f"{1e6 * figure:.0f}"
            for taken in (found[(shape, pause), name, threads] for found in (quiet, crowded))
            for figure in np.quantile(taken, (0.5, 0.9))
        ]
        lines.append(f"| {shape} | {1e3 * pause:.0f} | {name} | {threads} | {' | '.join(cells)} |")
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
