"""Each slip of the catalogues, written by hand in one style or two."""

import numpy as np
from hand_written import compact, graph


def no_axis(values):
    return values.sum()


def without_batch(p):
    return lambda values: values.sum(axis=p.axes[1:], keepdims=True)


def over_channels(p):
    (axis,) = set(range(p.x.ndim)) - set(p.axes)
    return lambda values: values.sum(axis=axis, keepdims=True)


def over_some(p):
    """A sum without the last of the right axes but with the first; for (N, C) only that is wrong."""
    axes = p.axes[:-1] or p.axes
    return lambda values: values.sum(axis=axes, keepdims=True)


def batch(p):
    return p.x.dtype.type(p.x.shape[p.axes[0]])


def dvar_term(dy, p):
    """dvar·2/n"""
    return p.s(dy * p.gamma * p.xmu) * -(p.rstd**3) / p.n


def unbiased(p):
    return 1 / np.sqrt(p.var * p.n / (p.n - 1) + p.eps)


def absolute(p):
    return abs(p.xmu).mean(axis=p.axes, keepdims=True)


SLIPS = {
    "mean pathway missing": [
        lambda dy, p: dy * p.gamma * p.rstd - p.gamma * p.rstd * p.xhat * p.s(dy * p.xhat) / p.n,
        lambda dy, p: graph(dy, p, s_mean=lambda values: 0 * p.s(values)),
    ],
    "variance pathway missing": [
        lambda dy, p: p.gamma * p.rstd * (dy - dy.mean(axis=p.axes, keepdims=True)),
        lambda dy, p: graph(dy, p, s_var=lambda values: 0 * p.s(values)),
    ],
    "mean and variance pathways missing": [lambda dy, p: dy * p.gamma * p.rstd],
    "direct pathway missing": [lambda dy, p: graph(dy, p) - dy * p.gamma * p.rstd],
    "gamma forgotten": [lambda dy, p: graph(dy, p, dxhat=dy), lambda dy, p: compact(dy, p, gamma=1)],
    "gamma applied twice": [lambda dy, p: p.gamma * graph(dy, p)],
    "divided by gamma": [lambda dy, p: graph(dy, p, dxhat=dy / p.gamma)],
    "gamma forgotten in a pathway": [
        lambda dy, p: graph(dy, p, s_var=lambda values: p.s(values / p.gamma)),
        lambda dy, p: graph(dy, p, s_mean=lambda values: p.s(values / p.gamma), s_var=lambda v: p.s(v / p.gamma)),
    ],
    "gamma applied twice in a pathway": [
        lambda dy, p: graph(dy, p, s_var=lambda values: p.gamma * p.s(values)),
        lambda dy, p: graph(dy, p, s_mean=lambda values: p.s(values * p.gamma)),
    ],
    "1/n forgotten": [
        lambda dy, p: graph(dy, p, n_mean=1, n_var=1),
        lambda dy, p: compact(dy, p, n=1),
    ],
    "1/n forgotten in the mean pathway": [lambda dy, p: graph(dy, p, n_mean=1)],
    "1/n forgotten in the variance pathway": [lambda dy, p: graph(dy, p, n_var=1)],
    "1/n twice in a pathway": [
        lambda dy, p: graph(dy, p, n_mean=p.n**2),
        lambda dy, p: graph(dy, p, n_var=p.n**2),
        lambda dy, p: compact(dy, p, s_mean=lambda v: p.s(v) / p.n, s_var=lambda v: p.s(v) / p.n),
    ],
    "n forgotten before dy": [
        lambda dy, p: p.gamma * p.rstd / p.n * (dy - p.s(dy) - p.xhat * p.s(dy * p.xhat)),
        lambda dy, p: graph(dy, p) - dy * p.gamma * p.rstd * (1 - 1 / p.n),
    ],
    "common factor forgotten in a term": [
        lambda dy, p: p.gamma * p.rstd / p.n * (p.n * dy - p.s(dy)) - p.xhat * p.s(dy * p.xhat),
        lambda dy, p: p.gamma * p.rstd / p.n * p.n * dy - p.s(dy) - p.xhat * p.s(dy * p.xhat),
        lambda dy, p: p.n * dy - p.gamma * p.rstd / p.n * (p.s(dy) + p.xhat * p.s(dy * p.xhat)),
        lambda dy, p: p.gamma * p.rstd * (dy - p.s(dy) / p.n) - p.xhat * p.s(dy * p.xhat) / p.n,
        lambda dy, p: p.rstd / p.n * p.n * dy * p.gamma - p.s(dy * p.gamma) + dvar_term(dy, p) * p.xmu,
        lambda dy, p: p.gamma * p.rstd * (p.n * dy - (p.s(dy) + p.xhat * p.s(dy * p.xhat)) / p.n),
        lambda dy, p: p.n * dy - p.s(dy) - p.gamma * p.rstd / p.n * p.xhat * p.s(dy * p.xhat),
    ],
    "n - 1 in place of n": [
        lambda dy, p: graph(dy, p, n_mean=p.n - 1, n_var=p.n - 1),
        lambda dy, p: graph(dy, p, n_var=p.n - 1),
        lambda dy, p: compact(dy, p, n=p.n - 1),
    ],
    "batch size in place of n": [
        lambda dy, p: graph(dy, p, n_mean=batch(p), n_var=batch(p)),
        lambda dy, p: graph(dy, p, n_mean=batch(p)),
        lambda dy, p: compact(dy, p, n=batch(p)),
    ],
    "rstd not cubed": [lambda dy, p, power=power: graph(dy, p, power=power) for power in range(3)],
    "rstd forgotten": [lambda dy, p: graph(dy, p) / p.rstd],
    "rstd forgotten in a pathway": [
        lambda dy, p: graph(dy, p) + dy * p.gamma * (1 - p.rstd),
        lambda dy, p: graph(dy, p, s_mean=lambda values: p.s(values) / p.rstd),
    ],
    "rstd applied twice in a pathway": [
        lambda dy, p: graph(dy, p, s_mean=lambda values: p.s(values) * p.rstd),
        lambda dy, p: graph(dy, p) - dy * p.gamma * p.rstd + dy * p.gamma / (p.var + p.eps),
        lambda dy, p: p.gamma * (dy - p.s(dy) / p.n) / (p.var + p.eps) + dvar_term(dy, p) * p.xmu,
    ],
    "xhat in place of x - μ": [lambda dy, p: graph(dy, p, power=4), lambda dy, p: graph(dy, p, power=5)],
    "n - 1 in the variance": [
        lambda dy, p: graph(dy, p, rstd=unbiased(p)),
        lambda dy, p: graph(dy, p, rstd=unbiased(p), n_var=p.n - 1),
        lambda dy, p: compact(dy, p, rstd=unbiased(p), xhat=p.xmu * unbiased(p)),
    ],
    "mean absolute deviation": [
        lambda dy, p: graph(dy, p, rstd=1 / (absolute(p) + p.eps)),
        lambda dy, p: compact(dy, p, rstd=1 / absolute(p), xhat=p.xmu / absolute(p)),
    ],
    "eps outside the root": [
        lambda dy, p: graph(dy, p, rstd=1 / (np.sqrt(p.var) + p.eps)),
        lambda dy, p: compact(dy, p, rstd=1 / (np.sqrt(p.var) + p.eps)),
    ],
    "eps forgotten": [lambda dy, p: graph(dy, p, rstd=1 / np.sqrt(p.var))],
    "eps added twice": [
        lambda dy, p: graph(dy, p, rstd=1 / np.sqrt(p.var + p.eps + p.eps)),
        lambda dy, p: graph(dy, p, rstd=1 / (np.sqrt(p.var + p.eps) + p.eps)),
    ],
    "variance taken for the standard deviation": [
        lambda dy, p: graph(dy, p, rstd=1 / (p.var + p.eps)),
        lambda dy, p: compact(dy, p, rstd=1 / p.var),
    ],
    "variance taken for the inverse standard deviation": [
        lambda dy, p: graph(dy, p, rstd=p.var + p.eps),
        lambda dy, p: compact(dy, p, rstd=p.var),
    ],
    "standard deviation taken for its inverse": [
        lambda dy, p: graph(dy, p, rstd=np.sqrt(p.var + p.eps)),
        lambda dy, p: compact(dy, p, rstd=np.sqrt(p.var + p.eps)),
    ],
    "sum over the channels too": [
        lambda dy, p: graph(dy, p, s_mean=no_axis),
        lambda dy, p: graph(dy, p, s_var=no_axis),
        lambda dy, p: compact(dy, p, s_mean=no_axis, s_var=no_axis),
        lambda dy, p: compact(dy, p, s_mean=no_axis),
    ],
    "only the diagonal of the Jacobian": [
        lambda dy, p: p.gamma * p.rstd * dy * (1 - 1 / p.n - p.xhat**2 / p.n),
        lambda dy, p: graph(dy, p, s_mean=lambda values: values, s_var=lambda values: values),
    ],
    "sum forgotten in the mean pathway": [
        lambda dy, p: graph(dy, p, s_mean=lambda values: values),
        lambda dy, p: p.gamma * p.rstd * (dy * (1 - 1 / p.n) - p.xhat * p.s(dy * p.xhat) / p.n),
    ],
    "sum forgotten in the variance pathway": [
        lambda dy, p: graph(dy, p, s_var=lambda values: values),
        lambda dy, p: p.gamma * p.rstd * (dy - p.s(dy) / p.n - p.xhat**2 * dy / p.n),
    ],
    "sum without the batch axis": [
        lambda dy, p: graph(dy, p, s_mean=without_batch(p)),
        lambda dy, p: compact(dy, p, s_mean=without_batch(p), s_var=without_batch(p)),
        lambda dy, p: compact(dy, p, s_var=without_batch(p)),
    ],
    "sum over the channel axis": [
        lambda dy, p: compact(dy, p, s_mean=over_channels(p), s_var=over_channels(p)),
        lambda dy, p: graph(dy, p, s_mean=over_channels(p)),
    ],
    "sum over the wrong axes": [
        lambda dy, p: compact(dy, p, s_mean=over_some(p), s_var=over_some(p)),
        lambda dy, p: graph(dy, p, s_var=over_some(p)),
    ],
    "x in place of x - μ": [
        lambda dy, p: graph(dy, p, s_var=lambda values: p.s(values / p.xmu * p.x)),
        lambda dy, p: graph(dy, p, s_var=lambda values: 0 * p.s(values)) + dvar_term(dy, p) * p.x,
    ],
    "x in place of x - μ in the second term of dmean": [
        lambda dy, p: graph(dy, p) - dvar_term(dy, p) * p.mean,
    ],
    "xhat forgotten in the variance pathway": [
        lambda dy, p: graph(dy, p, s_var=lambda values: p.s(values / p.xmu / p.rstd)),
        lambda dy, p: graph(dy, p, s_var=lambda values: 0 * p.s(values)) + dvar_term(dy, p) / p.rstd,
    ],
    "x - μ forgotten in the variance pathway": [
        lambda dy, p: graph(dy, p, s_var=lambda values: p.s(values / p.xmu)),
        lambda dy, p: graph(dy, p, s_var=lambda values: 0 * p.s(values)) + dvar_term(dy, p),
    ],
    "factor 2 in the variance pathway": [lambda dy, p: graph(dy, p, half=1), lambda dy, p: graph(dy, p, half=0.25)],
    "pathway counted twice": [
        lambda dy, p: graph(dy, p) + dy * p.gamma * p.rstd,
        lambda dy, p: graph(dy, p, n_mean=p.n / 2),
    ],
    "wrong sign": [lambda dy, p: -graph(dy, p)],
    "wrong sign of the mean pathway": [lambda dy, p: graph(dy, p, n_mean=-p.n)],
    "wrong sign of the variance pathway": [lambda dy, p: graph(dy, p, half=-0.5)],
    "wrong sign of both pathways": [lambda dy, p: graph(dy, p, half=-0.5, n_mean=-p.n)],
    "second term of dmean not summed": [
        lambda dy, p: (
            graph(dy, p) + p.s(dy * p.gamma * p.xmu * -0.5 * p.rstd**3).astype(dy.dtype) * -2 * p.xmu / p.n / p.n
        )
    ],
    "number of channels in place of n": [
        lambda dy, p: graph(dy, p, n_mean=p.gamma.size, n_var=p.gamma.size),
        lambda dy, p: graph(dy, p, n_var=p.gamma.size),
    ],
    "number of positions in place of n": [
        lambda dy, p: graph(dy, p, n_mean=p.n / batch(p), n_var=p.n / batch(p)),
        lambda dy, p: compact(dy, p, n=p.n / batch(p)),
    ],
    "number of all values in place of n": [
        lambda dy, p: graph(dy, p, n_mean=p.x.size, n_var=p.x.size),
        lambda dy, p: compact(dy, p, n=p.x.size),
    ],
}

