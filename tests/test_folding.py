"""Folded weights against the layer and the batch norm that they replace, tap by tap in long double."""

import doctest
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from convolution import convolution, depthwise, padded, transposed
from processes import succeeds

import batchnorm as bn

EPS = 1e-3
U64 = 2.0**-53
ROUNDING = {"float64": 0.0, "float32": 2.0**-24, "float16": 2.0**-11}
"""Relative error of the rounding to the dtype, after the calculation in float64."""
LEAST = {"float64": 0.0, "float32": 0.0, "float16": 2.0**-25}
"""Its absolute error where the result is subnormal."""
AFFINE = {"gamma and beta": (True, True), "gamma": (True, False), "neither": (False, False)}
LENGTHS = {"H": 3, "W": 2, "L": 3}

pytestmark = pytest.mark.once  # no kernel takes part in it


class Layer(NamedTuple):
    run: Callable[..., np.ndarray]
    axes: str
    """Of the weight that `run` takes."""
    layout: str
    """Of the weight that is folded."""
    channels: dict[str, int]
    groups: int = 1

    @property
    def inputs(self):
        return self.channels["I"] * (self.groups if self.run is convolution else 1)

    @property
    def outputs(self):
        if self.run is depthwise:
            return self.channels["I"] * self.channels["M"]
        return self.channels["O"] * (self.groups if self.run is transposed else 1)

    def weight(self, rng, dtype):
        lengths = LENGTHS | self.channels
        return rng.standard_normal([lengths[letter] for letter in self.axes]).astype(dtype)

    def order(self):
        return self.layout.replace("...", "".join(letter for letter in self.axes if letter not in self.layout))

    def laid_out(self, weight):
        return np.ascontiguousarray(weight.transpose([self.axes.index(letter) for letter in self.order()]))

    def brought_back(self, weight):
        return weight.transpose([self.order().index(letter) for letter in self.axes])

    def x(self, rng):
        """Values, of batch norm or of the layer, as far from 0 as they are wide."""
        spatial = [7, 5][: len(self.axes) - 2]
        return rng.standard_normal((2, self.inputs, *spatial)).astype(np.longdouble) + 1

    def apply(self, x, weight, bias=None, stride=1):
        bias = np.zeros(self.outputs) if bias is None else bias
        return self.run(x, weight, bias.astype(np.longdouble), self.groups, stride)


