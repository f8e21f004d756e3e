"""y of 8-bit integers is correctly rounded, whatever the order of x and y in memory."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

import batchnorm as bn

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
INTEGERS = [np.uint8, np.int8]

pytestmark = pytest.mark.once  # bytes are looked up by code that is compiled once


def every_byte(dtype, channels):
    """All values, (256, channels)."""
    return np.repeat(np.arange(256, dtype=np.uint8).view(dtype)[:, None], channels, axis=1)


def is_nearest(y, exact):
    """Whether no neighbour of y is nearer to a rational number, and y is even where one is as near."""
    own = abs(Fraction(float(y)) - exact)
    for side in (np.inf, -np.inf):
        other = abs(Fraction(float(np.nextafter(y, y.dtype.type(side)))) - exact)
        if other < own or (other == own and y.view(f"u{y.itemsize}") % 2):
            return False
    return True


@pytest.mark.parametrize("to", [np.float32, np.float16])
@pytest.mark.parametrize("of", INTEGERS)
@pytest.mark.parametrize("seed", range(4))
def test_images_are_correctly_rounded(seed, of, to):
    """Every value of every channel, against exact arithmetic; the first seed is ImageNet's normalization."""
    rng = np.random.default_rng(seed)
    mean, std = IMAGENET if seed == 0 else rng.uniform(0.05, 0.95, (2, 3))
    scale = 1 / 255 if seed < 2 else rng.uniform(0.001, 2)
    x = every_byte(of, 3)
    y = bn.Plan.normalizer(mean, std, scale=scale, dtype=to)(x)
    assert y.dtype == to
    for value, row in zip(x[:, 0].tolist(), y, strict=True):
        for c in range(3):
            exact = (Fraction(scale) * value - Fraction(float(mean[c]))) / Fraction(float(std[c]))
            assert is_nearest(row[c], exact), (value, c)


@pytest.mark.parametrize("activation", [None, "relu", ("leaky_relu", 0.1), ("clip", -0.5, 0.5)], ids=str)
@pytest.mark.parametrize("of", INTEGERS)
def test_any_plan_is_rounded_once(of, activation, rng):
    """Against long double, with and without the activation."""
    mean, var, gamma, beta = 40 * rng.standard_normal(5), 900 * rng.random(5), *rng.standard_normal((2, 5))
    x = every_byte(of, 5)
    wide = (np.longdouble(1) * x - mean) / np.sqrt(np.longdouble(1) * var + np.longdouble(1e-5)) * gamma + beta
    name, *numbers = (activation,) if isinstance(activation, str) else activation or ("none",)
    exact = {
        "none": lambda: wide,
        "relu": lambda: np.maximum(wide, 0),
        "leaky_relu": lambda: np.where(wide > 0, wide, wide * numbers[0]),
        "clip": lambda: np.clip(wide, *numbers),
    }[name]()
    y = bn.Plan(mean, var, gamma, beta, activation=activation)(x)
    np.testing.assert_array_equal(y, exact.astype(np.float32))
    y = bn.Plan(mean, var, gamma, beta, activation=activation, dtype=np.float64)(x)
    np.testing.assert_allclose(y, exact.astype(np.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("of", INTEGERS)
@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 5), (3, 4, 70), (5, 6), (2, 300, 9, 8), (1, 2, 200, 3), (70, 80, 1)], ids=str
)
def test_every_order_in_memory_to_every_other(shape, of, rng):
    for axis, memory in itertools.product(range(len(shape)), itertools.permutations(range(len(shape)))):
        channels = shape[axis]
        table = rng.standard_normal((channels, 2))
        plan = bn.Plan(table[:, 0], table[:, 1] ** 2, axis=axis)
        x = rng.integers(0, 256, [shape[i] for i in memory], np.uint8).view(of).transpose(np.argsort(memory))
        places = np.moveaxis(x, axis, 1).reshape(shape[0] if axis else shape[1], channels, -1)
        wide = np.longdouble(1) * places - table[:, :1]
        wide = (wide / np.sqrt(np.longdouble(1) * table[:, 1:] ** 2 + np.longdouble(1e-5))).astype(np.float32)
        others = [n for i, n in enumerate(shape) if i != axis]
        expected = np.moveaxis(wide.reshape(others[0], channels, *others[1:]), 1, axis)
        for order in "KC":
            y = plan(x, order=order)
            np.testing.assert_array_equal(y, expected)
        assert y.flags.c_contiguous
        for out in (np.empty(shape, np.float32), np.empty(shape[::-1], np.float32).T, np.empty_like(x, np.float32)):
            assert plan(x, out=out) is out
            np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("to", [pytest.param(np.float16, marks=pytest.mark.slow), np.float32, np.float64])
