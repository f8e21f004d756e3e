"""Other ways to train a layer: frozen statistics, batch renormalization, ghost batches.

Renorm is held against the paper's algorithm, Chainer's published formulas and Keras' in long double, and against Keras
itself where it is installed: `nox -s frameworks`. Frozen layers and ghost batches have the bits of calls that other
tests hold against the truth.
"""

import copy
import doctest
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from oracle import assert_close, back, column, rows, truth, ulps

import batchnorm as bn

try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None

EPS = 1e-3
FLOATS = ["float32", "float64"]
HALVES = ["float16", *(["bfloat16"] if ml_dtypes else [])]
INFINITE = (np.inf, np.inf)
ROUNDING = 1e-12
"""Relative difference of two results in float64, or of float64 from long double, for ordinary data."""

WAYS = {
    "plain": {},
    "no update": {"update": False},
    "running": {"statistics": "running"},
    "frozen": {"statistics": "running", "update": False},
    "renorm": {"renorm": (1.25, 0.5)},
    "renorm, no update": {"renorm": (1.25, 0.5), "update": False},
    "ghost": {"ghost": 3},
    "ghost, no update": {"ghost": 3, "update": False},
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)

SELECTS = {
    "all": lambda _: {},
    "mask": lambda rng: {"mask": rng.random((10, 6)) < 0.6},
    "lengths": lambda rng: {"lengths": rng.integers(2, 7, 10)},
    "weights": lambda rng: {"weights": rng.uniform(0.1, 2, (10, 1))},
}
selected = pytest.mark.parametrize("select", SELECTS.values(), ids=SELECTS)

pytestmark = pytest.mark.once  # all of it is made of calls that are tested on every level


def as_type(array, name):
    return array.astype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def made(rng, channels=4, dtype="float64", **settings):
    """A layer that was trained for a while, on data that differ from those of `data`."""
    layer = bn.BatchNorm(channels, eps=EPS, dtype=dtype, **settings)
    if layer.gamma is not None:
        layer.gamma = rng.uniform(0.5, 2, channels)
    if layer.beta is not None:
        layer.beta = rng.standard_normal(channels)
    if layer.running_mean is not None:
        layer.running_mean = rng.uniform(-1, 2, channels)
        layer.running_var = rng.uniform(0.5, 9, channels)
    return layer


def data(rng, shape=(10, 4, 6), dtype="float64"):
    return as_type(rng.normal(0.5, 1.5, shape), dtype), as_type(rng.standard_normal(shape), dtype)


def state_of(layer):
    return layer.num_batches_tracked, {name: value.tobytes() for name, value in layer.state_dict().items()}


def same(got, expected):
    """Whether both are the same bits, or None."""
    if got is None or expected is None:
        return got is expected
    return got.dtype == expected.dtype and got.shape == expected.shape and got.tobytes() == expected.tobytes()


def test_the_page():
    page = Path(__file__).parents[1] / "docs" / "variants.md"
    failed, tried = doctest.testfile(str(page), module_relative=False)
    assert tried > 30
    assert failed == 0


# Renorm.


def of_paper(x, dy, gamma, beta, mean, var, bounds):
    """Algorithm 1 and the gradients of arXiv:1702.03275, in long double; channels last."""
    x, dy, gamma, beta, mean, var = (np.asarray(array, np.longdouble) for array in (x, dy, gamma, beta, mean, var))
    axes, m = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    rmax, dmax = (np.longdouble(bound) for bound in bounds)
    sigma = np.sqrt(var + np.longdouble(EPS))
    mean_batch = x.sum(axes) / m
    sigma_batch = np.sqrt(np.longdouble(EPS) + ((x - mean_batch) ** 2).sum(axes) / m)
    r = np.clip(sigma_batch / sigma, 1 / rmax, rmax)
    d = np.clip((mean_batch - mean) / sigma, -dmax, dmax)
    xhat = (x - mean_batch) / sigma_batch * r + d
    y = gamma * xhat + beta
    dxhat = dy * gamma
    dsigma = (dxhat * (x - mean_batch) * -r / sigma_batch**2).sum(axes)
    dmean = (dxhat * -r / sigma_batch).sum(axes)
    dx = dxhat * r / sigma_batch + dsigma * (x - mean_batch) / (m * sigma_batch) + dmean / m
    return y, dx, (dy * xhat).sum(axes), dy.sum(axes)


def of_chainer(x, dy, gamma, beta, mean, var, bounds):
    """What Chainer's BatchRenormalizationFunction calculates, in long double."""
    x, dy, gamma, beta, mean, var = (np.asarray(array, np.longdouble) for array in (x, dy, gamma, beta, mean, var))
    axes, m = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    rmax, dmax = bounds
    std = np.sqrt(x.var(axes) + np.longdouble(EPS))
    running_sigma = np.sqrt(var + np.longdouble(EPS))
    r = np.clip(std / running_sigma, 1 / np.longdouble(rmax), rmax)
    d = np.clip((x.mean(axes) - mean) / running_sigma, -dmax, dmax)
    x_hat = (x - x.mean(axes)) / std
    x_hat_renorm = x_hat * r + d
    gsigma_batch, gbeta = (dy * x_hat).sum(axes), dy.sum(axes)
    gx = r * gamma / std * (dy - (x_hat * gsigma_batch + gbeta) / m)
    return gamma * x_hat_renorm + beta, gx, (dy * x_hat_renorm).sum(axes), gbeta


def of_keras(x, dy, gamma, beta, mean, var, bounds):
    """Keras' layer with renorm_mean = mean, renorm_stddev = √(var + eps), rmin = 1/rmax; only forward is written."""
    x, gamma, beta, mean, var = (np.asarray(array, np.longdouble) for array in (x, gamma, beta, mean, var))
    axes = tuple(range(x.ndim - 1))
    rmax, dmax = bounds
    stddev = np.sqrt(x.var(axes) + np.longdouble(EPS))
    renorm_stddev = np.maximum(np.sqrt(var + np.longdouble(EPS)), np.sqrt(np.longdouble(EPS)))
    r = np.minimum(np.maximum(stddev / renorm_stddev, 1 / np.longdouble(rmax)), rmax)
    d = np.clip((x.mean(axes) - mean) / renorm_stddev, -dmax, dmax)
    scale, offset = r * gamma, d * gamma + beta
    return (x - x.mean(axes)) / stddev * scale + offset, None, None, None


