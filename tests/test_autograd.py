"""`batchnorm.autograd`: numerical derivatives, and autograd's own of the formula in NumPy."""

import doctest

import numpy as np
import pytest
from pages import run_section

import batchnorm as bn

pytest.importorskip("autograd")

import autograd.numpy as anp
from autograd import elementwise_grad, grad, make_hvp, make_jvp, make_vjp
from autograd.test_util import check_grads

import batchnorm.autograd
from batchnorm.autograd import batch_norm

SHAPES = [((7, 3), 1), ((4, 3, 5), 1), ((2, 4, 3, 3), 1), ((2, 3, 3, 4), -1), ((3, 5), 0)]
EPS = 0.02

pytestmark = pytest.mark.once  # other tests compare the levels


def textbook(x, gamma, beta, axis=1, eps=1e-5):
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    shape = [-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]
    centred = x - anp.mean(x, axis=others, keepdims=True)
    var = anp.mean(centred**2, axis=others, keepdims=True)
    return anp.reshape(gamma, shape) * centred / anp.sqrt(var + eps) + anp.reshape(beta, shape)


def arguments(rng, shape, axis):
    return rng.standard_normal(shape), rng.standard_normal(shape[axis]), rng.standard_normal(shape[axis])


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_check_grads(shape, axis, rng):
    check_grads(lambda *given: batch_norm(*given, axis, EPS), (0, 1, 2), modes=["fwd", "rev"], order=2)(
        *arguments(rng, shape, axis)
    )


@pytest.mark.parametrize("argument", [0, 1, 2])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_derivatives_of_the_formula(shape, axis, argument, rng):
    """First, and second in all four orders of modes, along one argument at a time."""
    given = arguments(rng, shape, axis)
    direction, other = (rng.standard_normal(given[argument].shape) for _ in range(2))
    dy = rng.standard_normal(shape)

    def derivatives(norm):
        def of(value):
            y = norm(*given[:argument], value, *given[argument + 1 :], axis, EPS)
            return anp.sin(y)  # without which second derivatives by gamma and beta are 0

        def reverse(value):
            return make_vjp(of)(value)[0](dy)

        def forward(value):
            return make_jvp(of)(value)(direction)[1]

        value = given[argument]
        loss = make_hvp(lambda value: anp.sum(dy * of(value)))(value)[0]
        return [
            of(value),
            reverse(value),
            forward(value),
            loss(direction),
            make_vjp(reverse)(value)[0](direction),
            make_jvp(reverse)(value)(direction)[1],
            make_vjp(forward)(value)[0](dy),
            make_jvp(forward)(value)(other)[1],
        ]

    for ours, theirs in zip(derivatives(batch_norm), derivatives(textbook), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-11)


def test_mixed_second_derivatives(rng):
    """Of x and gamma together, as a gradient penalty has them."""
    x, gamma, beta = arguments(rng, (6, 3), 1)

    def penalty(norm):
        def loss(x, gamma):
            of_x, of_gamma = grad(lambda *given: anp.sum(anp.tanh(norm(*given, beta))), (0, 1))(x, gamma)
            return anp.sum(of_x**2) + anp.sum(of_gamma**3)

        return grad(loss, (0, 1))(x, gamma)

    for ours, theirs in zip(penalty(batch_norm), penalty(textbook), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_bits_and_types_are_those_of_the_functions(dtype, rng):
    x, gamma, beta = (array.astype(dtype) for array in arguments(rng, (5, 3, 4), 1))
    dy = rng.standard_normal(x.shape).astype(dtype)
    y, saved = bn.forward(x, gamma, beta)
    np.testing.assert_array_equal(batch_norm(x, gamma, beta), y, strict=True)
    gradients = grad(lambda *given: anp.sum(dy * batch_norm(*given)), (0, 1, 2))(x, gamma, beta)
    for ours, expected in zip(gradients, bn.backward(dy, saved), strict=True):
        np.testing.assert_array_equal(ours, expected, strict=True)
    mixed = grad(lambda x: anp.sum(dy.astype(np.float64) * batch_norm(x, gamma, beta)))(x)
    np.testing.assert_array_equal(mixed, gradients[0], strict=True)
    tangent = make_jvp(lambda x: batch_norm(x, gamma, beta))(x)(dy)[1]
    np.testing.assert_allclose(tangent, bn.jvp(dy, saved).dy, rtol=1e-6 if dtype == np.float32 else 1e-14, atol=1e-6)
    assert tangent.dtype == dtype


def test_statistics_are_taken_once(rng, monkeypatch):
    calls = []
    forward = bn.functional.forward
    monkeypatch.setattr(bn.functional, "forward", lambda *given, **named: calls.append(1) or forward(*given, **named))
    given = arguments(rng, (6, 3), 1)
    grad(lambda x: anp.sum(grad(lambda *more: anp.sum(batch_norm(*more) ** 3))(x, *given[1:]) ** 2))(given[0])
    assert len(calls) == 1


def test_errors_are_those_of_forward_and_third_derivatives_are_missing(rng):
    x, gamma, beta = arguments(rng, (6, 3), 1)
    with pytest.raises(ValueError, match=r"gamma must have shape \(3,\), got \(4,\)"):
        grad(lambda x: anp.sum(batch_norm(x, np.ones(4), beta)))(x)
    third = elementwise_grad(elementwise_grad(elementwise_grad(lambda x: batch_norm(x, gamma, beta) ** 2)))
    with pytest.raises(NotImplementedError, match="_second_gradients"):
        third(x)


def test_examples():
    failed, tried = doctest.testmod(batchnorm.autograd)
    assert tried > 0
    assert failed == 0


def test_examples_on_the_page():
    failed, tried = run_section("adapters.md", "HIPS autograd: `batch_norm`")
    assert (failed, tried > 0) == (0, True)
