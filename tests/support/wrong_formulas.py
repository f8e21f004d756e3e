"""The judge, continued: one slip in one formula, and mistakes without a name."""

import numpy as np
from wrong_gradients import BOTH, NOT_CUBED, RUNNING, WRONG_AXES, called, total


@called("1/n forgotten", "constant factor n")
def bracket_not_divided(dout, k):
    return k.gamma * k.ivar * (k.N * dout - total(dout) - k.xhat * total(dout * k.xhat))


@called("1/n forgotten")
def sums_for_means(dout, k):
    return k.gamma * k.ivar * (dout - total(dout) - k.xhat * total(dout * k.xhat))


@called(NOT_CUBED)
def centred_for_normalized_in_the_sum(dout, k):
    return k.gamma * k.ivar * (dout - total(dout) / k.N - k.xhat * total(dout * k.xmu) / k.N)


@called(NOT_CUBED)
def centred_for_normalized(dout, k):
    return k.gamma * k.ivar / k.N * (k.N * dout - total(dout) - k.xmu * total(dout * k.xmu))


@called("sum over the channel axis", WRONG_AXES)
def mean_over_features(dout, k):
    return k.gamma * k.ivar * (dout - dout.mean(axis=1, keepdims=True) - k.xhat * total(dout * k.xhat) / k.N)


@called("sum over the channels too")
def mean_over_everything(dout, k):
    return k.gamma * k.ivar * (dout - dout.mean() - k.xhat * np.mean(dout * k.xhat, axis=0))


@called("wrong sign of the variance pathway")
def plus_in_the_bracket(dout, k):
    return k.gamma * k.ivar / k.N * (k.N * dout - total(dout) + k.xhat * total(dout * k.xhat))


@called("n - 1 in the variance")
def numpy_var_with_ddof(dout, k):
    s = 1 / np.sqrt(np.var(k.x, axis=0, ddof=1) + k.eps)
    xn = k.xmu * s
    return k.gamma * s * (dout - dout.mean(axis=0) - xn * (dout * xn).mean(axis=0))


@called("eps outside the root")
def numpy_std_plus_eps(dout, k):
    s = 1 / (np.std(k.x, axis=0) + k.eps)
    xn = k.xmu * s
    return k.gamma * s * (dout - dout.mean(axis=0) - xn * (dout * xn).mean(axis=0))


@called("eps forgotten")
def numpy_std(dout, k):
    s = np.std(k.x, axis=0)
    xn = k.xmu / s
    return k.gamma / s * (dout - dout.mean(axis=0) - xn * (dout * xn).mean(axis=0))


@called("eps added twice")
def eps_in_and_out(dout, k):
    s = 1 / (k.std + k.eps)
    xn = k.xmu * s
    return k.gamma * s / k.N * (k.N * dout - total(dout) - xn * total(dout * xn))


@called("eps added twice")
def variance_kept_with_eps(dout, k):
    var = k.var + k.eps
    s = (var + k.eps) ** -0.5
    xn = k.xmu * s
    return k.gamma * s / k.N * (k.N * dout - total(dout) - xn * total(dout * xn))


@called("another eps")
def eps_of_another_framework(dout, k):
    s = (k.var + x_like(k, 0.02)) ** -0.5
    xn = k.xmu * s
    return k.gamma * s / k.N * (k.N * dout - total(dout) - xn * total(dout * xn))


def x_like(k, value):
    return k.x.dtype.type(value)


@called(RUNNING)
def running_statistics_throughout(dout, k):
    s = 1 / np.sqrt(k.r_var + k.eps)
    xn = (k.x - k.r_mean) * s
    return k.gamma * s * (dout - dout.mean(axis=0) - xn * (dout * xn).mean(axis=0))


@called(f"{BOTH} + {RUNNING}")
def gradient_of_evaluation(dout, k):
    return k.gamma * dout / np.sqrt(k.r_var + k.eps)


@called(RUNNING)
def running_variance_only(dout, k):
    s = 1 / np.sqrt(k.r_var + k.eps)
    xn = k.xmu * s
    return k.gamma * s * (dout - dout.mean(axis=0) - xn * (dout * xn).mean(axis=0))


@called(RUNNING)
def running_mean_only(dout, k):
    xn = (k.x - k.r_mean) * k.ivar
    return k.gamma * k.ivar * (dout - dout.mean(axis=0) - xn * (dout * xn).mean(axis=0))


@called("normalized over the wrong axes")
def layer_norm(dout, k):
    dxhat = dout * k.gamma
    s = 1 / np.sqrt(k.x.var(axis=1, keepdims=True) + k.eps)
    xn = (k.x - k.x.mean(axis=1, keepdims=True)) * s
    return s * (dxhat - dxhat.mean(axis=1, keepdims=True) - xn * (dxhat * xn).mean(axis=1, keepdims=True))


