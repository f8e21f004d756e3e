"""Gradients against central differences along random directions, in float64, where no formula is trusted.

And gradients through some of the statistics against the oracle: each path is exact by itself.
"""

import numpy as np
import pytest
from oracle import ULPS, largest, truth, ulps
from shapes import VIEWS

import batchnorm as bn
from batchnorm import reference

STEP = 1e-5
SMALL = {name: view for name, view in VIEWS.items() if 3 <= view[0] * view[2] <= 5000}


def slope(loss, at, direction):
    """Derivative of loss along a direction by the five-point rule, error O(STEP⁴)."""
    f = [loss(at + k * STEP * direction) for k in (-2, -1, 1, 2)]
    return (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * STEP)


def check(loss, at, gradient, rng):
    for _ in range(3):
        direction = rng.standard_normal(at.shape)
        direction /= np.linalg.norm(direction)
        expected = slope(loss, at, direction)
        # What the subtraction of losses of size |loss| can lose, besides the gradient's own size.
        slack = 1e-8 * (np.linalg.norm(gradient) + 1e-2 * abs(loss(at)) + 1e-3)
        assert abs((gradient * direction).sum() - expected) <= slack


@pytest.mark.parametrize("view", SMALL.values(), ids=SMALL)
def test_batch_statistics(view, rng):
    x, dy = rng.standard_normal(view) * 2 + 1, rng.standard_normal(view)
    gamma, beta = rng.standard_normal(view[1]), rng.standard_normal(view[1])
    gradients = bn.backward(dy, bn.forward(x, gamma, beta)[1])
    check(lambda at: (bn.forward(at, gamma, beta)[0] * dy).sum(), x, gradients.dx, rng)
    check(lambda at: (bn.forward(x, at, beta)[0] * dy).sum(), gamma, gradients.dgamma, rng)
    check(lambda at: (bn.forward(x, gamma, at)[0] * dy).sum(), beta, gradients.dbeta, rng)


@pytest.mark.parametrize("view", SMALL.values(), ids=SMALL)
def test_fixed_statistics(view, rng):
    x, dy = rng.standard_normal(view) * 2 + 1, rng.standard_normal(view)
    gamma, beta, mean = (rng.standard_normal(view[1]) for _ in range(3))
    var = rng.random(view[1]) + 0.1
    gradients = bn.inference_backward(dy, x, mean, var, gamma)
    check(lambda at: (bn.inference(at, mean, var, gamma, beta) * dy).sum(), x, gradients.dx, rng)
    check(lambda at: (bn.inference(x, mean, var, at, beta) * dy).sum(), gamma, gradients.dgamma, rng)
    check(lambda at: (bn.inference(x, mean, var, gamma, at) * dy).sum(), beta, gradients.dbeta, rng)

    everything = bn.inference_backward(dy, x, mean, var, gamma, need=("dmean", "dvar"))
    check(lambda at: (bn.inference(x, at, var, gamma, beta) * dy).sum(), mean, everything.dmean, rng)
    check(lambda at: (bn.inference(x, mean, at, gamma, beta) * dy).sum(), var, everything.dvar, rng)


@pytest.mark.parametrize("view", SMALL.values(), ids=SMALL)
def test_a_loss_of_the_statistics_themselves(view, rng):
    x, dy = rng.standard_normal(view) * 2 + 1, rng.standard_normal(view)
    gamma, dmean, dvar = rng.standard_normal((3, view[1])) * [[1], [10], [10]]

    def loss(at):
        y, saved = bn.forward(at, gamma)
        return (y * dy).sum() + (saved.mean * dmean).sum() + (saved.var * dvar).sum()

    check(loss, x, bn.backward(dy, bn.forward(x, gamma)[1], dmean=dmean, dvar=dvar).dx, rng)


