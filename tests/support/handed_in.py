"""Wrong gradients as beginners hand them in: complete functions, not parts of a right one.

Each takes dy, x, gamma and eps, with x of shape (N, C) or (N, C, H, W), and returns what it calls dx. `HANDED_IN` has
the name that `diagnose` must find. `FOR_IMAGES` has those that are wrong only for images; `PARAMETERS` is for dgamma.
"""

import numpy as np


def standardize(x, eps=1e-5, ddof=0):
    axes = (0, *range(2, x.ndim))
    mu = np.mean(x, axis=axes, keepdims=True)
    var = np.var(x, axis=axes, keepdims=True, ddof=ddof)
    return axes, x.size // x.shape[1], mu, var, 1.0 / np.sqrt(var + x.dtype.type(eps))


def wide(gamma, x):
    return gamma.reshape(1, -1, *[1] * (x.ndim - 2))


def only_scaled_by_the_inverse_deviation(dy, x, gamma, eps):
    _, _, _, _, ivar = standardize(x, eps)
    return dy * ivar


def centred_and_scaled_without_gamma(dy, x, gamma, eps):
    axes, _, _, _, ivar = standardize(x, eps)
    return (dy - np.mean(dy, axis=axes, keepdims=True)) * ivar


def variance_alone_without_gamma(dy, x, gamma, eps):
    axes, m, mu, _, ivar = standardize(x, eps)
    dvar = np.sum(dy * (x - mu), axis=axes, keepdims=True) * -0.5 * ivar**3
    return dy * ivar + dvar * 2.0 * (x - mu) / m


def compact_without_gamma(dy, x, gamma, eps):
    axes, m, mu, _, ivar = standardize(x, eps)
    xn = (x - mu) * ivar
    return ivar / m * (m * dy - np.sum(dy, axis=axes, keepdims=True) - xn * np.sum(dy * xn, axis=axes, keepdims=True))


def gamma_in_the_first_term_only(dy, x, gamma, eps):
    axes, m, mu, _, ivar = standardize(x, eps)
    xn = (x - mu) * ivar
    rest = np.sum(dy, axis=axes, keepdims=True) + xn * np.sum(dy * xn, axis=axes, keepdims=True)
    return wide(gamma, x) * dy * ivar - ivar * rest / m


def gamma_missing_in_dvar(dy, x, gamma, eps):
    axes, m, mu, _, ivar = standardize(x, eps)
    dxn = dy * wide(gamma, x)
    dvar = np.sum(dy * (x - mu), axis=axes, keepdims=True) * -0.5 * ivar**3
    dmu = np.sum(-dxn * ivar, axis=axes, keepdims=True)
    return dxn * ivar + dvar * 2.0 * (x - mu) / m + dmu / m


def compact(dy, x, gamma, ivar, m, divisor):
    axes, _, mu, _, _ = standardize(x)
    xn = (x - mu) * ivar
    sums = np.sum(dy, axis=axes, keepdims=True) + xn * np.sum(dy * xn, axis=axes, keepdims=True)
    return wide(gamma, x) * ivar * (m * dy - sums) / divisor


def not_divided_by_m(dy, x, gamma, eps):
    _, m, _, _, ivar = standardize(x, eps)
    return compact(dy, x, gamma, ivar, m, 1)


def divided_by_m_twice(dy, x, gamma, eps):
    _, m, _, _, ivar = standardize(x, eps)
    return compact(dy, x, gamma, ivar, m, m * m)


def twice_as_much(dy, x, gamma, eps):
    _, m, _, _, ivar = standardize(x, eps)
    return 2 * compact(dy, x, gamma, ivar, m, m)


def half_as_much_without_gamma(dy, x, gamma, eps):
    _, m, _, _, ivar = standardize(x, eps)
    return compact(dy, x, np.ones_like(gamma), ivar, m, m) / 2


def averaged_and_centred_only(dy, x, gamma, eps):
    axes, m, _, _, ivar = standardize(x, eps)
    return wide(gamma, x) * ivar * (dy - np.mean(dy, axis=axes, keepdims=True)) / m


