"""Tangents and second gradients are the derivatives of `forward` and of `backward`: by differences in long double."""

import numpy as np
import pytest
from derivatives import Case, slope
from oracle import ULPS, rows, truth, ulps
from shapes import ARRANGEMENTS, VIEWS

import batchnorm as bn

EPS = 0.1
BOTH = ("mean", "variance")
KINDS = ("plain", "mask", "lengths", "weights", "large weights", "fixed")
ACTIVATIONS = (None, "relu", ("leaky_relu", 0.2))
TOLERANCE = {np.float64: 1e-12, np.float32: 4e-6}
"""Of a derivative, relative to the largest of its channel: some hundred roundings by the parts that cancel."""


def made(shape, axis, kind, activation, through, dtype, rng):
    """Arguments of `forward`, what it left, and the same batch in long double."""
    channels = shape[axis]
    places = [n for i, n in enumerate(shape) if i != axis % len(shape)]
    x, add = rng.standard_normal((2, *shape)).astype(dtype)
    gamma, beta = rng.standard_normal((2, channels)).astype(dtype)
    selects, fixed = {}, None
    weight = np.ones(places, np.longdouble)
    if kind == "mask":
        selects["mask"] = rng.random(places) < 0.7
        selects["mask"].flat[0] = True
        weight *= selects["mask"]
    elif kind == "lengths":
        selects["lengths"] = rng.integers(1, places[1] + 1, places[0])
        weight *= np.arange(places[1]) < selects["lengths"][:, None]
    elif "weights" in kind:
        selects["weights"] = rng.random(places) * (1e30 if kind == "large weights" else 1)
        weight *= selects["weights"]
    elif kind == "fixed":
        mean, var = rng.standard_normal(channels), rng.random(channels) + 0.3
        selects["moments"], fixed = bn.Moments(1, mean, var), (mean[:, None], var[:, None])
    _, saved = bn.forward(x, gamma, beta, axis=axis, eps=EPS, add=add, activation=activation, **selects)
    weight = weight.reshape(1, -1)
    case = Case(
        rows(x, axis),
        *(numbers.astype(np.longdouble)[:, None] for numbers in (gamma, beta)),
        rows(add, axis),
        weight / weight.sum(),
        np.ones_like(weight) if "weights" in kind else (weight > 0).astype(np.longdouble),
        np.longdouble(EPS),
        through,
        (None, None) if fixed is None else tuple(part.astype(np.longdouble) for part in fixed),
        activation,
    )
    if fixed is None:
        case = case._replace(
            held=tuple(m if n not in through else None for n, m in zip(BOTH, case.moments(), strict=True))
        )
    return saved, case


def near(got, exact, dtype):
    """Whether rows differ by no more than the tolerance, relative to the largest value of their channel, at least 1."""
    largest = np.maximum(abs(exact).max(axis=1, keepdims=True, initial=0), 1)
    assert (abs(got - exact) / largest).max() <= TOLERANCE[dtype]


CASES = [
    ((4, 3, 5), 1),
    ((4, 5, 3), -1),
    ((7, 2), 1),
    ((2, 3, 3, 4), 1),
    ((3, 2, 2, 2, 3), 1),
    ((3, 2, 2, 2, 3), -1),
    ((12, 40, 3), 1),
]