# The first corrects all channels in full, the second none of them, the others some.
BOUNDS = [INFINITE, (1 + 1e-9, 0.0), (1.25, 0.5), (3.0, 0.0), (1.0, 5.0)]


@pytest.mark.parametrize("published", [of_paper, of_chainer, of_keras])
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_renorm_is_what_was_published(published, bounds, rng):
    layer = made(rng, axis=-1, renorm=bounds)
    x, dy = data(rng, (7, 5, 4))
    expected = published(x, dy, layer.gamma, layer.beta, layer.running_mean, layer.running_var, bounds)
    y, dx = layer(x), layer.backward(dy)
    for got, exact in zip((y, dx, layer.dgamma, layer.dbeta), expected, strict=True):
        if exact is not None:
            np.testing.assert_allclose(got, exact.astype(float), rtol=ROUNDING, atol=ROUNDING)


def test_the_bounds_limit_some_channels_and_not_others(rng):
    """Or the test above would not tell a clip from none."""
    layer = made(rng, axis=-1)
    x, _ = data(rng, (7, 5, 4))
    sigma = np.sqrt(layer.running_var + EPS)
    ratio = np.sqrt(x.var((0, 1)) + EPS) / sigma
    apart = (x.mean((0, 1)) - layer.running_mean) / sigma
    assert len(set(np.digitize(ratio, [1 / 1.25, 1.25]))) > 1
    assert len(set(np.digitize(apart, [-0.5, 0.5]))) > 1


def renormed(x, dy, layer, bounds, axis, weights=None):
    """Everything of renorm in long double, with the terms at which errors are measured."""
    plain = truth(x, dy, axis=axis, eps=EPS, weights=weights)
    mean, var = (np.asarray(array, np.longdouble) for array in (layer.running_mean, layer.running_var))
    sigma, rmax, dmax = np.sqrt(var + np.longdouble(EPS)), *map(np.longdouble, bounds)
    rho = np.clip(np.sqrt(plain.var + np.longdouble(EPS)) / sigma, 1 / rmax, rmax)
    d = np.clip(((plain.first - mean) + plain.shift) / sigma, -dmax, dmax)
    gamma, beta = (column(array, d.size, default)[:, 0] for array, default in ((layer.gamma, 1), (layer.beta, 0)))
    t = truth(x, dy, gamma * rho, beta + gamma * d, axis, EPS, weights)
    return t._replace(
        dgamma=rho * t.dgamma + d * t.dbeta, dgamma_terms=rho * t.dgamma_terms + abs(d) * t.dbeta_terms
    ), np.maximum(t.y_terms, back(np.broadcast_to((abs(gamma * d))[:, None], rows(x, axis).shape), x.shape, axis))


@selected
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("affine", [{}, {"bias": False}, {"affine": False}], ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_renorm_within_the_limits_of_all_results(dtype, affine, axis, select, rng):
    bounds = (1.25, 0.5)
    shape = (10, 4, 6) if axis == 1 else (10, 6, 4)
    layer, (x, dy) = made(rng, dtype=dtype, axis=axis, renorm=bounds, **affine), data(rng, shape, dtype)
    selects = select(rng)
    counts = np.ones((10, 6), bool)
    if "mask" in selects:
        counts = selects["mask"]
    if "lengths" in selects:
        counts = np.arange(6) < selects["lengths"][:, None]
    weights = np.broadcast_to(selects["weights"], (10, 6)) if "weights" in selects else counts
    hidden = np.broadcast_to(~np.expand_dims(counts, axis), shape)
    t, y_terms = renormed(x, np.where(hidden, 0, dy), layer, bounds, axis, weights.reshape(-1))
    plain = copy.deepcopy(layer)
    plain.renorm = None
    y = layer(np.where(hidden, np.nan, x).astype(dtype), fill=7.0, **selects)
    dx = layer.backward(np.where(hidden, np.nan, dy).astype(dtype))
    assert (y[hidden] == 7).all()
    errors = {"y": ulps(np.where(hidden, 0, y).astype(dtype), np.where(hidden, 0, t.y), y_terms, axis)}
    errors["dx"] = ulps(dx, np.where(hidden, 0, t.dx), t.dx_terms, axis)
    for name in ("dgamma", "dbeta"):
        got = getattr(layer, name)
        assert (got is None) == (getattr(layer, name[1:]) is None)
        if got is not None:
            assert got.dtype == layer.dtype
            errors[name] = ulps(got, getattr(t, name), getattr(t, f"{name}_terms"))
    assert_close(errors, dtype)
    plain(x, **selects)
    for name in ("running_mean", "running_var"):
        np.testing.assert_allclose(getattr(layer, name), getattr(plain, name), rtol=np.finfo(dtype).eps)
    assert layer.num_batches_tracked == 1


def test_renorm_keeps_the_digits_of_data_far_from_0(rng):
    """μ_B is a pair of numbers in μ_B − μ too: one of them would be off by 1e-7 at 1e9."""
    layer, (x, dy) = made(rng, renorm=INFINITE), data(rng)
    x += 1e9
    layer.running_mean += 1e9
    t, y_terms = renormed(x, dy, layer, INFINITE, 1)
    assert_close({"y": ulps(layer(x), t.y, y_terms, 1)}, "float64")


@pytest.mark.parametrize("dtype", HALVES)
def test_renorm_of_16_bits_is_that_of_float32_rounded_once(dtype, rng):
    layer, (x, dy) = made(rng, dtype="float32", renorm=(1.25, 0.5)), data(rng, dtype=dtype)
    wide = copy.deepcopy(layer)
    assert same(layer(x), as_type(wide(x.astype("f4")), dtype))
    assert same(layer.backward(dy), as_type(wide.backward(dy.astype("f4")), dtype))
    assert same(layer.dgamma, wide.dgamma)


def test_the_gradient_of_renorm_by_central_differences(rng):
    """Of Σdy·y in long double, with ρ and d held: the gradient goes through the batch's μ and σ alone."""
    layer = made(rng, 2, renorm=INFINITE)
    x, dy = data(rng, (5, 2))
    wide = {name: np.asarray(getattr(layer, name), np.longdouble) for name in ("gamma", "beta")}
    x0, eps = x.astype(np.longdouble), np.longdouble(EPS)
    sigma = np.sqrt(np.asarray(layer.running_var, np.longdouble) + eps)

    def constants(x):
        return np.sqrt(x.var(0) + eps) / sigma, (x.mean(0) - layer.running_mean) / sigma

    held = constants(x0)

    def loss(x, gamma, beta, constants=held):
        rho, d = constants
        return (dy * (gamma * ((x - x.mean(0)) / np.sqrt(x.var(0) + eps) * rho + d) + beta)).sum()

    def differences(of, at):
        h = np.longdouble(1e-6)
        steps = np.eye(at.size, dtype=np.longdouble).reshape(at.size, *at.shape) * h
        return np.array([(of(at + step) - of(at - step)) / (2 * h) for step in steps]).reshape(at.shape)

    layer(x)
    got = layer.backward(dy), layer.dgamma, layer.dbeta
    expected = (
        differences(lambda x: loss(x, **wide), x0),
        differences(lambda gamma: loss(x0, gamma, wide["beta"]), wide["gamma"]),
        differences(lambda beta: loss(x0, wide["gamma"], beta), wide["beta"]),
    )
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other.astype(float), rtol=1e-9)
    through = differences(lambda x: loss(x, **wide, constants=constants(x)), x0)
    assert abs(through - got[0]).max() > 0.1 * abs(through).max()


