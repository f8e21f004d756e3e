"""y = act(gamma·xhat + beta + add): bit for bit what the functions give one after the other, and right by the oracle.

Where an activation is closed is read from y here, and never from the package.
"""

import doctest
import pickle
from pathlib import Path

import numpy as np
import pytest
from oracle import ULPS, gradient_errors, truth, ulps
from shapes import ARRANGEMENTS, VIEWS

import batchnorm as bn

ACTIVATIONS = {"relu": "relu", "leaky_relu": ("leaky_relu", 0.1), "clip": ("clip", -0.5, 0.75)}
DTYPES = ["float32", "float64"]

activations = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
views = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
added = pytest.mark.parametrize("added", [False, True], ids=["alone", "added"])


def act(pre, activation):
    """As somebody would write it in NumPy, in the dtype of pre."""
    name, *numbers = (activation,) if activation == "relu" else activation
    numbers = np.array(numbers, pre.dtype)
    if name == "clip":
        return np.clip(pre, *numbers)
    return np.where(pre > 0, pre, numbers[0] * pre if numbers.size else pre.dtype.type(0))


def is_closed(y, activation):
    if activation == "relu" or activation[0] == "leaky_relu":
        return y <= 0
    low, high = np.array(activation[1:], y.dtype)
    return (y <= low) | (y >= high)


def passed(dy, y, activation):
    """dy·act′ where y is the result; the derivative at the bounds is that below them."""
    slope = activation[1] if activation[0] == "leaky_relu" else 0
    return np.where(is_closed(y, activation), dy.dtype.type(slope) * dy if slope else dy.dtype.type(0), dy)


def data(rng, view, dtype):
    x, dy, add = (rng.normal(mean, 1.5, view).astype(dtype) for mean in (0.5, 0, 0))
    gamma, beta = (rng.uniform(-2, 2, view[1]).astype(dtype) for _ in range(2))
    return x, dy, add, gamma, beta


def same(got, expected):
    """The same bits; a NaN is a NaN, and 0 may have a sign. If not, NumPy says where they differ."""
    if got.dtype != expected.dtype or not np.array_equal(got, expected, equal_nan=True):
        np.testing.assert_array_equal(got, expected, strict=True)
    return True


def assert_same(gradients, expected):
    for name in ("dx", "dgamma", "dbeta"):
        assert same(getattr(gradients, name), getattr(expected, name)), name


# ---- Bits: one call is two calls


@activations
@added
@dtypes
@views
def test_one_call_gives_the_bits_of_two(view, dtype, added, activation, rng, always_threaded):
    x, dy, add, gamma, beta = data(rng, view, dtype)
    add = add if added else None
    plain, saved_plain = bn.forward(x, gamma, beta)
    pre = plain if add is None else plain + add
    expected = bn.backward(passed(dy, pre if activation == "relu" else act(pre, activation), activation), saved_plain)
    for threads in (1, 2):
        y, saved = bn.forward(x, gamma, beta, activation=activation, add=add, num_threads=threads)
        assert same(y, act(pre, activation))
        gradients = bn.backward(dy, saved, num_threads=threads)
        assert_same(gradients, expected)
        if added:
            assert same(gradients.dadd, passed(dy, y, activation))
        else:
            assert gradients.dadd is None


@activations
@added
@dtypes
@views
def test_fixed_statistics(view, dtype, added, activation, rng, always_threaded):
    x, dy, add, gamma, beta = data(rng, view, dtype)
    add = add if added else None
    mean, var = rng.normal(0, 1, view[1]), rng.uniform(0.5, 2, view[1])
    fixed, after = (x, mean, var, gamma), {"activation": activation, "add": add}
    plain = bn.inference(*fixed, beta)
    pre = plain if add is None else plain + add
    y = bn.inference(*fixed, beta, **after)
    assert same(y, act(pre, activation))
    need = ("dx", "dgamma", "dbeta", "dmean", "dvar", "dadd")
    g = passed(dy, y, activation)
    expected = bn.inference_backward(g, *fixed, need=need)
    gradients = bn.inference_backward(dy, *fixed, beta=beta, need=need, **after)
    assert_same(gradients, expected)
    assert same(gradients.dmean, expected.dmean)
    assert same(gradients.dvar, expected.dvar)
    assert same(gradients.dadd, g) if added else gradients.dadd is None


