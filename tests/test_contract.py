"""The contract of docs/numerics.md, checked with the oracle on data that is easy to lose digits on."""

from pathlib import Path

import numpy as np
import pytest
from batches import GRADIENTS, KINDS
from fuzz.accuracy import Case, errors_of
from oracle import ULPS, assert_close, errors_by_name, parts_error, truth

import batchnorm as bn

DTYPES = ["float32", "float64"]
OFFSETS = [0.0, 0.3, 1.0, 1e2, 1e4, 1e6, -3e5]

# By the way through the kernels: views (N, C, S), and whether the channels are last in memory.
LAYOUTS = {
    "lanes": ((5, 3, 200), False),
    "lanes, ragged": ((17, 2, 65), False),
    "lanes, blocks of rows": ((70, 2, 130), False),
    "lanes, segments": ((1, 1, 8192 + 5), False),
    "short rows": ((9, 5, 49), False),
    "short rows, one sample": ((1, 7, 49), False),
    "columns": ((300, 7, 1), False),
    "channels last": ((4, 6, 35), True),
    "few channels": ((1500, 2, 1), False),
    "few channels, short rows": ((150, 2, 4), False),
    "columns of many channels": ((40, 50, 1), False),
    "lanes of many channels": ((2, 320, 20), False),
    "few values": ((12, 3, 1), False),
}


def arranged(array, last):
    return np.ascontiguousarray(np.moveaxis(array, 1, -1)) if last else array


def check(x, dy, gamma, beta, axis, eps, cuts=()):
    """All results of the whole, and of parts of it with merged statistics."""
    t = truth(x, dy, gamma, beta, axis, eps)
    y, saved = bn.forward(x, gamma, beta, axis=axis, eps=eps)
    gradients = bn.backward(dy, saved)
    errors = errors_by_name(y, saved, gradients, t, axis)
    if cuts:
        xs, dys = np.split(x, cuts), np.split(dy, cuts)
        moments = sum(bn.Moments.of(part, axis) for part in xs)
        done = [bn.forward(part, gamma, beta, axis=axis, eps=eps, moments=moments) for part in xs]
        sums = sum(bn.grad_sums(part, saved) for part, (_, saved) in zip(dys, done, strict=True))
        each = [bn.backward(part, saved, sums=sums) for part, (_, saved) in zip(dys, done, strict=True)]
        parts = bn.Gradients(np.concatenate([g.dx for g in each]), each[0].dgamma, each[0].dbeta)
        errors["parts"] = parts_error(np.concatenate([y for y, _ in done]), parts, y, gradients, t, axis)
    assert_close(errors, x.dtype)
    return saved


