"""The judge of `diagnose`: wrong gradients as students write them, and the acceptable answers for each.

They were written independently of the catalogue of slips, and the catalogue independently of them. A case is a function
of dout and of what a forward pass keeps, in the dtype of x. All of its names are acceptable: if two slips give the same
formula, both are. "a + b" stands for two slips at once.

This module has one slip, node by node. `wrong_formulas` has one slip in one formula, `wrong_pairs` has two slips, and
`wrong_images` has those of images. Each adds to `ALL` when it is imported.
"""

from typing import NamedTuple

import numpy as np

EPS = 1e-3


class Kept:
    """The values that the forward pass keeps. `r_mean` and `r_var` are running statistics after a few batches."""

    def __init__(self, x, gamma):
        dtype = x.dtype.type
        self.x, self.axes, self.eps = x, (0, *range(2, x.ndim)), dtype(EPS)
        self.N, self.D = x.shape[:2]
        self.m = x.size // self.D
        self.gamma = gamma.reshape(1, -1, *[1] * (x.ndim - 2))
        self.mu = x.mean(axis=self.axes, keepdims=True)
        self.xmu = x - self.mu
        self.var = (self.xmu**2).mean(axis=self.axes, keepdims=True)
        self.std = np.sqrt(self.var + self.eps)
        self.ivar = 1 / self.std
        self.xhat = self.xmu * self.ivar
        some = np.random.default_rng(9)
        self.r_mean = (0.9 * self.mu + 0.2 * some.standard_normal(self.mu.shape)).astype(x.dtype)
        self.r_var = (self.var * (0.6 + 0.3 * some.random(self.mu.shape))).astype(x.dtype)


class Case(NamedTuple):
    """A wrong gradient and its acceptable names."""

    gradient: object
    names: tuple
    images: bool


ALL = []


def called(*names, images=False):
    def keep(gradient):
        ALL.append(Case(gradient, names, images))
        return gradient

    return keep


def total(values, axis=0):
    return np.sum(values, axis=axis, keepdims=True)


MEAN, VARIANCE, BOTH = (
    "mean pathway missing",
    "variance pathway missing",
    "mean and variance pathways missing",
)
NO_GAMMA, SOME_GAMMA = "gamma forgotten", "gamma forgotten in a pathway"
NOT_CUBED, WRONG_AXES, RUNNING = "rstd not cubed", "sum over the wrong axes", "running statistics"
TWICE_V = "factor 2 in the variance pathway"


@called(MEAN)
def mean_node_not_returned_to(dout, k):
    dxhat = dout * k.gamma
    divar = total(dxhat * k.xmu)
    dsqrt = -divar / k.std**2
    dvar = 0.5 * dsqrt / k.std
    return dxhat * k.ivar + 2 * k.xmu * dvar / k.N


@called("wrong sign of the variance pathway")
def reciprocal_without_minus(dout, k):
    dxhat = dout * k.gamma
    dsqrt = total(dxhat * k.xmu) / k.std**2
    dxmu = dxhat * k.ivar + 2 * k.xmu * 0.5 * dsqrt / k.std / k.N
    return dxmu - total(dxmu) / k.N


@called(TWICE_V)
def root_without_a_half(dout, k):
    dxhat = dout * k.gamma
    dvar = -total(dxhat * k.xmu) / k.std**2 / k.std
    dxmu = dxhat * k.ivar + 2 * k.xmu * dvar / k.N
    return dxmu - total(dxmu) / k.N


@called("1/n forgotten in the variance pathway")
def square_summed_not_averaged(dout, k):
    dxhat = dout * k.gamma
    dsquare = np.ones_like(dout) * -0.5 * total(dxhat * k.xmu) / k.std**3
    dxmu = dxhat * k.ivar + 2 * k.xmu * dsquare
    return dxmu - total(dxmu) / k.N


@called("1/n forgotten in the mean pathway")
def mean_node_passed_on_whole(dout, k):
    dxhat = dout * k.gamma
    dvar = -0.5 * total(dxhat * k.xmu) * k.ivar**3
    dxmu = dxhat * k.ivar + 2 * k.xmu * dvar / k.N
    dmu = -total(dxmu)
    return dxmu + dmu


@called("sum over the channels too")
def variance_node_summed_with_no_axis(dout, k):
    dxhat = dout * k.gamma
    dvar = np.sum(dxhat * k.xmu * -0.5 * (k.var + k.eps) ** -1.5)
    dmu = -total(dxhat * k.ivar)
    return dxhat * k.ivar + dvar * 2 * k.xmu / k.N + dmu / k.N


@called(SOME_GAMMA)
def dout_where_dxhat_is_meant(dout, k):
    dxhat = dout * k.gamma
    divar = total(dout * k.xmu)
    dxmu = dxhat * k.ivar - k.xmu * divar * k.ivar**3 / k.N
    return dxmu - total(dxmu) / k.N


@called(NOT_CUBED)
def reciprocal_not_squared(dout, k):
    dxhat = dout * k.gamma
    dsqrt = -total(dxhat * k.xmu) / k.std
    dxmu = dxhat * k.ivar + k.xmu * dsqrt / k.std / k.N
    return dxmu - total(dxmu) / k.N


@called(NOT_CUBED)
def root_times_its_value(dout, k):
    dxhat = dout * k.gamma
    dsqrt = -total(dxhat * k.xmu) / k.std**2
    dxmu = dxhat * k.ivar + k.xmu * dsqrt * k.std / k.N
    return dxmu - total(dxmu) / k.N


