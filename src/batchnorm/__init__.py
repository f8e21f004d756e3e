"""Batch normalization for NumPy: forward, backward and running statistics in compiled, threaded kernels.

`axis=1` is the channel axis, `momentum` the weight of the new batch, the running variance is unbiased, and `eps` is
added under the root: PyTorch's conventions. Statistics have dtype float64, and the same input gives the same bits for
any number of threads and any processor.
"""

import importlib
from typing import TYPE_CHECKING

from ._activation import Activation
from ._config import show_config
from ._threads import get_num_threads, num_threads, set_num_threads
from ._version import __version__
from .fixed import inference, inference_backward
from .functional import backward, forward, grad_sums, update_running
from .layer import BatchNorm
from .moments import GradientSums, Moments, population
from .plan import Plan
from .saved import Gradients, InferenceGradients, Saved

if TYPE_CHECKING:
    from . import cs231n, mpi
    from .calculus import SecondGradients, Tangents, double_backward, jvp, second_sums, tangent_sums
    from .conventions import Convention, convention, from_state, to_state
    from .drift import Drift
    from .folding import Folded, fold, fold_next
    from .gradient.diagnosis import Diagnosis, diagnose
    from .gradient.pathways import Pathways, centering_matrix, jacobian, moment_gradients, pathways
    from .reference import MomentGradients

__all__ = [
    "Activation",
    "BatchNorm",
    "Convention",
    "Diagnosis",
    "Drift",
    "Folded",
    "GradientSums",
    "Gradients",
    "InferenceGradients",
    "MomentGradients",
    "Moments",
    "Pathways",
    "Plan",
    "Saved",
    "SecondGradients",
    "Tangents",
    "__version__",
    "backward",
    "centering_matrix",
    "convention",
    "cs231n",
    "diagnose",
    "double_backward",
    "fold",
    "fold_next",
    "forward",
    "from_state",
    "get_num_threads",
    "grad_sums",
    "inference",
    "inference_backward",
    "jacobian",
    "jvp",
    "moment_gradients",
    "mpi",
    "num_threads",
    "pathways",
    "population",
    "second_sums",
    "set_num_threads",
    "show_config",
    "tangent_sums",
    "to_state",
    "update_running",
]


# Imported on first use: `gradient` alone would double the time of the import.
_MODULE_OF = {
    "Convention": ".conventions",
    "Diagnosis": ".gradient.diagnosis",
    "Drift": ".drift",
    "Folded": ".folding",
    "MomentGradients": ".reference",
    "Pathways": ".gradient.pathways",
    "SecondGradients": ".calculus",
    "Tangents": ".calculus",
    "centering_matrix": ".gradient.pathways",
    "convention": ".conventions",
    "diagnose": ".gradient.diagnosis",
    "double_backward": ".calculus",
    "fold": ".folding",
    "fold_next": ".folding",
    "from_state": ".conventions",
    "jacobian": ".gradient.pathways",
    "jvp": ".calculus",
    "moment_gradients": ".gradient.pathways",
    "pathways": ".gradient.pathways",
    "second_sums": ".calculus",
    "tangent_sums": ".calculus",
    "to_state": ".conventions",
}

if not TYPE_CHECKING:

    def __getattr__(name):
        if name in ("cs231n", "mpi"):
            return importlib.import_module(f".{name}", __name__)
        if name in _MODULE_OF:
            value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name], __name__), name)
            return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})
