"""The judge, continued: numbers taken for the inverse standard deviation, one mistake or two, and powers of it."""

import numpy as np
from wrong_gradients import RUNNING, called, total

UNBIASED, OUTSIDE, FORGOTTEN = "n - 1 in the variance", "eps outside the root", "eps forgotten"
ABSOLUTE, NO_ROOT, OTHER = "mean absolute deviation", "variance taken for the standard deviation", "another eps"


def normalized_by(scale, dout, k):
    """The right gradient for a batch divided by this."""
    z, g = k.xmu / scale, dout * k.gamma / scale
    return g - total(g) / k.N - z * total(g * z) / k.N


def sample_std(k):
    return np.std(k.x, axis=0, ddof=1)


@called(f"{UNBIASED} + {OUTSIDE}")
def sample_deviation_plus_eps(dout, k):
    return normalized_by(sample_std(k) + k.eps, dout, k)


@called(f"{UNBIASED} + {FORGOTTEN}")
def sample_deviation(dout, k):
    return normalized_by(sample_std(k), dout, k)


@called(f"{UNBIASED} + {NO_ROOT}")
def sample_variance_for_deviation(dout, k):
    return normalized_by(np.var(k.x, axis=0, ddof=1) + k.eps, dout, k)


@called(f"{UNBIASED} + {OTHER}")
def sample_variance_and_an_eps_of_its_own(dout, k):
    return normalized_by(np.sqrt(sample_std(k) ** 2 + k.x.dtype.type(0.02)), dout, k)


@called(f"{OUTSIDE} + {OTHER}")
def deviation_plus_an_eps_of_its_own(dout, k):
    return normalized_by(np.std(k.x, axis=0) + k.x.dtype.type(0.02), dout, k)


@called(f"{NO_ROOT} + {OTHER}")
def variance_plus_an_eps_of_its_own(dout, k):
    return normalized_by(k.var + k.x.dtype.type(0.02), dout, k)


@called(f"{UNBIASED} + eps added twice")
def sample_variance_and_eps_again(dout, k):
    return normalized_by(np.sqrt(np.var(k.x, axis=0, ddof=1) + k.eps) + k.eps, dout, k)


@called(ABSOLUTE)
def average_distance_from_the_mean(dout, k):
    return normalized_by(np.mean(np.abs(k.xmu), axis=0) + k.eps, dout, k)


@called(ABSOLUTE)
def average_distance_without_eps(dout, k):
    return normalized_by(np.mean(np.abs(k.xmu), axis=0), dout, k)


@called(f"{UNBIASED} + {OUTSIDE} + gamma forgotten")
def sample_deviation_plus_eps_and_no_gamma(dout, k):
    return normalized_by(sample_std(k) + k.eps, dout / k.gamma, k)


@called(f"{UNBIASED} + {OUTSIDE} + variance pathway missing")
def sample_deviation_plus_eps_and_centred(dout, k):
    g = dout * k.gamma / (sample_std(k) + k.eps)
    return g - g.mean(axis=0)


@called(RUNNING)
def half_the_range_for_the_deviation(dout, k):
    """No slip of the catalogue, so the name is a guess."""
    return normalized_by((k.x.max(axis=0) - k.x.min(axis=0)) / 2, dout, k)
