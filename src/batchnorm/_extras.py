"""Optional packages, imported by name only where they are used."""

import importlib
import re
import sys
from collections.abc import Iterable, Sized
from typing import Any, TypeVar

Item = TypeVar("Item")


def require(module: str, command: str) -> Any:
    """Import a module, or end the command with a message that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        install = f"python -m pip install {requirements(package, command)}"
        raise SystemExit(f"python -m batchnorm {command}: {package} is missing, install it with {install}") from None


def requirements(package: str, extra: str) -> str:
    """What pip should install: the requirements of the extra that lists the package, or else its name."""
    from importlib import metadata  # here, because it takes a third as long as importing this package

    try:
        declared = metadata.requires("batchnorm") or []
    except metadata.PackageNotFoundError:
        declared = []
    wanted = [line.partition(";")[0].strip() for line in declared if re.search(rf"extra == .{extra}\W", line)]
    if not any(re.match(rf"{package}\b", requirement) for requirement in wanted):
        return package
    return " ".join(f"'{requirement}'" for requirement in wanted)


def with_progress(items: Iterable[Item], description: str) -> Iterable[Item]:
    """The items, with a bar on standard error if it is a terminal, they have a length, and rich is installed."""
    if not isinstance(items, Sized) or not sys.stderr.isatty():
        return items
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return items
    return track(items, description, console=Console(stderr=True), transient=True)