@called("constant factor 2")
def squared_error_without_its_half(dout, k):
    dxhat = 2 * dout * k.gamma
    return k.ivar * (dxhat - dxhat.mean(axis=0) - k.xhat * (dxhat * k.xhat).mean(axis=0))


@called("constant factor 1/n")
def loss_averaged_once_more(dout, k):
    dout = dout / k.N
    return k.gamma * k.ivar * (dout - dout.mean(axis=0) - k.xhat * (dout * k.xhat).mean(axis=0))


@called("constant factor 1/the size of x")
def loss_averaged_over_all(dout, k):
    dout = dout / dout.size
    return k.gamma * k.ivar * (dout - dout.mean(axis=0) - k.xhat * (dout * k.xhat).mean(axis=0))


@called("a factor per sample")
def weights_of_the_samples(dout, k):
    weights = np.linspace(0.5, 2, k.N, dtype=dout.dtype)[:, None]
    return weights * k.gamma * k.ivar * (dout - dout.mean(axis=0) - k.xhat * (dout * k.xhat).mean(axis=0))


@called("transposed layout")
def features_first(dout, k):
    return (k.gamma * k.ivar * (dout - dout.mean(axis=0) - k.xhat * (dout * k.xhat).mean(axis=0))).T


@called("wrong sign")
def descent_already(dout, k):
    return -k.gamma * k.ivar * (dout - dout.mean(axis=0) - k.xhat * (dout * k.xhat).mean(axis=0))


@called("variance taken for the standard deviation")
def root_forgotten(dout, k):
    s = 1 / (k.var + k.eps)
    xn = k.xmu * s
    return k.gamma * s * (dout - dout.mean(axis=0) - xn * (dout * xn).mean(axis=0))


@called("standard deviation taken for its inverse", "variance taken for the inverse standard deviation")
def times_the_deviation(dout, k):
    return k.gamma * k.std * (dout - dout.mean(axis=0) - k.xhat * (dout * k.xhat).mean(axis=0))


@called("divided by gamma")
def undone_not_applied(dout, k):
    dxhat = dout / k.gamma
    return k.ivar * (dxhat - dxhat.mean(axis=0) - k.xhat * (dxhat * k.xhat).mean(axis=0))


@called("gamma applied twice in a pathway", "y in place of xhat")
def output_for_normalized(dout, k):
    y = k.gamma * k.xhat
    return k.gamma * k.ivar * (dout - dout.mean(axis=0) - k.xhat * (dout * y).mean(axis=0))


@called("rstd forgotten")
def bracket_without_its_factor(dout, k):
    return k.gamma * (dout - dout.mean(axis=0) - k.xhat * (dout * k.xhat).mean(axis=0))


@called("n - 1 in place of n")
def bessel_in_the_bracket(dout, k):
    return k.gamma * k.ivar * (dout - total(dout) / (k.N - 1) - k.xhat * total(dout * k.xhat) / (k.N - 1))


@called("another eps", "eps forgotten")  # float32 may not distinguish one millionth from 0
def eps_squared(dout, k):
    s = np.sqrt(k.var + k.eps**2)
    z = k.xmu / s
    return k.gamma * (dout - dout.mean(axis=0) - z * (dout * z).mean(axis=0)) / s


@called("sum over the channel axis", WRONG_AXES)
def features_summed_in_dvar(dout, k):
    g = dout * k.gamma
    dvar = total(g * k.xmu, 1) * -0.5 * k.ivar**3
    return g * k.ivar - np.mean(g * k.ivar, axis=0) + dvar * 2 * k.xmu / k.N


@called("direct pathway missing")
def statistics_alone(dout, k):
    g = dout * k.gamma
    return -k.ivar * (g.mean(axis=0) + k.xhat * (g * k.xhat).mean(axis=0))


@called("unknown")
def only_above_the_mean(dout, k):
    return (k.xmu > 0) * k.gamma * k.ivar * (dout - dout.mean(axis=0) - k.xhat * (dout * k.xhat).mean(axis=0))


@called("unknown")
def of_samples_in_another_order(dout, k):
    dout = dout[::-1]
    return k.gamma * k.ivar * (dout - dout.mean(axis=0) - k.xhat * (dout * k.xhat).mean(axis=0))


@called("unknown")
def clipped(dout, k):
    dx = k.gamma * k.ivar * (dout - dout.mean(axis=0) - k.xhat * (dout * k.xhat).mean(axis=0))
    return np.clip(dx, -1, 1)


@called("unknown")
def three_slips(dout, k):
    dxmu = dout * k.ivar / 3
    return dxmu - 0.2 * dxmu.mean(axis=0) - 1.7 * k.xhat * (dxmu * k.xhat).mean(axis=0)
