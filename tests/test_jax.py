"""`batchnorm.jax`: JAX's own values and derivatives of the formula, in float64, and the bits of the functions."""

import doctest

import numpy as np
import pytest
from pages import run_section
from processes import succeeds

import batchnorm as bn

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from batchnorm.jax import Statistics, forward, functions, inference, primitives  # noqa: E402

SHAPES = [((7, 3), 1), ((2, 3, 2, 3), 1), ((2, 3, 2, 4), -1), ((3, 5), 0)]
EPS = 0.02


pytestmark = pytest.mark.once  # other tests compare the levels


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def reshaped(numbers, ndim, axis):
    return numbers.reshape([-1 if i == axis % ndim else 1 for i in range(ndim)])


def textbook_inference(x, mean, var, gamma, beta, axis=1, eps=1e-5):
    mean, var, gamma, beta = (reshaped(numbers, x.ndim, axis) for numbers in (mean, var, gamma, beta))
    return gamma * (x - mean) / jnp.sqrt(var + eps) + beta


def textbook(x, gamma, beta, axis=1, eps=1e-5):
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    return textbook_inference(x, x.mean(others), x.var(others), gamma, beta, axis, eps)


def arguments(rng, shape, axis, dtype=np.float64):
    x, gamma, beta = (rng.standard_normal(s).astype(dtype) for s in (shape, shape[axis], shape[axis]))
    return x, gamma, beta


def close(got, expected, rtol=1e-9, atol=1e-10):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def same(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True)


def derivatives(loss, given, directions, others):
    """Value, and first and second derivatives in all orders of modes, along directions; in one program."""
    (number,) = {len(given), len(directions), len(others)}
    argnums = tuple(range(number))
    gradient = jax.grad(loss, argnums)

    def along(*given):
        return jax.jvp(loss, given, directions)[1]

    def weighed(*given):
        return sum((g * v).sum() for g, v in zip(gradient(*given), directions, strict=True))

    return {
        "value": loss(*given),
        "reverse": gradient(*given),
        "forward": along(*given),
        "reverse of reverse": jax.grad(weighed, argnums)(*given),
        "forward of reverse": jax.jvp(gradient, given, directions)[1],
        "reverse of forward": jax.grad(along, argnums)(*given),
        "forward of forward": jax.jvp(along, given, others)[1],
    }


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_first_and_second_derivatives(shape, axis, rng, x64):
    dy = rng.standard_normal(shape)
    given, directions, others = (arguments(rng, shape, axis) for _ in range(3))

    def ours(*given):
        return (dy * jnp.sin(forward(*given, axis=axis, eps=EPS)[0])).sum()

    def theirs(*given):
        return (dy * jnp.sin(textbook(*given, axis, EPS))).sum()

    found = [jax.jit(derivatives, static_argnums=0)(loss, given, directions, others) for loss in (ours, theirs)]
    close(*found)


def test_derivatives_by_one_argument_without_jit(rng, x64):
    """Where most tangents are symbols for 0."""
    given = arguments(rng, (4, 2), 1)
    for i in range(3):

        def of(norm, i=i):
            def loss(value):
                return jnp.tanh(norm(*given[:i], value, *given[i + 1 :])).sum()

            return lambda value: (jax.grad(loss)(value), jax.hessian(loss)(value))

        close(of(lambda *given: forward(*given)[0])(given[i]), jax.jit(of(textbook))(given[i]))


def test_a_third_derivative_is_refused(rng):
    def third(x):
        return jax.grad(lambda x: jax.grad(lambda x: jax.grad(loss)(x).sum())(x).sum())(x)

    def loss(x):
        return (forward(x)[0] ** 3).sum()

    with pytest.raises(NotImplementedError, match="first and second derivatives of forward, but no third ones"):
        jax.eval_shape(third, jnp.ones((4, 3)))