def features_counted(dy, x, gamma, eps):
    d = x.shape[1]
    axes, _, mu, _, ivar = standardize(x, eps)
    dxn = dy * wide(gamma, x)
    dvar = np.sum(dxn * (x - mu) * -0.5 * ivar**3, axis=axes, keepdims=True)
    dmu = np.sum(dxn * -ivar, axis=axes, keepdims=True)
    return dxn * ivar + dvar * 2 * (x - mu) / d + dmu / d


def another_eps(value):
    def gradient(dy, x, gamma, eps):
        _, m, _, _, ivar = standardize(x, value)
        return compact(dy, x, gamma, ivar, m, m)

    return gradient


def eps_beside_the_deviation(dy, x, gamma, eps):
    _, m, _, var, _ = standardize(x)
    return compact(dy, x, gamma, 1 / (np.sqrt(var) + x.dtype.type(eps)), m, m)


def sample_variance(dy, x, gamma, eps):
    _, m, _, _, ivar = standardize(x, eps, ddof=1)
    return compact(dy, x, gamma, ivar, m, m)


def nothing_comes_through(dy, x, gamma, eps):
    return np.zeros_like(x)


def divided_by_zero(dy, x, gamma, eps):
    return dy * np.where(x > 0, x.dtype.type(np.nan), 1)


def each_by_itself(dy, x, gamma, eps):
    _, m, mu, _, ivar = standardize(x, eps)
    xn = (x - mu) * ivar
    return wide(gamma, x) * ivar * dy * (1 - 1 / m - xn * xn / m)


def summed_over_features(dy, x, gamma, eps):
    _, m, mu, _, ivar = standardize(x, eps)
    xn = (x - mu) * ivar
    sums = np.sum(dy, axis=1, keepdims=True) + xn * np.sum(dy * xn, axis=1, keepdims=True)
    return wide(gamma, x) * ivar * (m * dy - sums) / m


def x_not_centred_in_dvar(dy, x, gamma, eps):
    axes, m, mu, _, ivar = standardize(x, eps)
    dxn = dy * wide(gamma, x)
    dvar = np.sum(dxn * x, axis=axes, keepdims=True) * -0.5 * ivar**3
    return dxn * ivar + dvar * 2 * (x - mu) / m - np.sum(dxn * ivar, axis=axes, keepdims=True) / m


def mean_twice(dy, x, gamma, eps):
    _, m, _, _, ivar = standardize(x, eps)
    dxn = dy * wide(gamma, x)
    axes = (0, *range(2, x.ndim))
    return compact(dy, x, gamma, ivar, m, m) - np.mean(dxn * ivar, axis=axes, keepdims=True)


def square_root_of_the_variance_forgotten(dy, x, gamma, eps):
    axes, m, mu, _, ivar = standardize(x, eps)
    dxn = dy * wide(gamma, x)
    dvar = np.sum(dxn * (x - mu), axis=axes, keepdims=True) * -0.5 * ivar
    return dxn * ivar + dvar * 2 * (x - mu) / m - np.sum(dxn * ivar, axis=axes, keepdims=True) / m


HANDED_IN = {
    only_scaled_by_the_inverse_deviation: "gamma forgotten + mean and variance pathways missing",
    centred_and_scaled_without_gamma: "gamma forgotten + variance pathway missing",
    variance_alone_without_gamma: "gamma forgotten + mean pathway missing",
    compact_without_gamma: "gamma forgotten",
    gamma_in_the_first_term_only: "gamma forgotten in a pathway",
    gamma_missing_in_dvar: "gamma forgotten in a pathway",
    not_divided_by_m: "1/n forgotten",
    divided_by_m_twice: "constant factor 1/n",
    twice_as_much: "constant factor 2",
    half_as_much_without_gamma: "gamma forgotten + constant factor 1/2",
    averaged_and_centred_only: "variance pathway missing + constant factor 1/n",
    features_counted: "number of channels in place of n",
    another_eps(1e-3): "another eps",
    another_eps(0.05): "another eps",
    another_eps(1e-8): "another eps",
    eps_beside_the_deviation: "eps outside the root",
    sample_variance: "n - 1 in the variance",
    nothing_comes_through: "zero everywhere",
    divided_by_zero: "not finite",
    each_by_itself: "only the diagonal of the Jacobian",
    summed_over_features: "sum over the channel axis",
    x_not_centred_in_dvar: "x in place of x - μ",
    mean_twice: "pathway counted twice",
    square_root_of_the_variance_forgotten: "rstd not cubed",
}