SUBSETS = [(), ("mean",), ("variance",), ("variance", "mean")]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_through_some_of_the_statistics(view, dtype, rng, always_threaded):
    """The chosen paths and nothing else, with and without upstream gradients of the statistics."""
    x, dy = (rng.standard_normal(view) + 3).astype(dtype), rng.standard_normal(view).astype(dtype)
    gamma, dmean, dvar = rng.standard_normal((3, view[1])).astype(dtype) * np.array([[1], [view[0]], [view[0]]], dtype)
    exact = truth(x, dy, gamma)
    saved = bn.forward(x, gamma)[1]
    n = np.longdouble(saved.count)
    upstream = [dmean[:, None] / n + 0 * exact.xmu, dvar[:, None] * 2 * exact.xmu / n]
    for through in SUBSETS:
        paths = [exact.paths[name] for name in ("direct", *through)]
        for how, terms in (({}, paths), ({"dmean": dmean, "dvar": dvar}, paths + upstream)):
            dx, dgamma, _ = bn.backward(dy, saved, through=through, num_threads=2, **how)
            most = np.maximum.reduce([largest(term, 1) for term in terms])
            assert ulps(dx, sum(terms), most, 1) <= ULPS["dx"][dtype]
            assert dgamma.tobytes() == bn.backward(dy, saved).dgamma.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_fixed_mean_and_var_in_ulps(view, dtype, rng):
    x, dy, (gamma, mean) = rng.standard_normal(view), rng.standard_normal(view), rng.standard_normal((2, view[1]))
    x, dy, gamma, mean = (array.astype(dtype) for array in (x, dy, gamma, mean))
    var = (rng.random(view[1]) + 0.1).astype(dtype)
    wide = [value.astype(np.longdouble)[None, :, None] for value in (gamma, mean, var)]
    rstd = 1 / np.sqrt(wide[2] + np.longdouble(1e-5))
    by_mean = -wide[0] * rstd * dy
    by_var = -wide[0] * rstd**3 * dy * (x - wide[1]) / 2
    gradients = bn.inference_backward(dy, x, mean, var, gamma, need=["dmean", "dvar"])
    assert gradients == (None, None, None)
    for got, summands in ((gradients.dmean, by_mean), (gradients.dvar, by_var)):
        assert got.dtype == dtype
        limit = ULPS["dgamma"][dtype]
        assert ulps(got, summands.sum(axis=(0, 2)), abs(summands).sum(axis=(0, 2))) <= limit


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_treating_the_batch_as_fixed_is_inference(dtype, rng):
    """The variance of a float64 batch has more digits than `var`: there the last one of dx may differ."""
    x, dy, gamma = (rng.standard_normal(shape).astype(dtype) for shape in ((50, 6, 4), (50, 6, 4), 6))
    _, saved = bn.forward(x, gamma)
    fixed = bn.inference_backward(dy, x, saved.mean, saved.var, gamma).dx
    dx = bn.backward(dy, saved, through=()).dx
    if dtype == "float32":
        assert dx.tobytes() == fixed.tobytes()
    assert (abs(dx - fixed) <= np.spacing(abs(fixed))).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mean", [np.inf, np.nan])
def test_fixed_means_do_not_reach_dx(dtype, mean, rng):
    x, dy = rng.standard_normal((2, 40, 3)).astype(dtype)
    gradients = bn.inference_backward(dy, x, [mean, 0.0, 1.0], np.ones(3), eps=0.0)
    np.testing.assert_array_equal(gradients.dx, dy)


def test_a_path_that_is_not_taken_is_not_read(rng):
    """A sum that overflows leaves the direct path alone."""
    x, dy = rng.standard_normal((8, 3)), np.full((8, 3), 1e308)
    _, saved = bn.forward(x)
    assert np.isfinite(bn.backward(dy * 0.5, saved, through=()).dx).all()
    assert not np.isfinite(bn.backward(dy, saved).dx).any()


