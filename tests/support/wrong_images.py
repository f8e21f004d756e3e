"""The judge, continued: images of shape (N, C, H, W), where a channel has more axes than the batch axis."""

import numpy as np
from wrong_gradients import BOTH, MEAN, NO_GAMMA, VARIANCE, WRONG_AXES, called, total


def images(*names):
    return called(*names, images=True)


@images(WRONG_AXES, "sum over the batch axis alone")
def sums_of_the_flat_code(dout, k):
    return k.gamma * k.ivar / k.m * (k.m * dout - total(dout) - k.xhat * total(dout * k.xhat))


@images(WRONG_AXES, "sum over the batch axis alone")
def means_of_the_flat_code(dout, k):
    return k.gamma * k.ivar * (dout - dout.mean(axis=0) - k.xhat * (dout * k.xhat).mean(axis=0))


@images("batch size in place of n")
def samples_counted(dout, k):
    n = len(dout)
    dxhat = dout * k.gamma
    dvar = total(dxhat * k.xmu, k.axes) * -0.5 * k.ivar**3
    dmu = total(-dxhat * k.ivar, k.axes)
    return dxhat * k.ivar + dvar * 2 * k.xmu / n + dmu / n


@images("number of positions in place of n")
def positions_counted(dout, k):
    n = dout.shape[2] * dout.shape[3]
    dxhat = dout * k.gamma
    dvar = total(dxhat * k.xmu, k.axes) * -0.5 * k.ivar**3
    dmu = total(-dxhat * k.ivar, k.axes)
    return dxhat * k.ivar + dvar * 2 * k.xmu / n + dmu / n


@images("sum without the batch axis", WRONG_AXES)
def means_of_an_image(dout, k):
    return (
        k.gamma
        * k.ivar
        * (dout - dout.mean(axis=(2, 3), keepdims=True) - k.xhat * (dout * k.xhat).mean(axis=(2, 3), keepdims=True))
    )


@images("sum over the channels too")
def one_mean_for_all(dout, k):
    return k.gamma * k.ivar * (dout - dout.mean() - k.xhat * (dout * k.xhat).mean())


@images(WRONG_AXES)
def width_left_out(dout, k):
    dxhat = dout * k.gamma
    dvar = total(dxhat * k.xmu, (0, 2)) * -0.5 * k.ivar**3
    dmu = total(-dxhat * k.ivar, (0, 2))
    return dxhat * k.ivar + dvar * 2 * k.xmu / k.m + dmu / k.m


@images("normalized over the wrong axes")
def instance_norm(dout, k):
    s = 1 / np.sqrt(k.x.var(axis=(2, 3), keepdims=True) + k.eps)
    xn = (k.x - k.x.mean(axis=(2, 3), keepdims=True)) * s
    dxhat = dout * k.gamma
    rest = dxhat.mean(axis=(2, 3), keepdims=True) + xn * (dxhat * xn).mean(axis=(2, 3), keepdims=True)
    return s * (dxhat - rest)


@images("normalized over the wrong axes")
def each_pixel_by_itself(dout, k):
    s = 1 / np.sqrt(k.x.var(axis=0) + k.eps)
    xn = (k.x - k.x.mean(axis=0)) * s
    dxhat = dout * k.gamma
    return s * (dxhat - dxhat.mean(axis=0) - xn * (dxhat * xn).mean(axis=0))


def flat(dout, x, gamma, eps):
    s = 1 / np.sqrt(x.var(axis=0) + eps)
    xn = (x - x.mean(axis=0)) * s
    return gamma * s * (dout - dout.mean(axis=0) - xn * (dout * xn).mean(axis=0))


@images("reshaped without transposing")
def rows_of_channels_by_reshape_alone(dout, k):
    rows = flat(dout.reshape(-1, k.D), k.x.reshape(-1, k.D), k.gamma.ravel(), k.eps)
    return rows.reshape(dout.shape)


@images("transposed layout", "reshaped without transposing")
def not_transposed_back(dout, k):
    rows = [array.transpose(0, 2, 3, 1).reshape(-1, k.D) for array in (dout, k.x)]
    return flat(*rows, k.gamma.ravel(), k.eps).reshape(dout.shape)


@images("gamma along the wrong axis")
def gamma_along_the_width(dout, k):
    dxhat = dout * k.gamma.ravel()
    return k.ivar * (
        dxhat - dxhat.mean(axis=k.axes, keepdims=True) - k.xhat * (dxhat * k.xhat).mean(axis=k.axes, keepdims=True)
    )


@images("constant factor 1/the number of positions")
def loss_averaged_over_positions(dout, k):
    dxhat = dout * k.gamma / (dout.shape[2] * dout.shape[3])
    return k.ivar * (
        dxhat - dxhat.mean(axis=k.axes, keepdims=True) - k.xhat * (dxhat * k.xhat).mean(axis=k.axes, keepdims=True)
    )


@images("constant factor 1/the batch size")
def loss_averaged_over_samples(dout, k):
    dxhat = dout * k.gamma / len(dout)
    return k.ivar * (
        dxhat - dxhat.mean(axis=k.axes, keepdims=True) - k.xhat * (dxhat * k.xhat).mean(axis=k.axes, keepdims=True)
    )


@images("a factor per sample")
def images_weighted(dout, k):
    weights = np.linspace(1, 2, len(dout), dtype=dout.dtype).reshape(-1, 1, 1, 1)
    mean, project = total(dout, k.axes) / k.m, total(dout * k.xhat, k.axes) / k.m
    return weights * k.gamma * k.ivar * (dout - mean - k.xhat * project)