def batch_counted_in_the_pathways(dy, x, gamma, eps):
    _, _, _, _, ivar = standardize(x, eps)
    return compact(dy, x, gamma, ivar, len(x), len(x))


def batch_counted_before_the_bracket(dy, x, gamma, eps):
    _, m, _, _, ivar = standardize(x, eps)
    return compact(dy, x, gamma, ivar, m, len(x))


def batch_counted_in_the_mean(dy, x, gamma, eps):
    axes, m, mu, _, ivar = standardize(x, eps)
    dxn = dy * wide(gamma, x)
    dvar = np.sum(dxn * (x - mu), axis=axes, keepdims=True) * -0.5 * ivar**3
    dmu = -np.sum(dxn * ivar, axis=axes, keepdims=True)
    return dxn * ivar + dvar * 2 * (x - mu) / m + dmu / x.shape[0]


def summed_over_positions_only(dy, x, gamma, eps):
    _, m, mu, _, ivar = standardize(x, eps)
    xn = (x - mu) * ivar
    sums = np.sum(dy, axis=(2, 3), keepdims=True) + xn * np.sum(dy * xn, axis=(2, 3), keepdims=True)
    return wide(gamma, x) * ivar * (m * dy - sums) / m


FOR_IMAGES = {
    batch_counted_in_the_pathways: "batch size in place of n",
    batch_counted_before_the_bracket: "batch size in place of n",
    batch_counted_in_the_mean: "batch size in place of n",
    summed_over_positions_only: "sum without the batch axis",
}


def normalized(x, eps=1e-5, ddof=0):
    _, _, mu, _, ivar = standardize(x, eps, ddof)
    return (x - mu) * ivar


def over(x):
    return (0, *range(2, x.ndim))


PARAMETERS = {
    "keepdims": (lambda dy, x: (dy * normalized(x)).sum(over(x), keepdims=True), "wrong shape"),
    "a column": (lambda dy, x: (dy * normalized(x)).sum(over(x))[:, None], "wrong shape"),
    "a row of means": (
        lambda dy, x: (dy * normalized(x)).mean(over(x), keepdims=True),
        "wrong shape + mean in place of the sum",
    ),
    "no axis": (lambda dy, x: np.sum(dy * normalized(x)), "sum over the channels too"),
    "a mean without axis": (lambda dy, x: np.mean(dy * normalized(x)), "wrong shape"),
    "not summed": (lambda dy, x: dy * normalized(x), "sum over the wrong axes"),
    "over the features": (lambda dy, x: (dy * normalized(x)).sum(axis=1), "sum over the wrong axes"),
    "over the batch only": (lambda dy, x: (dy * normalized(x)).sum(axis=0), ("correct", "sum over the wrong axes")),
    "NaN": (lambda dy, x: np.nan * dy.sum(over(x)), "not finite"),
    "zeros": (lambda dy, x: 0 * dy.sum(over(x)), "zero everywhere"),
    "another eps": (lambda dy, x: (dy * normalized(x, 1e-2)).sum(over(x)), "another eps"),
    "no eps": (lambda dy, x: (dy * normalized(x, 0)).sum(over(x)), "eps forgotten"),
    "sample variance": (lambda dy, x: (dy * normalized(x, ddof=1)).sum(over(x)), "n - 1 in the variance"),
    "sums divided by the batch": (
        lambda dy, x: (dy * normalized(x)).sum(over(x)) / len(x),
        ("mean in place of the sum", "mean over the batch in place of the sum"),
    ),
}