EVERY = [(shape, axis, kind) for shape, axis in CASES for kind in KINDS if len(shape) == 3 or kind != "lengths"]
SECOND = [
    (*case, through)
    for case in EVERY
    for through in ([()] if case[2] == "fixed" else [BOTH, ("mean",), ("variance",), ()])
    if np.prod(case[0]) < 200
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(("shape", "axis", "kind"), EVERY, ids=str)
def test_a_tangent_is_the_derivative_along_a_direction(shape, axis, kind, activation, dtype, rng):
    """Of x, gamma, beta, the residual and, where they are fixed, of the moments, all at once."""
    through = () if kind == "fixed" else BOTH
    saved, case = made(shape, axis, kind, activation, through, dtype, rng)
    dx, dadd = rng.standard_normal((2, *shape)).astype(dtype)
    dgamma, dbeta, dmean, dvar = rng.standard_normal((4, shape[axis]))
    if kind != "fixed":
        dmean = dvar = 0 * dmean
    tangents = bn.jvp(dx, saved, dgamma=dgamma, dbeta=dbeta, dmean=dmean, dvar=dvar, dadd=dadd, through=through)

    def moved(h):
        held = tuple(
            None if moment is None else moment + h * by[:, None]
            for moment, by in zip(case.held, (dmean, dvar), strict=True)
        )
        return case._replace(
            x=case.x + h * rows(dx, axis),
            gamma=case.gamma + h * dgamma[:, None],
            beta=case.beta + h * dbeta[:, None],
            add=case.add + h * rows(dadd, axis),
            held=held,
        )

    # The activation is taken as it is, or a difference might go over its kink.
    near(rows(tangents.dy, axis), slope(lambda h: moved(h).pre()) * case.passing(), dtype)
    assert tangents.dy.dtype == dtype
    for got, moment in ((tangents.dmean, 0), (tangents.dvar, 1)):
        near(got[:, None], slope(lambda h, moment=moment: moved(h).moments()[moment]), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(("shape", "axis", "kind", "through"), SECOND, ids=str)
def test_second_gradients_are_the_derivatives_of_the_gradients(shape, axis, kind, through, activation, dtype, rng):
    """Of ⟨u, dx⟩ + ⟨a, dgamma⟩ + ⟨b, dbeta⟩ + ⟨c, dadd⟩, by dy, gamma and x, each value by itself.

    A moment through which the gradient does not go is a constant in the second derivative too.
    """
    saved, case = made(shape, axis, kind, activation, through, dtype, rng)
    ddx, dy, ddadd = rng.standard_normal((3, *shape)).astype(dtype)
    a, b = rng.standard_normal((2, shape[axis]))
    second = bn.double_backward(ddx, dy, saved, ddgamma=a, ddbeta=b, ddadd=ddadd, through=through)
    u, g, c, passing = rows(ddx, axis) * case.counts, rows(dy, axis), rows(ddadd, axis), case.passing()

    def product(of, dy):
        """Per channel."""
        dx, dgamma, dbeta, dadd = of.gradients(dy, passing)
        return ((u * dx + c * dadd).sum(axis=-1, keepdims=True) + a[:, None] * dgamma + b[:, None] * dbeta)[..., 0]

    def by_value(f):
        """All values at once, each moved in a copy of the batch."""
        return slope(lambda h: f(h * np.eye(g.shape[1])[:, None])).T

    near(rows(second.dy, axis), by_value(lambda step: product(case, g + step)), dtype)
    near(second.gamma[:, None], slope(lambda h: product(case._replace(gamma=case.gamma + h), g))[:, None], dtype)
    near(rows(second.x, axis), by_value(lambda step: product(case._replace(x=case.x + step), g)), dtype)
    assert second.dy.dtype == second.x.dtype == second.gamma.dtype == dtype


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_the_jacobian_is_symmetric(view, dtype, rng, always_threaded):
    """So a tangent is a gradient: the long double dx of dy = ẋ. And the same bits for one thread and two."""
    x, dx = (rng.standard_normal(view) + 2).astype(dtype), rng.standard_normal(view).astype(dtype)
    gamma = rng.standard_normal(view[1])
    t = truth(x, dx, gamma)
    _, saved = bn.forward(x, gamma)
    tangents = bn.jvp(dx, saved, num_threads=1)
    assert ulps(tangents.dy, t.dx, t.dx_terms, 1) <= ULPS["dx"][np.dtype(dtype).name]
    backward = bn.backward(dx, saved).dx
    assert tangents.dy.tobytes() == backward.tobytes() == bn.jvp(dx, saved, num_threads=2).dy.tobytes()
    summed = bn.jvp(dx, saved, sums=bn.tangent_sums(dx, saved)).dy
    assert ulps(summed, t.dx, t.dx_terms, 1) <= ULPS["dx"][np.dtype(dtype).name]


@pytest.mark.parametrize("kind", ["plain", "mask", "weights"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_both_ways_give_the_same_number(view, dtype, kind, rng, always_threaded):
    """⟨v, Jẋ⟩ = ⟨Jᵀv, ẋ⟩; and of the second derivative, which is linear in u and in dy: ⟨g_dy, w⟩ moves dx along w."""
    saved, _ = made(view, 1, kind, "relu" if view[1] % 2 else None, BOTH, dtype, rng)
    v, dx, u, w = rng.standard_normal((4, *view)).astype(dtype)
    numbers = rng.standard_normal((2, view[1]))
    tangents = bn.jvp(dx, saved, dgamma=numbers[0], dbeta=numbers[1])
    gradients = bn.backward(v, saved)

    def product(one, other):
        return (rows(one, 1) * rows(other, 1)).sum(axis=1)

    forth = product(v, tangents.dy)
    back_again = product(gradients.dx, dx) + numbers[0] * gradients.dgamma + numbers[1] * gradients.dbeta
    allowed = 200 * np.finfo(dtype).eps * np.sqrt(view[0] * view[2]) * (1 + abs(saved.gamma) * saved.rstd)
    allowed = allowed * (1 + abs(numbers).max(axis=0))
    assert (abs(forth - back_again) <= allowed).all(), float((abs(forth - back_again) / allowed).max())
    second = bn.double_backward(u, v, saved)
    moved = bn.backward(w, saved)
    assert (abs(product(second.dy, w) - product(u, moved.dx)) <= allowed).all()


@pytest.mark.parametrize("arranged", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_any_arrangement_in_memory(arranged, rng):
    x, dx, dy = rng.standard_normal((3, 3, 5, 4, 7))
    _, plain = bn.forward(x, np.ones(5))
    _, saved = bn.forward(arranged(x), np.ones(5))
    np.testing.assert_allclose(bn.jvp(arranged(dx), saved).dy, bn.jvp(dx, plain).dy, rtol=1e-12, atol=1e-13)
    for got, expected in zip(
        bn.double_backward(arranged(dx), dy, saved), bn.double_backward(dx, dy, plain), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)
    for out in (np.empty_like(x), np.empty(x.shape[::-1]).T):
        assert bn.jvp(arranged(dx), saved, out=out).dy is out
        np.testing.assert_allclose(out, bn.jvp(dx, plain).dy, rtol=1e-12, atol=1e-13)
    again = dx.copy()
    assert bn.jvp(again, plain, out=again).dy is again
    np.testing.assert_array_equal(again, bn.jvp(dx, plain).dy)


def test_16_bit_floats_are_worked_on_in_float32(rng):
    x, dx, dy = rng.standard_normal((3, 8, 5, 9)).astype(np.float16)
    wide = [array.astype(np.float32) for array in (x, dx, dy)]
    _, saved = bn.forward(x, np.ones(5, np.float32))
    _, expected = bn.forward(wide[0], np.ones(5, np.float32))
    np.testing.assert_array_equal(bn.jvp(dx, saved).dy, bn.jvp(wide[1], expected).dy.astype(np.float16))
    second = bn.double_backward(dx, dy, saved)
    for got, wanted in zip(second, bn.double_backward(wide[1], wide[2], expected), strict=True):
        np.testing.assert_array_equal(got, wanted.astype(got.dtype))
    assert second.x.dtype == np.float16


@pytest.mark.parametrize("kind", ["plain", "mask", "weights"])
def test_sums_of_parts_add_up(kind, rng):
    """Each part by itself, with the statistics and the sums of all, is that part of the whole."""
    saved, _ = made((12, 4, 6), 1, kind, None, BOTH, np.float64, rng)
    x, (dx, u, dy) = saved.x, rng.standard_normal((3, 12, 4, 6))
    select = {"mask": rng.random((12, 6)) < 0.6, "weights": 1e6 * rng.random((12, 6))}.get(kind)
    named = {} if kind == "plain" else {kind: select}
    gamma = rng.standard_normal(4)
    _, whole = bn.forward(x, gamma, **named)
    cuts = [slice(0, 1), slice(1, 7), slice(7, 12)]
    parts = [{kind: select[cut]} if named else {} for cut in cuts]
    moments = sum(bn.Moments.of(x[cut], **part) for cut, part in zip(cuts, parts, strict=True))
    of_parts = [bn.forward(x[cut], gamma, moments=moments, **part)[1] for cut, part in zip(cuts, parts, strict=True)]
    tangent = sum(bn.tangent_sums(dx[cut], part) for cut, part in zip(cuts, of_parts, strict=True))
    second = sum(bn.second_sums(u[cut], dy[cut], part) for cut, part in zip(cuts, of_parts, strict=True))
    expected, expected_second = bn.jvp(dx, whole), bn.double_backward(u, dy, whole)
    for cut, part in zip(cuts, of_parts, strict=True):
        tangents = bn.jvp(dx[cut], part, sums=tangent)
        np.testing.assert_allclose(tangents.dy, expected.dy[cut], rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(tangents[1:], expected[1:], rtol=1e-11, atol=1e-12)
        gradients = bn.double_backward(u[cut], dy[cut], part, sums=second)
        for got, wanted in zip(gradients[:2], expected_second[:2], strict=True):
            np.testing.assert_allclose(got, wanted[cut], rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(gradients.gamma, expected_second.gamma, rtol=1e-11, atol=1e-12)


@pytest.mark.once
def test_what_is_needed(rng):
    x, dy, u = rng.standard_normal((3, 6, 3))
    _, saved = bn.forward(x, np.ones(3))
    everything = bn.double_backward(u, dy, saved)
    for name in ("dy", "x", "gamma"):
        only = bn.double_backward(u, dy, saved, need=name)
        for other in ("dy", "x", "gamma"):
            if other == name:
                np.testing.assert_array_equal(getattr(only, name), getattr(everything, name))
            else:
                assert getattr(only, other) is None
    assert bn.double_backward(u, dy, bn.forward(x)[1]).gamma is None


def test_an_empty_batch():
    x = np.empty((0, 3, 4))
    _, saved = bn.forward(x, np.ones(3))
    tangents, second = bn.jvp(x, saved, dgamma=np.ones(3)), bn.double_backward(x, x, saved)
    assert tangents.dy.shape == second.dy.shape == second.x.shape == x.shape
    assert tangents.dmean.tolist() == tangents.dvar.tolist() == second.gamma.tolist() == [0, 0, 0]


X = np.linspace(-3, 5, 24).reshape(2, 3, 4)
SAVED = bn.forward(X, np.ones(3))[1]
ONES = np.ones(3)
BAD = {
    "saved": (lambda: bn.jvp(X, None), TypeError, "saved must be what forward returned, got NoneType"),
    "dx of another shape": (lambda: bn.jvp(X[:1], SAVED), ValueError, r"dx must have the shape of x, \(2, 3, 4\), got"),
    "dx of another dtype": (
        lambda: bn.jvp(X.astype("f4"), SAVED),
        TypeError,
        "dx must have the dtype of x, float64, got",
    ),
    "dgamma": (lambda: bn.jvp(X, SAVED, dgamma=ONES[:2]), ValueError, r"dgamma must have shape \(3,\), got \(2,\)"),
    "dadd of nothing": (
        lambda: bn.jvp(X, SAVED, dadd=X),
        ValueError,
        "dadd must be None if forward had no add",
    ),
    "through": (lambda: bn.jvp(X, SAVED, through="median"), ValueError, "through must be one or more .*got .*median"),
    "sums": (
        lambda: bn.jvp(X, SAVED, sums=np.ones((3, 3))),
        ValueError,
        r"sums must be float64 of shape \(2, 3\), got",
    ),
    "out": (lambda: bn.jvp(X, SAVED, out=np.empty(3)), ValueError, r"out must have shape \(2, 3, 4\), got \(3,\)"),
    "out overlaps": (lambda: bn.jvp(X, SAVED, out=SAVED.x), ValueError, "out must not overlap x"),
    "sums, saved": (lambda: bn.tangent_sums(X, None), TypeError, "saved must be what forward returned"),
    "second, saved": (lambda: bn.double_backward(X, X, None), TypeError, "saved must be what forward returned"),
    "ddx": (lambda: bn.double_backward(X[:1], X, SAVED), ValueError, "ddx must have the shape of x"),
    "dy": (lambda: bn.double_backward(X, X[:1], SAVED), ValueError, "dy must have the shape of x"),
    "ddgamma": (lambda: bn.double_backward(X, X, SAVED, ddgamma=ONES[:1]), ValueError, "ddgamma must have shape"),
    "ddadd": (lambda: bn.double_backward(X, X, SAVED, ddadd=X), ValueError, "ddadd must be None if"),
    "need": (lambda: bn.double_backward(X, X, SAVED, need="beta"), ValueError, "need must be one or more .*got .*beta"),
    "second sums": (
        lambda: bn.double_backward(X, X, SAVED, sums=np.ones((2, 3))),
        ValueError,
        "sums must be float64 of",
    ),
}


@pytest.mark.once
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.once
def test_a_layer_has_both(rng):
    """Of its last call: in training, in evaluation that keeps x, and with running statistics in training."""
    layer = bn.BatchNorm(4, activation="relu", dtype=np.float64)
    layer.gamma, layer.beta = rng.standard_normal((2, 4))
    x, dx, dy, add, dadd = rng.standard_normal((5, 6, 4, 3))
    numbers = {"dgamma": rng.standard_normal(4), "dbeta": rng.standard_normal(4)}
    second = {f"d{name}": value for name, value in numbers.items()}
    with pytest.raises(RuntimeError, match="backward needs a call of the layer before it"):
        layer.jvp(dx)
    layer(x, add=add)
    for prepare, fixed in ((lambda: None, False), (lambda: layer.eval(keep_input=True), True), (freeze(layer), True)):
        prepare()
        known = {"moments": bn.Moments(1, layer.running_mean, layer.running_var)} if fixed else {}
        _, saved = bn.forward(x, layer.gamma, layer.beta, add=add, activation="relu", **known)
        layer(x, add=add)
        through = () if fixed else BOTH
        expected = bn.jvp(dx, saved, dadd=dadd, through=through, **numbers)
        for got, wanted in zip(layer.jvp(dx, dadd=dadd, **numbers), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)
        expected = bn.double_backward(dx, dy, saved, ddadd=dadd, through=through, **second)
        for got, wanted in zip(layer.double_backward(dx, dy, ddadd=dadd, **second), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)
    layer.train()
    layer.statistics, layer.ghost = "batch", 3
    layer(x, add=add)
    with pytest.raises(RuntimeError, match="only backward is available after renorm or ghost batches"):
        layer.jvp(dx)


def freeze(layer):
    def frozen():
        layer.train()
        layer.statistics, layer.update = "running", False

    return frozen
