"""The assignment's functions: its semantics by plain NumPy, and its own kind of check, the numeric gradient."""

import numpy as np
import pytest

from batchnorm.cs231n import (
    batchnorm_backward,
    batchnorm_backward_alt,
    batchnorm_forward,
    spatial_batchnorm_backward,
    spatial_batchnorm_forward,
)

pytestmark = pytest.mark.once  # functions of Python over those that are tested on every level


def relative_error(x, y):
    """The course's measure: the largest difference over the sum of both sizes."""
    return (abs(x - y) / np.maximum(1e-8, abs(x) + abs(y))).max()


def numeric_gradient(f, x, dout, step=1e-3):
    """Differences of Σ f·dout, one element of x at a time, by the five-point rule, which leaves O(step⁴)."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        before, values = x[index], []
        for k in (-2, -1, 1, 2):
            x[index] = before + k * step
            values.append(f())
        x[index] = before
        gradient[index] = ((values[0] - 8 * values[1] + 8 * values[2] - values[3]) * dout).sum() / (12 * step)
    return gradient


PLAIN = ((4, 5), batchnorm_forward, (batchnorm_backward, batchnorm_backward_alt))
SPATIAL = ((2, 3, 4, 5), spatial_batchnorm_forward, (spatial_batchnorm_backward,))


@pytest.mark.parametrize(("shape", "forward", "backwards"), [PLAIN, SPATIAL], ids=["plain", "spatial"])
def test_numeric_gradient(shape, forward, backwards):
    rng = np.random.default_rng(231)
    x, dout = 5 * rng.standard_normal(shape) + 12, rng.standard_normal(shape)
    gamma, beta = rng.standard_normal(shape[1]), rng.standard_normal(shape[1])
    _, cache = forward(x, gamma, beta, {"mode": "train"})
    numeric = [
        numeric_gradient(lambda: forward(x, gamma, beta, {"mode": "train"})[0], argument, dout)
        for argument in (x, gamma, beta)
    ]
    for backward in backwards:
        for got, expected in zip(backward(dout, cache), numeric, strict=True):
            assert relative_error(got, expected) <= 1e-8


# What the assignment's own notebooks do, with their types of arrays: whole numbers for gamma and beta among them.


def activations(rng, samples=200, inputs=50, hidden=60, outputs=3):
    """Of a network with two layers, and a function that draws more of them."""
    first, second = rng.standard_normal((inputs, hidden)), rng.standard_normal((hidden, outputs))
    return lambda: np.maximum(0, rng.standard_normal((samples, inputs)).dot(first)).dot(second)


PARAMETERS = {
    "ones and zeros": (np.ones((3,)), np.zeros((3,))),
    "floats": (np.asarray([1.0, 2.0, 3.0]), np.asarray([11.0, 12.0, 13.0])),
    "integers": (np.asarray([3, 4, 5]), np.asarray([6, 7, 8])),
    "lists": ([3, 4, 5], [6, 7, 8]),
    "one of each": (np.asarray([3, 4, 5]), np.asarray([6.0, 7.0, 8.0])),
}


@pytest.mark.parametrize(("gamma", "beta"), PARAMETERS.values(), ids=PARAMETERS)
def test_the_notebook_training(gamma, beta):
    """Features have beta for mean and gamma for deviation, in rows and in images."""
    rng = np.random.default_rng(231)
    out, _ = batchnorm_forward(activations(rng)(), gamma, beta, {"mode": "train"})
    np.testing.assert_allclose(out.mean(axis=0), beta, atol=1e-13)
    np.testing.assert_allclose(out.std(axis=0), gamma, rtol=1e-6)
    images = 4 * rng.standard_normal((2, 3, 4, 5)) + 10
    out, _ = spatial_batchnorm_forward(images, gamma, beta, {"mode": "train"})
    assert out.shape == images.shape
    np.testing.assert_allclose(out.mean(axis=(0, 2, 3)), beta, atol=1e-13)
    np.testing.assert_allclose(out.std(axis=(0, 2, 3)), gamma, rtol=1e-6)


@pytest.mark.parametrize(("gamma", "beta"), PARAMETERS.values(), ids=PARAMETERS)
def test_the_notebook_testing(gamma, beta):
    """After fifty batches the running statistics give nearly the same, with the noise of one batch."""
    rng = np.random.default_rng(231)
    draw, bn_param = activations(rng), {"mode": "train"}
    images, image_param = (lambda: 2.3 * rng.standard_normal((10, 3, 11, 12)) + 13), {"mode": "train"}
    for _ in range(50):
        batchnorm_forward(draw(), gamma, beta, bn_param)
        spatial_batchnorm_forward(images(), gamma, beta, image_param)
    bn_param["mode"] = image_param["mode"] = "test"
    out, _ = batchnorm_forward(draw(), gamma, beta, bn_param)
    np.testing.assert_allclose((out.mean(axis=0) - beta) / gamma, 0, atol=0.25)
    np.testing.assert_allclose(out.std(axis=0), gamma, rtol=0.15)
    out, _ = spatial_batchnorm_forward(images(), gamma, beta, image_param)
    np.testing.assert_allclose((out.mean(axis=(0, 2, 3)) - beta) / gamma, 0, atol=0.15)
    np.testing.assert_allclose(out.std(axis=(0, 2, 3)), gamma, rtol=0.1)


@pytest.mark.parametrize(("gamma", "beta"), PARAMETERS.values(), ids=PARAMETERS)
@pytest.mark.parametrize("spatial", [False, True])
def test_the_notebook_backward(spatial, gamma, beta):
    """One `bn_param` for all calls, as there, whose running statistics move meanwhile and change nothing."""
    rng = np.random.default_rng(231)
    shape = (2, 3, 4, 5) if spatial else (4, 3)
    forward, backwards = (SPATIAL if spatial else PLAIN)[1:]
    x, dout, bn_param = 5 * rng.standard_normal(shape) + 12, rng.standard_normal(shape), {"mode": "train"}
    a, b = np.array(gamma, float), np.array(beta, float)
    numeric = (
        numeric_gradient(lambda: forward(x, gamma, beta, bn_param)[0], x, dout),
        numeric_gradient(lambda: forward(x, a, beta, bn_param)[0], a, dout),
        numeric_gradient(lambda: forward(x, gamma, b, bn_param)[0], b, dout),
    )
    _, cache = forward(x, gamma, beta, bn_param)
    for backward in backwards:
        for got, expected in zip(backward(dout, cache), numeric, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-8)
            assert got.dtype == np.float64


def test_the_notebook_compares_both_backward_passes():
    """The graph's and the simplified one, on (100, 500): the same."""
    rng = np.random.default_rng(231)
    x, dout = 5 * rng.standard_normal((100, 500)) + 12, rng.standard_normal((100, 500))
    gamma, beta = rng.standard_normal(500), rng.standard_normal(500)
    _, cache = batchnorm_forward(x, gamma, beta, {"mode": "train"})
    for one, other in zip(batchnorm_backward(dout, cache), batchnorm_backward_alt(dout, cache), strict=True):
        assert relative_error(one, other) == 0