@pytest.mark.parametrize(("shape", "axis"), SHAPES[2:], ids=str)
def test_inference_and_its_derivatives(shape, axis, rng, x64):
    """By all arguments, and under `vmap`, where the formula meets more axes."""
    dy = rng.standard_normal((2, *shape))
    x, directions = (rng.standard_normal((2, *shape)) for _ in range(2))
    mean, gamma, beta, *others = (rng.standard_normal(shape[axis]) for _ in range(7))
    var = rng.random(shape[axis]) + 0.1

    def loss(norm):
        def of(x, *numbers):
            return (dy * jnp.sin(jax.vmap(lambda x: norm(x, *numbers, axis=axis, eps=EPS))(x))).sum()

        return of

    given, along = (x, mean, var, gamma, beta), (directions, *others)
    run = jax.jit(derivatives, static_argnums=0)
    close(run(loss(inference), given, along, along), run(loss(textbook_inference), given, along, along))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("shape", "axis"), [((6, 3, 5), 1), ((6, 5, 3), -1)], ids=str)
def test_bits_and_types_are_those_of_the_functions(shape, axis, dtype, rng, x64):
    x, dy = (jnp.asarray(rng.standard_normal(shape)).astype(dtype) for _ in range(2))
    gamma, beta = (rng.standard_normal(3).astype(dtype if dtype == "float64" else "float32") for _ in range(2))
    arrays = np.asarray(x), gamma, beta
    expected, saved = bn.forward(*arrays, axis=axis)
    y, pull, (mean, var) = jax.vjp(lambda *given: forward(*given, axis=axis), *arrays, has_aux=True)
    same((y, pull(dy)), (expected, tuple(bn.backward(np.asarray(dy), saved))))
    full = np.float64 if dtype == "float64" else np.float32
    same((mean, var), (saved.mean.astype(full), saved.var.astype(full)))
    _, tangent = jax.jvp(lambda x: forward(x, gamma, beta, axis=axis)[0], (x,), (dy,))
    same(tangent, bn.jvp(np.asarray(dy), saved, dgamma=np.zeros(3), dbeta=np.zeros(3)).dy)
    fixed = inference(x, mean, var, gamma, beta, axis=axis)
    same(fixed, bn.inference(arrays[0], np.asarray(mean), np.asarray(var), gamma, beta, axis=axis))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_second_derivatives_of_16_bits(dtype, rng):
    x = jnp.asarray(rng.standard_normal((8, 3))).astype(dtype)

    def penalty(norm):
        return lambda x: (jax.grad(lambda x: (norm(x).astype("float32") ** 3).sum())(x).astype("float32") ** 2).sum()

    got = jax.jit(jax.grad(penalty(lambda x: forward(x)[0])))(x)
    assert got.dtype == dtype
    exact = jax.jit(jax.grad(penalty(lambda x: textbook(x, jnp.ones(3), jnp.zeros(3)))))(x.astype("float32"))
    close(got.astype("float32"), exact, rtol=0, atol=0.02 * float(abs(exact).max()))


def test_parameters_of_other_types_and_none(rng):
    x, gamma, beta = arguments(rng, (6, 3), 1, np.float32)
    same(forward(x), bn_forward(x))
    same(forward(x, beta=beta), bn_forward(x, None, beta))
    half = jnp.asarray(gamma, jnp.bfloat16)
    same(forward(x, half, beta), bn_forward(x, np.asarray(half.astype("float32")), beta))
    of_half, of_beta = jax.grad(lambda *given: (forward(x, *given)[0] ** 2).sum(), (0, 1))(half, beta)
    assert (of_half.dtype, of_beta.dtype) == (jnp.bfloat16, jnp.float32)
    same(forward(x, jnp.array([1, 2, 3])), bn_forward(x, np.array([1, 2, 3], np.float32)))


def bn_forward(x, *parameters, **options):
    y, saved = bn.forward(x, *parameters, **options)
    return y, Statistics(saved.mean.astype(np.float32), saved.var.astype(np.float32))