@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES])
def test_without_limits_y_is_that_of_evaluation_before_the_batch(dtype, rng):
    layer, (x, _) = made(rng, dtype="float32" if dtype in HALVES else dtype, renorm=INFINITE), data(rng, dtype=dtype)
    expected = copy.deepcopy(layer).eval()(x).astype(float)
    epsilon = 2.0**-7 if dtype == "bfloat16" else float(np.finfo(dtype).eps)
    np.testing.assert_allclose(layer(x).astype(float), expected, rtol=0, atol=8 * epsilon * abs(expected).max())
    assert layer.num_batches_tracked == 1


@selected
@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES])
def test_bounds_of_1_and_0_are_plain_bit_for_bit(dtype, select, rng):
    layer = made(rng, dtype="float64" if dtype == "float64" else "float32", activation=("leaky_relu", 0.1))
    layer.beta, layer.gamma = [-0.0, 1, 2, 3], [np.inf, 1, 2, 3]  # whose bits γ·1 and β + γ·0 would change
    x, dy = data(rng, dtype=dtype)
    x[:, 1] = 1.0
    selects = select(rng)
    other = copy.deepcopy(layer)
    other.renorm = (1, 0)
    for _ in range(2):
        assert same(other(x, add=dy, **selects), layer(x, add=dy, **selects))
        assert same(other.backward(dy), layer.backward(dy))
        assert all(same(getattr(other, name), getattr(layer, name)) for name in ("dgamma", "dbeta", "dadd"))
        assert state_of(other) == state_of(layer)