def test_integers_everywhere():
    """x, dout and running statistics too: what NumPy's own arithmetic gives."""
    x, dout = np.array([[1, 5], [3, 4], [8, 0]]), np.array([[1, 0], [0, 2], [3, 0]])
    gamma, beta = np.array([3, 4]), np.array([6, 7])
    bn_param = {"mode": "train", "running_mean": np.zeros(2, int), "running_var": np.ones(2, int)}
    y, gradients, running = textbook(x, gamma, beta, dout, [np.zeros(2), np.ones(2)], 1e-5, 0.9)
    out, cache = batchnorm_forward(x, gamma, beta, bn_param)
    np.testing.assert_allclose(out, y, rtol=1e-13)
    for got, expected in zip(batchnorm_backward(dout, cache), gradients, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose([bn_param["running_mean"], bn_param["running_var"]], running, rtol=1e-14)
    out, _ = batchnorm_forward(x, gamma, beta, {"mode": "test", "running_mean": [4, 3], "running_var": [1, 2]})
    np.testing.assert_allclose(out, gamma * (x - [4, 3]) / np.sqrt(np.array([1, 2]) + 1e-5) + beta, rtol=1e-13)


def textbook(x, gamma, beta, dout, running, eps, momentum):
    """One training step on rows (N, D) in plain NumPy."""
    n, mean, var = len(x), x.mean(axis=0), x.var(axis=0)
    rstd = 1 / np.sqrt(var + eps)
    xhat = (x - mean) * rstd
    dgamma, dbeta = (dout * xhat).sum(axis=0), dout.sum(axis=0)
    dx = gamma * rstd / n * (n * dout - dbeta - xhat * dgamma)
    running = [momentum * old + (1 - momentum) * new for old, new in zip(running, (mean, var), strict=True)]
    return gamma * xhat + beta, (dx, dgamma, dbeta), running


@pytest.mark.parametrize("settings", [{}, {"eps": 1e-3, "momentum": 0.5}, {"momentum": 1.0}], ids=str)
@pytest.mark.parametrize("spatial", [False, True])
def test_several_steps_are_the_textbook(settings, spatial, rng):
    """Forward, both backward passes and the running statistics, which begin at zero; then test mode."""
    eps, momentum = settings.get("eps", 1e-5), settings.get("momentum", 0.9)
    forward, backwards = (SPATIAL if spatial else PLAIN)[1:]
    gamma, beta = rng.standard_normal(6), rng.standard_normal(6)
    bn_param, running = {"mode": "train", **settings}, [np.zeros(6), np.zeros(6)]

    def shaped(rows):
        return rows.reshape(5, 2, 3, 6).transpose(0, 3, 1, 2) if spatial else rows

    for _ in range(4):
        x, dout = rng.standard_normal((30, 6)) * 3 + 7, rng.standard_normal((30, 6))
        y, gradients, running = textbook(x, gamma, beta, dout, running, eps, momentum)
        out, cache = forward(shaped(x), gamma, beta, bn_param)
        np.testing.assert_allclose(out, shaped(y), rtol=0, atol=1e-12)
        for backward in backwards:
            got = backward(shaped(dout), cache)
            np.testing.assert_allclose(got[0], shaped(gradients[0]), rtol=0, atol=1e-12)
            np.testing.assert_allclose(got[1:], gradients[1:], rtol=0, atol=1e-12)
        np.testing.assert_allclose(bn_param["running_mean"], running[0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(bn_param["running_var"], running[1], rtol=0, atol=1e-12)
    bn_param["mode"] = "test"
    before = {name: np.copy(value) for name, value in bn_param.items()}
    out, cache = forward(shaped(x), gamma, beta, bn_param)
    expected = gamma * (x - running[0]) / np.sqrt(running[1] + eps) + beta
    np.testing.assert_allclose(out, shaped(expected), rtol=1e-12, atol=1e-12)
    assert cache is None
    assert all(np.array_equal(bn_param[name], value) for name, value in before.items())


def test_running_statistics_are_new_arrays(rng):
    """As in the course: what the caller put in is not written to."""
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    bn_param = {"mode": "train", "running_mean": mean, "running_var": var}
    batchnorm_forward(rng.standard_normal((8, 3)).astype(np.float32), np.ones(3), np.zeros(3), bn_param)
    assert not mean.any()
    assert (var == 1).all()
    assert bn_param["running_mean"].dtype == np.float32
    assert bn_param["running_mean"].all()


def own_backward_of_a_tuple(dout, cache):
    xhat, rstd, gamma = cache
    return gamma * rstd * (dout - dout.mean(axis=0) - xhat * (dout * xhat).mean(axis=0))


def own_backward_of_a_dict(dout, cache):
    return dout * cache["gamma"]


def train(x):
    forward = batchnorm_forward if x.ndim == 2 else spatial_batchnorm_forward
    return forward(x, np.ones(3), np.zeros(3), {"mode": "train"})[1]


OWN_BACKWARD = (
    "what forward left is for batchnorm's own backward and has no items: .* "
    "pair your own backward pass with your own forward pass"
)
X, IMAGES, ONES = np.ones((4, 3)), np.ones((2, 3, 4, 5)), np.ones(3)
TRAIN = {"mode": "train"}
BAD = {
    "no mode": (lambda: batchnorm_forward(X, ONES, ONES, {}), KeyError, "mode"),
    "mode unknown": (
        lambda: batchnorm_forward(X, ONES, ONES, {"mode": "eval"}),
        ValueError,
        r"bn_param\['mode'\] must be 'train' or 'test', got 'eval'",
    ),
    "x 4-d": (
        lambda: batchnorm_forward(np.ones((2, 3, 4, 5)), ONES, ONES, TRAIN),
        ValueError,
        r"x must have shape \(N, D\), got \(2, 3, 4, 5\)",
    ),
    "x 2-d": (lambda: spatial_batchnorm_forward(X, ONES, ONES, TRAIN), ValueError, r"x must have shape \(N, C, H, W\)"),
    "gamma too short": (
        lambda: batchnorm_forward(X, np.ones(2), ONES, TRAIN),
        ValueError,
        r"gamma must have shape \(3,\), got \(2,\)",
    ),
    "momentum too large": (
        lambda: batchnorm_forward(X, ONES, ONES, {"mode": "train", "momentum": 2}),
        ValueError,
        "momentum, the weight of the old value, must be between 0 and 1, got 2.0",
    ),
    "running_mean too short": (
        lambda: batchnorm_forward(X, ONES, ONES, {"mode": "train", "running_mean": np.ones(2)}),
        ValueError,
        r"running_mean must have shape \(3,\), got \(2,\)",
    ),
    "no cache in test mode": (
        lambda: batchnorm_backward(X, batchnorm_forward(X, ONES, ONES, {"mode": "test"})[1]),
        TypeError,
        "cache must be what the forward pass of batchnorm.cs231n returned in mode 'train', got NoneType",
    ),
    "the cache of an own forward pass": (
        lambda: batchnorm_backward(X, (X, ONES, ONES, 1e-5)),
        TypeError,
        "got tuple; pass the cache of your own forward pass to your own backward pass",
    ),
    "an own backward pass that unpacks": (lambda: own_backward_of_a_tuple(X, train(X)), TypeError, OWN_BACKWARD),
    "an own backward pass that looks up": (lambda: own_backward_of_a_dict(X, train(X)), TypeError, OWN_BACKWARD),
    "an own spatial pass": (lambda: own_backward_of_a_tuple(IMAGES, train(IMAGES)), TypeError, OWN_BACKWARD),
    "x of text": (
        lambda: batchnorm_forward([["1"]], [1], [1], TRAIN),
        TypeError,
        "x must have dtype float64, float32, float16 or bfloat16",
    ),
    "dout of another shape": (
        lambda: spatial_batchnorm_backward(X[:2], batchnorm_forward(X, ONES, ONES, {"mode": "train"})[1]),
        ValueError,
        r"dy must have the shape of x, \(4, 3\), got \(2, 3\)",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert TRAIN == {"mode": "train"}