@pytest.mark.parametrize("shape", [(-1, 331, 700, 3), (-1, 1201, 800, 1), (-1, 9, 11, 1700)], ids=str)
def test_more_than_a_cache_holds(shape, to, rng):
    """What is written around the cache, to channels first and to channels last; rows that begin within a line."""
    C, beyond = shape[-1], 32 << 20
    shape = (-(-beyond // (np.prod(shape[1:]) * np.dtype(to).itemsize)), *shape[1:])
    x = rng.integers(0, 256, shape, np.uint8)
    mean, var = rng.standard_normal(C), rng.random(C) + 0.1
    plan = bn.Plan(mean, var, axis=-1, dtype=to)
    values = plan(every_byte(np.uint8, C))
    expected = values[x, np.arange(C)]
    for threads in (1, 3):
        np.testing.assert_array_equal(plan(x, num_threads=threads), expected)
        first = bn.Plan(mean, var, axis=1, dtype=to)(x.transpose(0, 3, 1, 2), order="C", num_threads=threads)
        assert first.flags.c_contiguous
        np.testing.assert_array_equal(first, expected.transpose(0, 3, 1, 2))
        for start in (1, 7):
            beside = np.zeros(x.size + 40, to)
            out = beside[start : start + x.size].reshape(x.shape)
            plan(x, out=out, num_threads=threads)
            np.testing.assert_array_equal(out, expected)
            assert not beside[:start].any()
            assert not beside[start + x.size :].any()


@pytest.mark.parametrize("to", [np.float64, np.float32])
def test_a_residual_is_added_before_the_activation(to, rng):
    mean, var = 20 * rng.standard_normal(4), 400 * rng.random(4) + 1
    x, add = rng.integers(-128, 128, (30, 4, 9)).astype(np.int8), rng.standard_normal((30, 4, 9)).astype(to)
    y = bn.Plan(mean, var, activation="relu", dtype=to)(x, add=add)
    pre = bn.Plan(mean, var, dtype=to)(x)
    np.testing.assert_array_equal(y, np.maximum(pre + add, 0))


def test_the_door_measures_every_array():
    """Whatever the façade has checked: memory of another size than the view needs is not touched."""
    from batchnorm._kernels import lookup

    view, strides = (2, 3, 4), (12, 4, 1)
    right = {"x": np.zeros(24, np.uint8), "y": np.zeros(24, np.float32), "table": np.zeros((3, 256), np.float32)}

    def call(of_x=strides, of_y=strides, **changes):
        arrays = right | changes
        lookup.look_up(arrays["x"], arrays["y"], arrays["table"], view, of_x, of_y, 1)

    call()
    wrong = {"x": [np.zeros(23, np.uint8), np.zeros(24, np.uint16)], "y": [np.zeros(23, np.float32), np.zeros(24)]}
    wrong["table"] = [np.zeros((2, 256), np.float32), np.zeros(3 * 256, np.float16)]
    for name, arrays in wrong.items():
        for array in arrays:
            with pytest.raises(ValueError, match=r"must have \d+ values of \d bytes or more"):
                call(**{name: array})
    for bad in ((13, 4, 1), (12, 4, -1), (12, 5, 1)):
        for name in ("of_x", "of_y"):
            with pytest.raises(ValueError, match=r"strides must stay within the view \(2, 3, 4\), got "):
                call(**{name: bad})
