"""The compiled kernels: which level of instructions is used, with one module for each data type.

    this module ── runtime         processor, OpenMP, forks, rows of the tables; compiled once
                └─ per_channel     numbers per channel, into the tables and out of them; compiled once
                └─ lookup          8-bit integers, by a table; compiled once
                └─ float32_LEVEL   kernels.pxi → partition, formula, selection → reduce, finish, apply → stored.h
                └─ float64_LEVEL   the same sources for float64
                └─ float16_LEVEL   for float16 in memory, computed in float32; loaded when it is first used
                └─ bfloat16_LEVEL  for bfloat16, likewise

The level is the best one that this build has and this processor runs, or the one named by `BATCHNORM_ISA`. If a named
level is not available, that is an error: falling back would hide a broken build and spoil a measurement.

Idle threads of libgomp spin before they sleep, by default for milliseconds. If other programs need the processors too,
spinning threads can block the very thread that they wait for. Here they spin for a fraction of a millisecond, which
costs nothing on a quiet machine (bench/experiments.md). libgomp reads this setting from the environment once, when it
is loaded.
"""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

if importlib.util.find_spec(f"{__name__}.runtime") is None:
    raise ImportError(
        f"{os.path.dirname(os.path.dirname(__file__))} has no kernels compiled for this Python; "
        "in a source checkout install batchnorm first, with python -m pip install ."
    )

Limits = tuple[float, float, float]
Bits = NDArray[np.uint8]
Three = tuple[int, int, int]
Chosen = tuple[NDArray[np.bool_] | None, NDArray[np.intp] | None, int, NDArray[np.floating[Any]] | None, float]
"""What the kernels take besides arrays of floats, as `kernels.pyi` explains it."""

SPINS = 10_000
"""How many times an idle thread of libgomp spins, unless the environment sets that."""


@contextlib.contextmanager
def _short_waits() -> Iterator[None]:
    """Set `SPINS` in the environment while libgomp is loaded, unless the user has set how threads wait."""
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    try:
        yield
    finally:
        os.environ.pop("GOMP_SPINCOUNT", None)


with _short_waits():
    from . import runtime

if TYPE_CHECKING:
    from .kernels import Float64Kernels, Kernels

level: str
"""The level in use."""

float64: "Float64Kernels"
"""Its kernels for float64, which also fill the tables for data of other types."""

NAMES = {"f": "float32", "d": "float64", "e": "float16", "E": "bfloat16"}
"""The names of the data types, by NumPy's character for them (`dtype.char`)."""


class _OfType(dict[str, "Kernels"]):
    """The kernels of the level, by the character of their type, loaded when they are first used."""

    def __missing__(self, char: str) -> "Kernels":
        kernels: Kernels = importlib.import_module(f"{__name__}.{NAMES[char]}_{level}")
        self[char] = kernels
        return kernels


of_type = _OfType()


def available() -> tuple[str, ...]:
    """The levels that can be used here, best first."""
    return tuple(name for name in runtime.supported() if name in runtime.built())


def chosen_level() -> str:
    """The level to load, from the environment or the processor."""
    named = os.environ.get("BATCHNORM_ISA")
    if named is None and not available():
        raise ImportError(
            f"this processor runs none of the kernel levels built here ({', '.join(runtime.built())}); "
            "on x86-64 batchnorm needs SSE4.2"
        )
    return available()[0] if named is None else named


def use(name: str) -> None:
    """Use the kernels of this level from now on."""
    global level, float64
    if name not in runtime.built():
        raise ImportError(f"the kernel level must be one of {', '.join(runtime.built())} (built here), got {name!r}")
    if name not in runtime.supported():
        raise ImportError(f"this processor cannot run the kernel level {name!r}, only {', '.join(available())}")
    level = name
    of_type.clear()
    for char in "fd":  # load these now, so that a broken build shows at once
        of_type[char]
    float64 = cast("Float64Kernels", of_type["d"])


use(chosen_level())