@pytest.mark.once
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_the_reference_is_right_too(axis, rng):
    x = rng.standard_normal((5, 4, 6, 3)) + 1
    dy = rng.standard_normal(x.shape)
    gamma, beta = rng.standard_normal(x.shape[axis]), rng.standard_normal(x.shape[axis])
    y, cache = reference.forward(x, gamma, beta, axis)
    dx, dgamma, dbeta = reference.backward(dy, cache)
    check(lambda at: (reference.forward(at, gamma, beta, axis)[0] * dy).sum(), x, dx, rng)
    check(lambda at: (reference.forward(x, at, beta, axis)[0] * dy).sum(), gamma, dgamma, rng)
    check(lambda at: (reference.forward(x, gamma, at, axis)[0] * dy).sum(), beta, dbeta, rng)
    np.testing.assert_allclose(y, bn.forward(x, gamma, beta, axis=axis)[0], rtol=0, atol=1e-13)
    mean, var = rng.standard_normal(x.shape[axis]), rng.random(x.shape[axis])
    np.testing.assert_allclose(
        reference.inference(x, mean, var, gamma, beta, axis),
        bn.inference(x, mean, var, gamma, beta, axis=axis),
        rtol=0,
        atol=1e-12,
    )


def exact_and_dx(x, dy, gamma, eps):
    saved = bn.forward(x, gamma, eps=eps)[1]
    dx = bn.backward(dy, saved).dx.astype(np.longdouble)
    return truth(x, dy, gamma, eps=eps), dx


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("view", SMALL.values(), ids=SMALL)
def test_moving_a_channel_moves_nothing(view, dtype, rng):
    """Σ dx = 0: each dx is off by at most the table's ulps of its channel's largest term, and so is their mean."""
    x, dy = (rng.standard_normal(view) + 2).astype(dtype), rng.standard_normal(view).astype(dtype)
    exact, dx = exact_and_dx(x, dy, rng.standard_normal(view[1]).astype(dtype), 1e-5)
    mean = dx.mean(axis=(0, 2)).astype(dtype)
    assert ulps(mean, 0, exact.dx_terms) <= ULPS["dx"][dtype]


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("view", SMALL.values(), ids=SMALL)
def test_stretching_a_channel_moves_it_by_eps_alone(view, dtype, eps, rng):
    """Σ dx·xhat = gamma·rstd·Σ(dy·xhat)·eps/(var + eps), which is nothing for eps = 0."""
    x, dy = (rng.standard_normal(view) + 2).astype(dtype), rng.standard_normal(view).astype(dtype)
    gamma = rng.standard_normal(view[1]).astype(dtype)
    exact, dx = exact_and_dx(x, dy, gamma, eps)
    rstd = 1 / np.sqrt(exact.var + np.longdouble(eps))
    xhat = exact.xmu * rstd[:, None]
    expected = gamma * rstd * exact.dgamma * np.longdouble(eps) / (exact.var + np.longdouble(eps))
    got = (dx * xhat).sum(axis=(0, 2))
    unit = np.spacing(exact.dx_terms.astype(dtype))
    assert (abs(got - expected) <= ULPS["dx"][dtype] * unit * abs(xhat).sum(axis=(0, 2))).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("view", SMALL.values(), ids=SMALL)
def test_y_does_not_see_scale_and_offset_of_x(view, dtype, rng):
    """For eps = 0, y of a·x + b is y of x; integers stay exact."""
    x = rng.integers(-(2**12), 2**12, view).astype(dtype)
    gamma, beta = rng.standard_normal((2, view[1])).astype(dtype)
    y, saved = bn.forward(x, gamma, beta, eps=0.0)
    assert (saved.var > 0).all()
    assert bn.forward(x * 1024, gamma, beta, eps=0.0)[0].tobytes() == y.tobytes()
    terms, limit = np.maximum(largest(y - beta[:, None], 1), abs(beta)), 2 * ULPS["y"][dtype]
    exact, shift = y.astype(np.longdouble), beta[:, None].astype(np.longdouble)
    for a, b in ((3, 17), (1, 4096), (8, -513)):
        assert ulps(bn.forward(a * x + b, gamma, beta, eps=0.0)[0], exact, terms, 1) <= limit
    assert ulps(bn.forward(-3 * x, gamma, beta, eps=0.0)[0], 2 * shift - exact, terms, 1) <= limit