@pytest.mark.parametrize("activation", [None, "relu", ("leaky_relu", 0.1), ("clip", -0.5, 1.0)], ids=str)
def test_activation_and_residual_follow_a_renorm(activation, rng):
    layer, (x, dy) = made(rng, renorm=(1.25, 0.5), activation=activation), data(rng)
    add = rng.standard_normal(x.shape)
    before = copy.deepcopy(layer)
    t, _ = renormed(x, dy, before, layer.renorm, 1)
    pre = (t.y + add).astype(float)
    act, slope = {
        None: (pre, np.ones_like(pre)),
        "relu": (np.maximum(pre, 0), pre > 0),
        ("leaky_relu", 0.1): (np.where(pre > 0, pre, 0.1 * pre), np.where(pre > 0, 1, 0.1)),
        ("clip", -0.5, 1.0): (np.clip(pre, -0.5, 1), (pre > -0.5) & (pre < 1)),
    }[activation]
    t, _ = renormed(x, dy * slope, before, layer.renorm, 1)
    np.testing.assert_allclose(layer(x, add=add), act, rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_allclose(layer.backward(dy), t.dx.astype(float), rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_allclose(layer.dadd, dy * slope, rtol=ROUNDING)
    np.testing.assert_allclose(layer.dgamma, t.dgamma.astype(float), rtol=ROUNDING)


def test_a_channel_without_spread_in_either(rng):
    """With eps = 0, σ of the running statistics may be 0: ρ is at its limit then, and 1 where σ_B is 0 too."""
    layer = bn.BatchNorm(3, eps=0.0, renorm=(2.0, 1.0), dtype=np.float64)
    layer.running_mean, layer.running_var = [1.0, 1.0, -9.0], [0.0, 0.0, 0.0]
    x = np.array([[0.0, 1.0, 1.0], [2.0, 1.0, 1.0]])
    # xhat·ρ + d: ±1·2 + 0, 0·1 + 0 and 0·1 + 1
    assert layer(x).tolist() == [[-2.0, 0.0, 1.0], [2.0, 0.0, 1.0]]


def test_channels_with_nan_or_infinity_do_not_touch_others(rng):
    layer, (x, _) = made(rng, renorm=(1.25, 0.5)), data(rng)
    clean = copy.deepcopy(layer)(x)
    x[3, 1, 2], x[4, 2, 1] = np.nan, np.inf
    y = layer(x)
    assert np.isnan(y[:, 1:3]).all()
    assert same(y[:, [0, 3]], clean[:, [0, 3]])


# Keras itself.

KERAS = 2e-6
"""Relative to the largest value: float32 of Keras against long double."""


@pytest.fixture(scope="module")
def keras():
    os.environ.setdefault("KERAS_BACKEND", "torch")
    return pytest.importorskip("keras", exc_type=ImportError)


def keras_gradients(keras, module, x, dy):
    """dx, dgamma and dbeta of Σdy·y in training, by the backend."""
    if keras.backend.backend() == "torch":
        import torch

        leaf = torch.from_numpy(x).requires_grad_()
        variables = [leaf, module.gamma.value, module.beta.value]
        loss = (module(leaf, training=True) * torch.from_numpy(dy)).sum()
        return [gradient.detach().numpy() for gradient in torch.autograd.grad(loss, variables)]
    jax = pytest.importorskip("jax")
    fixed = [variable.value for variable in module.non_trainable_variables]
    trained = [variable.value for variable in module.trainable_variables]

    def loss(x, trained):
        y, _ = module.stateless_call(trained, fixed, x, training=True)
        return (y * dy).sum()

    dx, (dgamma, dbeta) = jax.grad(loss, argnums=(0, 1))(x, trained)
    return [np.asarray(gradient) for gradient in (dx, dgamma, dbeta)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bounds", [(1.25, 0.5), INFINITE, (3.0, 0.0)], ids=str)
def test_keras_renorm(keras, bounds, rng):
    rmax, dmax = bounds
    clipping = {"rmax": rmax, "rmin": 1 / rmax, "dmax": dmax}
    clipping = {name: value for name, value in clipping.items() if np.isfinite(value)}
    theirs = keras.layers.BatchNormalization(
        momentum=0.75, epsilon=EPS, renorm=True, renorm_clipping=clipping, renorm_momentum=0.75
    )
    theirs.build((None, 5, 4))
    layer = made(rng, axis=-1, dtype="float32", renorm=bounds, momentum=0.25, unbiased=False)
    theirs.gamma.assign(layer.gamma)
    theirs.beta.assign(layer.beta)
    for name in ("moving_mean", "renorm_mean"):
        getattr(theirs, name).assign(layer.running_mean)
    for name in ("moving_stddev", "renorm_stddev"):
        getattr(theirs, name).assign(np.sqrt(layer.running_var + np.float32(EPS)))
    x, dy = data(rng, (7, 5, 4), "float32")
    gradients = keras_gradients(keras, copy_of(keras, theirs), x, dy)
    y = keras.ops.convert_to_numpy(theirs(x, training=True))
    sigma, var = np.sqrt(layer.running_var + EPS), layer.running_var.copy()
    assert_near(layer(x), y)
    for got, expected in zip((layer.backward(dy), layer.dgamma, layer.dbeta), gradients, strict=True):
        assert_near(got, expected)
    # Means follow in the same way. Keras' σ follows σ_B, our variance σ_B² − eps.
    assert_near(layer.running_mean, keras.ops.convert_to_numpy(theirs.moving_mean))
    batch = x.astype(float).var((0, 1))
    followed = keras.ops.convert_to_numpy(theirs.moving_stddev)
    assert_near(followed, 0.75 * sigma + 0.25 * np.sqrt(batch + EPS))
    assert_near(layer.running_var, 0.75 * var + 0.25 * batch)
    assert (followed < np.sqrt(layer.running_var + EPS)).all()


def copy_of(keras, theirs):
    """Another layer of Keras with the same variables."""
    other = keras.layers.BatchNormalization.from_config(theirs.get_config())
    other.build((None, 5, 4))
    other.set_weights(theirs.get_weights())
    return other


def assert_near(got, expected):
    assert abs(np.asarray(got, float) - np.asarray(expected, float)).max() <= KERAS * max(1, abs(expected).max())


@pytest.mark.filterwarnings("ignore")
def test_keras_not_trainable_is_frozen(keras, rng):
    theirs = keras.layers.BatchNormalization(epsilon=EPS, trainable=False)
    theirs.build((None, 4))
    layer = made(rng, axis=-1, dtype="float32", statistics="running", update=False)
    theirs.set_weights([layer.gamma, layer.beta, layer.running_mean, layer.running_var])
    x, _ = data(rng, (9, 4), "float32")
    before = [weights.tobytes() for weights in theirs.get_weights()]
    assert_near(layer(x), keras.ops.convert_to_numpy(theirs(x, training=True)))
    assert [weights.tobytes() for weights in theirs.get_weights()] == before


# Ghost batches.


def cuts_of(samples, size):
    """As np.array_split cuts into ⌈N/size⌉; one part fewer where one sample would be alone."""
    parts = -(-samples // size)
    pieces = np.array_split(np.arange(samples), max(parts, 1))
    if len(pieces) > 1 and pieces[-1].size == 1:
        pieces = np.array_split(np.arange(samples), parts - 1)
    return pieces


@pytest.mark.parametrize("size", [2, 3, 4, 7, 100])
@pytest.mark.parametrize("samples", [2, 3, 4, 5, 9, 10, 13, 64])
def test_ghost_batches_are_nearly_equal_and_never_one_sample(samples, size, rng):
    layer, (x, _) = made(rng, 2, ghost=size), data(rng, (samples, 2))
    y, pieces = layer(x), cuts_of(samples, size)
    assert min(piece.size for piece in pieces) >= 2
    assert max(piece.size for piece in pieces) <= max(size, 3)
    for piece in pieces:
        xhat = (y[piece] - layer.beta) / layer.gamma
        np.testing.assert_allclose(xhat.mean(axis=0), 0, atol=1e-12)
        var = x[piece].var(axis=0)
        np.testing.assert_allclose(xhat.var(axis=0), var / (var + EPS), rtol=1e-10)


SHAPES = [(10, 4, 6), (7, 4), (6, 4, 3, 2)]


def by_hand(layer, x, dy, add, fill, selects, axis=1):
    """A loop of plain calls, with parameters in float64 so that sums are rounded once; all but x's parts are new."""
    first = int(axis == 0)
    gamma, beta = (None if a is None else a.astype(float) for a in (layer.gamma, layer.beta))
    y, dx, dadd = (np.empty_like(x) for _ in range(3))
    total, dgamma, dbeta = None, 0, 0
    for piece in cuts_of(x.shape[first], layer.ghost):
        where = (slice(None),) * first + (slice(piece[0], piece[-1] + 1),)
        chosen = {name: value[where[-1]] for name, value in selects.items()}
        y[where], saved = bn.forward(
            x[where], gamma, beta, axis=axis, eps=EPS, fill=fill, activation=layer.activation,
            add=None if add is None else add[where], **chosen,
        )  # fmt: skip
        gradients = bn.backward(dy[where], saved)
        dx[where] = gradients.dx
        if add is not None:
            dadd[where] = gradients.dadd
        if gamma is not None:
            dgamma, dbeta = dgamma + gradients.dgamma, dbeta + gradients.dbeta
        moments = bn.Moments.of(x[where], axis, **chosen)
        total = [*(total or []), moments]
    return y, dx, dadd, dgamma, dbeta, bn.Moments.merge_all(total)


@selected
@pytest.mark.parametrize("activation", [None, ("leaky_relu", 0.1)], ids=["plain", "activation and add"])
@pytest.mark.parametrize("affine", [{}, {"affine": False}], ids=str)
@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES])
def test_ghost_batches_are_a_loop_bit_for_bit(dtype, affine, activation, select, rng):
    own = "float64" if dtype == "float64" else "float32"
    layer = made(rng, dtype=own, ghost=4, activation=activation, **affine)
    x, dy = data(rng, dtype=dtype)
    add = None if activation is None else as_type(rng.standard_normal(x.shape), dtype)
    selects = select(rng)
    mean, var = layer.running_mean.copy(), layer.running_var.copy()
    y, dx, dadd, dgamma, dbeta, moments = by_hand(layer, x, dy, add, 7.0, selects)
    assert same(layer(x, add=add, fill=7.0, **selects), y)
    assert same(layer.backward(dy), dx)
    assert same(layer.dadd, None if add is None else dadd)
    if layer.affine:
        assert same(layer.dgamma, dgamma.astype(own))
        assert same(layer.dbeta, dbeta.astype(own))
    bn.update_running(mean, var, bn.forward(x, moments=moments)[1])
    assert same(layer.running_mean, mean)
    if "weights" in selects:  # whose m2 is var times their sum here
        np.testing.assert_allclose(layer.running_var, var, rtol=2 * np.finfo(own).eps)
    else:
        assert same(layer.running_var, var)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("arrangement", ["C", "channels first", "channels last", "Fortran", "gaps"])
def test_ghost_batches_in_other_arrangements(arrangement, shape, rng):
    axis = {"channels first": 0, "channels last": -1}.get(arrangement, 1)
    x, dy = data(rng, shape)
    if axis != 1:
        x, dy = (np.ascontiguousarray(np.moveaxis(array, 1, axis)) for array in (x, dy))
    if arrangement == "Fortran":
        x = np.asfortranarray(x)
    if arrangement == "gaps":
        x = np.repeat(x, 2, axis=-1)[..., ::2]
    layer = made(rng, ghost=3, axis=axis)
    y, dx, _, dgamma, _, _ = by_hand(layer, x, dy, None, 0.0, {}, axis)
    got = layer(x)
    assert same(got, y)
    assert got.strides == bn.forward(x, axis=axis)[0].strides
    assert same(layer.backward(dy), dx)
    assert same(layer.dgamma, dgamma)
    out = np.full(x.shape, 9.0, order="F")
    assert layer(x, out=out) is out
    assert same(out, y)
    assert layer.backward(dy, out=out) is out
    assert same(out, dx)
    assert layer.backward(dy, out=dy) is dy
    assert same(dy, dx)


def test_no_copy_of_ghost_batches(rng):
    """y and dx are written in place, part by part."""
    import tracemalloc

    layer, (x, dy) = made(rng, ghost=8, dtype="float32"), data(rng, (64, 4, 4096), "float32")
    out = np.empty_like(x)
    layer(x, out=out)
    layer.backward(dy, out=out)
    tracemalloc.start()
    try:
        layer(x, out=out)
        layer.backward(dy, out=out)
        assert tracemalloc.get_traced_memory()[1] < x.nbytes / 64
    finally:
        tracemalloc.stop()


@selected
def test_running_statistics_follow_the_whole_batch_whatever_the_parts(select, rng):
    x, _ = data(rng)
    selects = select(rng)
    plain = made(np.random.default_rng(0), momentum=0.5)
    before = plain.running_mean.copy(), plain.running_var.copy()
    plain(x, **selects)
    for size in (3, 5):
        layer = made(np.random.default_rng(0), momentum=0.5, ghost=size)
        layer(x, **selects)
        np.testing.assert_allclose(layer.running_mean, plain.running_mean, rtol=ROUNDING)
        np.testing.assert_allclose(layer.running_var, plain.running_var, rtol=ROUNDING)
        if not selects:
            np.testing.assert_allclose(layer.running_mean, (before[0] + x.mean((0, 2))) / 2, rtol=ROUNDING)
            np.testing.assert_allclose(layer.running_var, (before[1] + x.var((0, 2), ddof=1)) / 2, rtol=ROUNDING)


def test_one_ghost_batch_is_plain_bit_for_bit(rng):
    x, dy = data(rng)
    ghost, plain = (made(np.random.default_rng(0), **way) for way in ({"ghost": 10}, {}))
    assert same(ghost(x), plain(x))
    assert same(ghost.backward(dy), plain.backward(dy))
    assert state_of(ghost) == state_of(plain)


def test_a_part_that_is_masked_as_a_whole_is_empty(rng):
    layer, (x, dy) = made(rng, ghost=5), data(rng)
    mask = np.ones((10, 6), bool)
    mask[:5] = False
    y = layer(np.where(mask[:, None], x, np.nan), mask=mask, fill=7.0)
    assert (y[:5] == 7).all()
    expected, saved = bn.forward(x[5:], layer.gamma, layer.beta, eps=EPS)
    assert same(y[5:], expected)
    assert not layer.backward(dy)[:5].any()
    np.testing.assert_allclose(layer.dgamma, bn.backward(dy[5:], saved).dgamma, rtol=ROUNDING)


@pytest.mark.parametrize(
    ("selects", "message"),
    [
        (
            {"lengths": [6] * 5 + [0, 0, 1, 0, 0]},
            r"got 1 of x of shape \(5, 4, 6\) with axis=1 in the ghost batch of samp",
        ),
        ({"weights": np.repeat([1.0, 0.0], 5)[:, None]}, r"got 0 of x .* in the ghost batch of samples 5 to 9; use"),
        ({"weights": np.ones((5, 6))}, r"weights must have shape \(10, 6\)"),
        ({"mask": np.ones((10, 6))}, "mask must have dtype bool"),
        ({"mask": np.ones((10, 6), bool), "lengths": [6] * 10}, "at most one of mask, lengths and weights"),
        ({"fill": "0"}, "fill must be a number"),
        ({"add": np.ones((10, 4, 6), "f4")}, "add must have the dtype of x"),
        ({"add": np.ones((5, 4, 6))}, "add must have the shape of x"),
        ({"num_threads": 0}, "num_threads must be"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_a_refused_ghost_call_writes_nothing(selects, message, rng):
    layer, (x, _) = made(rng, ghost=5), data(rng)
    before, out = state_of(layer), np.full(x.shape, 9.0)
    with pytest.raises((TypeError, ValueError), match=message):
        layer(x, out=out, **selects)
    assert (out == 9).all()
    assert state_of(layer) == before


def test_refused_outputs_of_ghost_batches(rng):
    layer, (x, dy) = made(rng, ghost=5), data(rng)
    before = x.copy()
    for out, message in (
        (x, "out must not overlap x"),
        (x[::-1], "out must not overlap x"),
        (x[:5], "must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x, out=out)
    layer(x)
    for out, message in ((x, "out must not overlap x"), (dy[::-1], "out must not overlap dy"), (dy[:5], "have shape")):
        with pytest.raises(ValueError, match=message):
            layer.backward(dy, out=out)
    with pytest.raises(ValueError, match="dy must have the shape of x"):
        layer.backward(dy[:5])
    x.resize((5, 8, 6), refcheck=False)
    with pytest.raises(ValueError, match="x must stay what forward saw"):
        layer.backward(dy)
    assert same(x.reshape(before.shape), before)


def test_threads_do_not_matter(rng, always_threaded):
    x, dy = data(rng, (40, 4, 50), "float32")
    for way in WAYS.values():
        bits = set()
        for threads in (1, 2, 5):
            layer = made(np.random.default_rng(0), dtype="float32", **way)
            found = layer(x, num_threads=threads), layer.backward(dy, num_threads=threads), layer.dgamma, layer.dbeta
            bits.add(b"".join(array.tobytes() for array in found) + repr(state_of(layer)).encode())
        assert len(bits) == 1


# Frozen.


@selected
@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES])
@pytest.mark.parametrize("affine", [{}, {"bias": False}, {"affine": False}], ids=str)
def test_a_frozen_layer_is_evaluation_bit_for_bit(affine, dtype, select, rng):
    own = "float64" if dtype == "float64" else "float32"
    layer = made(rng, dtype=own, statistics="running", update=False, activation="relu", **affine)
    x, dy = data(rng, dtype=dtype)
    selects, before = select(rng), state_of(layer)
    evaluated = copy.deepcopy(layer).eval(keep_input=True)
    assert same(layer(x, add=dy, fill=7.0, **selects), evaluated(x, add=dy, fill=7.0, **selects))
    assert same(layer.backward(dy), evaluated.backward(dy))
    assert all(same(getattr(layer, name), getattr(evaluated, name)) for name in ("dgamma", "dbeta", "dadd"))
    assert state_of(layer) == before
    selects = {name: value for name, value in selects.items() if name != "weights"}
    how = {"eps": EPS, "activation": "relu", "add": dy, "fill": 7.0}
    y = bn.inference(x, layer.running_mean, layer.running_var, layer.gamma, layer.beta, **how, **selects)
    assert same(layer(x, add=dy, fill=7.0, **selects), y)


def test_one_sample_is_enough_for_a_frozen_layer(rng):
    layer = made(rng, statistics="running", update=False)
    assert layer(np.ones((1, 4))).shape == (1, 4)
    for way in ({"statistics": "running"}, {"update": False}, {"renorm": (3, 5)}, {"ghost": 2}):
        layer = made(rng, **way)
        before = state_of(layer)
        with pytest.raises(ValueError, match="training needs more than one value per channel"):
            layer(np.ones((1, 4)))
        assert state_of(layer) == before


def test_a_frozen_layer_keeps_x_unless_it_is_written_over(rng):
    layer, (x, dy) = made(rng, statistics="running", update=False), data(rng)
    expected = layer(x)
    layer.backward(dy)
    assert same(layer(x, out=x), expected)
    with pytest.raises(RuntimeError, match="the last call wrote y over one of them"):
        layer.backward(dy)


@selected
def test_running_statistics_can_be_used_and_moved(select, rng):
    """y of what they were before the batch; the state of plain training after it. Also in place."""
    layer, (x, dy) = made(rng, statistics="running"), data(rng)
    selects = select(rng)
    evaluated, plain = copy.deepcopy(layer).eval(keep_input=True), copy.deepcopy(layer)
    plain.statistics = "batch"
    for _ in range(2):
        evaluated.load_state_dict(layer.state_dict())
        expected = evaluated(x, **selects)
        assert same(layer(x, **selects), expected)
        assert same(layer.backward(dy), evaluated.backward(dy))
        plain(x, **selects)
        assert state_of(layer) == state_of(plain)
    evaluated.load_state_dict(layer.state_dict())
    expected = evaluated(x, **selects)
    plain(x, **selects)
    assert same(layer(x, out=x, **selects), expected)
    assert state_of(layer) == state_of(plain)


@pytest.mark.parametrize("way", [{}, {"renorm": (1.25, 0.5)}, {"ghost": 3}], ids=str)
def test_without_updates_the_rest_is_as_with_them(way, rng):
    still, (x, dy) = made(rng, update=False, **way), data(rng)
    moving, before = copy.deepcopy(still), state_of(still)
    moving.update = True
    assert same(still(x), moving(x))
    assert same(still.backward(dy), moving.backward(dy))
    assert same(still.dgamma, moving.dgamma)
    assert state_of(still) == before
    assert moving.num_batches_tracked == 1


# All ways.


@ways
def test_gradients_are_computed_where_needed(way, rng):
    layer, (x, dy) = made(rng, **way), data(rng)
    names = ("dx", "dgamma", "dbeta", "dadd")
    layer(x, add=dy)
    whole = dict(zip(names, (layer.backward(dy), layer.dgamma, layer.dbeta, layer.dadd), strict=True))
    assert all(value is not None for value in whole.values())
    for need in ("dx", "dgamma", "dbeta", "dadd", ["dgamma", "dadd"], ("dx", "dbeta"), {"dx", "dgamma"}, ()):
        found = dict(zip(names, (layer.backward(dy, need=need), layer.dgamma, layer.dbeta, layer.dadd), strict=True))
        wanted = {need} if isinstance(need, str) else set(need)
        assert all(same(found[name], whole[name] if name in wanted else None) for name in names), need
    out = np.empty_like(x)
    assert layer.backward(dy, out=out) is out
    assert same(out, whole["dx"])
    for need in ("d", ["dx", "dmu"], 5):
        with pytest.raises(ValueError, match="need must be one or more of the names"):
            layer.backward(dy, need=need)
    with pytest.raises(ValueError, match="out is for dx, so need must contain"):
        layer.backward(dy, need="dgamma", out=out)


@ways
def test_y_goes_where_it_is_asked_to(way, rng):
    layer, (x, _) = made(rng, update=False, **{name: way[name] for name in way if name != "update"}), data(rng)
    add = rng.standard_normal(x.shape)
    expected = layer(x, add=add)
    assert layer(x, add=add, out=add) is add
    assert same(add, expected)


@ways
def test_an_empty_batch_changes_nothing(way, rng):
    layer = made(rng, **way)
    before = state_of(layer)
    empty = np.empty((0, 4, 6))
    assert layer(empty).shape == layer.backward(empty).shape == (0, 4, 6)
    assert not layer.dgamma.any()
    assert not layer.dbeta.any()
    x, dy = data(rng)
    y = layer(x, lengths=np.zeros(10, int), fill=7.0)
    assert (y == 7).all()
    assert not layer.backward(dy).any()
    assert not layer.dgamma.any()
    assert state_of(layer) == before


@ways
def test_evaluation_is_the_same_whatever_the_way(way, rng):
    layer, (x, dy) = made(rng, **way).eval(keep_input=True), data(rng)
    plain = made(np.random.default_rng(20150211)).eval(keep_input=True)
    plain.load_state_dict(layer.state_dict())
    assert same(layer(x), plain(x))
    assert same(layer.backward(dy), plain.backward(dy))
    assert same(layer.dgamma, plain.dgamma)
    assert same(bn.Plan.of(layer)(x), plain(x))


def test_evaluation_without_running_statistics_has_no_ghosts(rng):
    layer, (x, _) = made(rng, track_running_stats=False, ghost=3), data(rng)
    y = layer(x)
    expected = bn.forward(x, layer.gamma, layer.beta, eps=EPS)[0]
    assert not same(y, expected)
    assert same(layer.eval()(x), expected)


@ways
def test_files_pickles_and_copies_keep_the_way(way, rng, tmp_path):
    layer, (x, dy) = made(rng, **way), data(rng)
    layer(x)
    layer.save(tmp_path / "layer")
    copies = [bn.BatchNorm.load(tmp_path / "layer"), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)]
    y, dx = layer(x), layer.backward(dy)
    for one in copies:
        assert repr(one) == repr(layer)
        assert (one.statistics, one.update, one.renorm, one.ghost) == (
            layer.statistics,
            layer.update,
            layer.renorm,
            layer.ghost,
        )
        with pytest.raises(RuntimeError, match="backward needs a call"):
            one.backward(dy)
        assert same(one(x), y)
        assert same(one.backward(dy), dx)
        assert state_of(one) == state_of(layer)
    order = ("statistics", "update", "renorm", "ghost")
    shown = "".join(f", {name}={way[name]!r}" for name in order if name in way)
    assert repr(layer).endswith(f"dtype=float64{shown})")


PLAIN_FILE = {
    "num_features", "axis", "eps", "momentum", "affine", "track_running_stats", "float_bits",
    "weight", "bias", "running_mean", "running_var", "num_batches_tracked",
}  # fmt: skip
"""What a layer without any of these settings has always been written as."""


@pytest.mark.parametrize(
    ("way", "more"),
    [
        ({}, []),
        ({"update": False}, ["update"]),
        ({"statistics": "running", "update": False}, ["update", "trains_with_running"]),
        ({"renorm": (np.inf, 5)}, ["renorm"]),
        ({"renorm": (1, 0)}, ["renorm"]),
        ({"ghost": 32}, ["ghost"]),
    ],
    ids=str,
)
def test_a_file_says_only_what_differs(way, more, tmp_path):
    layer = bn.BatchNorm(3, **way)
    layer.save(tmp_path / "layer")
    with np.load(tmp_path / "layer") as arrays:
        assert set(arrays.files) == PLAIN_FILE.union(more)
    assert repr(bn.BatchNorm.load(tmp_path / "layer")) == repr(layer)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"renorm": np.array([0.5, 1.0])}, "rmax >= 1 and dmax >= 0"),
        ({"renorm": np.array([np.nan, 1.0])}, "rmax >= 1 and dmax >= 0"),
        ({"renorm": np.array([2.0])}, "renorm must be two float64 numbers"),
        ({"renorm": np.array([2, 3])}, "renorm must be two float64 numbers"),
        ({"ghost": np.array(1)}, "ghost must be None or at least 2 samples, got 1"),
        ({"ghost": np.array(2.0)}, "ghost must be one int64"),
        ({"ghost": np.array(4), "renorm": np.array([2.0, 3.0])}, "at most one of renorm and ghost"),
        ({"ghost": np.array(4), "trains_with_running": np.array(1)}, "ghost=4 needs statistics='batch'"),
    ],
    ids=str,
)
def test_damaged_files_are_refused(damage, message, tmp_path):
    bn.BatchNorm(3).save(tmp_path / "layer")
    with np.load(tmp_path / "layer") as arrays:
        content = dict(arrays)
    np.savez(tmp_path / "damaged.npz", **content, **damage)
    with pytest.raises(ValueError, match=message):
        bn.BatchNorm.load(tmp_path / "damaged.npz")


