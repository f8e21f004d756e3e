"""Batch normalization for JAX on the CPU: `forward` and `inference`, for `jit`, `vmap` and two derivatives.

Decisions:

- Arguments and results are XLA's own memory, which `buffer_callback` shows as arrays. This is JAX's foreign function
  interface, with a handler from jaxlib. `pure_callback` would copy them, and may wait forever for the first copy
  (jax-ml/jax#24255). A compiled handler would save some 20 of 30 µs per call, but need jaxlib's headers in every build.
- A callback must not raise, so everything is checked while JAX traces. Only a negative variance is unknown then: its
  channel becomes NaN. A callback must not use JAX either, so it works on NumPy arrays alone.
- JAX does not say how many threads it uses, so this package's setting applies, as it is when the program runs.
"""

from .._extras import requirements

try:
    import jax.experimental.buffer_callback  # noqa: F401
except ImportError as _error:
    _install = f"python -m pip install {requirements('jax', 'jax')}"
    raise ImportError(f"batchnorm.jax needs JAX 0.6.1 or newer: {_install}") from _error

from . import rules as _rules  # noqa: F401 (without which nothing has a derivative)
from .functions import Statistics, forward, inference

__all__ = ["Statistics", "forward", "inference"]
