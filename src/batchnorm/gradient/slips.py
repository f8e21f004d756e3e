"""The mistakes that people make with dx: a slip is a formula.

The catalogue has each slip once: its name, the remedy, and the wrong dx made of right parts, in the ways in which
people write it. If some data cannot tell slips apart, the first is the most likely.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ..reference import Array
from .right import Right


class Slip(NamedTuple):
    """One mistake: its name, what to do about it, and the wrong dx in each of the ways it is written."""

    name: str
    remedy: str
    forms: Callable[[Right], Iterable[Array]]


def _channel_axis(right: Right) -> int:
    (axis,) = set(range(right.dy.ndim)) - set(right.cache.axes)
    return axis


def _without_batch(right: Right) -> Iterator[Array]:
    if len(right.cache.axes) > 1:  # else nothing is left to sum over, which is the diagonal
        yield from right.with_sum(lambda values: values.sum(axis=right.cache.axes[1:], keepdims=True))


GAMMA_FORGOTTEN = "gamma forgotten"

SLIPS = (
    Slip(
        "mean pathway missing",
        "x reaches y through μ too: add dmean/n with dmean = −rstd·Σdxhat",
        lambda right: [right.paths(1, 0, 1)],
    ),
    Slip(
        "variance pathway missing",
        "x reaches y through σ² too: add dvar·2(x − μ)/n with dvar = Σdxhat·(x − μ)·(−½)·rstd³",
        lambda right: [right.paths(1, 1, 0)],
    ),
    Slip(
        "mean and variance pathways missing",
        "μ and σ² are functions of the batch, not constants: add dmean/n + dvar·2(x − μ)/n",
        lambda right: [right.paths(1, 0, 0)],
    ),
    Slip(
        "direct pathway missing", "add dxhat·rstd to the paths through μ and σ²", lambda right: [right.paths(0, 1, 1)]
    ),
    Slip(
        GAMMA_FORGOTTEN,
        "y is gamma·xhat + beta, so dxhat = dy·gamma",
        lambda right: [right.with_gamma(np.ones_like(right.cache.gamma))],
    ),
    Slip(
        "gamma applied twice",
        "dxhat = dy·gamma has gamma already",
        lambda right: [right.with_gamma(right.cache.gamma**2)],
    ),
    Slip(
        "gamma forgotten in a pathway",
        "every pathway begins with dxhat = dy·gamma",
        Right.with_gamma_in_some,
    ),
    Slip(
        "1/n forgotten",
        "μ and σ² are means of n values, so ∂μ/∂x = 1/n and ∂σ²/∂x = 2(x − μ)/n",
        lambda right: [right.paths(1, right.n, right.n), right.paths(right.n, right.n, right.n)],
    ),
    Slip("1/n forgotten in the mean pathway", "μ = Σx/n, so ∂μ/∂x = 1/n", lambda right: [right.paths(1, right.n, 1)]),
    Slip(
        "1/n forgotten in the variance pathway",
        "σ² = Σ(x − μ)²/n, so ∂σ²/∂x = 2(x − μ)/n",
        lambda right: [right.paths(1, 1, right.n)],
    ),
    Slip(
        "n - 1 in place of n",
        "μ and σ² are divided by n, so both pathways are too",
        lambda right: right.with_count(right.n - 1),
    ),
    Slip(
        "batch size in place of n",
        "n counts the values of a channel: the batch size times the positions",
        lambda right: right.with_count(right.dy.shape[right.cache.axes[0]]) if len(right.cache.axes) > 1 else (),
    ),
    Slip(
        "n - 1 in the variance",
        "the batch is normalized with the biased variance Σ(x − μ)²/n",
        Right.with_unbiased_variance,
    ),
    Slip(
        "eps outside the root",
        "rstd = 1/√(σ² + eps), not 1/(√σ² + eps)",
        lambda right: right.with_rstd(right.eps_outside()),
    ),
    Slip("eps forgotten", "rstd = 1/√(σ² + eps), not 1/√σ²", lambda right: right.with_rstd(1 / np.sqrt(right.var))),
    Slip(
        "variance taken for the standard deviation",
        "divide by √(σ² + eps), not by σ² + eps",
        lambda right: right.with_rstds(1 / (right.var + right.eps), 1 / right.var),
    ),
    Slip(
        "variance taken for the inverse standard deviation",
        "multiply by 1/√(σ² + eps), not by σ² + eps",
        lambda right: right.with_rstds(right.var + right.eps, right.var),
    ),
    Slip(
        "standard deviation taken for its inverse",
        "multiply by 1/√(σ² + eps), not by √(σ² + eps)",
        lambda right: right.with_rstds(np.sqrt(right.var + right.eps), np.sqrt(right.var)),
    ),
    Slip(
        "sum over the channels too",
        "sum over all axes but the channel axis; np.sum without axis= adds up everything",
        lambda right: right.with_sum(np.sum),
    ),
    Slip(
        "only the diagonal of the Jacobian",
        "every y of the channel depends on x_i through μ and σ², so both pathways are sums over the channel",
        lambda right: right.with_sum(np.asarray),
    ),
    Slip(
        "sum without the batch axis",
        "sum over all axes but the channel axis, the batch axis among them",
        _without_batch,
    ),
    Slip(
        "sum over the channel axis",
        "sum over all axes but the channel axis",
        lambda right: right.with_sum(lambda values: values.sum(axis=_channel_axis(right), keepdims=True)),
    ),
    Slip(
        "x in place of x - μ",
        "dvar = Σdxhat·(x − μ)·(−½)·rstd³ and ∂σ²/∂x = 2(x − μ)/n",
        Right.with_x,
    ),
    Slip(
        "rstd not cubed",
        "dvar = Σdxhat·(x − μ)·(−½)·rstd³, from the derivative of (σ² + eps)^(−½)",
        lambda right: (
            right.terms.direct + right.terms.mean + right.terms.variance * right.cache.rstd**power for power in (-2, -1)
        ),
    ),
    Slip(
        "factor 2 in the variance pathway",
        "dvar has the factor −½, ∂σ²/∂x the factor 2",
        lambda right: [right.paths(1, 1, 2), right.paths(1, 1, 0.5)],
    ),
    Slip(
        "pathway counted twice",
        "dx is the sum of the three pathways, each once",
        lambda right: [right.paths(2, 1, 1), right.paths(1, 2, 1)],
    ),
    Slip("wrong sign", "turn the sign of dx", lambda right: [right.paths(-1, -1, -1)]),
    Slip("wrong sign of the mean pathway", "dmean = −rstd·Σdxhat", lambda right: [right.paths(1, -1, 1)]),
    Slip(
        "wrong sign of the variance pathway", "dvar = Σdxhat·(x − μ)·(−½)·rstd³", lambda right: [right.paths(1, 1, -1)]
    ),
    Slip(
        "wrong sign of both pathways", "dmean and dvar both begin with a minus", lambda right: [right.paths(1, -1, -1)]
    ),
    Slip(
        "second term of dmean not summed",
        "it is dvar·(−2/n)·Σ(x − μ), one number per channel, and 0",
        lambda right: [right.paths(1, 1, 1 - 1 / right.n)],
    ),
    Slip(
        "number of channels in place of n",
        "n counts the values of a channel, not the channels",
        lambda right: right.with_count(right.cache.gamma.size),
    ),
    Slip(
        "number of all values in place of n",
        "n counts the values of one channel",
        lambda right: right.with_count(right.dy.size),
    ),
)
