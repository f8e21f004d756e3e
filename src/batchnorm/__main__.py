"""`python -m batchnorm <command>`: a command is a module of this package, imported only when it is asked for.

A command module has `add_arguments(parser)` and `run(arguments, error)`, where `error(message)` refuses an argument
as argparse does and `run` returns the exit status. A new command is one more entry of `COMMANDS`.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "explain": ("gradient.worked_example", "follow a gradient through four values, by its three pathways"),
    "profile": ("profile", "time forward, backward and inference on the layer shapes of real networks"),
}


def main(argv: Sequence[str]) -> int:
    """Run one command and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m batchnorm", description="Batch normalization for NumPy.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    name = parser.parse_args(argv[:1]).command
    command = importlib.import_module(f"batchnorm.{COMMANDS[name][0]}")
    command.add_arguments(commands.choices[name])
    arguments = parser.parse_args(argv)
    try:
        status: int = command.run(arguments, commands.choices[name].error)
    except KeyboardInterrupt:
        print(f"python -m batchnorm {name}: interrupted", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