def test_statistics_have_no_derivative(rng):
    x, _, _ = arguments(rng, (6, 3), 1, np.float32)

    def loss(x):
        _, (mean, var) = forward(x)
        return mean.sum() + (mean * var).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(x)
    assert float(value) != 0
    assert not np.asarray(gradient).any()


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (2, 3, 0), (1, 3)], ids=str)
def test_empty_batches_and_single_values(shape):
    x, numbers = jnp.ones(shape), jnp.ones(shape[1])
    same(jax.jit(forward)(x), bn_forward(np.asarray(x)))
    gradient = jax.jit(jax.grad(lambda x: (forward(x)[0] ** 2).sum()))(x)
    assert gradient.shape == shape
    assert not np.asarray(gradient).any()
    assert jax.jit(inference)(x, numbers, numbers).shape == shape


def test_a_negative_variance_is_nan():
    y = inference(jnp.ones((2, 3)), jnp.zeros(3), jnp.array([1.0, -1.0, 1.0]))
    assert np.isnan(np.asarray(y)).tolist() == [[False, True, False]] * 2


def test_subnormal_numbers_count_as_zero():
    """As in JAX's own arithmetic."""
    x = np.full((2, 3), np.finfo(np.float32).smallest_subnormal)
    program = jax.jit(lambda x: (inference(x, jnp.zeros(3), jnp.ones(3), eps=0.0), x * 1.5))
    same(program(x), (np.zeros_like(x), np.zeros_like(x)))


def test_vmap_is_a_loop(rng):
    """Over any axis, of some of the arguments, twice, and around or inside of a gradient."""
    x, gamma = rng.standard_normal((4, 6, 3, 5)).astype("f4"), rng.standard_normal((2, 3)).astype("f4")

    def norm(x, gamma):
        return forward(x, gamma)[0]

    each = np.stack([[bn.forward(part, g)[0] for g in gamma] for part in x])
    same(jax.vmap(norm, (0, None))(x, gamma[0]), each[:, 0])
    same(jax.vmap(norm, (3, None), out_axes=1)(np.moveaxis(x, 0, 3), gamma[1]), np.moveaxis(each[:, 1], 0, 1))
    twice = jax.jit(jax.vmap(jax.vmap(norm, (None, 0)), (0, None)))
    same(twice(x, gamma), each)
    one = jax.jit(jax.grad(lambda *given: (norm(*given) ** 3).sum(), (0, 1)))
    got = jax.vmap(one, (0, None))(x, gamma[0])
    alone = [one(part, gamma[0]) for part in x]
    same(got, jax.tree.map(lambda *parts: np.stack(parts), *alone))
    inside = jax.jit(jax.grad(lambda *given: (twice(*given) ** 3).sum(), (0, 1)))(x, gamma)
    close(inside[1], np.stack([sum(one(part, g)[1] for part in x) for g in gamma]), rtol=1e-5, atol=1e-5)
    close(inside[0], np.stack([sum(one(part, g)[0] for g in gamma) for part in x]), rtol=1e-5, atol=1e-5)


def test_scan_checkpoint_and_second_derivatives_together(rng, x64):
    """A recurrent network with batch norm in each step, against the same with the formula."""
    xs, weights = rng.standard_normal((3, 5, 4)), rng.standard_normal((4, 4))
    gamma, beta = rng.standard_normal((2, 4))

    def penalty(norm):
        def loss(weights, gamma):
            def step(state, x):
                state = jnp.tanh(norm(x + state @ weights, gamma, beta))
                return state, state.mean()

            state, means = jax.lax.scan(jax.checkpoint(step), jnp.zeros((5, 4)), xs)
            return (state**2).sum() + means.sum()

        def of_gradients(*given):
            value, gradients = jax.value_and_grad(loss, (0, 1))(*given)
            return value + sum((gradient**2).sum() for gradient in gradients)

        return jax.jit(jax.value_and_grad(of_gradients, (0, 1)))(weights, gamma)

    close(penalty(lambda *given: forward(*given)[0]), penalty(textbook))


