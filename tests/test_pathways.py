"""The gradient taken apart: every part against the oracle and the textbook, in any layout."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ULPS, truth, ulps
from shapes import ARRANGEMENTS, VIEWS

import batchnorm as bn
from batchnorm import reference

pytestmark = pytest.mark.once  # it is NumPy on top of the statistics

DTYPES = ["float32", "float64"]
PATHS = ("direct", "mean", "variance")
SUM_LIMIT = 4  # ulps of the largest term between dx and the sum of its pathways
AT_LEAST_TWO = {name: view for name, view in VIEWS.items() if view[0] * view[2] > 1}


def textbook_terms(x, dy, gamma, axis, eps):
    """The terms of the textbook in long double, with statistics of its own."""
    gamma = np.ones(x.shape[axis]) if gamma is None else gamma
    wide = [array.astype(np.longdouble) for array in (x, gamma, 0 * gamma, dy)]
    _, cache = reference.forward(*wide[:3], axis, eps)
    return reference.backward_terms(wide[3], cache)


def check(x, dy, gamma, axis=1, eps=1e-5, arrange=lambda array: array, sum_limit=SUM_LIMIT):
    """The pathways of dx, each and together."""
    exact, textbook = truth(x, dy, gamma, axis=axis, eps=eps), textbook_terms(x, dy, gamma, axis, eps)
    _, saved = bn.forward(arrange(x), gamma, axis=axis, eps=eps)
    paths = bn.pathways(arrange(dy), saved)
    dx = bn.backward(arrange(dy), saved).dx
    assert all(path.shape == x.shape and path.dtype == np.float64 for path in paths)
    limit = ULPS["dx"][str(x.dtype)]
    assert ulps(dx, sum(paths), exact.dx_terms, axis) <= sum_limit
    assert ulps(sum(paths).astype(x.dtype), exact.dx, exact.dx_terms, axis) <= limit
    assert all(path.strides == bn.forward(arrange(x).astype(np.float64), axis=axis)[0].strides for path in paths)
    for name in PATHS:
        path = getattr(paths, name).astype(x.dtype)
        assert ulps(path, exact.paths[name], exact.dx_terms, axis) <= limit, name
        assert ulps(path, getattr(textbook, name), exact.dx_terms, axis) <= limit, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", AT_LEAST_TWO.values(), ids=AT_LEAST_TWO)
def test_pathways_add_up_to_dx(view, dtype, rng):
    x, dy = (rng.standard_normal(view) + 1).astype(dtype), rng.standard_normal(view).astype(dtype)
    gamma = rng.standard_normal(view[1]).astype(dtype)
    check(x, dy, gamma)
    # With a mean in dy its sum, and what rounding leaves of it, grows with n.
    check(x, dy + dy.dtype.type(2), gamma, sum_limit=ULPS["dx"][dtype])


@settings(max_examples=60)
@given(
    shape=st.lists(st.integers(2, 7), min_size=2, max_size=5).map(tuple),
    axis=st.integers(-5, 4),
    dtype=st.sampled_from(DTYPES),
    arrangement=st.sampled_from(sorted(ARRANGEMENTS)),
    affine=st.booleans(),
    eps=st.sampled_from([0.0, 1e-5, 1.0]),
    offset=st.sampled_from([0.0, -7.0, 1e3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_pathways_of_any_array(shape, axis, dtype, arrangement, affine, eps, offset, seed):
    rng = np.random.default_rng(seed)
    axis = axis % len(shape) - (len(shape) if axis < 0 else 0)
    x, dy = (rng.standard_normal(shape) + offset).astype(dtype), rng.standard_normal(shape).astype(dtype)
    gamma = rng.standard_normal(shape[axis]).astype(dtype) if affine else None
    check(x, dy, gamma, axis, eps, ARRANGEMENTS[arrangement])


def normalized(x, mean, var, gamma, eps):
    """y with statistics that are arguments of their own."""
    return gamma * (x - mean) / np.sqrt(var + eps)


def test_moment_gradients_are_derivatives(rng):
    """By the five-point rule, of a loss in which x, the mean and the variance are separate."""
    x, dy, gamma = rng.standard_normal((9, 4)) + 2, rng.standard_normal((9, 4)), rng.random(4) + 0.5
    eps = step = 1e-3
    _, saved = bn.forward(x, gamma, eps=eps)
    dxhat, dvar, dmean = bn.moment_gradients(dy, saved)

    def derivative(loss):
        values = [loss(k * step) for k in (-2, -1, 1, 2)]
        return (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)

    mean, var = saved.mean, saved.var
    by_mean = derivative(lambda h: (dy * normalized(x, mean + h, var, gamma, eps)).sum(axis=0))
    by_var = derivative(lambda h: (dy * normalized(x, mean, var + h, gamma, eps)).sum(axis=0))
    np.testing.assert_allclose(dmean, by_mean, rtol=1e-8)
    np.testing.assert_allclose(dvar, by_var, rtol=1e-8)
    np.testing.assert_array_equal(dxhat, dy * gamma)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [((6, 3), 1), ((3, 8), 0), ((2, 3, 2, 4), 1), ((2, 2, 3, 5), -1)], ids=str)
def test_the_jacobian_contracted_with_dy_is_dx(shape, axis, dtype, rng):
    x, dy = (rng.standard_normal(shape) + 1).astype(dtype), rng.standard_normal(shape).astype(dtype)
    gamma = rng.standard_normal(shape[axis]).astype(dtype)
    matrix = bn.jacobian(x, gamma, axis=axis)
    n = x.size // shape[axis]
    assert matrix.shape == (shape[axis], n, n)
    upstream = np.moveaxis(dy, axis, 0).reshape(shape[axis], n)
    dx = np.einsum("cj,cji->ci", upstream, matrix)
    exact = truth(x, dy, gamma, axis=axis)
    got = np.moveaxis(dx.reshape(shape[axis], *np.delete(shape, axis)), 0, axis)
    assert ulps(got.astype(dtype), exact.dx, exact.dx_terms, axis) <= ULPS["dx"][dtype]
    np.testing.assert_array_equal(matrix, matrix.transpose(0, 2, 1))


def test_the_jacobian_is_made_of_derivatives(rng):
    x, gamma, step = rng.standard_normal((3, 2, 4)), np.array([0.5, -2.0]), 1e-6
    matrix = bn.jacobian(x, gamma)
    for c, i in np.ndindex(2, 12):
        moved = np.zeros_like(x)
        moved[i // 4, c, i % 4] = step
        column = (bn.forward(x + moved, gamma)[0] - bn.forward(x - moved, gamma)[0])[:, c] / (2 * step)
        np.testing.assert_allclose(matrix[c, :, i], column.ravel(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1.0])
def test_rows_of_the_jacobian_of_xhat(eps, rng):
    """They add up to 0; and stretching x, which is moving it along xhat, changes xhat by eps alone."""
    x = rng.standard_normal((40, 3)) * 5 + 100
    matrix = bn.jacobian(x, eps=eps)
    assert abs(matrix.sum(axis=2)).max() < 1e-14
    _, saved = bn.forward(x, eps=eps)
    xhat = ((x - saved.mean) * saved.rstd).T
    stretched = np.einsum("cji,ci->cj", matrix, xhat)
    expected = xhat * (saved.rstd * (eps / (saved.var + eps)))[:, None]
    np.testing.assert_allclose(stretched, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 257])
def test_the_centering_matrix(n, rng):
    matrix = bn.centering_matrix(n)
    np.testing.assert_allclose(matrix @ matrix, matrix, rtol=0, atol=n * np.finfo(float).eps)
    np.testing.assert_allclose(matrix, np.eye(n) - np.ones((n, n)) / n, rtol=0, atol=1e-16)
    assert np.linalg.matrix_rank(matrix) == n - 1
    x = rng.standard_normal(n) + 5
    np.testing.assert_allclose(matrix @ x, x - x.mean(), rtol=0, atol=1e-13)


def test_the_two_sample_case(rng):
    """Two values become −1 and 1 whatever they are. Only the whole sum of paths knows that no dx can help."""
    x, dy = np.array([[1.0], [5.0]]), np.array([[3.0], [-1.0]])
    y, saved = bn.forward(x, eps=0.0)
    assert not bn.backward(dy, saved).dx.any()
    without_mean = bn.backward(dy, saved, through=["variance"]).dx
    assert without_mean[0] == without_mean[1] != 0
    np.testing.assert_array_equal(bn.forward(x - without_mean, eps=0.0)[0], y)


def test_no_channels():
    x = np.ones((4, 0, 2))
    _, saved = bn.forward(x)
    assert all(path.shape == x.shape for path in bn.pathways(x, saved))
    assert bn.moment_gradients(x, saved).dvar.shape == (0,)
    assert bn.jacobian(x).shape == (0, 8, 8)


X, DY = np.ones((2, 3, 4, 5)), np.ones((2, 3, 4, 5))
SAVED = bn.forward(X)[1]
ONE, NONE = bn.forward(X[:1, :, :1, :1])[1], bn.forward(X[:0])[1]
BAD = {
    "saved a tuple": (lambda part: part(DY, (X,)), TypeError, "saved must be what forward returned, got tuple"),
    "dy of another layout": (
        lambda part: part(np.moveaxis(DY, 1, -1), SAVED),
        ValueError,
        r"dy must have the shape of x, \(2, 3, 4, 5\), got \(2, 4, 5, 3\)",
    ),
    "dy of another dtype": (
        lambda part: part(DY.astype("f"), SAVED),
        TypeError,
        "dy must have the dtype of x, float64",
    ),
    "n = 1": (
        lambda part: part(DY[:1, :, :1, :1], ONE),
        ValueError,
        r"x must have at least 2 values per channel, got shape \(1, 3, 1, 1\) with axis=1",
    ),
    "n = 0": (
        lambda part: part(DY[:0], NONE),
        ValueError,
        r"x must have at least 2 values per channel, got shape \(0, 3, 4, 5\) with axis=1",
    ),
}


@pytest.mark.parametrize("part", [bn.pathways, bn.moment_gradients])
@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(part, call, error, message):
    with pytest.raises(error, match=message):
        call(part)


JACOBIAN = {
    "1-d": (lambda: bn.jacobian(np.ones(3)), ValueError, "x must have at least 2 dimensions"),
    "gamma too long": (lambda: bn.jacobian(X, np.ones(4)), ValueError, r"gamma must have shape \(3,\), got \(4,\)"),
    "axis too large": (lambda: bn.jacobian(X, axis=4), ValueError, "axis must be between -4 and 3"),
    "one value": (lambda: bn.jacobian(np.ones((1, 3))), ValueError, "x must have at least 2 values per channel"),
    "no value": (lambda: bn.jacobian(np.ones((0, 3))), ValueError, "x must have at least 2 values per channel"),
    "too large": (
        lambda: bn.jacobian(np.ones((10000, 4))),
        ValueError,
        r"the Jacobian of x of shape \(10000, 4\) with axis=1 needs 3,052 MiB, more than max_bytes = 1,024 MiB",
    ),
    "too large for the caller": (
        lambda: bn.jacobian(np.ones((1024, 1)), max_bytes=2**20),
        ValueError,
        "needs 8 MiB, more than max_bytes = 1 MiB",
    ),
    "no n": (lambda: bn.centering_matrix(0), ValueError, "n must be at least 1, got 0"),
    "n a float": (lambda: bn.centering_matrix(2.0), TypeError, "n must be an integer, got float"),
    "n too large": (lambda: bn.centering_matrix(10**6), ValueError, "a matrix for n = 1000000 needs 7,629,395 MiB"),
}


@pytest.mark.parametrize(("call", "error", "message"), JACOBIAN.values(), ids=JACOBIAN)
def test_bad_input_for_matrices(call, error, message):
    with pytest.raises(error, match=message):
        call()