BAD = [
    ({"statistics": "batches"}, ValueError, "statistics must be 'batch' or 'running', got 'batches'"),
    ({"statistics": None}, ValueError, "statistics must be 'batch' or 'running', got None"),
    ({"renorm": 3.0}, ValueError, r"renorm must be None or \(rmax, dmax\), got 3.0"),
    ({"renorm": (1, 2, 3)}, ValueError, r"renorm must be None or \(rmax, dmax\), got \(1, 2, 3\)"),
    ({"renorm": "12"}, ValueError, r"renorm must be None or \(rmax, dmax\), got '12'"),
    ({"renorm": ("3", 5)}, TypeError, "rmax must be a number, got str"),
    ({"renorm": (3, None)}, TypeError, "dmax must be a number, got NoneType"),
    ({"renorm": (0.9, 5)}, ValueError, r"rmax >= 1 and dmax >= 0, got \(0.9, 5.0\)"),
    ({"renorm": (3, -1)}, ValueError, r"rmax >= 1 and dmax >= 0, got \(3.0, -1.0\)"),
    ({"renorm": (np.nan, 1)}, ValueError, "rmax >= 1 and dmax >= 0"),
    ({"ghost": 1}, ValueError, "ghost must be None or at least 2 samples, got 1"),
    ({"ghost": 0}, ValueError, "ghost must be None or at least 2 samples, got 0"),
    ({"ghost": 4.0}, TypeError, "ghost must be an integer, got float"),
    ({"ghost": "4"}, TypeError, "ghost must be an integer, got str"),
    ({"renorm": (3, 5), "ghost": 4}, ValueError, r"at most one of renorm and ghost .* got \(3.0, 5.0\) and 4: renorm"),
    ({"statistics": "running", "ghost": 4}, ValueError, "ghost=4 needs statistics='batch'"),
    ({"statistics": "running", "renorm": (3, 5)}, ValueError, r"renorm=\(3.0, 5.0\) needs statistics='batch'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=str)
def test_bad_ways_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        bn.BatchNorm(3, **arguments)
    layer = bn.BatchNorm(3)
    *first, (last, value) = arguments.items()
    for name, good in first:
        setattr(layer, name, good)
    before = repr(layer)
    with pytest.raises(error, match=message):
        setattr(layer, last, value)
    assert repr(layer) == before


@pytest.mark.parametrize("way", [{"statistics": "running"}, {"renorm": (3.0, 5.0)}], ids=str)
def test_what_needs_running_statistics_says_so(way):
    ((name, value),) = way.items()
    message = f"{name}={value!r} needs a layer with running statistics, made with track_running_stats=True"
    with pytest.raises(ValueError) as caught:
        bn.BatchNorm(3, track_running_stats=False, **way)
    assert str(caught.value) == message
    with pytest.raises(ValueError) as caught:
        setattr(bn.BatchNorm(3, track_running_stats=False), name, value)
    assert str(caught.value) == message


@pytest.mark.parametrize("way", [{"statistics": "running"}, {"renorm": (3.0, 5.0)}], ids=str)
def test_tracking_that_was_stopped_later_stops_updates_alone(way, rng):
    layer, (x, _) = made(rng, **way), data(rng)
    other = copy.deepcopy(layer)
    other.update = False
    layer.track_running_stats = False
    before = state_of(layer)
    assert same(layer(x), other(x))
    assert state_of(layer) == before


def test_a_negative_running_variance_is_an_error_of_renorm(rng):
    layer, (x, _) = made(rng, renorm=(3, 5)), data(rng)
    layer.running_var = [1, -2, 3, 4]
    before, out = state_of(layer), np.full(x.shape, 9.0)
    with pytest.raises(ValueError, match=r"var must not be negative, got -2.0 in channel 1"):
        layer(x, out=out)
    assert (out == 9).all()
    assert state_of(layer) == before


def test_a_schedule(rng):
    """The limits of a renorm change from step to step; a change reaches the next call, not the last one's gradient."""
    layer, (x, dy) = made(rng, update=False), data(rng)
    plain = layer(x), layer.backward(dy)
    layer.renorm = np.array([2, 1])
    assert layer.renorm == (2.0, 1.0)
    corrected = layer(x)
    layer.renorm = None
    dx = layer.backward(dy)
    assert not same(corrected, plain[0])
    assert not same(dx, plain[1])
    assert same(layer(x), plain[0])
    assert same(layer.backward(dy), plain[1])


# A recipe.


@pytest.mark.parametrize("dtype", FLOATS)
def test_instance_norm_is_a_reshape(dtype, rng):
    N, C, H, W = 4, 3, 5, 6
    x, dy = data(rng, (N, C, H, W), dtype)
    gamma, beta = rng.uniform(0.5, 2, (2, C)).astype(dtype)
    y, saved = bn.forward(x.reshape(1, N * C, H * W), np.tile(gamma, N), np.tile(beta, N))
    dx, dgamma, dbeta = bn.backward(dy.reshape(1, N * C, H * W), saved)
    y, dx = y.reshape(x.shape), dx.reshape(x.shape)
    for n in range(N):
        t = truth(x[n], dy[n], gamma, beta, axis=0)
        assert_close({"y": ulps(y[n], t.y, t.y_terms, 0), "dx": ulps(dx[n], t.dx, t.dx_terms, 0)}, dtype)
    wide = x.astype(np.longdouble)
    spread = np.sqrt(wide.var((2, 3), keepdims=True) + np.longdouble(1e-5))
    xhat = (wide - wide.mean((2, 3), keepdims=True)) / spread
    tolerance = {"rtol": 1e-4 if dtype == "float32" else ROUNDING, "atol": 1e-5 if dtype == "float32" else ROUNDING}
    np.testing.assert_allclose(dgamma.reshape(N, C).sum(0), (dy * xhat).sum((0, 2, 3)).astype(float), **tolerance)
    np.testing.assert_allclose(dbeta.reshape(N, C).sum(0), dy.astype(float).sum((0, 2, 3)), **tolerance)