@dtypes
@views
def test_a_residual_without_an_activation(view, dtype, rng, always_threaded):
    x, dy, add, gamma, beta = data(rng, view, dtype)
    plain, saved_plain = bn.forward(x, gamma, beta)
    y, saved = bn.forward(x, gamma, beta, add=add)
    assert same(y, plain + add)
    gradients = bn.backward(dy, saved)
    assert_same(gradients, bn.backward(dy, saved_plain))
    assert same(gradients.dadd, dy)
    assert not np.shares_memory(gradients.dadd, dy)
    fixed = x, saved.mean, saved.var, gamma, beta
    assert same(bn.inference(*fixed, add=add), bn.inference(*fixed) + add)


@activations
@added
@pytest.mark.parametrize("view", [VIEWS["short rows"], VIEWS["segments"], VIEWS["few channels, rows side by side"]])
def test_steps(view, added, activation, rng, always_threaded):
    """Merged statistics, sums, paths and upstream gradients of the statistics."""
    x, dy, add, gamma, beta = data(rng, view, "float32")
    add = add if added else None
    y, saved = bn.forward(x, gamma, beta, activation=activation, add=add)
    again, of_moments = bn.forward(x, gamma, beta, moments=bn.Moments.of(x), activation=activation, add=add)
    assert same(again, y)
    sums = bn.grad_sums(dy, saved)
    assert_same(bn.backward(dy, of_moments, sums=sums), bn.backward(dy, saved))
    plain, g = bn.forward(x, gamma, beta)[1], passed(dy, y, activation)
    for arguments in ({"through": ()}, {"through": "mean"}, {"dmean": gamma, "dvar": beta}, {"need": "dbeta"}):
        got, expected = bn.backward(dy, saved, **arguments), bn.backward(g, plain, **arguments)
        for one, other in zip(got, expected, strict=True):
            assert same(one, other) if other is not None else one is None
        assert got.dadd is None or "need" not in arguments


@activations
@added
def test_channels_whose_coefficients_do_not_fit_float32(activation, added, rng, always_threaded):
    """They are written in float64, and summed again: a gamma or a spread that float32 has no digits for."""
    for view in [(40, 9, 1), (7, 9, 30), (3, 9, 1), (300, 9, 49)]:
        x, dy, add, gamma, beta = data(rng, view, "float32")
        gamma[:4] = 1e-36, -1e-36, 3e33, -1e-30
        beta[:5] = 1e-37, 1e-38, 0, -1e-31, 1e-36
        x[:, 5] *= np.float32(1e30)
        x[:, 6] *= np.float32(1e-30)
        x[0, 7] = 1e6
        add = add * np.float32(1e-30) if added else None
        plain, saved_plain = bn.forward(x, gamma, beta, eps=0.0)
        y, saved = bn.forward(x, gamma, beta, eps=0.0, activation=activation, add=add)
        if not added:
            assert same(y, act(plain, activation))
        gradients, expected = bn.backward(dy, saved), bn.backward(passed(dy, y, activation), saved_plain)
        for name in ("dx", "dgamma", "dbeta"):
            got, right = getattr(gradients, name), getattr(expected, name)
            size = abs(right).max(axis=(0, 2) if right.ndim > 1 else (), keepdims=True)
            assert (abs(got - right) <= 1e-5 * size).all(), name


