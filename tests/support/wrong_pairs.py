"""The judge, continued: two slips at once."""

import numpy as np
from wrong_gradients import (
    BOTH,
    MEAN,
    NO_GAMMA,
    NOT_CUBED,
    RUNNING,
    SOME_GAMMA,
    TWICE_V,
    VARIANCE,
    WRONG_AXES,
    called,
    total,
)


@called(f"{NO_GAMMA} + 1/n forgotten", f"{NO_GAMMA} + constant factor n")
def no_gamma_and_no_count(dout, k):
    return k.ivar * (k.N * dout - total(dout) - k.xhat * total(dout * k.xhat))


@called(f"{MEAN} + {TWICE_V}")
def no_mean_and_no_two(dout, k):
    dxhat = dout * k.gamma
    dvar = total(dxhat * k.xmu) * -0.5 * k.ivar**3
    return dxhat * k.ivar + dvar * k.xmu / k.N


@called(f"{NO_GAMMA} + wrong sign of the variance pathway")
def no_gamma_and_a_plus(dout, k):
    dvar = total(dout * k.xmu) * 0.5 * k.ivar**3
    return dout * k.ivar + dvar * 2 * k.xmu / k.N - total(dout * k.ivar) / k.N


@called(f"n - 1 in the variance + {MEAN}")
def sample_variance_and_no_mean(dout, k):
    s = 1 / np.sqrt(k.x.var(axis=0, ddof=1) + k.eps)
    dxhat = dout * k.gamma
    return dxhat * s - k.xmu * total(dxhat * k.xmu) * s**3 / k.N


@called(f"{NO_GAMMA} + eps outside the root")
def no_gamma_and_eps_outside(dout, k):
    s = 1 / (np.sqrt(k.var) + k.eps)
    xn = k.xmu * s
    return s * (dout - dout.mean(axis=0) - xn * (dout * xn).mean(axis=0))


@called("x in place of x - μ + 1/n forgotten in the mean pathway")
def raw_x_and_a_whole_mean(dout, k):
    dxhat = dout * k.gamma
    dvar = total(dxhat * k.x) * -0.5 * k.ivar**3
    return dxhat * k.ivar + dvar * 2 * k.xmu / k.N - total(dxhat * k.ivar)


@called(f"{NOT_CUBED} + {MEAN}")
def one_power_and_no_mean(dout, k):
    dxhat = dout * k.gamma
    dvar = total(dxhat * k.xmu) * -0.5 * k.ivar
    return dxhat * k.ivar + dvar * 2 * k.xmu / k.N


@called(f"{NO_GAMMA} + sum over the channels too")
def no_gamma_and_no_axis(dout, k):
    return k.ivar * (dout - np.sum(dout) / k.N - k.xhat * total(dout * k.xhat) / k.N)


@called("n - 1 in the variance + constant factor 2")
def sample_variance_and_doubled(dout, k):
    s = 1 / np.sqrt(k.x.var(axis=0, ddof=1) + k.eps)
    xn = k.xmu * s
    return 2 * k.gamma * s * (dout - dout.mean(axis=0) - xn * (dout * xn).mean(axis=0))


@called(f"another eps + {VARIANCE}")
def tiny_eps_and_no_variance(dout, k):
    dxmu = k.gamma * dout / np.sqrt(k.var + k.x.dtype.type(0.05))
    return dxmu - dxmu.mean(axis=0)


@called(f"wrong sign of the mean pathway + {TWICE_V}")
def mean_added_and_no_half(dout, k):
    dxhat = dout * k.gamma
    dvar = -total(dxhat * k.xmu) * k.ivar**3
    return dxhat * k.ivar + dvar * 2 * k.xmu / k.N + total(dxhat * k.ivar) / k.N


@called("gamma applied twice + constant factor 1/n")
def gamma_twice_and_averaged(dout, k):
    return k.gamma**2 * k.ivar / k.N * (dout - dout.mean(axis=0) - k.xhat * (dout * k.xhat).mean(axis=0))


@called("1/n forgotten in the variance pathway + wrong sign of the variance pathway")
def variance_not_averaged_and_added(dout, k):
    dxmu = dout * k.gamma * k.ivar
    return dxmu - dxmu.mean(axis=0) + k.xhat * total(dxmu * k.xhat)


@called(f"{NO_GAMMA} + {RUNNING}")
def no_gamma_and_running_statistics(dout, k):
    s = 1 / np.sqrt(k.r_var + k.eps)
    xn = (k.x - k.r_mean) * s
    return s * (dout - dout.mean(axis=0) - xn * (dout * xn).mean(axis=0))


@called(f"{MEAN} + sum over the channel axis", f"{MEAN} + {WRONG_AXES}")
def no_mean_and_summed_over_features(dout, k):
    return k.gamma * k.ivar * (dout - k.xhat * total(dout * k.xhat, axis=1) / k.N)


@called("1/n forgotten in the mean pathway + wrong sign of the mean pathway")
def mean_whole_and_added(dout, k):
    dxmu = dout * k.gamma * k.ivar
    return dxmu + total(dxmu) - k.xhat * (dxmu * k.xhat).mean(axis=0)