@called(TWICE_V)
def square_without_two(dout, k):
    dxhat = dout * k.gamma
    dvar = -0.5 * total(dxhat * k.xmu) * k.ivar**3
    dxmu = dxhat * k.ivar + k.xmu * dvar / k.N
    return dxmu - total(dxmu) / k.N


@called("wrong sign of the mean pathway")
def mean_added(dout, k):
    dxhat = dout * k.gamma
    dvar = -0.5 * total(dxhat * k.xmu) * k.ivar**3
    dmu = total(dxhat * k.ivar)
    return dxhat * k.ivar + 2 * k.xmu * dvar / k.N + dmu / k.N


@called(MEAN)
def mean_of_the_wrong_branch(dout, k):
    dxhat = dout * k.gamma
    dxmu1 = dxhat * k.ivar
    dxmu2 = -k.xmu * total(dxhat * k.xmu) * k.ivar**3 / k.N
    return dxmu1 + dxmu2 - total(dxmu2) / k.N


@called(BOTH)
def statistics_as_constants(dout, k):
    return dout * k.gamma / k.std


@called("zero everywhere")
def one_minus_one(dout, k):
    dxmu = dout * k.gamma * k.ivar
    dmu = -dxmu
    return dxmu + dmu


@called("sum forgotten in the mean pathway")
def mean_node_not_summed(dout, k):
    dxhat = dout * k.gamma
    dxmu = dxhat * k.ivar - k.xmu * total(dxhat * k.xmu) * k.ivar**3 / k.N
    return dxmu - dxmu / k.N


@called("sum forgotten in the variance pathway")
def variance_node_not_summed(dout, k):
    dxhat = dout * k.gamma
    dvar = dxhat * k.xmu * -0.5 * k.ivar**3
    dmu = total(dxhat * -k.ivar)
    return dxhat * k.ivar + dvar * 2 * k.xmu / k.N + dmu / k.N


@called("gamma applied twice")
def gamma_at_the_end_too(dout, k):
    dxhat = dout * k.gamma
    dxmu = dxhat * k.ivar - k.xmu * total(dxhat * k.xmu) * k.ivar**3 / k.N
    return k.gamma * (dxmu - total(dxmu) / k.N)


@called("gamma applied twice in a pathway")
def gamma_again_in_divar(dout, k):
    dxhat = dout * k.gamma
    divar = total(k.gamma * dxhat * k.xmu)
    dxmu = dxhat * k.ivar - k.xmu * divar * k.ivar**3 / k.N
    return dxmu - total(dxmu) / k.N


@called("rstd forgotten in a pathway")
def mean_without_the_deviation(dout, k):
    dxhat = dout * k.gamma
    dmu = -total(dxhat)
    dvar = total(dxhat * k.xmu) * -0.5 * k.ivar**3
    return dxhat * k.ivar + dvar * 2 * k.xmu / k.N + dmu / k.N


@called("rstd forgotten in a pathway")
def direct_without_the_deviation(dout, k):
    dxhat = dout * k.gamma
    dmu = -total(dxhat * k.ivar)
    dvar = total(dxhat * k.xmu) * -0.5 * k.ivar**3
    return dxhat + dvar * 2 * k.xmu / k.N + dmu / k.N


@called("x in place of x - μ")
def variance_node_with_x(dout, k):
    dxhat = dout * k.gamma
    dvar = total(dxhat * k.x * -0.5 * (k.var + k.eps) ** -1.5)
    dmu = total(dxhat * -k.ivar) + dvar * total(-2 * k.xmu) / k.N
    return dxhat * k.ivar + dvar * 2 * k.xmu / k.N + dmu / k.N


@called("x in place of x - μ")
def square_node_with_x(dout, k):
    dxhat = dout * k.gamma
    dvar = total(dxhat * k.xmu * -0.5 * (k.var + k.eps) ** -1.5)
    return dxhat * k.ivar + dvar * 2 * k.x / k.N - total(dxhat * k.ivar) / k.N


@called("x in place of x - μ", "x in place of x - μ in the second term of dmean")
def second_term_of_dmean_with_x(dout, k):
    dxhat = dout * k.gamma
    dvar = total(dxhat * k.xmu * -0.5 * (k.var + k.eps) ** -1.5)
    dmu = total(dxhat * -k.ivar) + dvar * total(-2 * k.x) / k.N
    return dxhat * k.ivar + dvar * 2 * k.xmu / k.N + dmu / k.N


@called("eps forgotten")
def eps_forgotten_in_dvar(dout, k):
    dxhat = dout * k.gamma
    dvar = total(dxhat * k.xmu * -0.5 * k.var**-1.5)
    return dxhat * k.ivar + dvar * 2 * k.xmu / k.N - total(dxhat * k.ivar) / k.N


@called("pathway counted twice")
def direct_added_again(dout, k):
    dxmu = dout * k.gamma * k.ivar
    dx1 = dxmu - k.xmu * total(dout * k.gamma * k.xmu) * k.ivar**3 / k.N
    dx2 = dxmu - total(dxmu) / k.N
    return dx1 + dx2


@called("pathway counted twice")
def mean_added_again(dout, k):
    dxhat = dout * k.gamma
    dvar = -0.5 * total(dxhat * k.xmu) * k.ivar**3
    dmu = -total(dxhat * k.ivar)
    dxmu = dxhat * k.ivar + 2 * k.xmu * dvar / k.N + dmu / k.N
    return dxmu + dmu / k.N