def near_the_bound(rng, dtype, channels, values):
    """Values of x around those that give 0, from the next number to some thousands away, at any offset and scale."""
    tiny, large = (-40, 30) if dtype == np.float32 else (-300, 280)
    gamma = (rng.choice([-1, 1], channels) * 10.0 ** rng.uniform(tiny / 2, large / 2, channels)).astype(dtype)
    beta = (gamma * rng.normal(0, 2, channels)).astype(dtype)
    beta[rng.random(channels) < 0.1] = 0
    mean = (rng.normal(0, 1, channels) * 10.0 ** rng.uniform(-6, 6, channels)).astype(dtype)
    std = 10.0 ** rng.uniform(-5, 3, channels)
    root = (mean - beta.astype(float) / gamma * std).astype(dtype)
    steps = np.round(rng.choice([-1, 1], (values, channels)) * 10 ** rng.uniform(0, 4, (values, channels)) - 1)
    x = (root + steps * np.spacing(abs(root))).astype(dtype)
    x[: values // 8] = rng.choice([0, 1, -1], (values // 8, channels)) * np.finfo(dtype).smallest_subnormal
    return x, gamma, beta, mean, std * std


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(-1, 1), (-1, 10), (2, 50)], ids=["columns", "short rows", "lanes"])
def test_the_sign_is_that_of_y(dtype, shape, rng, always_threaded):
    """For dy = 1 dbeta counts where dy passes, and dx along the direct path is not 0 there."""
    for _ in range(20):
        flat, gamma, beta, mean, var = near_the_bound(rng, dtype, 64, 100)
        x = np.moveaxis(flat.reshape(*shape, 64), -1, 1)
        given = x, mean, var, gamma
        y = bn.inference(*given, beta, eps=0.0, activation="relu")
        gradients = bn.inference_backward(np.ones_like(x), *given, beta=beta, eps=0.0, activation="relu")
        axes = tuple(i for i in range(x.ndim) if i != 1)
        assert np.array_equal(gradients.dbeta, (y > 0).sum(axis=axes))
        assert np.array_equal(gradients.dx != 0, y > 0)


# ---- The oracle, NaN and infinity


@activations
@added
@dtypes
def test_the_contract(dtype, added, activation, rng):
    for view in [(33, 7, 1), (8, 5, 49), (5, 3, 200)]:
        x, dy, add, gamma, beta = data(rng, view, dtype)
        add = add if added else None
        y, saved = bn.forward(x, gamma, beta, activation=activation, add=add)
        gradients = bn.backward(dy, saved)
        t = truth(x, passed(dy, y, activation), gamma, beta)
        pre = t.y if add is None else t.y + add
        terms = t.y_terms if add is None else np.maximum(t.y_terms, abs(pre))
        assert ulps(y, act(pre, activation), terms) <= ULPS["y"][dtype] + added
        for name, error in gradient_errors(gradients, t, t, 1).items():
            assert error <= ULPS[name][dtype], name


@dtypes
@added
def test_nan_and_infinity(dtype, added):
    x = np.array([[np.nan], [np.inf], [-np.inf], [1.0], [-1.0]], dtype)
    add = np.zeros_like(x) if added else None
    fixed = x, np.zeros(1), np.ones(1)
    leaky = ("leaky_relu", 0.5)
    for activation, expected in [("relu", [np.inf, 0, 1, 0]), (leaky, [np.inf, -np.inf, 1, -0.5])]:
        y = bn.inference(*fixed, eps=0.0, activation=activation, add=add)
        assert np.isnan(y[0, 0])
        assert y[1:, 0].tolist() == expected
    for activation, expected in [("relu", [1, 1, 0, 1, 0]), (leaky, [1, 1, 0.5, 1, 0.5])]:
        gradients = bn.inference_backward(np.ones_like(x), *fixed, eps=0.0, activation=activation, add=add)
        assert gradients.dx[:, 0].tolist() == expected


@dtypes
def test_what_does_not_pass_may_be_anything(dtype, rng):
    x, dy, add, gamma, beta = data(rng, (40, 6, 5), dtype)
    for residual in (None, add):
        y, saved = bn.forward(x, gamma, beta, activation="relu", add=residual)
        expected = bn.backward(np.where(y > 0, dy, 0).astype(dtype), saved)
        for junk in (np.nan, np.inf):
            assert_same(bn.backward(np.where(y > 0, dy, junk).astype(dtype), saved), expected)


