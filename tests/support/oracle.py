"""The true results in long double, written independently of the package, and the largest errors allowed.

The first value is subtracted before anything is added up, so that the oracle keeps its digits at any offset.
"""

from typing import NamedTuple

import numpy as np

# Largest error allowed, in ulps of the dtype of x. For y: ulps at the largest of |gamma·xhat|, |gamma| and |beta|, per
# value. For dgamma and dbeta: at Σ|dy|·max(|xhat|, 1) and Σ|dy|, the sums without cancellation. For dx: at the largest
# of |dxhat|·rstd and the two other terms with these sums, in its channel. For the mean: in epsilons of a standard
# deviation; for the variance: in epsilons of itself.
ULPS = {
    "y": {"float32": 8, "float64": 12},
    "dx": {"float32": 16, "float64": 18},
    "dgamma": {"float32": 10, "float64": 12},
    "dbeta": {"float32": 4, "float64": 12},
    "mean": {"float32": 2, "float64": 4},
    "var": {"float32": 8, "float64": 10},
    "parts": {"float32": 18, "float64": 24},  # merged parts against the whole batch: y and all gradients
}

# Relative error of the statistics of ordinary float32 data.
FLOAT32_STATISTICS = 2 * float(np.finfo(np.float32).eps)


class Truth(NamedTuple):
    y: np.ndarray
    mean: np.ndarray
    first: np.ndarray  # the mean is first + shift, a sum that long double cannot hold
    shift: np.ndarray
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
    """One row of long doubles per channel."""
    return np.moveaxis(np.asarray(array), axis, 0).reshape(array.shape[axis], -1).astype(np.longdouble)


def back(array, shape, axis):
    axis %= len(shape)
    return np.moveaxis(array.reshape(shape[axis], *shape[:axis], *shape[axis + 1 :]), 0, axis)


def column(value, channels, default):
    value = np.full(channels, default) if value is None else np.asarray(value)
    return value.astype(np.longdouble)[:, None]


KEPT = 1 << 20
"""The largest x whose truth is cached, in values."""
_kept = {}


def truth(x, dy, gamma=None, beta=None, axis=1, eps=1e-5, weights=None):
    """Everything about one batch; errors are measured relative to the terms: per value for y, else per channel.

    Weights belong to the values of each channel, one after the other. The last truths are cached, for the other levels
    of the same test.
    """
    arrays = [None if array is None else np.asarray(array) for array in (x, dy, gamma, beta, weights)]
    asked = (
        axis,
        float(eps),
        *(array if array is None else (array.shape, array.dtype, array.tobytes()) for array in arrays),
    )
    found = _kept.get(asked)
    if found is None:
        found = _kept[asked] = calculated(*arrays, axis, eps)
        while sum(kept.y.size for kept in _kept.values()) > KEPT:
            del _kept[next(iter(_kept))]
    return found


def calculated(x, dy, gamma, beta, weights, axis, eps):
    d = rows(x, axis)
    g = rows(dy, axis)
    channels, n = d.shape
    gamma, beta = column(gamma, channels, 1), column(beta, channels, 0)
    if weights is None:
        share = 1 / np.longdouble([n])
    else:
        share = weights.reshape(n).astype(np.longdouble)
        share = share / share.sum()
    first = d[:, :1]
    d = d - first
    shift = (share * d).sum(axis=1, keepdims=True)
    d = d - shift
    var = (share * d * d).sum(axis=1, keepdims=True)
    spread = np.sqrt(var + np.longdouble(eps))
    rstd = np.divide(1, spread, out=np.zeros_like(spread), where=spread != 0)
    xhat, size = d * rstd, abs(g)
    scaled = gamma * xhat
    dbeta, dgamma = g.sum(axis=1, keepdims=True), (g * xhat).sum(axis=1, keepdims=True)
    paths = {
        "direct": gamma * rstd * g,
        "mean": np.broadcast_to(-gamma * rstd * dbeta * share, g.shape),
        "variance": -gamma * rstd * dgamma * share * xhat,
    }
    dbeta_terms = size.sum(axis=1, keepdims=True)
    dgamma_terms = (size * np.maximum(abs(d), np.sqrt(var))).sum(axis=1, keepdims=True) * rstd
    summands = size, dbeta_terms * share, dgamma_terms * share * abs(xhat)
    return Truth(
        back(scaled + beta, x.shape, axis),
        (first + shift)[:, 0],
        first[:, 0],
        shift[:, 0],
        var[:, 0],
        back(np.maximum(abs(scaled), np.maximum(abs(gamma), abs(beta))), x.shape, axis),
        back(paths["direct"] + paths["mean"] + paths["variance"], x.shape, axis),
        dgamma[:, 0],
        dbeta[:, 0],
        (abs(gamma) * rstd)[:, 0] * np.maximum.reduce([terms.max(axis=1) for terms in summands]),
        dgamma_terms[:, 0],
        dbeta_terms[:, 0],
        {name: back(path, x.shape, axis) for name, path in paths.items()},
        back(d, x.shape, axis),
    )


