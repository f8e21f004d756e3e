"""Results against the long-double oracle: any shape, axis, dtype and arrangement in memory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ULPS, assert_close, largest_errors, truth, ulps
from shapes import ARRANGEMENTS, VIEWS

import batchnorm as bn

DTYPES = ["float32", "float64"]


def arrays(rng, shape, dtype, channels, offset=0.0):
    x = (rng.standard_normal(shape) + offset).astype(dtype)
    dy = rng.standard_normal(shape).astype(dtype)
    gamma, beta = (rng.standard_normal(channels).astype(dtype) for _ in range(2))
    return x, dy, gamma, beta


def check(x, dy, gamma, beta, axis=1, eps=1e-5, **how):
    y, saved = bn.forward(x, gamma, beta, axis=axis, eps=eps, **how)
    gradients = bn.backward(dy, saved, **how)
    assert y.dtype == gradients.dx.dtype == x.dtype
    assert y.shape == gradients.dx.shape == x.shape
    assert_close(largest_errors(x, dy, gamma, beta, axis, eps, y, saved, gradients), x.dtype)
    return y, saved, gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_every_way_through_the_kernels(view, dtype, rng, always_threaded):
    x, dy, gamma, beta = arrays(rng, view, dtype, view[1], offset=3)
    check(x, dy, gamma, beta, num_threads=2)


@settings(max_examples=150)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple),
    long=st.sampled_from([1, 1, 13, 40]),
    axis=st.integers(-5, 4),
    dtype=st.sampled_from(DTYPES),
    arrange_x=st.sampled_from(sorted(ARRANGEMENTS)),
    arrange_dy=st.sampled_from(sorted(ARRANGEMENTS)),
    affine=st.sampled_from(["both", "gamma", "beta", "neither"]),
    eps=st.sampled_from([1e-5, 1e-3, 1.0]),
    offset=st.sampled_from([0.0, -7.0, 1e3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_array(shape, long, axis, dtype, arrange_x, arrange_dy, affine, eps, offset, seed):
    shape = (*shape[:-1], shape[-1] * long)
    axis = axis % len(shape) - (len(shape) if axis < 0 else 0)
    rng = np.random.default_rng(seed)
    x, dy, gamma, beta = arrays(rng, shape, dtype, shape[axis], offset)
    gamma = gamma if affine in ("both", "gamma") else None
    beta = beta if affine in ("both", "beta") else None
    x_given, dy_given = ARRANGEMENTS[arrange_x](x), ARRANGEMENTS[arrange_dy](dy)
    x_before, dy_before = x_given.copy(), dy_given.copy()
    y, saved = bn.forward(x_given, gamma, beta, axis=axis, eps=eps)
    gradients = bn.backward(dy_given, saved)
    np.testing.assert_array_equal(x_given, x_before)
    np.testing.assert_array_equal(dy_given, dy_before)
    assert (gradients.dgamma is None, gradients.dbeta is None) == (gamma is None, beta is None)
    assert not np.shares_memory(y, x_given)
    assert not np.shares_memory(gradients.dx, dy_given)
    assert_close(largest_errors(x, dy, gamma, beta, axis, eps, y, saved, gradients), x.dtype)


@pytest.mark.once
@pytest.mark.parametrize("arrange", ["C", "F", "channels last in memory", "axes swapped"])
def test_dense_arrays_are_not_copied_and_keep_their_order(arrange, rng):
    x = ARRANGEMENTS[arrange](rng.standard_normal((4, 6, 5, 3)))
    y, saved = bn.forward(x)
    assert saved.x is x
    assert y.strides == x.strides
    assert bn.backward(x, saved).dx.strides == x.strides
    assert bn.inference(x, np.zeros(6), np.ones(6)).strides == x.strides


@settings(max_examples=60)
@given(
    view=st.tuples(st.integers(1, 60), st.integers(1, 20), st.sampled_from([1, 1, 3, 50, 70, 200])),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_inference_and_its_gradients(view, dtype, seed):
    rng = np.random.default_rng(seed)
    x, dy, gamma, beta = arrays(rng, view, dtype, view[1], offset=2)
    mean, var = rng.standard_normal(view[1]).astype(dtype), rng.random(view[1]).astype(dtype)
    wide = [value.astype(np.longdouble)[None, :, None] for value in (mean, var, gamma, beta)]
    rstd = 1 / np.sqrt(wide[1] + np.longdouble(1e-5))
    xhat = (x.astype(np.longdouble) - wide[0]) * rstd
    terms = np.maximum(abs(wide[2] * xhat).max(axis=(0, 2)), abs(beta))
    exact = wide[2] * xhat + wide[3]
    assert ulps(bn.inference(x, mean, var, gamma, beta), exact, terms, 1) <= ULPS["y"][dtype]
    dx, dgamma, dbeta = bn.inference_backward(dy, x, mean, var, gamma)
    exact_dx = dy * wide[2] * rstd
    assert ulps(dx, exact_dx, abs(exact_dx).max(axis=(0, 2)), 1) <= ULPS["dx"][dtype]
    for got, summands in ((dgamma, dy * xhat), (dbeta, dy.astype(np.longdouble))):
        limit = ULPS["dgamma"][dtype]
        assert ulps(got, summands.sum(axis=(0, 2)), abs(summands).sum(axis=(0, 2))) <= limit


OFFSETS = [0.0, 1e2, 1e4, 1e6]


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_at_any_offset(offset, layout, dtype, rng):
    shape, axis = ((16, 8, 32, 32), 1) if layout == "channels first" else ((16, 32, 32, 8), -1)
    x, dy, gamma, beta = arrays(rng, shape, dtype, 8, offset)
    check(x, dy, gamma, beta, axis)


@pytest.mark.parametrize("scale", [1e-30, 1e15, 1e30, 3e38])
@pytest.mark.parametrize("view", [(64, 5, 1), (7, 5, 130), (40, 5, 9)], ids=str)
def test_no_overflow_or_underflow_in_float32(scale, view, rng):
    x = (rng.uniform(-1, 1, view) * scale).astype(np.float32)
    dy = rng.standard_normal(view).astype(np.float32)
    y, saved = bn.forward(x, eps=0.0)
    t = truth(x, dy, eps=0.0)
    assert np.isfinite(y).all()
    assert ulps(y, t.y, t.y_terms, 1) <= ULPS["y"]["float32"]
    dx = bn.backward(dy * np.float32(min(scale, 1)), saved).dx
    t = truth(x, dy * np.float32(min(scale, 1)), eps=0.0)
    assert ulps(dx, t.dx, t.dx_terms, 1) <= ULPS["dx"]["float32"]


@pytest.mark.parametrize("value", [0.0, 1.1, -3e-3, 100.0, 1e30, 16777217.0])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_constant_channel_gives_beta(view, dtype, eps, value, rng):
    x = np.full(view, value, dtype)
    gamma, beta = (rng.standard_normal(view[1]).astype(dtype) for _ in range(2))
    y, saved = bn.forward(x, gamma, beta, eps=eps)
    assert (saved.var == 0).all()
    assert (saved.mean == x[0, 0, 0]).all()
    expected = np.broadcast_to(beta[None, :, None], view)
    assert y.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_data_with_exact_statistics_gives_exact_results(view, dtype, rng):
    """Each value m + d has a neighbour m − d: mean m, variance d², without rounding, however rows are cut."""
    N, C, S = view if view[2] < 8192 else (*view[:2], view[2] + view[2] % 2)
    view = (N, C, S)
    m, d = rng.integers(-8, 9, C) * 0.5, 2.0 ** rng.integers(-3, 4, C)
    if S % 2 == 0:
        signs = rng.choice([-1.0, 1.0], (N, C, S // 2, 1)) * [1, -1]
    elif N % 2 == 0:
        signs = rng.choice([-1.0, 1.0], (N // 2, 1, C, S)) * np.reshape([1, -1], (2, 1, 1))
    else:
        signs, d = np.zeros(view), np.zeros(C)
    x = (m[:, None] + d[:, None] * signs.reshape(view)).astype(dtype)
    gamma, beta = rng.integers(-4, 5, view[1]).astype(dtype), rng.integers(-4, 5, view[1]).astype(dtype)
    y, saved = bn.forward(x, gamma, beta, eps=0.0)
    np.testing.assert_array_equal(saved.mean, m)
    np.testing.assert_array_equal(saved.var, d**2)
    wide = [value[None, :, None] for value in (m, d, gamma, beta)]
    xhat = np.divide(x - wide[0], wide[1], out=np.zeros(view), where=wide[1] != 0)
    np.testing.assert_array_equal(y, wide[2] * xhat + wide[3])
    dy = rng.integers(-4, 5, view).astype(dtype)
    gradients = bn.backward(dy, saved)
    np.testing.assert_array_equal(gradients.dbeta, dy.sum(axis=(0, 2), dtype=np.float64).astype(dtype))
    np.testing.assert_array_equal(gradients.dgamma, (dy * xhat).sum(axis=(0, 2)).astype(dtype))


HARD = {
    "padding first": lambda x: x.__setitem__(np.s_[: x.shape[0] // 3], 0),
    "outlier first": lambda x: x.__setitem__(np.s_[0, :, 0], 1e5),
    "outlier last": lambda x: x.__setitem__(np.s_[-1, :, -1], -1e5),
    "one huge value": lambda x: x.__setitem__(np.s_[0, :, 0], 3e37),
    "drift": lambda x: x.__iadd__(np.linspace(0, 1e4, x.shape[0])[:, None, None].astype(x.dtype)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spoil", HARD.values(), ids=HARD)
@pytest.mark.parametrize("view", [(3000, 5, 1), (60, 5, 300), (600, 5, 9)], ids=str)
def test_accuracy_on_data_that_misleads_the_pivot(view, spoil, dtype, rng):
    x, dy, gamma, beta = arrays(rng, view, dtype, view[1], offset=1e3)
    spoil(x)
    check(x, dy, gamma, beta)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, -1])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_nan_and_infinity_stay_in_their_channel(view, where, poison, rng):
    x, dy, gamma, beta = arrays(rng, view, "float32", view[1])
    spoiled = x.copy()
    spoiled[where, 0, where] = poison
    clean, clean_saved = bn.forward(x, gamma, beta)
    y, saved = bn.forward(spoiled, gamma, beta)
    assert np.isnan(y[:, 0]).all()
    np.testing.assert_array_equal(y[:, 1:], clean[:, 1:])
    np.testing.assert_array_equal(saved.var[1:], clean_saved.var[1:])
    dx = bn.backward(dy, saved).dx
    np.testing.assert_array_equal(dx[:, 1:], bn.backward(dy, clean_saved).dx[:, 1:])


def test_some_gradients_are_the_same_bits_as_all(rng):
    for view in VIEWS.values():
        x, dy, gamma, beta = arrays(rng, view, "float32", view[1])
        _, saved = bn.forward(x, gamma, beta)
        everything = bn.backward(dy, saved)
        for need in ([], ["dx"], ["dgamma"], ["dbeta"], ["dx", "dbeta"], ("dgamma", "dbeta")):
            some = bn.backward(dy, saved, need=need)
            for name in ("dx", "dgamma", "dbeta"):
                got, expected = getattr(some, name), getattr(everything, name)
                assert (got is None) == (name not in need)
                if got is not None:
                    assert got.tobytes() == expected.tobytes()