@added
def test_a_channel_that_is_closed_everywhere(added):
    x = np.linspace(-1, 1, 600, dtype=np.float32).reshape(100, 3, 2)
    add = np.zeros_like(x) if added else None
    y, saved = bn.forward(x, beta=[-9, 0, 9], activation="relu", add=add)
    gradients = bn.backward(np.ones_like(x), saved)
    assert not y[:, 0].any()
    assert y[:, 1].any()
    assert y[:, 2].all()
    assert not gradients.dx[:, 0].any()
    assert gradients.dbeta[0] == 0
    assert bn.grad_sums(np.ones_like(x), saved).sum_dy.tolist() == [0, (y[:, 1] > 0).sum(), 200]


@activations
def test_an_empty_batch(activation):
    x = np.empty((0, 3, 4), np.float32)
    y, saved = bn.forward(x, np.ones(3), np.ones(3), activation=activation, add=x)
    gradients = bn.backward(x, saved)
    assert y.shape == gradients.dx.shape == gradients.dadd.shape == x.shape
    assert not gradients.dgamma.any()
    assert bn.inference(x, np.zeros(3), np.ones(3), activation=activation, add=x).shape == x.shape


# ---- Arrays


@pytest.mark.parametrize("arrange", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_arrangements(arrange, rng):
    x, dy, add, gamma, beta = data(rng, (6, 5, 7), "float32")
    for arranged_x in (x, arrange(x)):
        plain, saved_plain = bn.forward(arranged_x, gamma, beta)
        y, saved = bn.forward(arranged_x, gamma, beta, activation="relu", add=arrange(add))
        assert np.array_equal(y, act(plain + add, "relu"))
        gradients, passing = bn.backward(arrange(dy), saved), passed(dy, y, "relu")
        assert np.array_equal(gradients.dadd, passing)
        assert_same(gradients, bn.backward(passing, saved_plain))


@views
def test_in_place(view, rng, always_threaded):
    x, dy, add, gamma, beta = data(rng, view, "float32")
    y, saved = bn.forward(x, gamma, beta, activation="relu", add=add)
    expected = bn.backward(dy, saved)
    out = add.copy()
    got, saved = bn.forward(x, gamma, beta, activation="relu", add=out, out=out)
    assert got is out
    assert same(out, y)
    out = dy.copy()
    gradients = bn.backward(out, saved, out=out)
    assert gradients.dx is out
    assert_same(gradients, expected)
    assert same(gradients.dadd, expected.dadd)
    fixed = x, saved.mean, saved.var, gamma, beta
    expected = bn.inference(*fixed, activation="relu", add=add)
    for name in ("x", "add"):
        out = (x if name == "x" else add).copy()
        given = (out, *fixed[1:]) if name == "x" else fixed
        bn.inference(*given, activation="relu", add=out if name == "add" else add, out=out)
        assert same(out, expected)


@pytest.mark.slow
def test_beyond_the_caches(rng):
    """Results that go around the cache, and the notes of two threads in one byte."""
    for view in [(16, 65, 1200 * 9 + 3), (16, 64, 112 * 112), (70000, 64, 1)]:
        x, dy, add, gamma, beta = data(rng, view, "float32")
        plain, saved_plain = bn.forward(x, gamma, beta)
        for residual in (None, add):
            pre = plain if residual is None else plain + residual
            y, saved = bn.forward(x, gamma, beta, activation="relu", add=residual, num_threads=2)
            assert same(y, act(pre, "relu"))
            assert_same(bn.backward(dy, saved, num_threads=2), bn.backward(passed(dy, y, "relu"), saved_plain))


@activations
@added
def test_float16(activation, added, rng):
    """As float32 of the same values, rounded; what was noted passes back what was rounded."""
    for view in [(40, 9, 1), (8, 5, 49), (3, 5, 300)]:
        x, dy, add, gamma, beta = (a.astype(np.float16) for a in data(rng, view, "float32"))
        residual, residual32 = (add, add.astype(np.float32)) if added else (None, None)
        y, saved = bn.forward(x, gamma, beta, activation=activation, add=residual)
        y32, saved32 = bn.forward(
            *(a.astype(np.float32) for a in (x, gamma, beta)), activation=activation, add=residual32
        )
        assert same(y, y32.astype(np.float16))
        gradients = bn.backward(dy, saved)
        expected = bn.backward(dy.astype(np.float32), saved32)
        if added:
            assert same(gradients.dadd, expected.dadd.astype(np.float16))
        if activation[0] != "leaky_relu" or not added:
            assert same(gradients.dx, expected.dx.astype(np.float16))


# ---- The rest of the package


@pytest.mark.once
def test_pathways_and_diagnosis(rng):
    x, dy, add, gamma, beta = data(rng, (20, 4, 3), "float64")
    for residual in (None, add):
        _, saved = bn.forward(x, gamma, beta, activation="relu", add=residual)
        gradients = bn.backward(dy, saved)
        np.testing.assert_allclose(sum(bn.pathways(dy, saved)), gradients.dx, rtol=1e-9, atol=1e-12)
        assert bn.diagnose(gradients.dx, dy, saved).correct


@pytest.mark.once
def test_what_is_saved_can_be_copied_and_says_what_followed(rng):
    x, dy, add, gamma, beta = data(rng, (20, 4, 3), "float32")
    _, saved = bn.forward(x, gamma, beta, activation=("clip", 0, 6), add=add)
    assert saved.activation == ("clip", 0.0, 6.0)
    assert "activation=('clip', 0.0, 6.0)" in repr(saved)
    assert bn.forward(x)[1].activation is None
    expected, gradients = bn.backward(dy, saved), bn.backward(dy, pickle.loads(pickle.dumps(saved)))
    assert_same(gradients, expected)
    assert "dadd=<float32 (20, 4, 3)>" in repr(gradients)
    assert "dadd" not in repr(bn.backward(dy, saved, need="dx"))
    assert same(pickle.loads(pickle.dumps(gradients)).dadd, expected.dadd)
    assert same(gradients._replace(dx=None).dadd, expected.dadd)


@pytest.mark.once
def test_the_page():
    page = Path(__file__).parents[1] / "docs" / "activation.md"
    assert not doctest.testfile(str(page), module_relative=False).failed


# ---- Bad input

X = np.linspace(-3, 5, 24, dtype=np.float32).reshape(2, 3, 4)
NAMES = r"activation must be None, 'relu', \('leaky_relu', slope\) or \('clip', low, high\), got "
OVERLAPPING = np.empty(())
BAD = {
    "an unknown name": ({"activation": "tanh"}, ValueError, NAMES + "'tanh'"),
    "a missing slope": ({"activation": "leaky_relu"}, ValueError, NAMES + "'leaky_relu'"),
    "too many numbers": ({"activation": ("relu", 0)}, ValueError, NAMES),
    "one bound": ({"activation": ("clip", 6)}, ValueError, NAMES),
    "a function": ({"activation": np.tanh}, ValueError, NAMES),
    "a number": ({"activation": 1}, ValueError, NAMES),
    "a slope that is a string": (
        {"activation": ("leaky_relu", "0.1")},
        TypeError,
        "slope of leaky_relu must be a number",
    ),
    "a slope that is NaN": ({"activation": ("leaky_relu", np.nan)}, ValueError, "slope of leaky_relu must be finite"),
    "an infinite slope": ({"activation": ("leaky_relu", np.inf)}, ValueError, "slope of leaky_relu must be finite"),
    "bounds in the wrong order": ({"activation": ("clip", 6, 0)}, ValueError, "low < high, got 6.0 and 0.0"),
    "equal bounds": ({"activation": ("clip", 1, 1)}, ValueError, "low < high"),
    "a bound that is NaN": ({"activation": ("clip", 0, np.nan)}, ValueError, "low < high"),
    "a bound that is None": ({"activation": ("clip", None, 1)}, TypeError, "a bound of clip must be a number"),
    "another shape": ({"add": X[:1]}, ValueError, r"add must have the shape of x, \(2, 3, 4\), got \(1, 3, 4\)"),
    "a number to add": ({"add": 1.0}, ValueError, r"add must have the shape of x, \(2, 3, 4\), got \(\)"),
    "another dtype": ({"add": X.astype(float)}, TypeError, "add must have the dtype of x, float32, got float64"),
    "integers": ({"add": X.astype(int)}, TypeError, "add must have dtype float64, float32"),
    "overlapping out": ({"add": OVERLAPPING}, ValueError, r"out must not overlap add \(out=add itself is allowed\)"),
}


@pytest.mark.once
@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(arguments, error, message):
    room = np.full(30, 7, np.float32)
    out = room[1:25].reshape(X.shape)
    if arguments.get("add") is OVERLAPPING:
        arguments = {"add": room[:24].reshape(X.shape)}
    layer = bn.BatchNorm(3)
    calls = [
        lambda: bn.forward(X, out=out, **arguments),
        lambda: bn.inference(X, np.zeros(3), np.ones(3), out=out, **arguments),
    ]
    if "activation" in arguments:
        calls.append(lambda: bn.BatchNorm(3, **arguments))
        calls.append(lambda: setattr(layer, "activation", arguments["activation"]))
    else:
        calls += [lambda: layer(X, out=out, **arguments), lambda: layer.eval()(X, out=out, **arguments)]
    if "out" not in message:
        calls.append(lambda: bn.inference_backward(X, X, np.zeros(3), np.ones(3), out=out, **arguments))
    for call in calls:
        with pytest.raises(error, match=message):
            call()
    assert (room == 7).all()
    assert layer.num_batches_tracked == 0
    assert not layer.running_mean.any()


@pytest.mark.once
def test_need_may_name_what_was_not_added():
    _, saved = bn.forward(X, activation="relu")
    assert bn.backward(X, saved, need="dadd").dadd is None
    with pytest.raises(ValueError, match=r"need must be one or more of the names .*'dadd'"):
        bn.backward(X, saved, need="dres")


# ---- The layer


@pytest.mark.once
@activations
def test_the_layer(activation, rng, tmp_path):
    x, dy, add, *_ = data(rng, (20, 4, 3), "float32")
    layer = bn.BatchNorm(4, activation=activation)
    layer.gamma, layer.beta = rng.uniform(-2, 2, (2, 4))
    assert f"activation={layer.activation!r}" in repr(layer)
    for training in (True, False):
        layer = layer.train() if training else layer.eval(keep_input=True)
        for residual in (None, add):
            y = layer(x, add=residual)
            dx = layer.backward(dy)
            if training:
                expected_y, saved = bn.forward(x, layer.gamma, layer.beta, activation=activation, add=residual)
                expected = bn.backward(dy, saved)
            else:
                fixed = x, layer.running_mean, layer.running_var, layer.gamma
                after = {"activation": activation, "add": residual}
                expected_y = bn.inference(*fixed, layer.beta, **after)
                expected = bn.inference_backward(dy, *fixed, beta=layer.beta, **after)
            assert same(y, expected_y)
            assert same(dx, expected.dx)
            assert same(layer.dgamma, expected.dgamma)
            assert same(layer.dbeta, expected.dbeta)
            assert layer.dadd is None if residual is None else same(layer.dadd, expected.dadd)
    layer.save(tmp_path / "layer.npz")
    for other in (bn.BatchNorm.load(tmp_path / "layer.npz"), pickle.loads(pickle.dumps(layer))):
        assert other.activation == layer.activation
        assert same(other.eval()(x, add=add), layer.eval()(x, add=add))


@pytest.mark.once
def test_a_layer_whose_input_was_overwritten(rng):
    x, _, add, *_ = data(rng, (20, 4, 3), "float32")
    layer = bn.BatchNorm(4, activation="relu").eval(keep_input=True)
    layer(x, add=add, out=add)
    with pytest.raises(RuntimeError, match="wrote y over one of them"):
        layer.backward(x)


@pytest.mark.once
@pytest.mark.parametrize("numbers", [[1.0, 2.0], [0.0, 1.0, 2.0], [1.0, 0.0, 0.0], [np.nan, 1.0, 0.0]])
def test_a_file_with_an_activation_that_is_none(numbers, tmp_path):
    path = tmp_path / "layer.npz"
    bn.BatchNorm(2, activation="relu").save(path)
    with np.load(path) as file:
        arrays = dict(file)
    arrays["activation"] = np.array(numbers)
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"must be a file that BatchNorm\.save wrote"):
        bn.BatchNorm.load(path)
