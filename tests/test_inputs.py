"""Bad input: an error that names the argument, what was wanted and what came; or the right answer. Nothing written."""

import re

import numpy as np
import pytest

import batchnorm as bn

X = np.linspace(-3, 5, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
ONES = np.ones(3)
SAVED = bn.forward(X, ONES, ONES)[1]


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


class Unreadable:
    """As torch's tensors of bfloat16."""

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Got unsupported ScalarType BFloat16")


# call, error, message
FORWARD = {
    "0-d": (lambda: bn.forward(1.0), ValueError, r"x must have at least 2 dimensions, got shape \(\)"),
    "1-d": (lambda: bn.forward(np.ones(4)), ValueError, r"x must have at least 2 dimensions, got shape \(4,\)"),
    "None": (
        lambda: bn.forward(None),
        TypeError,
        "x must have dtype float64, float32, float16 or bfloat16, got object",
    ),
    "text": (lambda: bn.forward("abc"), TypeError, "x must have dtype float64, float32, float16 or bfloat16, got <U3"),
    "ragged": (lambda: bn.forward([[1.0], [1.0, 2.0]]), ValueError, "x must be an array of numbers"),
    "axis too large": (lambda: bn.forward(X, axis=4), ValueError, r"axis must be between -4 and 3 for shape .*, got 4"),
    "axis too small": (lambda: bn.forward(X, axis=-5), ValueError, "axis must be between -4 and 3 .*, got -5"),
    "axis a float": (lambda: bn.forward(X, axis=1.0), TypeError, "axis must be an integer, got float"),
    "axis None": (lambda: bn.forward(X, axis=None), TypeError, "axis must be an integer, got NoneType"),
    "eps negative": (lambda: bn.forward(X, eps=-1e-9), ValueError, "eps must be finite and at least 0, got -1e-09"),
    "eps NaN": (lambda: bn.forward(X, eps=np.nan), ValueError, "eps must be finite and at least 0, got nan"),
    "eps infinite": (lambda: bn.forward(X, eps=np.inf), ValueError, "eps must be finite and at least 0, got inf"),
    "eps a string": (lambda: bn.forward(X, eps="1e-5"), TypeError, "eps must be a number, got str"),
    "gamma too long": (lambda: bn.forward(X, np.ones(4)), ValueError, r"gamma must have shape \(3,\), got \(4,\)"),
    "gamma 2-d": (lambda: bn.forward(X, np.ones((3, 1))), ValueError, r"gamma must have shape \(3,\), got \(3, 1\)"),
    "gamma a number": (lambda: bn.forward(X, 1.0), ValueError, r"gamma must have shape \(3,\), got \(\)"),
    "beta too short": (lambda: bn.forward(X, ONES, np.ones(2)), ValueError, r"beta must have shape \(3,\), got \(2,\)"),
    "beta complex": (
        lambda: bn.forward(X, ONES, [1j, 2, 3]),
        TypeError,
        "beta must have dtype float64, float32, float16 or bfloat16",
    ),
    "axes of the statistics": (
        lambda: bn.forward(X, axis=(0, 2, 3)),
        TypeError,
        r"axis must be the channel axis, one integer, got \(0, 2, 3\): statistics are taken over all other axes",
    ),
    "eps a 1-d array": (lambda: bn.forward(X, eps=np.full(1, 1e-5)), TypeError, "eps must be a number, got ndarray"),
    "eps a 0-d array of a string": (
        lambda: bn.forward(X, eps=np.array("1")),
        TypeError,
        "eps must be a number, got str",
    ),
    "gamma for the last axis": (
        lambda: bn.forward(X, np.ones(5)),
        ValueError,
        r"gamma must have shape \(3,\), got \(5,\); x of shape \(2, 3, 4, 5\) has length 5 along axis -1: axis=-1\?",
    ),
    "beta for axis 1": (
        lambda: bn.forward(X, beta=ONES, axis=-1),
        ValueError,
        r"beta must have shape \(5,\), got \(3,\); x of .* has length 3 along axis 1: axis=1\?",
    ),
    "a bfloat16 tensor": (
        lambda: bn.forward(Unreadable()),
        TypeError,
        r"x must be readable as a NumPy array: Got unsupported ScalarType BFloat16; pass x\.float\(\)",
    ),
    "threads 0": (lambda: bn.forward(X, num_threads=0), ValueError, "num_threads must be between 1 and 4096, got 0"),
    "threads a float": (lambda: bn.forward(X, num_threads=2.0), TypeError, "num_threads must be an integer, got float"),
    "out a list": (lambda: bn.forward(X, out=[1.0]), TypeError, "out must be a numpy array, got list"),
    "out a list where dx goes": (
        lambda: bn.inference_backward(X, X, ONES, ONES, out=[1.0]),
        TypeError,
        "out must be a numpy array, got list",
    ),
    "out of another shape": (
        lambda: bn.forward(X, out=np.empty((2, 3, 4))),
        ValueError,
        r"out must have shape \(2, 3, 4, 5\), got \(2, 3, 4\)",
    ),
    "out of another dtype": (
        lambda: bn.forward(X, out=np.empty(X.shape, np.float32)),
        TypeError,
        "out must have dtype float64, got float32",
    ),
    "out of foreign byte order": (
        lambda: bn.forward(X, out=np.empty(X.shape, ">f8")),
        TypeError,
        "out must have dtype float64, got >f8",
    ),
    "masked": (lambda: bn.forward(np.ma.masked_less(X, 0)), TypeError, "x must not be a masked array"),
}
for bad in (
    "int8",
    "int64",
    "uint8",
    "bool",
    "complex64",
    "complex128",
    "object",
    "longdouble",
    "datetime64[s]",
):
    FORWARD[f"x of {bad}"] = (
        lambda bad=bad: bn.forward(np.ones((2, 3)).astype(bad)),
        TypeError,
        "x must have dtype float64, float32, float16 or bfloat16, got ",
    )
BACKWARD = {
    "dy of another shape": (
        lambda: bn.backward(X[:1], SAVED),
        ValueError,
        r"dy must have the shape of x, \(2, 3, 4, 5\), got \(1, 3, 4, 5\)",
    ),
    "dy of another dtype": (
        lambda: bn.backward(X.astype("f4"), SAVED),
        TypeError,
        "dy must have the dtype of x, float64, got float32",
    ),
    "dy of integers": (
        lambda: bn.backward(X.astype(int), SAVED),
        TypeError,
        "dy must have dtype float64, float32, float16 or bfloat16",
    ),
    "saved a tuple": (lambda: bn.backward(X, (X, SAVED)), TypeError, "saved must be what forward returned, got tuple"),
    "need unknown": (
        lambda: bn.backward(X, SAVED, need=["dx", "dmu"]),
        ValueError,
        "need must be one or more of the names",
    ),
    "need another name": (
        lambda: bn.backward(X, SAVED, need="d"),
        ValueError,
        r"need must be one or more of the names .*, got \('d',\)",
    ),
    "through unknown": (
        lambda: bn.backward(X, SAVED, through=["mean", "var"]),
        ValueError,
        r"through must be one or more of the names \('mean', 'variance'\), got \['mean', 'var'\]",
    ),
    "through another name": (
        lambda: bn.backward(X, SAVED, through="mea"),
        ValueError,
        r"through must be one or more of the names .*, got \('mea',\)",
    ),
    "through a tuple with another name": (
        lambda: bn.backward(X, SAVED, through=("mean", ["variance"])),
        ValueError,
        "through must be one or more of the names",
    ),
    "through None": (
        lambda: bn.backward(X, SAVED, through=None),
        ValueError,
        "through must be one or more of the names .*, got None",
    ),
    "need a statistic": (
        lambda: bn.backward(X, SAVED, need=["dmean"]),
        ValueError,
        r"need must be one or more of the names \('dx', 'dgamma', 'dbeta', 'dadd'\), got \['dmean'\]",
    ),
    "dmean too short": (
        lambda: bn.backward(X, SAVED, dmean=np.ones(2)),
        ValueError,
        r"dmean must have shape \(3,\), got \(2,\)",
    ),
    "dvar of text": (
        lambda: bn.backward(X, SAVED, dvar=["1", "2", "3"]),
        TypeError,
        "dvar must have dtype float64, float32, float16 or bfloat16, got <U1",
    ),
    "out without dx": (
        lambda: bn.backward(X, SAVED, need=["dgamma"], out=np.empty_like(X)),
        ValueError,
        "out is for dx, so need must contain",
    ),
    "out of another shape": (
        lambda: bn.backward(X, SAVED, out=np.empty(3)),
        ValueError,
        r"out must have shape \(2, 3, 4, 5\), got \(3,\)",
    ),
}
INFERENCE = {
    "mean None": (
        lambda: bn.inference(X, None, ONES),
        TypeError,
        "mean must have dtype float64, float32, float16 or bfloat16, got object",
    ),
    "var None": (
        lambda: bn.inference(X, ONES, None),
        TypeError,
        "var must have dtype float64, float32, float16 or bfloat16, got object",
    ),
    "mean too short": (
        lambda: bn.inference(X, np.ones(2), ONES),
        ValueError,
        r"mean must have shape \(3,\), got \(2,\)",
    ),
    "var too long": (lambda: bn.inference(X, ONES, np.ones(4)), ValueError, r"var must have shape \(3,\), got \(4,\)"),
    "var negative": (
        lambda: bn.inference(X, ONES, [1.0, np.nan, -2.0]),
        ValueError,
        "var must not be negative, got -2.0 in channel 2",
    ),
    "mean of dates": (lambda: bn.inference(X, np.zeros(3, "M8[s]"), ONES), TypeError, "mean must have dtype"),
    "mean for the last axis": (lambda: bn.inference(X, np.ones(5), ONES), ValueError, r"axis=-1\?"),
    "eps negative": (lambda: bn.inference(X, ONES, ONES, eps=-1.0), ValueError, "eps must be finite"),
    "dy of another shape": (
        lambda: bn.inference_backward(X[0], X, ONES, ONES),
        ValueError,
        "dy must have the shape of x",
    ),
    "backward, var negative": (
        lambda: bn.inference_backward(X, X, ONES, -ONES),
        ValueError,
        "var must not be negative, got -1.0 in channel 0",
    ),
}
RUNNING = {
    "a list": (
        lambda: bn.update_running([0.0] * 3, np.ones(3), SAVED),
        TypeError,
        "running_mean must be a numpy array",
    ),
    "too short": (
        lambda: bn.update_running(np.zeros(2), np.ones(3), SAVED),
        ValueError,
        r"running_mean must have shape \(3,\), got \(2,\)",
    ),
    "of integers": (
        lambda: bn.update_running(np.zeros(3), np.ones(3, int), SAVED),
        TypeError,
        "running_var must have dtype float64, float32, float16 or bfloat16, got int64",
    ),
    "of two dtypes": (
        lambda: bn.update_running(np.zeros(3, "f4"), np.ones(3), SAVED),
        TypeError,
        "running_var must have the dtype of running_mean, float32, got float64",
    ),
    "foreign byte order": (
        lambda: bn.update_running(np.zeros(3), np.ones(3, ">f8"), SAVED),
        TypeError,
        "running_var must be an aligned array in native byte order",
    ),
    "read-only": (
        lambda: bn.update_running(np.zeros(3), read_only(ONES), SAVED),
        ValueError,
        "running_var must be writeable",
    ),
    "the same array": (lambda: bn.update_running(*[np.zeros(3)] * 2, SAVED), ValueError, "must not overlap"),
    "momentum 2": (
        lambda: bn.update_running(np.zeros(3), np.ones(3), SAVED, momentum=2),
        ValueError,
        "momentum, the weight of the new batch, must be between 0 and 1, got 2",
    ),
    "momentum NaN": (
        lambda: bn.update_running(np.zeros(3), np.ones(3), SAVED, momentum=np.nan),
        ValueError,
        "momentum, the weight of the new batch, must be between 0 and 1, got nan",
    ),
    "momentum None": (
        lambda: bn.update_running(np.zeros(3), np.ones(3), SAVED, momentum=None),
        TypeError,
        "momentum must be a number, got NoneType",
    ),
    "one value": (
        lambda: bn.update_running(np.zeros(3), np.ones(3), bn.forward(np.ones((1, 3)))[1]),
        ValueError,
        r"more than one value per channel, got x of shape \(1, 3\) with axis=1; pass unbiased=False",
    ),
}
CASES = {
    f"{function}: {name}": case
    for function, cases in (
        ("forward", FORWARD),
        ("backward", BACKWARD),
        ("inference", INFERENCE),
        ("update_running", RUNNING),
    )
    for name, case in cases.items()
}


@pytest.mark.once
@pytest.mark.parametrize(("call", "error", "message"), CASES.values(), ids=CASES)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def overlaps(x):
    """Arrays of x's shape that share memory with it, by how."""
    flat = np.empty(x.size + 8)
    view = flat[: x.size].reshape(x.shape)
    view[...] = x
    return {
        "shifted": (view, flat[4 : x.size + 4].reshape(x.shape)),
        "reversed": (view, view[::-1]),
        "channels reversed": (view, view[:, ::-1]),
    }


@pytest.mark.once
@pytest.mark.parametrize("how", ["shifted", "reversed", "channels reversed"])
def test_overlapping_out(how):
    calls = {
        "x": lambda x, out: bn.forward(x, out=out),
        "x ": lambda x, out: bn.inference(x, ONES, ONES, out=out),
        "dy": lambda dy, out: bn.backward(dy, SAVED, out=out),
        "dy ": lambda dy, out: bn.inference_backward(dy, X, ONES, ONES, out=out),
    }
    for name, call in calls.items():
        array, out = overlaps(X)[how]
        before = array.copy()
        with pytest.raises(ValueError, match=f"out must not overlap {name.strip()}"):
            call(array, out)
        np.testing.assert_array_equal(array, before)


@pytest.mark.once
def test_out_that_is_an_input_of_another_role():
    x = X.copy()
    _, saved = bn.forward(x)
    with pytest.raises(ValueError, match=r"out must not overlap x$"):
        bn.forward(x, out=x)
    with pytest.raises(ValueError, match=r"out must not overlap x$"):
        bn.backward(X, saved, out=x)
    with pytest.raises(ValueError, match=r"out must not overlap x$"):
        bn.inference_backward(X, x, ONES, ONES, out=x)
    square = np.ones((3, 3))
    for name, arguments in {
        "gamma": (ONES, ONES, square[0], ONES),
        "beta": (ONES, ONES, ONES, square[0]),
        "mean": (square[0], ONES),
        "var": (ONES, square[0]),
    }.items():
        with pytest.raises(ValueError, match=f"out must not overlap {name}$"):
            bn.inference(np.zeros((3, 3)), *arguments, out=square)
    np.testing.assert_array_equal(x, X)


def test_interleaved_memory_is_no_overlap():
    both = np.zeros((2, 3, 8))
    both[..., ::2] = X[..., 0, :4]
    y, _ = bn.forward(both[..., ::2], out=both[..., 1::2])
    np.testing.assert_array_equal(y, bn.forward(both[..., ::2].copy())[0])
    np.testing.assert_array_equal(both[..., ::2], X[..., 0, :4])


@pytest.mark.parametrize(
    "arrange", [np.asfortranarray, lambda a: np.repeat(a, 2, axis=0)[::2], lambda a: a[:, ::-1].copy()[:, ::-1]]
)
def test_out_of_any_arrangement(arrange):
    out = arrange(np.full(X.shape, np.nan))
    y, saved = bn.forward(X, out=out)
    assert y is out
    np.testing.assert_array_equal(out, bn.forward(X)[0])
    assert bn.inference(X, ONES, ONES, out=out) is out
    np.testing.assert_array_equal(out, bn.inference(X, ONES, ONES))
    assert bn.backward(X**2, saved, out=out).dx is out
    np.testing.assert_array_equal(out, bn.backward(X**2, saved).dx)
    x = arrange(X)
    assert bn.inference(x, ONES, ONES, out=x) is x
    np.testing.assert_array_equal(x, bn.inference(X, ONES, ONES))


@pytest.mark.once
def test_read_only_out_is_not_written():
    out = read_only(np.full(X.shape, 7.0))
    for call in (
        lambda: bn.forward(X, out=out),
        lambda: bn.backward(X, SAVED, out=out),
        lambda: bn.inference(X, ONES, ONES, out=out),
        lambda: bn.inference_backward(X, X, ONES, ONES, out=out),
    ):
        with pytest.raises(ValueError, match="out must be writeable, got a read-only array"):
            call()
    assert (out == 7).all()


@pytest.mark.once
@pytest.mark.parametrize(("call", "error", "message"), CASES.values(), ids=CASES)
def test_a_refused_call_leaves_x_alone(call, error, message):
    before = X.tobytes(), SAVED.mean.tobytes()
    with pytest.raises(error):
        call()
    assert (X.tobytes(), SAVED.mean.tobytes()) == before


@pytest.mark.once
def test_refused_running_statistics_are_not_half_written():
    mean, var = np.zeros(3), np.ones(3, np.float32)
    with pytest.raises(TypeError):
        bn.update_running(mean, var, SAVED)
    with pytest.raises(ValueError, match=re.escape("running_var must be writeable")):
        bn.update_running(mean, read_only(np.ones(3)), SAVED)
    assert not mean.any()


def test_lists_and_mixed_precision_are_right():
    y, saved = bn.forward([[1.0, 2.0], [3.0, 6.0]], gamma=[2.0, 2.0], eps=0.0)
    np.testing.assert_array_equal(y, [[-2, -2], [2, 2]])
    assert y.dtype == np.float64
    y, saved = bn.forward(X.astype(np.float32), np.ones(3), np.ones(3, np.float32))
    dx, dgamma, dbeta = bn.backward(X.astype(np.float32), saved)
    assert (y.dtype, dx.dtype, dgamma.dtype, dbeta.dtype) == tuple(np.dtype(c) for c in "ffdf")


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint16", "bool"])
def test_parameters_of_integers_are_those_of_float64(dtype):
    """Values of x must be floats. Numbers per channel may be integers, and have gradients of float64."""
    a, b = np.array([[1, 0, 1], [1, 1, 0]]).astype(dtype)
    exact_a, exact_b = a.astype(np.float64), b.astype(np.float64)
    y, saved = bn.forward(X, a, b)
    exact_y, exact_saved = bn.forward(X, exact_a, exact_b)
    np.testing.assert_array_equal(y, exact_y)
    got, expected = (bn.backward(X, s, dmean=m, dvar=v) for s, m, v in ((saved, a, b), (exact_saved, exact_a, exact_b)))
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == np.float64
    np.testing.assert_array_equal(bn.inference(X, a, b, a, b), bn.inference(X, *[exact_a, exact_b] * 2))
    fixed = bn.inference_backward(X, X, a, b, a, need=("dgamma", "dmean"))
    assert fixed.dgamma.dtype == fixed.dmean.dtype == np.float64


@pytest.mark.once
def test_one_name_is_a_collection_of_one():
    _, saved = bn.forward(X, ONES, ONES)
    np.testing.assert_array_equal(
        bn.backward(X**2, saved, through="mean").dx, bn.backward(X**2, saved, through=("mean",)).dx
    )
    for name in ("dx", "dgamma", "dbeta"):
        gradients = bn.backward(X, saved, need=name)
        assert [field for field, value in gradients._asdict().items() if value is not None] == [name]
    assert bn.inference_backward(X, X, ONES, ONES, need="dvar").dvar.shape == (3,)


@pytest.mark.once
def test_numbers_may_be_arrays_without_dimensions():
    np.testing.assert_array_equal(bn.forward(X, eps=np.array(1e-3))[0], bn.forward(X, eps=1e-3)[0])
    mean, var = np.zeros(3), np.ones(3)
    bn.update_running(mean, var, SAVED, momentum=np.array(1))
    np.testing.assert_array_equal(mean, SAVED.mean)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 3, 2, 2), (2, 3, 0, 5), (2, 0, 4, 4), (0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_empty_arrays(shape, dtype):
    x = np.empty(shape, dtype)
    channels = shape[1]
    params = np.ones(channels, dtype)
    y, saved = bn.forward(x, params, params)
    dx, dgamma, dbeta = bn.backward(x, saved)
    assert y.shape == dx.shape == shape
    assert y.dtype == dx.dtype == dtype
    assert saved.count == int(np.prod([shape[0], *shape[2:]]))
    assert not dgamma.any()
    assert not dbeta.any()
    assert not saved.mean.any()
    assert not saved.var.any()
    assert bn.inference(x, params, params).shape == shape
    mean, var = np.full(channels, 2.0), np.full(channels, 3.0)
    assert bn.backward(x, saved, dmean=params, dvar=params).dx.shape == shape
    statistics = bn.inference_backward(x, x, params, params, need=["dmean", "dvar"])
    assert not statistics.dmean.any()
    assert not statistics.dvar.any()
    bn.update_running(mean, var, saved)
    assert (mean == 2).all()
    assert (var == 3).all()


@pytest.mark.once
def test_saved_cannot_be_changed():
    _, saved = bn.forward(X)
    for name in ("x", "mean", "eps", "count", "anything"):
        with pytest.raises(AttributeError):
            setattr(saved, name, 1)
    for array in (saved.mean, saved.var, saved.rstd):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.once
def test_representations():
    y, saved = bn.forward(X.astype(np.float32), ONES)
    assert repr(saved) == "Saved(x=<float32 (2, 3, 4, 5)>, axis=1, eps=1e-05, count=40)"
    fixed = bn.inference_backward(X, X, ONES, ONES, need=["dgamma", "dmean"])
    assert repr(fixed) == (
        "InferenceGradients(dx=None, dgamma=<float64 (3,)>, dbeta=None, dmean=<float64 (3,)>, dvar=None)"
    )
    assert repr(bn.backward(y, saved)) == "Gradients(dx=<float32 (2, 3, 4, 5)>, dgamma=<float64 (3,)>, dbeta=None)"
