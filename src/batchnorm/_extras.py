"""Optional packages, asked for by name where they are used and nowhere else."""

import importlib
from typing import Any


def require(module: str, command: str, requirement: str) -> Any:
    """Import a module, or end the command with a sentence that says what installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package, install = module.partition(".")[0], f"python -m pip install '{requirement}'"
        raise SystemExit(f"python -m batchnorm {command}: {package} is missing, install it with {install}") from None
