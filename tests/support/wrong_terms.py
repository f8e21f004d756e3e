"""The judge, continued: terms of the compact formula, and one pathway of three. `PLACES` says where the slip is."""

import numpy as np
from wrong_gradients import NO_GAMMA, SOME_GAMMA, called, total

COMMON, RSTD_TWICE, NO_N = (
    "common factor forgotten in a term",
    "rstd applied twice in a pathway",
    "n forgotten before dy",
)
NO_XHAT, NO_XMU = "xhat forgotten in the variance pathway", "x - μ forgotten in the variance pathway"
PLACES = {}


def there(words, *names):
    """A case whose answer must also contain these words."""

    def keep(gradient):
        PLACES[gradient.__name__] = words
        return called(*names)(gradient)

    return keep


@called(NO_N)
def bracket_without_its_count(dout, k):
    db, dg = dout.sum(axis=0), np.sum(dout * k.xhat, axis=0)
    return (k.gamma * k.ivar / k.N) * (dout - db - k.xhat * dg)


@called(f"{NO_GAMMA} + {NO_N}")
def bracket_without_its_count_and_gamma(dout, k):
    return (dout - total(dout) - k.xhat * total(dout * k.xhat)) / (k.N * k.std)


@called(f"{NO_N} + wrong sign of the variance pathway")
def bracket_without_its_count_and_a_plus(dout, k):
    g = dout * k.gamma
    return (g - total(g) + k.xhat * total(g * k.xhat)) / k.std / k.N


@called(f"{NO_N} + eps forgotten")
def bracket_without_its_count_and_eps(dout, k):
    s = np.std(k.x, axis=0)
    z = k.xmu / s
    return k.gamma / (s * k.N) * (dout - total(dout) - z * total(dout * z))


@there("before the sum: ", NO_XHAT)
def sum_of_products_alone(dout, k):
    return k.gamma * k.ivar / k.N * (k.N * dout - total(dout) - total(dout * k.xhat))


@there("in the sum: ", NO_XHAT)
def xhat_times_the_sum_of_dout(dout, k):
    g = dout * k.gamma
    return (k.N * g - total(g) - k.xhat * total(g)) / (k.N * k.std)


@there("in dvar: ", NO_XMU)
def variance_without_its_deviation(dout, k):
    g = dout * k.gamma
    dvar = -0.5 * total(g) * k.ivar**3
    return g * k.ivar - total(g) * k.ivar / k.N + dvar * 2 * k.xmu / k.N


@there("in ∂σ²/∂x: ", NO_XMU)
def variance_spread_evenly(dout, k):
    g = dout * k.gamma
    dvar = -0.5 * total(g * k.xmu) * k.ivar**3
    return g * k.ivar - total(g) * k.ivar / k.N + 2 * dvar / k.N


@there("gamma·rstd/n is missing in the mean pathway: ", COMMON)
def sum_of_dout_outside(dout, k):
    scale = k.gamma * k.ivar / k.N
    return scale * (k.N * dout - k.xhat * total(dout * k.xhat)) - total(dout)


@there("gamma·rstd/n is missing in the mean and variance pathways: ", COMMON)
def scale_times_the_first_term(dout, k):
    return k.gamma * k.ivar / k.N * k.N * dout - total(dout) - k.xhat * total(dout * k.xhat)


@there("gamma·rstd is missing in the variance pathway: ", COMMON)
def mean_of_products_outside(dout, k):
    return k.gamma * k.ivar * (dout - dout.mean(axis=0)) - k.xhat * (dout * k.xhat).mean(axis=0)


@there("rstd/n is missing in the variance pathway: ", COMMON)
def products_of_dxhat_outside(dout, k):
    g = dout * k.gamma
    return k.ivar / k.N * (k.N * g - total(g)) - k.xhat * total(g * k.xhat)


@there("rstd/n is missing in the variance pathway: ", f"{COMMON} + {NO_GAMMA}")
def products_of_dout_outside_and_no_gamma(dout, k):
    return k.ivar / k.N * (k.N * dout - total(dout)) - k.xhat * total(dout * k.xhat)


@there("1/n is missing in the direct pathway: ", COMMON)
def count_times_dout_outside(dout, k):
    return k.gamma * k.ivar * (k.N * dout - (total(dout) + k.xhat * total(dout * k.xhat)) / k.N)


