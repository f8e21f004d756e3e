"""Right gradients of batch normalization as people write them, in the dtype of x.

Two styles, the graph node by node and the compact formula, can be given wrong pieces. `s` sums over a channel; `s_mean`
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
