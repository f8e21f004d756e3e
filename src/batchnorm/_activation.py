"""y = act(pre) after the normalization: the names of activations, and the limits that the kernels take.

Decisions:

- All activations are one function: low, or slope·pre if there is a slope, for pre <= low; high for pre >= high; else
  pre. At pre <= low and pre >= high the activation is *closed*: act′ is slope or 0. At NaN it is not closed.
- At its bounds an activation is closed: relu′(0) = 0, as in every framework.
- Without `add`, the kernels recompute from x where it is closed, with the operations that made y. With `add`, they
  store it, in one bit per value.
"""

import math
from typing import Any, Literal

import numpy as np

from . import _arrays
from ._kernels import Bits, Limits

Activation = Literal["relu"] | tuple[Literal["leaky_relu"], float] | tuple[Literal["clip"], float, float]
"""The type of the argument `activation`."""

_SPARE = 3
"""Padding after the bits, because the kernels read this many bytes at once."""


def as_limits(activation: Activation | None) -> Limits | None:
    """The activation as (low, high, slope)."""
    if activation is None:
        return None
    given: tuple[Any, ...] = (activation,) if isinstance(activation, str) else activation
    match given:
        case ("relu",):
            return 0.0, math.inf, 0.0
        case ("leaky_relu", slope):
            slope = _arrays.as_number(slope, "the slope of leaky_relu")
            if not math.isfinite(slope):
                raise ValueError(f"the slope of leaky_relu must be finite, got {slope}")
            return 0.0, math.inf, slope
        case ("clip", low, high):
            low, high = (_arrays.as_number(bound, "a bound of clip") for bound in (low, high))
            if not low < high:
                raise ValueError(f"the bounds of clip must be low < high, got {low} and {high}")
            return low, high, 0.0
    raise ValueError(
        f"activation must be None, 'relu', ('leaky_relu', slope) or ('clip', low, high), got {activation!r}"
    )


def activation_of(limits: Limits | None) -> Activation | None:
    """The inverse of `as_limits`: the activation with these limits."""
    if limits is None:
        return None
    low, high, slope = limits
    if slope:
        return "leaky_relu", slope
    return "relu" if (low, high) == (0, math.inf) else ("clip", low, high)


def empty_bits(values: int) -> Bits:
    """Room for one bit per value, all 0."""
    return np.zeros(values // 8 + _SPARE, np.uint8)