@images(f"batch size in place of n + {NO_GAMMA}")
def samples_counted_and_no_gamma(dout, k):
    n = len(dout)
    return k.ivar * (dout - total(dout, k.axes) / n - k.xhat * total(dout * k.xhat, k.axes) / n)


@images(f"{MEAN} + {WRONG_AXES}", f"{MEAN} + sum over the batch axis alone")
def flat_sums_and_no_mean(dout, k):
    dxhat = dout * k.gamma
    return dxhat * k.ivar - k.xmu * total(dxhat * k.xmu) * k.ivar**3 / k.m


@images(f"{WRONG_AXES} + constant factor 2")
def height_left_out_and_doubled(dout, k):
    mean, project = total(dout, (0, 3)) / k.m, total(dout * k.xhat, (0, 3)) / k.m
    return 2 * k.gamma * k.ivar * (dout - mean - k.xhat * project)


@images("n - 1 in the variance + sum over the channels too")
def sample_variance_and_no_axis(dout, k):
    s = 1 / np.sqrt(k.x.var(axis=k.axes, keepdims=True, ddof=1) + k.eps)
    dxhat = dout * k.gamma
    dvar = total(dxhat * k.xmu, k.axes) * -0.5 * s**3
    return dxhat * s + dvar * 2 * k.xmu / k.m - np.sum(dxhat * s) / k.m


@images(f"batch size in place of n + {MEAN}", f"{MEAN} + batch size in place of n")
def samples_counted_and_no_mean(dout, k):
    dxhat = dout * k.gamma
    return dxhat * k.ivar - k.xmu * total(dxhat * k.xmu, k.axes) * k.ivar**3 / len(dout)


@images(f"{BOTH} + {NO_GAMMA}")
def scaled_and_nothing_else(dout, k):
    return dout / k.std


@images("batch size in place of n + wrong sign of the variance pathway")
def images_counted_and_a_plus(dout, k):
    n = dout.shape[0]
    g = dout * k.gamma
    return k.ivar * (g - total(g, k.axes) / n + k.xhat * total(g * k.xhat, k.axes) / n)


@images(f"{WRONG_AXES} + {NO_GAMMA}")
def rows_only_and_no_gamma(dout, k):
    mean, project = dout.mean(axis=3, keepdims=True), (dout * k.xhat).mean(axis=3, keepdims=True)
    return k.ivar * (dout - mean - k.xhat * project)


@images("normalized over the wrong axes")
def one_norm_for_an_image(dout, k):
    axes = (1, 2, 3)
    s = 1 / np.sqrt(k.x.var(axis=axes, keepdims=True) + k.eps)
    z = (k.x - k.x.mean(axis=axes, keepdims=True)) * s
    g = dout * k.gamma
    return s * (g - g.mean(axis=axes, keepdims=True) - z * (g * z).mean(axis=axes, keepdims=True))


@images(f"{VARIANCE} + {WRONG_AXES}")
def flat_mean_and_no_variance(dout, k):
    g = dout * k.gamma * k.ivar
    return g - g.mean(axis=0)


@images("eps forgotten")
def images_without_eps(dout, k):
    s = k.x.std(axis=k.axes, keepdims=True)
    z = k.xmu / s
    g = dout * k.gamma
    return (g - g.mean(axis=k.axes, keepdims=True) - z * (g * z).mean(axis=k.axes, keepdims=True)) / s


@images("unknown")
def the_first_image_alone(dout, k):
    g = dout * k.gamma * k.ivar
    dx = np.zeros_like(g)
    dx[0] = g[0] - g[0].mean()
    return dx


@images("unknown")
def saturated(dout, k):
    dout = dout * (1 - np.tanh(k.xhat) ** 2)
    return k.gamma * k.ivar * (dout - dout.mean(axis=k.axes, keepdims=True))


@images("unknown")
def noise(dout, k):
    return np.random.default_rng(4).standard_normal(dout.shape).astype(dout.dtype)


def normalized_channels_last(k):
    """x̂ of the channels last, as (N·H·W, C)."""
    return k.xhat.transpose(0, 2, 3, 1).reshape(-1, k.D)


def flat_code_of(g, k):
    """The gradient of the flat code, back in the layout of x."""
    z = normalized_channels_last(k)
    dx = k.gamma.ravel() * k.ivar.ravel() * (g - g.mean(axis=0) - z * (g * z).mean(axis=0))
    return dx.reshape(k.N, *k.x.shape[2:], k.D).transpose(0, 3, 1, 2)


@images("dy reshaped without transposing")
def dout_not_moved(dout, k):
    return flat_code_of(dout.reshape(-1, k.D), k)


@images("dy reshaped without transposing")
def dout_not_moved_to_the_front(dout, k):
    g = dout.reshape(k.D, -1).reshape(k.D, k.N, *k.x.shape[2:]).swapaxes(0, 1)
    return k.gamma * k.ivar * (g - total(g, k.axes) / k.m - k.xhat * total(g * k.xhat, k.axes) / k.m)


@images(f"dy reshaped without transposing + {VARIANCE}")
def dout_not_moved_and_no_variance(dout, k):
    g = dout.reshape(-1, k.D)
    dx = k.gamma.ravel() * k.ivar.ravel() * (g - g.mean(axis=0))
    return dx.reshape(k.N, *k.x.shape[2:], k.D).transpose(0, 3, 1, 2)