def test_running_statistics_and_training_as_the_page_has_them(rng, x64):
    """Twenty steps within one program, running statistics as those of a layer."""
    xs, target, weights = rng.standard_normal((20, 16, 4)), rng.standard_normal((16, 3)), rng.standard_normal((4, 3))
    layer = bn.BatchNorm(3, dtype=np.float64)

    def train(norm, statistics):
        def loss(parameters, x):
            y = norm(x @ parameters[0], *parameters[1:])
            return ((y - target) ** 2).mean(), statistics(x @ parameters[0])

        def step(carry, x):
            parameters, running_mean, running_var = carry
            (value, (mean, var)), gradients = jax.value_and_grad(loss, has_aux=True)(parameters, x)
            parameters = [p - 0.1 * g for p, g in zip(parameters, gradients, strict=True)]
            n = x.shape[0]
            running = 0.9 * running_mean + 0.1 * mean, 0.9 * running_var + 0.1 * var * n / (n - 1)
            return (parameters, *running), value

        start = [weights, jnp.ones(3), jnp.zeros(3)]
        return jax.jit(lambda xs: jax.lax.scan(step, (start, jnp.zeros(3), jnp.ones(3)), xs))(xs)

    ours = train(lambda *given: forward(*given)[0], lambda x: forward(x)[1])
    close(ours, train(textbook, lambda x: (x.mean(0), x.var(0))), rtol=1e-8, atol=1e-9)
    (_, *running), _ = train(lambda *_: jnp.zeros((16, 3)), lambda x: forward(x)[1])
    for x in xs:
        layer(x @ weights)
    close(running, [layer.running_mean, layer.running_var], rtol=1e-12)


def test_memory_is_shared(rng, monkeypatch):
    """The kernels read and write where XLA's arrays lie."""
    x, seen = jnp.asarray(rng.standard_normal((64, 32)), jnp.float32), []
    original = bn.functional.forward

    def watched(x, *given, out, **options):
        seen.append((x.__array_interface__["data"][0], out.__array_interface__["data"][0]))
        return original(x, *given, out=out, **options)

    monkeypatch.setattr(bn.functional, "forward", watched)
    y, _ = jax.block_until_ready(jax.jit(forward)(x))
    assert seen == [(x.unsafe_buffer_pointer(), y.unsafe_buffer_pointer())]


def test_nothing_is_compiled_twice(rng, monkeypatch):
    compiled = []
    original = primitives.buffer_callback
    monkeypatch.setattr(primitives, "buffer_callback", lambda *given: compiled.append(1) or original(*given))
    x, gamma, beta = arguments(rng, (13, 11), 1, np.float32)
    loss = jax.jit(jax.grad(lambda *given: (forward(*given)[0] ** 3).sum(), (0, 1, 2)))
    for _ in range(3):
        forward(x, gamma, beta)
    assert len(compiled) == 1
    for _ in range(3):
        loss(x, gamma, beta)
    assert len(compiled) == 3


def test_same_bits_for_any_number_of_threads(rng, always_threaded, monkeypatch):
    """This package's setting counts, also for a program that was compiled with another."""
    asked = []
    decide = bn._threads.decide
    monkeypatch.setattr(bn._threads, "decide", lambda: asked.append(decide()[0]) or decide())
    x = jnp.asarray(rng.standard_normal((16, 8, 12, 12)), jnp.float32)

    def penalty(x, gamma):
        return (jax.grad(lambda x: (forward(x, gamma)[0] ** 3).sum())(x) ** 2).sum()

    program = jax.jit(jax.value_and_grad(penalty, (0, 1)))
    found = []
    for threads in (1, 2, 3):
        asked.clear()
        with bn.num_threads(threads):
            result = jax.block_until_ready(program(x, jnp.ones(8)))
        assert set(asked) == {threads}
        found.append([np.asarray(each).tobytes() for each in jax.tree.leaves(result)])
    assert found[0] == found[1] == found[2]