ORDINARY = {
    f"{layout}, groups={groups}": Layer(convolution, axes, layout, {"O": outputs, "I": 4 // groups}, groups)
    for axes, layouts in {"OIHW": ["OI...", "OHWI", "HWIO", "H...OI"], "OIL": ["OIL", "LIO"]}.items()
    for layout in layouts
    for groups, outputs in [(1, 6), (2, 6), (4, 8)]
} | {f"dense {layout}": Layer(convolution, "OI", layout, {"O": 6, "I": 4}) for layout in ("OI", "OI...", "IO")}
DEPTHWISE = {
    f"depthwise {layout}, {M} of each": Layer(depthwise, "HWIM", layout, {"I": 3, "M": M})
    for layout, M in [("HWIM", 1), ("HWIM", 2), ("M...I", 2), ("IM...", 3)]
}
TRANSPOSED = {
    f"transposed {layout}, groups={groups}": Layer(transposed, "IOHW", layout, {"I": 6, "O": outputs}, groups)
    for layout in ("IO...", "HWOI", "OHWI")
    for groups, outputs in [(1, 4), (2, 2), (3, 2), (6, 1)]
}
BEFORE = ORDINARY | DEPTHWISE | TRANSPOSED
AFTER = ORDINARY | DEPTHWISE

cases = [
    pytest.mark.parametrize("dtype", ROUNDING),
    pytest.mark.parametrize("affine", AFFINE.values(), ids=AFFINE),
    pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"]),
]


def in_all_cases(test):
    for mark in cases:
        test = mark(test)
    return test


def numbers(rng, channels, dtype, affine=(True, True)):
    """mean, var, gamma, beta."""
    mean, var = rng.standard_normal(channels).astype(dtype), rng.uniform(0.2, 3, channels).astype(dtype)
    gamma = (rng.choice([-1, 1], channels) * rng.uniform(0.5, 2, channels)).astype(dtype) if affine[0] else None
    beta = rng.standard_normal(channels).astype(dtype) if affine[1] else None
    return mean, var, gamma, beta


def along(row, ndim):
    return row.reshape(-1, *[1] * (ndim - 2))


def in_full(mean, var, gamma=None, beta=None, eps=EPS):
    """Scale, mean and beta in long double."""
    wide = np.longdouble
    gamma = np.ones(len(mean)) if gamma is None else gamma
    beta = np.zeros(len(mean)) if beta is None else beta
    return gamma.astype(wide) / np.sqrt(var.astype(wide) + wide(eps)), mean.astype(wide), beta.astype(wide)


def batch_norm(x, *numbers):
    scale, mean, beta = (along(row, x.ndim) for row in in_full(*numbers))
    return (x - mean) * scale + beta


def assert_within(got, wanted, bound):
    assert got.shape == wanted.shape
    worst = float((abs(got - wanted) / bound).max())
    assert worst <= 1, worst


@in_all_cases
@pytest.mark.parametrize("layer", BEFORE.values(), ids=BEFORE)
def test_fold_is_the_layer_and_then_batch_norm(layer, with_bias, affine, dtype, rng):
    """Off by no more than one rounding of each weight and of the bias, and by those of float64 before it."""
    x, weight = layer.x(rng), layer.weight(rng, dtype)
    bias = rng.standard_normal(layer.outputs).astype(dtype) if with_bias else None
    given = numbers(rng, layer.outputs, dtype, affine)
    folded = bn.fold(
        layer.laid_out(weight),
        bias,
        *given,
        layout=layer.layout,
        groups=layer.groups,
        transposed=layer.run is transposed,
        eps=EPS,
    )
    scale, mean, beta = in_full(*given)
    b = 0 if bias is None else bias.astype(np.longdouble)
    # Roundings before the last: var + eps (half, under the root), root, quotient, gamma, W make 4.5; b − mean, s (3.5),
    # their product and the sum 6.5. The rest is room for second orders and for long double.
    of_weights = layer.apply(abs(x), abs(weight)) * along(abs(scale), x.ndim) * (5 * U64 + ROUNDING[dtype])
    of_weights += layer.apply(abs(x), np.ones_like(weight)) * LEAST[dtype]
    shifted = (b - mean) * scale + beta
    of_bias = 7 * U64 * (abs((b - mean) * scale) + abs(beta)) + ROUNDING[dtype] * abs(shifted) + LEAST[dtype]
    assert folded.weight.dtype == folded.bias.dtype == dtype
    assert not folded.flushed.any()
    assert folded.pad is None
    y = layer.apply(x, layer.brought_back(folded.weight), folded.bias)
    assert_within(y, batch_norm(layer.apply(x, weight, bias), *given), of_weights + along(of_bias, x.ndim))


def next_to(layer, rng, dtype, with_bias=True, affine=(True, True), **more):
    """A layer after batch norm: its weight and bias, the numbers of batch norm, and what they are folded to."""
    weight, given = layer.weight(rng, dtype), numbers(rng, layer.inputs, dtype, affine)
    bias = rng.standard_normal(layer.outputs).astype(dtype) if with_bias else None
    folded = bn.fold_next(
        layer.laid_out(weight), bias, *given, layout=layer.layout, groups=layer.groups, eps=EPS, **more
    )
    return weight, bias, given, folded


def bounds_of_next(layer, x, weight, bias, given, dtype, shares=1):
    """How far off fold_next may be, at x; every weight counts `shares` roundings of the dtype."""
    scale, mean, beta = in_full(*given)
    spatial = weight.shape[:-2] if layer.run is depthwise else weight.shape[2:]
    shift = np.broadcast_to(along(beta - mean * scale, x.ndim), (1, layer.inputs, *spatial))
    terms = np.broadcast_to(along(abs(mean * scale) + abs(beta), x.ndim), shift.shape)
    n = weight.size * layer.inputs // layer.outputs  # at least as many terms as the sum of an output has
    b = np.zeros(layer.outputs) if bias is None else bias
    of_sum = layer.apply(terms, abs(weight), abs(b))
    of_bias = (n + 8) * U64 * of_sum + ROUNDING[dtype] * abs(layer.apply(shift, weight, b)) + LEAST[dtype]
    size = abs(x) * along(abs(scale), x.ndim)
    of_weights = layer.apply(size, abs(weight)) * shares * (5 * U64 + ROUNDING[dtype])
    of_weights += layer.apply(abs(x), np.ones_like(weight)) * LEAST[dtype]
    return of_weights, of_bias[:1]


@in_all_cases
@pytest.mark.parametrize("layer", AFTER.values(), ids=AFTER)
def test_fold_next_is_batch_norm_and_then_the_layer(layer, with_bias, affine, dtype, rng):
    x = layer.x(rng)
    weight, bias, given, folded = next_to(layer, rng, dtype, with_bias, affine)
    assert folded.weight.dtype == folded.bias.dtype == dtype
    assert not folded.flushed.any()
    assert folded.pad is None
    of_weights, of_bias = bounds_of_next(layer, x, weight, bias, given, dtype)
    for stride in (1, 2):
        places = (slice(None), slice(None), *[slice(None, None, stride)] * (x.ndim - 2))
        y = layer.apply(x, layer.brought_back(folded.weight), folded.bias, stride)
        wanted = layer.apply(batch_norm(x, *given), weight, bias, stride)
        assert_within(y, wanted, (of_weights + of_bias)[places])


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("layer", AFTER.values(), ids=AFTER)
def test_padding_with_pad_is_padding_after_batch_norm(layer, dtype, rng):
    """A padded place adds three roundings: of W', of p, and of what they cancel."""
    weight, bias, given, folded = next_to(layer, rng, dtype, padded=True)
    assert folded.pad.dtype == dtype
    assert folded.pad.shape == (layer.inputs,)
    x = layer.x(rng)
    wide = padded(x, 1, folded.pad)
    of_weights, of_bias = bounds_of_next(layer, wide, weight, bias, given, dtype, shares=3)
    y = layer.apply(wide, layer.brought_back(folded.weight), folded.bias)
    wanted = layer.apply(padded(batch_norm(x, *given), 1), weight, bias)
    assert_within(y, wanted, of_weights + of_bias)


def test_padding_with_0_is_wrong_at_the_border_and_nowhere_else(rng):
    layer = ORDINARY["OI..., groups=1"]
    weight, bias, given, folded = next_to(layer, rng, "float64", padded=True)
    x = layer.x(rng)
    wanted = layer.apply(padded(batch_norm(x, *given), 1), weight, bias)
    right, wrong = (
        abs(layer.apply(padded(x, 1, value), folded.weight, folded.bias) - wanted) for value in (folded.pad, 0.0)
    )
    assert right.max() < 1e-12
    assert wrong[:, :, 1:-1, 1:-1].max() < 1e-12
    assert wrong.max() > 1
    for border in (wrong[:, :, 0], wrong[:, :, -1], wrong[..., 0], wrong[..., -1]):
        assert border.min() > 1e-3


@pytest.mark.parametrize("mode", ["reflect", "wrap", "edge"])
def test_padding_with_values_of_x_needs_no_pad(mode, rng):
    layer = ORDINARY["OI..., groups=1"]
    weight, bias, given, folded = next_to(layer, rng, "float64")
    x, width = layer.x(rng), [(0, 0), (0, 0), (1, 1), (1, 1)]
    wanted = layer.apply(np.pad(batch_norm(x, *given), width, mode), weight, bias)
    assert abs(layer.apply(np.pad(x, width, mode), folded.weight, folded.bias) - wanted).max() < 1e-12


def test_pad_is_what_batch_norm_makes_0_of(rng):
    mean, var, gamma, beta = numbers(rng, 3, "float64")
    gamma[1] = mean[1] = beta[1] = 0  # s = t = 0: any padding will do
    pad = bn.fold_next(np.ones((2, 3)), None, mean, var, gamma, beta, padded=True).pad
    assert pad[1] == 0
    assert abs(bn.inference(pad[None], mean, var, gamma, beta)).max() < 1e-15


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 2.0**-103), ("float64", 2.0**-970), ("float16", 2.0**-14)])
def test_pad_is_right_down_to_the_smallest_scale_that_it_takes(dtype, scale):
    """Also for weights that do not survive, because these are small beside the others then."""
    eps = float(np.finfo(dtype).eps)
    weight, shift = np.array([[1, 1.25 * eps, 0.75 * eps, 0.5 * eps, -1.75 * eps]], dtype), np.full(5, 0.75)
    given = np.zeros(5), np.ones(5), np.full(5, scale), shift
    folded = bn.fold_next(weight, None, *given, eps=0.0, padded=True)
    assert folded.flushed.any()
    at_the_border = (folded.weight.astype(np.longdouble) @ folded.pad.astype(np.longdouble) + folded.bias)[0]
    assert abs(at_the_border) <= 2 * eps
    with pytest.raises(ValueError, match="padded must be False if gamma/√"):
        bn.fold_next(weight, None, *given[:2], np.full(5, scale * 0.99), shift, eps=0.0, padded=True)


