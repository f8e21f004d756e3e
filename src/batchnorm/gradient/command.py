"""`python -m batchnorm diagnose`: what is wrong with a gradient in a file.

Decisions:

- Files are npy, or members of npz as FILE.npz:NAME, and are read without pickle: nothing in them is executed.
- The exit status is 0 for a right gradient, 1 for one that is wrong or undecided, 2 for invalid input.
"""

import argparse
import sys
import zipfile
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .. import functional
from .diagnosis import diagnose

ARRAYS = {
    "dx": "the gradient to check, of the shape of x",
    "--x": "the input of the layer",
    "--dy": "the upstream gradient, of the shape of x",
    "--gamma": "the scale, one number per channel (default: 1)",
    "--beta": "the shift; dx does not depend on it, and it is checked like gamma",
    "--dgamma": "a gradient of gamma to check",
    "--dbeta": "a gradient of beta to check",
}

NEEDED = ("dx", "--x", "--dy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    for name, meaning in ARRAYS.items():
        parser.add_argument(name, metavar="FILE", help=f"{meaning}; .npy, or .npz:NAME").required = name in NEEDED
    parser.add_argument("--axis", type=int, default=1, help="channel axis (default: %(default)s)")
    parser.add_argument("--eps", type=float, default=1e-5, help="added to the variance (default: %(default)s)")
    parser.add_argument("--plot", metavar="PICTURE", help="draw the worst channel: a .png, .pdf or .svg")


def run(arguments: argparse.Namespace, _error: Callable[[str], NoReturn]) -> int:
    """Diagnose, and print the answer."""
    try:
        arrays = {name.lstrip("-"): read(name, getattr(arguments, name.lstrip("-"))) for name in ARRAYS}
        saved = functional.forward(
            arrays["x"], arrays["gamma"], arrays["beta"], axis=arguments.axis, eps=arguments.eps
        )[1]
        diagnosis = diagnose(arrays["dx"], arrays["dy"], saved, arrays["dgamma"], arrays["dbeta"])
        if arguments.plot is not None:
            diagnosis.plot(arguments.plot)
    except (TypeError, ValueError, ImportError) as problem:
        return _refused(str(problem))
    except OSError as problem:
        return _refused(f"{problem.filename or arguments.plot}: {problem.strerror}")
    print(diagnosis)
    return 0 if diagnosis.correct else 1


def read(name: str, where: str | None) -> Any:
    """The array in a file; None without a file."""
    if where is None:
        return None
    path, colon, member = where.rpartition(":") if ".npz:" in where else (where, "", "")
    try:
        found: Any = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray) and not colon:
            return found
        if isinstance(found, np.ndarray):
            raise ValueError(f"{path} is no npz file")
        with found:
            if member in found.files:
                array: NDArray[Any] = found[member]
                return array
            raise ValueError(f"ask for one of {path}:{{{','.join(found.files)}}}")
    except (ValueError, EOFError, zipfile.BadZipFile) as problem:
        raise ValueError(f"{name} must be an npy file, or FILE.npz:NAME, without pickled objects: {problem}") from None


def _refused(problem: str) -> int:
    """Print one line, and return the status for invalid input."""
    print(f"python -m batchnorm diagnose: {' '.join(problem.split())}", file=sys.stderr)
    return 2
