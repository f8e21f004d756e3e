"""Gradients against central differences along random directions, in float64, where no formula is trusted."""

import numpy as np
import pytest
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


def test_the_gradient_sees_the_batch(rng):
    """dx adds up to nothing over a channel: moving all of it moves nothing."""
    x, dy = rng.standard_normal((40, 6, 5)), rng.standard_normal((40, 6, 5))
    dx = bn.backward(dy, bn.forward(x)[1]).dx
    assert abs(dx.sum(axis=(0, 2))).max() < 1e-13 * abs(dx).sum(axis=(0, 2)).max()
