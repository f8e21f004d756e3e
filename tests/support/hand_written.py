"""Gradients of batch normalization as people write them, in the dtype of x: right ones, and each slip by itself.

The slips are written in two styles, the graph node by node and the compact formula. `s` sums over a channel; `s_mean`
and `s_var` are the sums of the two pathways. `RIGHT` has more styles.
"""

import numpy as np


class Pieces:
    """The results of a forward pass, by their usual names."""

    def __init__(self, x, gamma, eps, axis):
        self.axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
        self.x, self.eps = x, x.dtype.type(eps)
        self.gamma = np.expand_dims(gamma, self.axes)
        self.n = x.dtype.type(x.size // x.shape[axis])
        self.mean = x.mean(axis=self.axes, keepdims=True)
        self.xmu = x - self.mean
        self.var = (self.xmu**2).mean(axis=self.axes, keepdims=True)
        self.rstd = 1 / np.sqrt(self.var + self.eps)
        self.xhat = self.xmu * self.rstd

    def s(self, values):
        return values.sum(axis=self.axes, keepdims=True)


def graph(dy, p, *, dxhat=None, rstd=None, s_mean=None, s_var=None, n_mean=None, n_var=None, half=0.5, power=3):
    """Node by node; each argument replaces one piece by a wrong one."""
    rstd = p.rstd if rstd is None else rstd
    dxhat = dy * p.gamma if dxhat is None else dxhat
    s_mean, s_var = s_mean or p.s, s_var or p.s
    n_mean, n_var = p.n if n_mean is None else n_mean, p.n if n_var is None else n_var
    dvar = s_var(dxhat * p.xmu * -p.x.dtype.type(half) * rstd**power)
    dmean = s_mean(-dxhat * rstd)
    return dxhat * rstd + dmean / n_mean + dvar * 2 * p.xmu / n_var


def compact(dy, p, *, gamma=None, rstd=None, xhat=None, s_mean=None, s_var=None, n=None):
    """gamma·rstd/n·(n·dy − Σdy − xhat·Σdy·xhat), with wrong pieces."""
    gamma, rstd = p.gamma if gamma is None else gamma, p.rstd if rstd is None else rstd
    xhat, n = p.xhat if xhat is None else xhat, p.n if n is None else n
    s_mean, s_var = s_mean or p.s, s_var or p.s
    return gamma * rstd / n * (p.n * dy - s_mean(dy) - xhat * s_var(dy * xhat))


def no_axis(values):
    return values.sum()


def without_batch(p):
    return lambda values: values.sum(axis=p.axes[1:], keepdims=True)


def staged(dy, p):
    """Backpropagation through every node of x − μ, (x − μ)², σ², √(σ² + eps), 1/√, ·, as in lecture notes."""
    two, half = p.x.dtype.type(2), p.x.dtype.type(0.5)
    root = np.sqrt(p.var + p.eps)
    dxhat = dy * p.gamma
    dinverse = p.s(dxhat * p.xmu)
    dxmu = dxhat / root
    droot = -dinverse / root**2
    dvar = half * droot / root
    dsquare = np.ones_like(p.x) * dvar / p.n
    dxmu = dxmu + two * p.xmu * dsquare
    return dxmu + np.ones_like(p.x) * -p.s(dxmu) / p.n


def paper(dy, p):
    """Section 3 of the paper, with the second term of dmean."""
    dxhat = dy * p.gamma
    dvar = p.s(dxhat * p.xmu) * -p.x.dtype.type(0.5) * (p.var + p.eps) ** p.x.dtype.type(-1.5)
    dmean = p.s(dxhat * -1 / np.sqrt(p.var + p.eps)) + dvar * p.s(-2 * p.xmu) / p.n
    return dxhat / np.sqrt(p.var + p.eps) + dvar * 2 * p.xmu / p.n + dmean / p.n


def means(dy, p):
    """Means instead of sums."""
    mean = dy.mean(axis=p.axes, keepdims=True)
    return p.gamma * p.rstd * (dy - mean - p.xhat * (dy * p.xhat).mean(axis=p.axes, keepdims=True))


def projections(dy, p):
    """The frameworks' way: subtract the projection on x − μ, and the mean."""
    project = p.s(dy * p.xmu) * p.rstd**2 / p.n
    return (dy - p.xmu * project - p.s(dy) / p.n) * p.rstd * p.gamma


def sums_of_x(dy, p):
    """Σdy·(x − μ) as Σdy·x − μ·Σdy."""
    dgamma = (p.s(dy * p.x) - p.mean * p.s(dy)) * p.rstd
    return p.gamma * p.rstd * (dy - p.s(dy) / p.n - p.xhat * dgamma / p.n)


def line(dy, p):
    """a·dy + b·x + c."""
    a = p.gamma * p.rstd
    b = -a * p.rstd * p.s(dy * p.xhat) / p.n
    return a * dy + b * p.x + (-b * p.mean - a * p.s(dy) / p.n)


RIGHT = [graph, compact, staged, paper, means, projections, sums_of_x, line]
"""The right gradient, in the published ways to write it."""


def right(dy, p):
    return graph(dy, p)


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
        lambda dy, p: graph(dy, p, s_var=lambda values: values),
        lambda dy, p: p.gamma * p.rstd * (dy * (1 - 1 / p.n) - p.xhat * p.s(dy * p.xhat) / p.n),
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
    "rstd not cubed": [lambda dy, p: graph(dy, p, power=1), lambda dy, p: graph(dy, p, power=2)],
    "rstd forgotten": [lambda dy, p: graph(dy, p) / p.rstd],
    "rstd forgotten in a pathway": [
        lambda dy, p: graph(dy, p) + dy * p.gamma * (1 - p.rstd),
        lambda dy, p: graph(dy, p, s_mean=lambda values: p.s(values) / p.rstd),
    ],
    "xhat in place of x - μ": [lambda dy, p: graph(dy, p, power=4), lambda dy, p: graph(dy, p, power=5)],
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
    "dgamma and dbeta exchanged": lambda dy, p: (p.s(dy), p.s(dy * p.xhat)),
    "mean in place of the sum": lambda dy, p: (
        (dy * p.xhat).mean(axis=p.axes, keepdims=True),
        dy.mean(axis=p.axes, keepdims=True),
    ),
    "mean over the batch in place of the sum": lambda dy, p: (p.s(dy * p.xhat) / batch(p), p.s(dy) / batch(p)),
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
