"""What the results ought to be, in long double, written without a look at the package; and how far off they may be.

Deviations are taken from the first value before anything is added up, so that the oracle keeps its digits at any
offset.
"""

from typing import NamedTuple

import numpy as np

# Largest error allowed, in ulps of the dtype of x: of y at the largest of |gamma·xhat|, |gamma| and |beta|, value by
# value; of dx at the largest term of its channel; of dgamma and dbeta at the sum of absolute terms; of the variance at
# itself; of the mean at a standard deviation (float32), or at itself where that is larger (float64).
ULPS = {
    "y": {"float32": 4, "float64": 8},
    "dx": {"float32": 4, "float64": 16},
    "parameters": {"float32": 1, "float64": 16},
    "statistics": {"float32": 3, "float64": 16},
    "parts": {"float32": 3, "float64": 16},  # of a batch with merged statistics, against the whole
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
    """Everything about one batch; terms are what errors are measured at: per value for y, else per channel."""
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
        back(np.maximum(abs(gamma * xhat), np.maximum(abs(gamma), abs(beta))), x.shape, axis),
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
    """Largest error of `got`, in ulps of its terms: one for each value, or one for each channel."""
    dtype = got.dtype
    unit = np.spacing(np.maximum(terms, np.finfo(dtype).tiny).astype(dtype)).astype(np.longdouble)
    error = abs(got.astype(np.longdouble) - exact)
    if unit.ndim < got.ndim:
        unit = np.expand_dims(unit, [i for i in range(got.ndim) if i != axis % got.ndim])
    return float((error / unit).max(initial=0))


def largest(values, axis):
    """The largest absolute value of each channel."""
    return abs(rows(values, axis)).max(axis=1)


def statistics_error(mean, var, t, dtype):
    """Largest error of mean and variance, in ulps of the dtype."""
    eps, std = np.finfo(dtype).eps, np.sqrt(t.var)
    mean_unit = eps * std + np.finfo(np.float64).eps * np.maximum(abs(t.mean), std)
    errors = abs(mean - t.mean) / mean_unit, abs(var - t.var) / (eps * t.var + np.finfo(np.float64).tiny)
    return float(max(error.max(initial=0, where=np.isfinite(t.var)) for error in errors))


def largest_errors(x, dy, gamma, beta, axis, eps, y, saved, gradients):
    """Errors in ulps by what they are errors of; to be held against ULPS."""
    t = truth(x, dy, gamma, beta, axis, eps)
    found = {
        "y": ulps(y, t.y, t.y_terms, axis),
        "statistics": statistics_error(saved.mean, saved.var, t, y.dtype),
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
    allowed = {what: times * ULPS[what][str(dtype)] for what in errors}
    assert all(errors[what] <= allowed[what] for what in errors), f"errors {errors} over {allowed} ulps"