def is_nearest(got, exact, terms):
    """Where no number of the dtype is nearer, as far as float64 can tell after seven roundings at the terms."""
    error = abs(got.astype(np.longdouble) - exact)
    steps = [np.nextafter(got, got.dtype.type(to)).astype(np.longdouble) for to in (-np.inf, np.inf)]
    return error <= np.minimum(*(abs(step - exact) for step in steps)) + 2 * 7 * U64 * abs(terms)


def dtype_of(name):
    return np.dtype(getattr(pytest.importorskip("ml_dtypes"), name) if name == "bfloat16" else name)


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_each_weight_is_rounded_once(name, rng):
    dtype = dtype_of(name)
    weight = rng.standard_normal((64, 32, 3, 3)).astype(dtype)
    given = numbers(rng, 64, dtype)
    folded = bn.fold(weight, None, *given, eps=EPS)
    scale, mean, beta = in_full(*given)
    exact = weight.astype(np.longdouble) * scale[:, None, None, None]
    assert is_nearest(folded.weight, exact, exact).all()
    assert is_nearest(folded.bias, beta - mean * scale, abs(mean * scale) + abs(beta)).all()
    given = numbers(rng, 32, dtype)
    exact = weight.astype(np.longdouble) * in_full(*given)[0][:, None, None]
    assert is_nearest(bn.fold_next(weight, None, *given, eps=EPS).weight, exact, exact).all()
    if name != "float64":
        twice = weight * in_full(*given)[0].astype(dtype)[:, None, None]
        assert not is_nearest(twice, exact, exact).all()


