"""What the results ought to be, in long double, written without a look at the package; and how far off they may be.

Deviations are taken from the first value before anything is added up, so that the oracle keeps its digits at any
offset.
"""

from typing import NamedTuple

import numpy as np

# Largest error allowed, in ulps (of the result's dtype) of the largest term of the channel. float32 is worked on in
# float64 and rounded once; float64 has no wider type to lean on.
ULPS = {
    "y": {"float32": 2, "float64": 4},
    "dx": {"float32": 4, "float64": 8},
    "parameters": {"float32": 1, "float64": 8},
    "statistics": {"float32": 4096, "float64": 8},  # of float64, in which they are
}


class Truth(NamedTuple):
    y: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    y_terms: np.ndarray
    dx: np.ndarray
    dgamma: np.ndarray
    dbeta: np.ndarray
    dx_terms: np.ndarray
    dgamma_terms: np.ndarray
    dbeta_terms: np.ndarray
    paths: dict[str, np.ndarray]
    xmu: np.ndarray


def rows(array, axis):
    """One row of long doubles a channel."""
    return np.moveaxis(np.asarray(array), axis, 0).reshape(array.shape[axis], -1).astype(np.longdouble)


def back(array, shape, axis):
    axis %= len(shape)
    return np.moveaxis(array.reshape(shape[axis], *shape[:axis], *shape[axis + 1 :]), 0, axis)


def column(value, channels, default):
    value = np.full(channels, default) if value is None else np.asarray(value)
    return value.astype(np.longdouble)[:, None]


def truth(x, dy, gamma=None, beta=None, axis=1, eps=1e-5):
    """Everything about one batch; terms are the largest absolute summands of each channel."""
    d = rows(x, axis)
    g = rows(dy, axis)
    channels, n = d.shape
    gamma, beta = column(gamma, channels, 1), column(beta, channels, 0)
    first = d[:, :1]
    d = d - first
    shift = d.sum(axis=1, keepdims=True) / n
    d = d - shift
    var = (d * d).sum(axis=1, keepdims=True) / n
    spread = np.sqrt(var + np.longdouble(eps))
    rstd = np.divide(1, spread, out=np.zeros_like(spread), where=spread != 0)
    xhat = d * rstd
    dbeta, dgamma = g.sum(axis=1, keepdims=True), (g * xhat).sum(axis=1, keepdims=True)
    paths = {
        "direct": gamma * rstd * g,
        "mean": -gamma * rstd * dbeta / n + 0 * g,
        "variance": -gamma * rstd * xhat * dgamma / n,
    }
    largest = [abs(path).max(axis=1) for path in paths.values()]
    return Truth(
        back(gamma * xhat + beta, x.shape, axis),
        (first + shift)[:, 0],
        var[:, 0],
        np.maximum(abs(gamma * xhat).max(axis=1), abs(beta[:, 0])),
        back(sum(paths.values()), x.shape, axis),
        dgamma[:, 0],
        dbeta[:, 0],
        np.maximum.reduce(largest),
        abs(g * xhat).sum(axis=1),
        abs(g).sum(axis=1),
        {name: back(path, x.shape, axis) for name, path in paths.items()},
        back(d, x.shape, axis),
    )


def ulps(got, exact, terms, axis=None):
    """Largest error of `got`, in ulps of the largest term of each channel."""
    dtype = got.dtype
    unit = np.spacing(np.maximum(terms, np.finfo(dtype).tiny).astype(dtype)).astype(np.longdouble)
    error = abs(got.astype(np.longdouble) - exact)
    if axis is not None:
        unit = np.expand_dims(unit, [i for i in range(got.ndim) if i != axis % got.ndim])
    return float((error / unit).max(initial=0))


def largest(values, axis):
    """The largest absolute value of each channel."""
    return abs(rows(values, axis)).max(axis=1)


def largest_errors(x, dy, gamma, beta, axis, eps, y, saved, gradients):
    """Errors in ulps by what they are errors of; to be held against ULPS."""
    t = truth(x, dy, gamma, beta, axis, eps)
    found = {
        "y": ulps(y, t.y, t.y_terms, axis),
        "statistics": max(
            ulps(saved.mean, t.mean, np.maximum(abs(t.mean), np.sqrt(t.var))),
            ulps(saved.var, t.var, np.maximum(t.var, np.finfo(np.float64).tiny)),
        ),
        "dx": ulps(gradients.dx, t.dx, t.dx_terms, axis),
    }
    parameters = [
        ulps(got, exact, terms)
        for got, exact, terms in (
            (gradients.dgamma, t.dgamma, t.dgamma_terms),
            (gradients.dbeta, t.dbeta, t.dbeta_terms),
        )
        if got is not None
    ]
    return found | {"parameters": max(parameters, default=0.0)}


def assert_close(errors, dtype, times=1):
    allowed = {what: times * limits[str(dtype)] for what, limits in ULPS.items()}
    assert all(errors[what] <= allowed[what] for what in errors), f"errors {errors} over {allowed} ulps"
