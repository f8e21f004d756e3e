"""Every number of one channel's batch normalization, forward and backward, by name.

- They come from the library: `forward`, `moment_gradients`, `pathways` and `backward`. The rest are sums and
  products of those.
- They are shown with few decimals and a true minus sign, by the same rule as in the script of the page.
"""

import math
from collections.abc import Mapping

import numpy as np

from .. import functional
from ..reference import Array
from . import pathways

PER_SAMPLE = (
    *("x", "xmu", "sq", "xhat", "y", "dy", "dxhat", "dsq", "dxmu", "dx"),
    *("doubled", "direct", "through_mean", "through_variance"),
)
"""Names that stand for one number per sample."""


def worked_out(x: Array, dy: Array, gamma: float, beta: float, eps: float) -> dict[str, Array]:
    """Everything that the graph and the table show, by name: n values or one."""
    _, saved = functional.forward(x[:, None], [gamma], [beta], eps=eps)
    column, n = dy[:, None], x.size
    found = functional.backward(column, saved)
    dxhat, dvar, dmean = (part.reshape(-1) for part in pathways.moment_gradients(column, saved))
    direct, mean, variance = (part[:, 0] for part in pathways.pathways(column, saved))
    cache = pathways.textbook(saved)
    xmu, xhat, dx = cache.xmu[:, 0], cache.xhat[:, 0], found.dx[:, 0]
    matrix = pathways.centering_matrix(n)
    values = {
        "x": x,
        "mean": saved.mean,
        "xmu": xmu,
        "sq": xmu**2,
        "var": saved.var,
        "rstd": saved.rstd,
        "xhat": xhat,
        "gamma": saved.gamma,
        "beta": np.array([beta]),
        "y": gamma * xhat + beta,
    }
    gradients = {
        "dy": dy,
        "dbeta": found.dbeta,
        "dgamma": found.dgamma,
        "dxhat": dxhat,
        "drstd": (dxhat * xmu).sum(keepdims=True),
        "dvar": dvar,
        "dsq": np.repeat(dvar / n, n),
        "dxmu": direct + variance,
        "dmean": dmean,
        "dx": dx,
    }
    local = {
        "share": np.array([1 / n]),
        "slope": saved.rstd**3 / -2,
        "doubled": 2 * xmu,
        "diagonal": matrix[:1, 0],
        "other": matrix[:1, 1],
    }
    parts = {"direct": direct, "through_mean": mean, "through_variance": variance}
    sums = {f"sum_{name}": part.sum(keepdims=True) for name, part in {**parts, "dx": dx}.items()}
    along = {f"along_{name}": (part * xhat).sum(keepdims=True) for name, part in {**parts, "dx": dx}.items()}
    return {**values, **gradients, **local, **parts, **sums, **along}


def by_name(found: Mapping[str, Array]) -> dict[str, float]:
    """Single numbers: `mean`, and `x1` to `x4` for the values of x."""
    single = {name: float(values[0]) for name, values in found.items() if name not in PER_SAMPLE}
    return single | {f"{name}{i}": float(v) for name in PER_SAMPLE for i, v in enumerate(found[name], 1)}


def text(value: float, digits: int) -> str:
    """The number as text, with fewer decimals the larger it is, so that it fits its place.

    Half a unit is rounded away from 0, even if rounding put it just below half. The page's script does the same.
    """
    size = abs(value)
    digits = max(0, digits + 1 - len(str(int(size))))
    units = math.floor(size * 10**digits * (1 + 1e-12) + 0.5)
    return f"{'−' if value < 0 and units else ''}{units / 10**digits:.{digits}f}"
