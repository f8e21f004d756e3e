"""What was built, what was chosen, and why: the first thing to ask for in a problem report."""

import sys
from typing import Any, Literal, overload

import numpy as np

from . import _kernels, _threads
from ._kernels import runtime
from ._version import __version__

_UNSAFE_FORKS = "a child forked by a thread other than the main one must end with os._exit (OpenMP runtime before 5.0)"


@overload
def show_config(mode: Literal["stdout"] = ...) -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...
def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Show the kernel level, the threads and what decided them, OpenMP and versions.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Print, or return a dictionary, as `numpy.show_config` does.

    Raises
    ------
    ValueError
        If `mode` is another string.

    Examples
    --------
    >>> import batchnorm as bn
    >>> bn.show_config(mode="dicts")["kernels"]["level"] in ("v4", "v3", "v2", "baseline")
    True
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode must be 'stdout' or 'dicts', got {mode!r}")
    threads, reason = _threads.decide()
    openmp = runtime.openmp()
    config: dict[str, Any] = {
        "versions": {"batchnorm": __version__, "numpy": np.__version__, "python": sys.version.split()[0]},
        "kernels": {
            "level": _kernels.level,
            "usable": list(_kernels.available()),
            "built": list(runtime.built()),
        },
        "threads": {
            "default": threads,
            "decided by": reason,
            **{name: "–" if count is None else count for name, count in _threads.considered().items()},
            "OpenMP": f"specification of {openmp // 100}-{openmp % 100:02}" if openmp else "serial build",
            "OpenMP runtime": runtime.openmp_runtime() or "–",
            "OpenMP limit": runtime.max_threads(),
            "forks": "safe" if runtime.safe_forks() else _UNSAFE_FORKS,
            "serial below": f"{_threads.SERIAL_VALUES} values, {_threads.ASLEEP} times as many after a pause",
        },
    }
    if mode == "dicts":
        return config
    for title, entries in config.items():
        print(f"{title}:")
        for name, value in entries.items():
            print(f"  {name}: {', '.join(value) if isinstance(value, list) else value}")
    return None