@called(f"{MEAN} + x in place of x - μ")
def no_mean_and_raw_x(dout, k):
    dxhat = dout * k.gamma
    return dxhat * k.ivar - k.xmu * total(dxhat * k.x) * k.ivar**3 / k.N


@called(f"{SOME_GAMMA} + {MEAN}")
def gamma_in_dxhat_alone_and_no_mean(dout, k):
    return dout * k.gamma * k.ivar - k.xmu * total(dout * k.xmu) * k.ivar**3 / k.N


@called(f"eps forgotten + {NO_GAMMA}")
def no_eps_and_no_gamma(dout, k):
    s = k.var**-0.5
    return s * (dout - dout.mean(axis=0) - k.xmu * s * (dout * k.xmu * s).mean(axis=0))


@called(f"n - 1 in the variance + {NO_GAMMA}")
def numpy_ddof_and_no_gamma(dout, k):
    s = 1 / np.sqrt(k.x.var(axis=0, ddof=1) + k.eps)
    dvar = total(dout * k.xmu) * -0.5 * s**3
    return dout * s + dvar * 2 * k.xmu / k.N - total(dout * s) / k.N


@called(f"{VARIANCE} + sum forgotten in the mean pathway", f"{VARIANCE} + only the diagonal of the Jacobian")
def no_variance_and_not_summed(dout, k):
    dxmu = dout * k.gamma * k.ivar
    return dxmu - dxmu / k.N


@called("wrong sign + gamma applied twice")
def negative_and_gamma_twice(dout, k):
    return -(k.gamma**2) * k.ivar * (dout - dout.mean(axis=0) - k.xhat * (dout * k.xhat).mean(axis=0))


@called(f"variance taken for the standard deviation + {NO_GAMMA}")
def no_root_and_no_gamma(dout, k):
    s = 1 / (k.var + k.eps)
    return s * (dout - dout.mean(axis=0) - k.xmu * s * (dout * k.xmu * s).mean(axis=0))


@called("a factor per sample + gamma forgotten")
def weights_and_no_gamma(dout, k):
    weights = np.linspace(0.5, 2, k.N, dtype=dout.dtype)[:, None]
    return weights * k.ivar * (dout - dout.mean(axis=0) - k.xhat * (dout * k.xhat).mean(axis=0))


@called(f"{MEAN} + wrong sign of the variance pathway")
def square_branch_with_a_plus_alone(dout, k):
    dxhat = k.gamma * dout
    return dxhat / k.std + k.xmu * np.sum(dxhat * k.xmu, axis=0) / k.std**3 / k.N


@called(f"{VARIANCE} + 1/n forgotten in the mean pathway")
def centred_by_the_sum(dout, k):
    dxmu = dout * k.gamma / k.std
    return dxmu - dxmu.sum(axis=0)


@called(f"{VARIANCE} + wrong sign of the mean pathway")
def mean_put_back(dout, k):
    dxmu = dout * k.gamma / k.std
    return dxmu + dxmu.mean(axis=0)


@called("eps forgotten + constant factor 1/n")
def no_eps_and_averaged(dout, k):
    s = np.std(k.x, axis=0)
    z = k.xmu / s
    g = k.gamma * dout / k.N
    return (g - g.mean(axis=0) - z * (g * z).mean(axis=0)) / s


@called("eps outside the root + rstd not cubed")
def eps_outside_and_one_power(dout, k):
    s = np.sqrt(k.var) + k.eps
    g = dout * k.gamma
    return g / s - np.mean(g / s, axis=0) - k.xmu * np.mean(g * k.xmu, axis=0) / s


@called("n - 1 in the variance + 1/n forgotten in the variance pathway")
def ddof_and_square_not_averaged(dout, k):
    s = np.sqrt(np.var(k.x, axis=0, ddof=1) + k.eps)
    g = dout * k.gamma
    return g / s - np.mean(g / s, axis=0) - k.xmu * np.sum(g * k.xmu, axis=0) / s**3


@called("n - 1 in the variance", "n - 1 in the variance + n - 1 in place of n")
def ddof_in_both_directions(dout, k):
    s = np.sqrt(np.var(k.x, axis=0, ddof=1) + k.eps)
    g = dout * k.gamma
    return g / s - np.mean(g / s, axis=0) - k.xmu * np.sum(g * k.xmu, axis=0) / s**3 / (k.N - 1)


@called("x in place of x - μ + gamma forgotten", "gamma forgotten + x in place of x - μ")
def raw_x_and_no_gamma(dout, k):
    dvar = np.sum(dout * k.x * -0.5 * k.ivar**3, axis=0)
    return dout * k.ivar + dvar * 2 * k.xmu / k.N - np.mean(dout * k.ivar, axis=0)


@called(f"{RUNNING} + {VARIANCE}")
def running_and_centred(dout, k):
    s = np.sqrt(k.r_var + k.eps)
    return k.gamma * (dout - dout.mean(axis=0)) / s


@called("sum over the channels too + wrong sign of the variance pathway")
def all_summed_and_a_plus(dout, k):
    g = dout * k.gamma
    return k.ivar * (g - g.sum() / k.N + k.xhat * (g * k.xhat).mean(axis=0))


@called(f"{BOTH} + wrong sign")
def minus_the_scale(dout, k):
    return -dout * k.gamma * k.ivar
