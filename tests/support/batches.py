"""Data whose sums of squares may lose digits, and gradients whose sums cancel: around 0, of size 1."""

import numpy as np


def sparse(rng, view):
    """One value per channel, and zeros."""
    N, C, S = view
    x = np.zeros(view)
    for c in range(C):
        x[rng.integers(N), c, rng.integers(S)] = rng.uniform(0.5, 1.5)
    return x


def walk(rng, view):
    """A random walk through all values of a channel."""
    N, C, S = view
    return np.cumsum(rng.standard_normal((C, N * S)), axis=1).reshape(C, N, S).swapaxes(0, 1)


def smooth(rng, view):
    """A few long waves through all values of a channel."""
    N, C, S = view
    t = np.linspace(0, 2 * np.pi, N * S)
    waves = [rng.standard_normal((C, 1)) * np.sin(k * t + rng.uniform(0, 6, (C, 1))) for k in (1, 2, 3)]
    return sum(waves).reshape(C, N, S).swapaxes(0, 1)


def ramp(_, view):
    """A straight line through all values of a channel."""
    return np.linspace(-1, 1, view[0] * view[2]).reshape(view[0], 1, view[2]) * np.ones(view)


def with_value(value, where):
    def made(rng, view):
        x = rng.standard_normal(view)
        x[where * (view[0] - 1), :, 0] = value
        return x

    return made


def with_padding(value, share):
    def made(rng, view):
        x = rng.standard_normal(view)
        x[: 1 + int(view[0] * share)] = value
        return x

    return made


def drifting(far):
    def made(rng, view):
        return rng.standard_normal(view) + np.linspace(0, far, view[0])[:, None, None]

    return made


def levels(low, share):
    return lambda rng, view: np.where(rng.random(view) < share, 1.0, low)


KINDS = {
    "normal": lambda rng, view: rng.standard_normal(view),
    "uniform": lambda rng, view: rng.uniform(-1, 1, view),
    "±a": lambda rng, view: 0.7 * np.sign(rng.standard_normal(view)),
    "two levels": levels(-0.3, 0.1),
    "two levels, one rare": levels(0.0, 0.01),
    "two levels, near": lambda rng, view: 1 + 1e-6 * np.sign(rng.standard_normal(view)),
    "sparse": sparse,
    "ReLU": lambda rng, view: np.maximum(rng.standard_normal(view), 0),
    "pixels": lambda rng, view: rng.integers(0, 256, view) / 255,
    "walk": walk,
    "smooth": smooth,
    "ramp": ramp,
    "drift": drifting(3.0),
    "long drift": drifting(1e4),
    "outlier first": with_value(1e5, 0),
    "outlier last": with_value(-1e3, 1),
    "padding first": with_padding(-100.0, 0.3),
    "some padding first": with_padding(-3.0, 0.1),
    "long tails": lambda rng, view: rng.standard_normal(view) / (1e-3 + abs(rng.standard_normal(view))),
}


def xhat_of(x):
    d = x.astype(np.longdouble) - x.mean(axis=(0, 2), dtype=np.longdouble, keepdims=True)
    std = np.sqrt((d * d).mean(axis=(0, 2), keepdims=True))
    return np.divide(d, std, out=np.zeros_like(d), where=std != 0).astype(float)


GRADIENTS = {
    "normal": lambda rng, x: rng.standard_normal(x.shape),
    "steady": lambda rng, x: 1 + 1e-3 * rng.standard_normal(x.shape),
    "constant": lambda rng, x: np.full(x.shape, rng.uniform(1, 2)),
    "along xhat": lambda rng, x: xhat_of(x) + 1e-3 * rng.standard_normal(x.shape),
    "near the mean": lambda _, x: np.where(abs(xhat_of(x)) < 0.1, 1.0, 0.0),
    "sparse": lambda rng, x: np.where(rng.random(x.shape) < 0.02, rng.standard_normal(x.shape), 0),
    "signs": lambda rng, x: np.sign(rng.standard_normal(x.shape)),
}