def test_bfloat16_is_not_rounded_to_float32_first():
    """1 + 2⁻⁸ + 2⁻⁴⁰ lies above the middle of two neighbours, in float32 on it."""
    dtype = dtype_of("bfloat16")
    above = np.array([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8, 1 + 3 * 2.0**-8])
    folded = bn.fold(np.ones((3, 1), dtype), None, np.zeros(3), np.ones(3), above, above, eps=0.0)
    assert above.astype(dtype).tolist() == [1, 1, 1 + 2.0**-6]
    assert folded.weight.ravel().tolist() == folded.bias.tolist() == [1 + 2.0**-7, 1, 1 + 2.0**-6]


def test_the_order_in_memory_is_kept_and_changes_nothing(rng):
    """A slice without an order of its own comes back dense."""
    weight = rng.standard_normal((6, 4, 3, 3)).astype(np.float32)
    given = numbers(rng, 6, "float32")
    given_next = numbers(rng, 4, "float32")
    last, fortran = np.ascontiguousarray(weight.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2), np.asfortranarray(weight)
    apart = np.repeat(weight, 2, axis=0)[::2]
    for arranged in (last, fortran, apart, weight.astype(">f4")):
        for function, these in ((bn.fold, given), (bn.fold_next, given_next)):
            folded, plain = function(arranged, None, *these), function(weight, None, *these)
            np.testing.assert_array_equal(folded.weight, plain.weight)
            np.testing.assert_array_equal(folded.bias, plain.bias)
            assert folded.weight.strides == np.empty_like(arranged).strides
            assert folded.weight.dtype == np.float32


def test_nothing_is_changed_in_place(rng):
    for function, channels in ((bn.fold, 6), (bn.fold_next, 4)):
        arrays = [rng.standard_normal((6, 4, 3)), rng.standard_normal(6), *numbers(rng, channels, "float64")]
        before = [array.copy() for array in arrays]
        weight, bias = function(*arrays)
        assert all(np.array_equal(array, copy) for array, copy in zip(arrays, before, strict=True))
        assert not any(np.shares_memory(array, result) for array in arrays for result in (weight, bias))


def test_a_bias_keeps_its_own_dtype(rng):
    weight, given = rng.standard_normal((3, 3)).astype(np.float16), numbers(rng, 3, "float64")
    for function in (bn.fold, bn.fold_next):
        assert function(weight, np.ones(3, np.float32), *given).bias.dtype == np.float32
        assert function(weight, [1, 2, 3], *given).bias.dtype == np.float64
        assert function(weight, None, *given).bias.dtype == np.float16
        assert function(weight, np.ones(3), *given).weight.dtype == np.float16


