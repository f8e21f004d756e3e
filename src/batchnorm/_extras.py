"""Optional packages, asked for by name where they are used and nowhere else."""

import importlib
import sys
from collections.abc import Iterable, Sized
from typing import Any, TypeVar

Item = TypeVar("Item")


def require(module: str, command: str, requirement: str) -> Any:
    """Import a module, or end the command with a sentence that says what installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package, install = module.partition(".")[0], f"python -m pip install '{requirement}'"
        raise SystemExit(f"python -m batchnorm {command}: {package} is missing, install it with {install}") from None


def with_progress(items: Iterable[Item], description: str) -> Iterable[Item]:
    """The items, with a bar on standard error if that is a terminal, they have a length, and rich is there."""
    if not isinstance(items, Sized) or not sys.stderr.isatty():
        return items
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return items
    return track(items, description, console=Console(stderr=True), transient=True)