UNDER_LOAD = """
import threading
import numpy as np
import jax, jax.numpy as jnp
from batchnorm.jax import forward, inference

def net(x, gamma):
    branches = [forward(x * k, gamma)[0] for k in (1.0, 2.0, 3.0, 4.0)]
    for _ in range(2):
        branches = [jnp.tanh(forward(y + 1, gamma)[0]) for y in branches]
    return sum((inference(y, gamma, gamma) ** 3).sum() for y in branches)

program = jax.jit(jax.value_and_grad(net, (0, 1)))
gamma = jnp.ones(16)
rng = np.random.default_rng(0)
xs = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in [(8, 16), (32, 16, 56, 56)]]
expected = [jax.tree.leaves(program(x, gamma)) for x in xs]
for _ in range(3):  # without waiting for what is asked for
    _, (dx, _) = program(xs[1], gamma)
    _, (dx, _) = program(dx * 0 + xs[1], gamma)
print(np.asarray(dx).tobytes() == np.asarray(expected[1][1]).tobytes())
wrong, done = [], []

def work(first):
    for i in range(first, first + 2):
        got = jax.tree.leaves(program(xs[i % 2], gamma))
        wrong.extend(i for a, b in zip(got, expected[i % 2]) if np.asarray(a).tobytes() != np.asarray(b).tobytes())
    done.append(first)

threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(done), len(wrong))
"""


@pytest.mark.parametrize("pool", ["1", "4"])
def test_no_deadlock_under_load(pool):
    """A program with 28 callbacks, in four threads and not waited for; XLA has one thread, or four, for all of it.

    With `pure_callback` and large arrays this waits for ever.
    """
    assert succeeds(UNDER_LOAD, NPROC=pool, BATCHNORM_NUM_THREADS="2", timeout=200).split() == ["True", "4", "0"]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda x: forward(x[0]), ValueError, r"x must have at least 2 dimensions, got shape \(3,\)"),
        (lambda x: forward(x.astype(int)), TypeError, r"x must have dtype float64, .* or bfloat16, got int32"),
        (lambda x: forward(x.astype(complex)), TypeError, r"x must have dtype float64, .*, got complex64"),
        (lambda x: forward(x, axis=2), ValueError, r"axis must be between -2 and 1 for shape \(6, 3\), got 2"),
        (lambda x: forward(x, axis=(0, 1)), TypeError, "axis must be the channel axis, one integer"),
        (lambda x: forward(x, eps=-1.0), ValueError, "eps must be finite and at least 0, got -1.0"),
        (lambda x: forward(x, eps=x[0, 0]), TypeError, "eps must be a number, got .*Tracer"),
        (lambda x: forward(x, x[:, 0]), ValueError, r"gamma must have shape \(3,\), got \(6,\); .*: axis=0\?"),
        (lambda x: forward(x, None, x), ValueError, r"beta must have shape \(3,\), got \(6, 3\)"),
        (lambda x: inference(x, x[0], x[0, :2]), ValueError, r"var must have shape \(3,\), got \(2,\)"),
    ],
)
def test_errors_are_raised_while_jax_traces(call, kind, message):
    with pytest.raises(kind, match=message):
        jax.eval_shape(call, jnp.ones((6, 3)))


def test_other_processors_are_refused():
    """When JAX compiles for them."""
    traced = jax.jit(forward).trace(jnp.ones((6, 3)))
    with pytest.raises(NotImplementedError, match="'batchnorm_forward' not found for platform cuda"):
        traced.lower(lowering_platforms=("cuda",))


def test_examples_in_docstrings():
    failed, tried = doctest.testmod(functions)
    assert (failed, tried > 0) == (0, True)


def test_the_page_is_true():
    failed, tried = run_section("adapters.md", "JAX: `forward` and `inference`")
    assert (failed, tried > 0) == (0, True)