def test_a_channel_without_variance_becomes_beta():
    """1/√0 counts as 0, as in `inference`."""
    weight, bias = bn.fold(np.ones((2, 3)), [5.0, 5.0], [0.0, 1.0], [0.0, 4.0], beta=[2.0, 2.0], eps=0.0)
    assert weight.tolist() == [[0, 0, 0], [0.5, 0.5, 0.5]]
    assert bias.tolist() == [2, 4]


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16"])
def test_subnormal_numbers_become_0_and_are_counted(name):
    """By output channel. Weights that are 0, or whose scale is, are no loss and do not count."""
    dtype = dtype_of(name)
    tiny = float(np.finfo(np.float64 if name == "float64" else np.float32).tiny)
    weight = np.array([[1, -1, 0], [1, 0.5, 2], [1, 1, 1], [1, 1, 1]]).astype(dtype)
    gamma, beta = np.array([tiny / 2, tiny, 1, 0]), np.array([tiny / 2, -tiny / 2, tiny, 1])
    folded = bn.fold(weight, None, np.zeros(4), np.ones(4), gamma, beta, eps=0.0)
    assert folded.weight.astype(float).tolist() == [[0, 0, 0], [tiny, 0, 2 * tiny], [1, 1, 1], [0, 0, 0]]
    assert folded.bias.astype(float).tolist() == [0, 0, tiny, 1]
    assert folded.flushed.tolist() == [2, 1, 0, 0]
    after = bn.fold_next(weight, None, np.zeros(3), np.ones(3), gamma[:3], eps=0.0)
    assert after.weight[:, 0].tolist() == [0, 0, 0, 0]
    assert after.flushed.tolist() == [1, 2, 1, 1]


def test_what_float64_cannot_tell_from_0_is_counted():
    folded = bn.fold(np.full((1, 2), 1e-200), None, [0.0], [1.0], [1e-200], eps=0.0)
    assert folded.weight.tolist() == [[0, 0]]
    assert folded.flushed.tolist() == [2]


def test_subnormal_numbers_of_float16_stay():
    """They are rounded like any number, the smallest of them from its half on."""
    gamma = np.array([2.0**-20, 1.5 * 2.0**-25, 2.0**-26])
    folded = bn.fold(np.ones((3, 2), np.float16), None, np.zeros(3), np.ones(3), gamma, gamma, eps=0.0)
    assert folded.weight.tolist() == [[2.0**-20] * 2, [2.0**-24] * 2, [0, 0]]
    assert folded.bias.tolist() == [2.0**-20, 2.0**-24, 0]
    assert folded.flushed.tolist() == [0, 0, 2]


def test_nan_and_infinity_stay_in_their_channel():
    """They are no overflow."""
    weight = np.array([[np.nan, np.inf, 1], [1, 1, 1], [1, 1, 1]], np.float32)
    folded = bn.fold(weight, None, [0, 0, np.nan], [1, np.inf, 1], [2.0, 1.0, 1.0], eps=0.0)
    np.testing.assert_array_equal(folded.weight, np.array([[np.nan, np.inf, 2], [0, 0, 0], [1, 1, 1]]))
    np.testing.assert_array_equal(folded.bias, [0, 0, np.nan])
    after = bn.fold_next(weight, None, np.ones(3), np.ones(3), eps=0.0)
    np.testing.assert_array_equal(after.bias, [np.nan, -3, -3])
    assert np.isinf(bn.fold(weight[1:], None, [0, 0], [1, 1], [np.inf, 1]).weight[0]).all()


@pytest.mark.parametrize(
    ("shape", "more", "channels"), [((0, 3, 2, 2), {}, 0), ((2, 0), {}, 2), ((2, 2, 0, 3), {"layout": "HWIM"}, 0)]
)
def test_no_channels(shape, more, channels):
    folded = bn.fold(np.ones(shape), None, np.ones(channels), np.ones(channels), **more)
    assert folded.weight.shape == shape
    assert folded.bias.shape == folded.flushed.shape == (channels,)
    inputs = 0 if more else shape[1]
    after = bn.fold_next(np.ones(shape), None, np.ones(inputs), np.ones(inputs), padded=True, **more)
    assert after.bias.shape == (channels,)
    assert after.pad.shape == (inputs,)


def test_folded_is_a_pair_that_cannot_be_changed():
    folded = bn.fold(np.ones((2, 3)), None, np.zeros(2), np.ones(2))
    weight, bias = folded
    assert weight is folded.weight
    assert bias is folded.bias
    with pytest.raises(AttributeError):
        folded.weight = bias


