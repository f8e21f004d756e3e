"""`python -m batchnorm <command>`: each command is a module of this package, imported only when it is used.

- A command module has `add_arguments(parser)` and `run(arguments, error)`, where `error(message)` refuses an argument
  like argparse and `run` returns the exit status. A new command is one more entry in `COMMANDS`.
- Ctrl-C, a full disk and a closed pipe end a command with at most one line and the status 130 or 1. A character that
  standard output cannot encode is printed as "?".
"""

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence

from ._version import __version__

COMMANDS = {
    "explain": ("gradient.worked_example", "follow a gradient through four values, by its three pathways"),
    "diagnose": ("gradient.command", "say what is wrong with a hand-derived gradient"),
    "convert": ("convert", "convert the batch norm layers of a file to another system's names and eps"),
    "profile": ("profile.command", "time forward, backward and inference on the layer shapes of real networks"),
}
PROGRAM = "python -m batchnorm"


def run(argv: Sequence[str]) -> int:
    """Run one command and return the exit status."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Batch normalization for NumPy.")
    parser.add_argument("--version", action="version", version=f"batchnorm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    name = parser.parse_args(argv[:1]).command
    command = importlib.import_module(f"batchnorm.{COMMANDS[name][0]}")
    command.add_arguments(commands.choices[name])
    status: int = command.run(parser.parse_args(argv), commands.choices[name].error)
    return status


def main(argv: Sequence[str]) -> int:
    """Run one command, and handle the errors that can happen to any of them."""
    named = " ".join([PROGRAM, *(name for name in argv[:1] if name in COMMANDS)])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            return run(argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{named}: interrupted", file=sys.stderr)
        return 130
    except OSError as problem:
        if problem.filename is not None:  # the error is of a file, not of standard output
            raise
        # Python flushes once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(problem, BrokenPipeError):
            print(f"{named}: cannot write to standard output: {problem.strerror}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