def ulps(got, exact, terms, axis=None):
    """Largest error of `got`, in ulps of its terms, which are one per value or one per channel."""
    dtype = got.dtype
    unit = np.spacing(np.maximum(terms, np.finfo(dtype).tiny).astype(dtype)).astype(np.longdouble)
    error = abs(got.astype(np.longdouble) - exact)
    if unit.ndim < got.ndim:
        unit = np.expand_dims(unit, [i for i in range(got.ndim) if i != axis % got.ndim])
    return float((error / unit).max(initial=0))


def largest(values, axis):
    """The largest absolute value of each channel."""
    return abs(rows(values, axis)).max(axis=1)


def mean_error(saved, t, dtype):
    """Largest error of the mean, in epsilons of the standard deviation."""
    unit = np.finfo(dtype).eps * np.sqrt(t.var) + np.finfo(np.float64).tiny
    got = (saved.mean.astype(np.longdouble) - t.first) + saved.mean_low
    return float((abs(got - t.shift) / unit).max(initial=0, where=np.isfinite(t.var)))


def var_error(saved, t, dtype):
    """Largest error of the variance, in epsilons of itself."""
    unit = np.finfo(dtype).eps * t.var + np.finfo(np.float64).tiny
    return float((abs(saved.var - t.var) / unit).max(initial=0, where=np.isfinite(t.var)))


def gradient_errors(gradients, exact, t, axis):
    """Errors of dx, dgamma and dbeta, if present, against the values of these names in `exact`."""
    found = {"dx": ulps(gradients.dx, exact.dx, t.dx_terms, axis)}
    for name in ("dgamma", "dbeta"):
        got = getattr(gradients, name)
        if got is not None:
            found[name] = ulps(got, getattr(exact, name), getattr(t, f"{name}_terms"))
    return found


def errors_by_name(y, saved, gradients, t, axis):
    """Errors by result, for comparison with ULPS."""
    return {
        "y": ulps(y, t.y, t.y_terms, axis),
        "mean": mean_error(saved, t, y.dtype),
        "var": var_error(saved, t, y.dtype),
    } | gradient_errors(gradients, t, t, axis)


def largest_errors(x, dy, gamma, beta, axis, eps, y, saved, gradients):
    return errors_by_name(y, saved, gradients, truth(x, dy, gamma, beta, axis, eps), axis)


def parts_error(y, gradients, whole_y, whole_gradients, t, axis):
    """Largest difference between the results of the parts and of the whole, in ulps of the same terms."""
    return max(ulps(y, whole_y, t.y_terms, axis), *gradient_errors(gradients, whole_gradients, t, axis).values())


def assert_close(errors, dtype, times=1):
    allowed = {what: times * ULPS[what][str(dtype)] for what in errors}
    over = [what for what in errors if not errors[what] <= allowed[what]]  # NaN counts as over
    assert not over, ", ".join(f"{what} is off by {errors[what]:.4g}, {allowed[what]} allowed" for what in over)