PARAMETER_SLIPS = {
    "wrong sign": lambda dy, p: (-p.s(dy * p.xhat), -p.s(dy)),
    "mean in place of the sum": lambda dy, p: (
        (dy * p.xhat).mean(axis=p.axes, keepdims=True),
        dy.mean(axis=p.axes, keepdims=True),
    ),
    "mean over the batch in place of the sum": lambda dy, p: (p.s(dy * p.xhat) / batch(p), p.s(dy) / batch(p)),
    "dgamma and dbeta exchanged": lambda dy, p: (p.s(dy), p.s(dy * p.xhat)),
    "sum over the channels too": lambda dy, p: (0 * p.mean + (dy * p.xhat).sum(), 0 * p.mean + dy.sum()),
    "dxhat in place of dy": lambda dy, p: (p.s(dy * p.gamma * p.xhat), p.s(dy * p.gamma)),
    "x - μ in place of xhat": lambda dy, p: (p.s(dy * p.xmu), None),
    "x in place of xhat": lambda dy, p: (p.s(dy * p.x), None),
    "n - 1 in the variance": lambda dy, p: (p.s(dy * p.xmu * unbiased(p)), None),
    "mean absolute deviation": lambda dy, p: (p.s(dy * p.xmu / absolute(p)), None),
    "eps outside the root": lambda dy, p: (p.s(dy * p.xmu / (np.sqrt(p.var) + p.eps)), None),
    "eps forgotten": lambda dy, p: (p.s(dy * p.xmu / np.sqrt(p.var)), None),
    "eps added twice": lambda dy, p: (p.s(dy * p.xmu / np.sqrt(p.var + 2 * p.eps)), None),
    "variance taken for the standard deviation": lambda dy, p: (p.s(dy * p.xmu / (p.var + p.eps)), None),
    "variance taken for the inverse standard deviation": lambda dy, p: (p.s(dy * p.xmu * p.var), None),
    "standard deviation taken for its inverse": lambda dy, p: (p.s(dy * p.xmu * np.sqrt(p.var)), None),
}
