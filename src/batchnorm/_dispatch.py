"""Which compiled level of the kernels is used.

The best level that this processor runs and this build has, or the one named by `BATCHNORM_ISA`. A level that is
named and cannot be had is an error: falling back would hide a broken build and spoil a measurement.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable

if importlib.util.find_spec(f"{__package__}._cpu") is None:
    raise ImportError(
        f"{os.path.dirname(__file__)} has no kernels compiled for this Python; "
        "in a source checkout install batchnorm first, with python -m pip install ."
    )

from . import _cpu

Kernel = Callable[..., None]

# Rows of the tables shared with the kernels, one column a channel.
MEAN, MEAN_LOW, VAR, RSTD, GAMMA, BETA, SUM_XMU2, SUM_XMU2_LOW, RSTD_LOW, STATISTICS_ROWS = range(10)
SUM_DY, SUM_DY_LOW, SUM_DY_XMU, SUM_DY_XMU_LOW, DGAMMA, DMEAN, DVAR, UPSTREAM_DMEAN, UPSTREAM_DVAR, GRADIENT_ROWS = (
    range(10)
)

# What dx is made of besides the direct path, as bits.
THROUGH_MEAN, THROUGH_VARIANCE, THROUGH_BOTH, UPSTREAM = 1, 2, 3, 4


class Kernels:
    """One compiled level."""

    def __init__(self, level: str) -> None:
        if level not in _cpu.built():
            raise ImportError(f"the kernel level must be one of {', '.join(_cpu.built())} (built here), got {level!r}")
        if level not in _cpu.supported():
            raise ImportError(f"this processor cannot run the kernel level {level!r}, only {', '.join(available())}")
        module = importlib.import_module(f"batchnorm._kernels_{level}")
        self.level = level
        self.max_threads: Callable[[], int] = module.max_threads
        self.processors: Callable[[], int] = module.processors
        self.openmp: Callable[[], int] = module.openmp
        self.openmp_runtime: Callable[[], str] = module.openmp_runtime
        self.forked: Callable[[], bool] = module.forked
        self.safe_forks: Callable[[], bool] = module.safe_forks
        self.fix_statistics: Callable[..., int] = module.fix_statistics
        self.moments: Kernel = module.moments
        self.forward: Kernel = module.forward
        self.normalize: Kernel = module.normalize
        self.grad_sums: Kernel = module.grad_sums
        self.grad_apply: Kernel = module.grad_apply
        self.backward: Kernel = module.backward
        self.channel_gradients: Kernel = module.channel_gradients
        # Matching a fused signature costs a call more than the arithmetic of a small layer.
        self.update_running: dict[str, Kernel] = {
            "f": module.update_running["float"],
            "d": module.update_running["double"],
        }

    def __repr__(self) -> str:
        return f"Kernels({self.level!r})"


def available() -> tuple[str, ...]:
    """Levels that can be used here, best first."""
    return tuple(level for level in _cpu.supported() if level in _cpu.built())


def chosen_level() -> str:
    """The level to load, from the environment or the processor."""
    named = os.environ.get("BATCHNORM_ISA")
    if named is None and not available():
        raise ImportError(
            f"this processor runs none of the kernel levels built here ({', '.join(_cpu.built())}); "
            "on x86-64 batchnorm needs SSE4.2"
        )
    return available()[0] if named is None else named


kernels = Kernels(chosen_level())