W = np.ones((8, 4, 3, 3), np.float32)
EIGHT, FOUR = np.ones(8), np.ones(4)
SOURCE = r"for weight of shape \(8, 4, 3, 3\) with layout='OI...', groups=1"
BAD = {
    "mean of the other side": (
        lambda: bn.fold(W, None, FOUR, FOUR),
        ValueError,
        rf"mean must have shape \(8,\) {SOURCE}, got \(4,\); axis 1 of weight has 4: is layout right\?$",
    ),
    "var too long": (lambda: bn.fold(W, None, EIGHT, np.ones(9)), ValueError, rf"var .*\(8,\) {SOURCE}, got \(9,\)$"),
    "gamma a column": (lambda: bn.fold(W, None, EIGHT, EIGHT, EIGHT[:, None]), ValueError, r"gamma .*got \(8, 1\)$"),
    "beta short": (lambda: bn.fold(W, None, EIGHT, EIGHT, None, FOUR), ValueError, r"beta must have shape \(8,\)"),
    "bias short": (lambda: bn.fold(W, FOUR, EIGHT, EIGHT), ValueError, r"bias must have shape \(8,\)"),
    "next: mean of the outputs": (
        lambda: bn.fold_next(W, None, EIGHT, EIGHT),
        ValueError,
        rf"mean must have shape \(4,\) {SOURCE}, got \(8,\); axis 0 of weight has 8",
    ),
    "next: bias of the inputs": (lambda: bn.fold_next(W, FOUR, FOUR, FOUR), ValueError, r"bias must have shape \(8,\)"),
    "var negative": (
        lambda: bn.fold(W, None, EIGHT, np.where(np.arange(8) == 5, -0.3, 1)),
        ValueError,
        r"var must not be negative, got -0.3 in channel 5; are mean and var swapped\?",
    ),
    "eps negative": (lambda: bn.fold(W, None, EIGHT, EIGHT, eps=-1.0), ValueError, "eps must be finite and at least 0"),
    "weight of integers": (lambda: bn.fold(W.astype(int), None, EIGHT, EIGHT), TypeError, "weight must have dtype"),
    "bias of text": (lambda: bn.fold(W, ["a"] * 8, EIGHT, EIGHT), TypeError, "bias must have dtype"),
    "groups a float": (lambda: bn.fold(W, None, EIGHT, EIGHT, groups=2.0), TypeError, "groups must be an integer"),
    "groups=0": (lambda: bn.fold(W, None, EIGHT, EIGHT, groups=0), ValueError, "groups must be at least 1"),
    "groups that do not divide": (
        lambda: bn.fold(W, None, EIGHT, EIGHT, groups=3),
        ValueError,
        r"groups must be at least 1 and divide the length of axis O, got weight of shape \(8, 4, 3, 3\) .* groups=3",
    ),
    "groups that do not divide, transposed": (
        lambda: bn.fold(W, None, FOUR, FOUR, groups=3, transposed=True),
        ValueError,
        "divide the length of axis I, got .* with layout='IO...', groups=3",
    ),
    "groups with M": (
        lambda: bn.fold(W, None, FOUR, FOUR, layout="HWIM", groups=2),
        ValueError,
        "groups must be 1 and transposed False if layout has M, .* got groups=2, transposed=False",
    ),
    "M transposed": (
        lambda: bn.fold(W, None, FOUR, FOUR, layout="HWIM", transposed=True),
        ValueError,
        "got groups=1, transposed=True",
    ),
    "padded with s = 0": (
        lambda: bn.fold_next(W, None, FOUR, FOUR, [1, 1, 0, 1], FOUR, padded=True),
        ValueError,
        r"padded must be False if gamma/√\(var \+ eps\) is 0 or close to it, got 0 in channel 2",
    ),
    "padded with s that no weight survives": (
        lambda: bn.fold_next(W, None, FOUR, FOUR, [1, 1, 1, 1e-38], FOUR, padded=True),
        ValueError,
        "got 9.99995e-39 in channel 3",
    ),
    "weight overflows": (
        lambda: bn.fold(W.astype("e"), None, EIGHT, EIGHT, 7e4 * (np.arange(8) == 6), eps=0.0),
        ValueError,
        "weight must fit float16 when folded, got 70000 in channel 6; give a wider dtype",
    ),
    "weight overflows in float64": (
        lambda: bn.fold(W.astype(float), None, EIGHT, EIGHT * 1e-300, EIGHT * 1e300, eps=0.0),
        ValueError,
        "weight must fit float64 when folded, got inf in channel 0",
    ),
    "bias overflows": (
        lambda: bn.fold(W.astype("e"), None, EIGHT, EIGHT, None, -7e4 * (np.arange(8) == 3)),
        ValueError,
        "bias must fit float16 when folded, got -7000. in channel 3",
    ),
    "next: weight overflows": (
        lambda: bn.fold_next(W.astype("e"), None, FOUR, FOUR, [1, 7e4, 1, 1], eps=0.0),
        ValueError,
        "weight must fit float16 when folded, got 70000 in channel 1",
    ),
    "next: bias overflows": (
        lambda: bn.fold_next(W.astype("e"), None, -4000.0 * FOUR, FOUR, eps=0.0),
        ValueError,
        "bias must fit float16 when folded, got 144000 in channel 0",
    ),
    "pad overflows": (
        lambda: bn.fold_next(W.astype("e"), None, 0 * FOUR, FOUR, [1e-3, 1, 1, 1], 100 * FOUR, padded=True, eps=0.0),
        ValueError,
        "pad must fit float16 when folded, got -100000 in channel 0",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


NO_LAYOUT = [
    "",
    "...",
    "oi...",
    "OO...",
    "OOI...",
    "IIO...",
    "O...",
    "I...",
    "OIM...",
    "OI1...",
    "OI... ",
    "OÌ...",
    "OI..",
]
NO_LAYOUT += ["OI......", "...OI...", 5]


@pytest.mark.parametrize("layout", NO_LAYOUT)
def test_a_layout_has_to_name_the_axes_by_letters(layout):
    message = "layout must name axes by different capital letters, I and either O or M among them"
    for function, given in ((bn.fold, EIGHT), (bn.fold_next, FOUR)):
        with pytest.raises(ValueError, match=message) as raised:
            function(W, None, given, given, layout=layout)
        assert str(raised.value).endswith(f"got {layout!r}")


@pytest.mark.parametrize("layout", ["OI", "OIL", "OILHW", "I...OLHW"])
def test_a_layout_has_to_name_as_many_axes_as_there_are(layout):
    message = r"layout must name the 4 axes of weight, of shape \(8, 4, 3, 3\), got "
    with pytest.raises(ValueError, match=f"{message}'{layout}'"):
        bn.fold(W, None, EIGHT, EIGHT, layout=layout)


def in_torch(torch, channels):
    """A batch norm in evaluation, in float64, and its numbers as `fold` takes them."""
    norm = torch.nn.BatchNorm2d(channels, dtype=torch.float64).eval()
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.2, 3)
        norm.weight.normal_()
        norm.bias.normal_()
    return norm, [getattr(norm, name).detach().numpy() for name in ("running_mean", "running_var", "weight", "bias")]


@pytest.mark.parametrize(
    ("name", "sizes", "transpose"),
    [
        ("Conv2d", (4, 6, 3), False),
        ("Conv2d", (4, 6, 3, 1, 0, 1, 2), False),
        ("Conv2d", (4, 8, 3, 1, 0, 1, 4), False),
        ("Linear", (4, 6), False),
        ("ConvTranspose2d", (4, 6, 3), True),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False])
def test_torch_folds_the_same_where_it_can(name, sizes, transpose, bias):
    """To 16 roundings: both have about five for a weight, and torch about six more for a bias."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(7)
    layer = getattr(torch.nn, name)(*sizes, bias=bias, dtype=torch.float64)
    norm, given = in_torch(torch, 8 if sizes[1] == 8 else 6)
    weight, bias = layer.weight.detach().numpy(), None if layer.bias is None else layer.bias.detach().numpy()
    folded = bn.fold(weight, bias, *given, groups=getattr(layer, "groups", 1), transposed=transpose, eps=norm.eps)
    theirs = torch.nn.utils.fusion.fuse_conv_bn_weights(
        layer.weight,
        layer.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
        transpose,
    )
    scale, mean, beta = in_full(*given, eps=norm.eps)
    terms = (abs(0 if bias is None else bias) + abs(mean)) * abs(scale) + abs(beta)
    np.testing.assert_allclose(folded.weight, theirs[0].detach().numpy(), rtol=16 * U64)
    assert (abs(folded.bias - theirs[1].detach().numpy()) <= 16 * U64 * terms).all()


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("outputs", [6, 12])
def test_a_transposed_convolution_of_torch_with_groups(outputs, groups):
    """torch's own fusion raises with transpose=True; without it, it is wrong if there are as many outputs as inputs."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(7)
    how = {"stride": 2, "padding": 1, "output_padding": 1, "groups": groups}
    layer = torch.nn.ConvTranspose2d(6, outputs, 3, dtype=torch.float64, **how)
    norm, given = in_torch(torch, outputs)
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    folded = bn.fold(weight, bias, *given, groups=groups, transposed=True, eps=norm.eps)
    run = torch.nn.functional.conv_transpose2d
    with torch.no_grad():
        wanted = norm(layer(x))
        y = run(x, torch.from_numpy(folded.weight), torch.from_numpy(folded.bias), **how)
        # Sums of at most 9 · 6 terms on both sides, and up to 12 roundings of each.
        size = run(abs(x), abs(layer.weight), abs(layer.bias), **how) + abs(norm.running_mean)[:, None, None]
    scale, _, beta = in_full(*given, eps=norm.eps)
    bound = 2 * (9 * 6 + 12) * U64 * (size.numpy() * abs(scale)[:, None, None] + abs(beta)[:, None, None])
    assert_within(y.numpy(), wanted.numpy(), bound)


IN_KERAS_AND_FLAX = """
import flax.linen as nn, jax, keras, numpy as np
import batchnorm as bn

rng = np.random.default_rng(7)

def numbers(channels):
    mean, gamma, beta = rng.normal(size=(3, channels))
    return mean, rng.uniform(0.5, 2, channels), gamma, beta

def keras_norm(x):
    norm = keras.layers.BatchNormalization()
    norm.build(x.shape)
    mean, var, gamma, beta = numbers(x.shape[-1])
    norm.set_weights([gamma, beta, mean, var])
    return lambda x: norm(x, training=False), (mean, var, gamma, beta), norm.epsilon

def check(y, wanted, what):
    assert abs(np.asarray(y) - np.asarray(wanted)).max() < 1e-5, what
    print(what)

image, k = (2, 7, 5, 4), (3, 2)
L = keras.layers
for layer, layout, shape, how in [
    (L.Conv2D(6, k), "HWIO", image, {}),
    (L.Conv2D(6, k, groups=2), "HWIO", image, {"groups": 2}),
    (L.Conv1D(6, 3), "LIO", image[1:], {}),
    (L.DepthwiseConv2D(k, depth_multiplier=2), "HWIM", image, {}),
    (L.Dense(6), "IO", (2, 4), {}),
    (L.Conv2DTranspose(6, k, strides=2), "HWOI", image, {"transposed": True}),
]:
    x = rng.normal(size=shape).astype("f")
    norm, given, eps = keras_norm(layer(x))
    weights, wanted = layer.get_weights(), norm(layer(x))
    layer.set_weights(list(bn.fold(*weights, *given, layout=layout, eps=eps, **how)))
    check(layer(x), wanted, f"Keras {layer.name}")
    if not how.get("transposed"):
        norm, given, eps = keras_norm(x)
        layer.set_weights(weights)
        wanted = layer(norm(x))
        layer.set_weights(list(bn.fold_next(*weights, *given, layout=layout, eps=eps, **how)))
        check(layer(x), wanted, f"Keras {layer.name} next")

for layer, layout, how in [
    (nn.Conv(6, k), "HWIO", {}),
    (nn.Conv(8, k, feature_group_count=4), "HWIO", {"groups": 4}),
    (nn.Dense(6), "IO", {}),
    (nn.ConvTranspose(6, k), "HWIO", {"transposed": True}),
    (nn.ConvTranspose(6, k, transpose_kernel=True), "HWOI", {"transposed": True}),
]:
    x = rng.normal(size=(2, 4) if layout == "IO" else image).astype("f")
    weights = layer.init(jax.random.key(7), x)["params"]
    mean, var, gamma, beta = numbers(weights["bias"].size)
    wanted = (np.asarray(layer.apply({"params": weights}, x)) - mean) / np.sqrt(var + 1e-5) * gamma + beta
    kernel, bias = bn.fold(np.asarray(weights["kernel"]), None, mean, var, gamma, beta, layout=layout, **how)
    check(layer.apply({"params": {"kernel": kernel, "bias": bias}}, x), wanted, f"Flax {type(layer).__name__}")
"""


@pytest.mark.slow
def test_layouts_of_keras_and_flax():
    if not all(importlib.util.find_spec(name) for name in ("keras", "flax", "jax")):
        pytest.skip("Keras and Flax are not installed")
    assert len(succeeds(IN_KERAS_AND_FLAX, timeout=300, KERAS_BACKEND="jax").splitlines()) == 16


def test_the_page():
    page = Path(__file__).parent.parent / "docs" / "folding.md"
    if not page.exists():
        pytest.skip("docs are not beside the tests")
    failed, tried = doctest.testfile(str(page), module_relative=False)
    assert tried
    assert not failed