@there("rstd² in place of rstd in the mean pathway: ", RSTD_TWICE)
def inverse_deviation_twice_in_dmu(dout, k):
    g = dout * k.gamma
    dmu = -total(g * k.ivar) * k.ivar
    return g * k.ivar + dmu / k.N - k.xmu * total(g * k.xmu) * k.ivar**3 / k.N


@there("rstd² in place of rstd in the direct pathway: ", RSTD_TWICE)
def variance_under_dxhat(dout, k):
    g = dout * k.gamma
    return g / (k.var + k.eps) - total(g * k.ivar) / k.N - k.xmu * total(g * k.xmu) * k.ivar**3 / k.N


@there("rstd² in place of rstd in the mean pathway: ", f"{RSTD_TWICE} + {NO_GAMMA}")
def inverse_deviation_twice_in_dmu_and_no_gamma(dout, k):
    return dout * k.ivar - total(dout) / (k.var + k.eps) / k.N - k.xmu * total(dout * k.xmu) * k.ivar**3 / k.N


@there("no rstd in place of rstd³ in the variance pathway: ", "rstd not cubed")
def deviations_without_their_scale(dout, k):
    g = dout * k.gamma
    return k.ivar * (g - g.mean(axis=0)) - k.xmu * (g * k.xmu).mean(axis=0)


@there("in dvar: ", "variance taken for the standard deviation")
def root_forgotten_in_dvar(dout, k):
    g = dout * k.gamma
    dvar = -0.5 * total(g * k.xmu) / (k.var + k.eps) ** 3
    return g * k.ivar + 2 * k.xmu * dvar / k.N - total(g * k.ivar) / k.N


@there("before the bracket: rstd is made with eps = 0.02", "another eps")
def an_eps_of_its_own_before_the_bracket(dout, k):
    scale = k.gamma / np.sqrt(k.var + k.x.dtype.type(0.02))
    return scale * (dout - dout.mean(axis=0) - k.xhat * (dout * k.xhat).mean(axis=0))


@there("in the direct and variance pathways: ", SOME_GAMMA)
def gamma_in_dmu_alone(dout, k):
    return k.ivar * (dout - k.gamma * dout.mean(axis=0) - k.xhat * (dout * k.xhat).mean(axis=0))


@there("the mean pathway is doubled: ", "pathway counted twice")
def mean_subtracted_from_both_branches(dout, k):
    g = dout * k.gamma * k.ivar
    first, second = g - g.mean(axis=0), -k.xhat * (g * k.xhat).mean(axis=0) - g.mean(axis=0)
    return first + second


@there("the variance pathway is halved: ", "factor 2 in the variance pathway")
def square_passed_on_once(dout, k):
    g = dout * k.gamma * k.ivar
    return g - g.mean(axis=0) - 0.5 * k.xhat * (g * k.xhat).mean(axis=0)


@there("the variance pathway is doubled: ", "factor 2 in the variance pathway")
def square_passed_on_four_times(dout, k):
    g = dout * k.gamma * k.ivar
    return g - g.mean(axis=0) - 2 * k.xhat * (g * k.xhat).mean(axis=0)


@there("in ∂σ²/∂x: ", "x in place of x - μ")
def raw_x_after_the_sum(dout, k):
    g = dout * k.gamma * k.ivar
    return g - g.mean(axis=0) - k.x * k.ivar * (g * k.xhat).mean(axis=0)


@there("in the mean pathway: ", "n - 1 in place of n")
def mean_of_one_fewer(dout, k):
    g = dout * k.gamma * k.ivar
    return g - total(g) / (k.N - 1) - k.xhat * (g * k.xhat).mean(axis=0)


@there("in the variance pathway, over the axes (1,): ", "sum over the channel axis")
def products_over_the_features(dout, k):
    g = dout * k.gamma
    return k.ivar * (g - g.mean(axis=0) - k.xhat * total(g * k.xhat, 1) / k.N)


@there("multiply dx by n", "constant factor 1/n")
def averaged_at_the_end(dout, k):
    g = dout * k.gamma * k.ivar
    return (g - g.mean(axis=0) - k.xhat * (g * k.xhat).mean(axis=0)) / k.N


@called("sum forgotten in the mean pathway + gamma forgotten")
def own_value_for_the_mean(dout, k):
    g = dout * k.ivar
    return g - g / k.N - k.xhat * (g * k.xhat).mean(axis=0)


@called("sum forgotten in the variance pathway + wrong sign of the variance pathway")
def own_product_for_the_sum_and_a_plus(dout, k):
    g = dout * k.gamma * k.ivar
    return g - g.mean(axis=0) + k.xhat * (g * k.xhat) / k.N