def parameters(rng, channels, dtype):
    return rng.uniform(-2, 2, (2, channels)).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_data_at_any_offset(kind, layout, dtype, rng):
    view, last = layout
    for offset, slope in zip(OFFSETS, GRADIENTS.values(), strict=True):
        x = (KINDS[kind](rng, view) + offset).astype(dtype)
        dy = slope(rng, x).astype(dtype)
        cuts = [view[0] // 3, view[0] // 2] if offset in (0.3, 1e4) else ()
        check(arranged(x, last), arranged(dy, last), *parameters(rng, view[1], dtype), -1 if last else 1, 1e-5, cuts)


@pytest.mark.parametrize("scale", [1e-30, 1e30, 3e38])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kind", ["uniform", "±a", "sparse", "ramp"])
def test_squares_that_float32_cannot_hold(kind, layout, scale, rng):
    """Such a block is summed again in float64, and coefficients that do not fit are applied in float64."""
    view, last = layout
    x = (np.clip(KINDS[kind](rng, view), -1, 1) * scale).astype(np.float32)
    dy = (rng.standard_normal(view) * min(scale, 1)).astype(np.float32)
    gamma, beta = parameters(rng, view[1], np.float32)
    saved = check(arranged(x, last), arranged(dy, last), gamma, beta, -1 if last else 1, 0.0)
    assert (saved.var > 0).all()
    assert np.isfinite(saved.var).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_one_value_in_zeros(seed, dtype):
    """One value is all of the variance, so that its rounding does not average out."""
    rng = np.random.default_rng(seed)
    x = np.zeros((2956, 3, 1))
    x[rng.integers(2956, size=3), range(3)] = rng.uniform(0.5, 1.5, (3, 1))
    dy = 1 + 1e-3 * rng.standard_normal(x.shape)
    check(x.astype(dtype), dy.astype(dtype), *parameters(rng, 3, dtype), 1, 1e-5, [7, 1000])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("a", [1 / 3, 0.7, 1e-3, 12345.678])
@pytest.mark.parametrize("n", [2, 16, 50, 1000, 4097])
def test_two_opposite_values(n, a, dtype, rng):
    """All squares are equal, and so are their roundings."""
    x = np.where(rng.random((n, 5)) < 0.5, a, -a).astype(dtype)
    for slope in GRADIENTS.values():
        dy = slope(rng, x[:, :, None])[:, :, 0].astype(dtype)
        check(x, dy, *parameters(rng, 5, dtype), 1, 1e-5, [n // 2])


# Inputs that tests/fuzz/accuracy.py found over a limit, by what was wrong in the kernels: type, bytes and meaning.
FOUND = {
    "a pivot 1.5 deviations off: y": (
        "float32",
        "521f16ac1a3b26ad1b53b73c36769a8b665a80425a6bae0325e13f146a27a526ccd01e5a83dc58b77848d0f28b5a65752c7e"
        "dde18a9cf6b8f4c5157e42680993",
        "(4, 40, 63) axis 1, two levels, dy sparse, offset 0, scale 0.001461, eps 0.0, cuts []",
    ),
    "a pivot 1.5 deviations off: mean": (
        "float32",
        "521f16ac1a3b26ad1b53b73c570d9a8b906f33425a6aae0325e13f286a27a508de861e5a0adcd0b77848d0f28b5a65752c7e"
        "dde18a9cf6b8f4c5157e42680993",
        "(4, 40, 63) axis 1, two levels, dy along xhat, offset 0, scale 0.001051, eps 1e-12, cuts []",
    ),
    "long blocks: y": (
        "float64",
        "9b33a1dd2ea25a1340a467e88209c9ae720f7ad460c8e7a307c3abaea217f955995045ceae5b7650a8e2f2dddb6aa87f733f"
        "46f395af9c23febcb1ec20c9500a",
        "(64, 1, 100) axis 1, two levels, one rare, dy near the mean, offset 1.035, scale 1.035e+15, eps 0.0, cuts []",
    ),
    "long blocks: dx": (
        "float64",
        "32b68fd3534e880f40a4e59a5e62c9ae5acf7ad4b2f93fa7c5e39eae3417165512506edfae5b7603a8e2f2dddb6aa87f733f"
        "46f395af9c23febcb1ec20c9500a",
        "(64, 1, 100) axis 1, ±a, dy along xhat, offset 1.383, scale 1.383e+15, eps 0.0, cuts [54]",
    ),
    "few channels summed again one by one": (
        "float64",
        "183aa39a216216d4769d9fcf252e34556751fb232f27006fbd1d17f4272c274809d178e3ebf93896a5a5d8ad590f23183b5b"
        "6b67221c20f74ec915abf4d76abf",
        "(1, 8193, 1) axis -1, some padding first, dy constant, offset 1.18e+04, scale 1.18e-30, eps 1.0, "
        "cuts [0, 1, 1]",
    ),
}


@pytest.mark.parametrize(("dtype", "data", "meaning"), FOUND.values(), ids=FOUND)
def test_the_worst_that_was_found(dtype, data, meaning):
    case = Case(bytes.fromhex(data), dtype)
    assert str(case) == meaning
    assert_close(errors_of(case), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 0.1, -12345.678, 1e6 + 1 / 3])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_constant_channels(layout, value, dtype, rng):
    """Mean, variance and y are exact, also beside a channel that is not constant."""
    (N, C, S), last = layout
    x = np.full((N, C + 1, S), value, dtype)
    x[:, C] = rng.standard_normal((N, S))
    dy = rng.standard_normal(x.shape).astype(dtype)
    gamma, beta = parameters(rng, C + 1, dtype)
    axis = -1 if last else 1
    saved = check(arranged(x, last), arranged(dy, last), gamma, beta, axis, 1e-5)
    assert (saved.mean[:C] == x[0, 0, 0]).all()
    assert (saved.var[:C] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 5, 15, 16, 17, 33, 100])
def test_few_values(size, dtype, rng):
    """Roundings of few values do not average out: fewer than 16 of float32 are summed in float64."""
    for _ in range(30):
        x = (rng.standard_normal((size, 20)) + rng.choice([0, 1, 100])).astype(dtype)
        dy = rng.standard_normal(x.shape).astype(dtype)
        check(x, dy, *parameters(rng, 20, dtype), 1, 1e-5, [1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_photographs(name, last, dtype, rng):
    """Neighbouring pixels are alike, and so is what rounding does to them."""
    pytest.importorskip("PIL")  # which reads the files
    image = pytest.importorskip("sklearn.datasets").load_sample_image(name)[100:180, 200:330]
    x = (image.astype(dtype) / np.dtype(dtype).type(255))[None]
    x = np.concatenate([x, x[:, ::-1] ** 2])
    dy = rng.standard_normal(x.shape).astype(dtype)
    gamma, beta = parameters(rng, 3, dtype)
    if last:
        check(x, dy, gamma, beta, -1, 1e-5, [1])
    else:
        check(*(np.ascontiguousarray(np.moveaxis(a, -1, 1)) for a in (x, dy)), gamma, beta, 1, 1e-5, [1])


def test_beyond_what_float64_holds(rng):
    """n·var above 1.8e308 counts as infinite, var below the smallest number as 0: y is beta either way."""
    for scale, var in ((1e155, np.inf), (1e-163, 0)):
        y, saved = bn.forward(rng.standard_normal((1000, 1)) * scale, beta=[3.0], eps=0.0)
        assert saved.var == var
        assert (y == 3).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinite_gamma_stays_in_its_channel(dtype, rng):
    x = rng.standard_normal((50, 2)).astype(dtype)
    y, saved = bn.forward(x, np.array([np.inf, 1], dtype))
    dx = bn.backward(x, saved).dx
    assert not np.isfinite(y[:, 0]).any()
    assert np.isnan(dx[:, 0]).all()
    np.testing.assert_array_equal(y[:, 1], bn.forward(x)[0][:, 1])


@pytest.mark.once
def test_the_limits_are_those_of_the_documentation():
    text = (Path(__file__).parents[1] / "docs" / "numerics.md").read_text(encoding="utf-8")
    for name, limits in ULPS.items():
        assert f"\n| {name} | {limits['float32']} | {limits['float64']} | " in text, name
