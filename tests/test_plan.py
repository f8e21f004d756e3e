"""A plan gives the bits of `inference`, whatever is in the batch and however x lies in memory, and it never changes."""

import copy
import doctest
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from shapes import ARRANGEMENTS, VIEWS
from test_memory import peak

import batchnorm as bn

ACTIVATIONS = [None, "relu", ("leaky_relu", 0.1), ("clip", -0.5, 1.0)]
FLOATS = [np.float64, np.float32, np.float16]


def given(channels, rng):
    """mean, var, gamma and beta."""
    return (rng.standard_normal(channels), rng.random(channels) + 0.1, *rng.standard_normal((2, channels)))


def same_bits(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_it_has_the_bits_of_inference(view, dtype, activation, rng, always_threaded):
    """In the first call and in later ones, with one thread and two, in place, and after an addition."""
    numbers = given(view[1], rng)
    x, add = rng.standard_normal((2, *view)).astype(dtype)
    plan = bn.Plan(*numbers, activation=activation)
    expected = bn.inference(x, *numbers, activation=activation)
    for num_threads in (None, None, 1, 2):
        same_bits(plan(x, num_threads=num_threads), expected)
    same_bits(plan(x, add=add), bn.inference(x, *numbers, activation=activation, add=add))
    again = x.copy()
    assert plan(again, out=again) is again
    same_bits(again, expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("arranged", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_any_arrangement_in_memory_gives_the_same_values(arranged, dtype, rng):
    numbers = given(5, rng)
    x = rng.standard_normal((3, 5, 4, 7)).astype(dtype)
    add = arranged(x[::-1].copy())
    plan, expected = bn.Plan(*numbers), bn.inference(x, *numbers)
    for _ in range(2):
        y = plan(arranged(x))
        np.testing.assert_array_equal(y, expected)
        assert y.dtype == dtype
    plain = plan(arranged(x), order="C")
    assert plain.flags.c_contiguous
    np.testing.assert_array_equal(plain, expected)
    np.testing.assert_array_equal(plan(arranged(x), add=add), bn.inference(x, *numbers, add=add))
    for out in (
        np.empty_like(x),
        np.empty(x.shape[::-1], dtype).T,
        np.empty((3, 4, 7, 5), dtype).transpose(0, 3, 1, 2),
    ):
        assert plan(arranged(x), out=out) is out
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", [*FLOATS, np.uint8])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_sample_does_not_depend_on_its_batch(view, dtype, rng):
    """Alone, in a part of the batch, in another order, channels last: always the same bits."""
    numbers = given(view[1], rng)
    x = (50 * rng.standard_normal(view) + 100).clip(0, 255).astype(dtype)
    plan = bn.Plan(*numbers)
    y = plan(x)
    for sample in {0, view[0] // 2, view[0] - 1}:
        same_bits(plan(x[sample : sample + 1]), y[sample : sample + 1])
    same_bits(plan(x[: view[0] // 2 + 1]), y[: view[0] // 2 + 1])
    same_bits(plan(np.ascontiguousarray(x[::-1])), np.ascontiguousarray(y[::-1]))
    last = bn.Plan(*numbers, axis=-1)(np.ascontiguousarray(x.swapaxes(1, 2)))
    same_bits(np.ascontiguousarray(last.swapaxes(1, 2)), y)


@pytest.mark.parametrize("arranged", ["C", "channels last in memory", "every second"])
@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("of", FLOATS)
def test_another_type_is_calculated_in_the_wider_one(of, to, arranged, rng):
    """And rounded once, which is to say: it is what `inference` gives for x in the wider type."""
    numbers = given(5, rng)
    x, add = rng.standard_normal((2, 6, 5, 9)).astype(of)
    wide = np.promote_types(of, to)
    plan = bn.Plan(*numbers, dtype=to, activation="relu")
    x_there, add = ARRANGEMENTS[arranged](x), ARRANGEMENTS[arranged](add.astype(to))
    for order in ("K", "C"):
        y = plan(x_there, order=order)
        assert y.dtype == to
        np.testing.assert_array_equal(y, bn.inference(x.astype(wide), *numbers, activation="relu").astype(to))
    expected = bn.inference(x.astype(wide), *numbers, activation="relu", add=add.astype(wide))
    np.testing.assert_array_equal(plan(x_there, add=add), expected.astype(to))


def test_out_may_be_what_is_added(rng):
    """Also where y takes two steps: of another type, of another order in memory, of bytes."""
    numbers = given(5, rng)
    for of, to in (
        (np.float32, np.float32),
        (np.float32, np.float64),
        (np.float64, np.float32),
        (np.uint8, np.float32),
    ):
        x = (50 * rng.standard_normal((3, 5, 4, 7)) + 100).clip(0, 255).astype(of)
        add = rng.standard_normal((3, 5, 4, 7)).astype(to)
        plan = bn.Plan(*numbers, activation="relu", dtype=to)
        expected = plan(x, add=add)
        for arranged in (ARRANGEMENTS["C"], ARRANGEMENTS["channels last in memory"], ARRANGEMENTS["F"]):
            for own in (add.copy(), ARRANGEMENTS["channels last in memory"](add), np.asfortranarray(add)):
                assert plan(arranged(x), add=own, out=own) is own
                np.testing.assert_array_equal(own, expected)


@pytest.mark.once
def test_what_numpy_can_read(rng, tmp_path):
    """Lists of floats, memory-mapped images, another dtype's byte order."""
    plan = bn.Plan(*given(3, rng))
    images = rng.integers(0, 256, (2, 3, 4), np.uint8)
    images.tofile(tmp_path / "images")
    mapped = np.memmap(tmp_path / "images", np.uint8, "r", shape=images.shape)
    same_bits(plan(mapped), plan(images))
    x = rng.standard_normal((2, 3))
    out = np.empty_like(x)
    same_bits(plan(x.tolist()), plan(x))
    same_bits(plan(x.tolist(), out=out), plan(x))
    with pytest.raises(TypeError, match="x must not be a masked array"):
        plan(np.ma.array(images))


def test_between_16_bit_types_it_is_calculated_in_float32(rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    numbers = given(5, rng)
    for of, to in ((np.float16, ml_dtypes.bfloat16), (ml_dtypes.bfloat16, np.float16)):
        x = rng.standard_normal((6, 5, 9)).astype(of)
        y = bn.Plan(*numbers, dtype=to)(x)
        assert y.dtype == to
        assert (y == bn.inference(x.astype(np.float32), *numbers).astype(to)).all()
        same_bits(bn.Plan(*numbers)(x).view(np.uint16), bn.inference(x, *numbers).view(np.uint16))


@pytest.mark.once
def test_the_plan_of_a_layer_is_the_layer_in_evaluation(rng):
    layer = bn.BatchNorm(5, axis=-1, eps=1e-3, activation=("leaky_relu", 0.2))
    layer.gamma, layer.beta = rng.standard_normal((2, 5))
    for _ in range(3):
        layer(rng.standard_normal((8, 4, 5), dtype=np.float32) + 2)
    x = rng.standard_normal((3, 4, 5), dtype=np.float32)
    plan = bn.Plan.of(layer)
    expected = layer.eval()(x)
    same_bits(plan(x), expected)
    layer.train()(x)
    layer.gamma = np.zeros(5)
    same_bits(plan(x), expected)
    assert bn.Plan.of(layer, dtype=np.float64)(x).dtype == np.float64
    with pytest.raises(ValueError, match="layer must have running statistics, got BatchNorm"):
        bn.Plan.of(bn.BatchNorm(5, track_running_stats=False))


@pytest.mark.once
def test_it_cannot_be_changed(rng):
    numbers = given(4, rng)
    plan = bn.Plan(*numbers, axis=0, eps=0.25, activation="relu", dtype="f4")
    for name in ("mean", "var", "gamma", "beta", "axis", "eps", "activation", "dtype", "num_features"):
        with pytest.raises(AttributeError):
            setattr(plan, name, 1)
    for name, value in zip(("mean", "var", "gamma", "beta"), numbers, strict=True):
        array = getattr(plan, name)
        np.testing.assert_array_equal(array, value)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        with pytest.raises(ValueError, match="cannot set WRITEABLE"):
            array.flags.writeable = True
        value[...] = 7  # is not the plan's
    assert (plan.axis, plan.eps, plan.activation, plan.dtype, plan.num_features) == (0, 0.25, "relu", np.float32, 4)
    assert not (plan.mean == 7).any()


@pytest.mark.once
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_a_copy_does_the_same(copied, rng):
    plan = bn.Plan(*given(4, rng), axis=-1, activation=("clip", -1.0, 1.0), dtype=np.float32)
    x = rng.standard_normal((6, 4))
    for one in (x, x.astype(np.float32), (50 * x).astype(np.int8)):
        same_bits(copied(plan)(one), plan(one))
    assert repr(copied(plan)) == repr(plan)


@pytest.mark.once
def test_threads_and_children_of_a_fork_may_share_it(rng):
    numbers = given(8, rng)
    plan = bn.Plan(*numbers)
    batches = [rng.standard_normal((n, 8, n % 5 + 1)).astype(dtype) for n in range(1, 90) for dtype in FLOATS]
    batches += [(30 * batch).astype(np.int8) for batch in batches]
    expected = [bn.Plan(*numbers)(x) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for y, wanted in zip(pool.map(plan, batches), expected, strict=True):
                same_bits(y, wanted)
    child = os.fork()
    if child == 0:
        right = all(plan(x).tobytes() == wanted.tobytes() for x, wanted in zip(batches, expected, strict=True))
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.once
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_it_allocates_y_and_no_more(dtype, rng):
    x = rng.integers(0, 200, (16, 3, 200, 200)).astype(dtype)
    plan, y = bn.Plan(*given(3, rng)), np.empty(x.shape, np.float32)
    for call, allowed in ((lambda: plan(x), y.nbytes), (lambda: plan(x, out=y), 0)):
        call()
        assert peak(call) < allowed + 10_000


def test_an_empty_batch_gives_an_empty_y(rng):
    plan = bn.Plan(*given(3, rng))
    for dtype in (*FLOATS, np.uint8):
        for shape in ((0, 3), (2, 3, 0), (0, 3, 4)):
            y = plan(np.empty(shape, dtype))
            assert y.shape == shape
            assert y.dtype == (np.float32 if dtype is np.uint8 else dtype)
    assert bn.Plan([], [])(np.empty((4, 0))).shape == (4, 0)


X, X8, ONES = np.ones((2, 3, 4)), np.ones((2, 3, 4), np.uint8), np.ones(3)
PLAN = bn.Plan(ONES, ONES)
BAD = {
    "mean a number": (lambda: bn.Plan(1.0, ONES), ValueError, r"mean must have shape \(C,\), got \(\)"),
    "mean of text": (lambda: bn.Plan(["a"], ONES), TypeError, "mean must have dtype float64, float32, float16"),
    "var too short": (lambda: bn.Plan(ONES, ONES[:2]), ValueError, r"var must have shape \(3,\), got \(2,\)"),
    "gamma too long": (
        lambda: bn.Plan(ONES, ONES, np.ones(4)),
        ValueError,
        r"gamma must have shape \(3,\), got \(4,\)",
    ),
    "var negative": (lambda: bn.Plan(-ONES, -ONES), ValueError, r"var must not be negative, got -1.0 in channel 0$"),
    "mean and var swapped": (
        lambda: bn.Plan(ONES, [1, -0.25, 3]),
        ValueError,
        r"var must not be negative, got -0.25 in channel 1; are mean and var swapped\?",
    ),
    "mean and var swapped in inference": (
        lambda: bn.inference(X, ONES, [1, -0.25, 3]),
        ValueError,
        r"var must not be negative, got -0.25 in channel 1; are mean and var swapped\?",
    ),
    "eps": (lambda: bn.Plan(ONES, ONES, eps=-1), ValueError, "eps must be finite and at least 0, got -1"),
    "axis": (lambda: bn.Plan(ONES, ONES, axis=1.5), TypeError, "axis must be an integer, got float"),
    "activation": (
        lambda: bn.Plan(ONES, ONES, activation="elu"),
        ValueError,
        "activation must be None, 'relu', .*'elu'",
    ),
    "dtype of integers": (
        lambda: bn.Plan(ONES, ONES, dtype="i4"),
        TypeError,
        "dtype must have dtype float64, .*got int32",
    ),
    "std of 0": (
        lambda: bn.Plan.normalizer(ONES, [1, 0, 1]),
        ValueError,
        r"std must be finite and above 0, got \[1. 0. 1.\]",
    ),
    "std too long": (
        lambda: bn.Plan.normalizer(ONES, np.ones(4)),
        ValueError,
        r"std must have shape \(3,\), got \(4,\)",
    ),
    "scale of 0": (
        lambda: bn.Plan.normalizer(ONES, ONES, scale=0),
        ValueError,
        "scale must be finite and above 0, got 0",
    ),
    "x 1-d": (lambda: PLAN(ONES), ValueError, r"x must have 3 channels along axis 1, got shape \(3,\)"),
    "channels elsewhere": (
        lambda: PLAN(np.ones((2, 4, 3))),
        ValueError,
        r"x must have 3 channels along axis 1, got shape \(2, 4, 3\); axis=-1\?",
    ),
    "x of wide integers": (
        lambda: PLAN(X.astype(int)),
        TypeError,
        "x must have dtype .*got int64; uint8 and int8 are also accepted",
    ),
    "x of bool": (lambda: PLAN(X > 0), TypeError, "x must have dtype .*got bool"),
    "x None": (lambda: PLAN(None), TypeError, "x must have dtype .*got object"),
    "order": (lambda: PLAN(X, order="F"), ValueError, "order must be 'C' or 'K', got 'F'"),
    "num_threads": (lambda: PLAN(X, num_threads=0), ValueError, "num_threads must be between 1 and 4096, got 0"),
    "out of another dtype": (
        lambda: PLAN(X, out=X.astype("f4")),
        TypeError,
        "out must have dtype float64, got float32",
    ),
    "out of x's dtype": (lambda: PLAN(X8, out=X8), TypeError, "out must have dtype float32, got uint8"),
    "out of another shape": (
        lambda: PLAN(X, out=X[:1]),
        ValueError,
        r"out must have shape \(2, 3, 4\), got \(1, 3, 4\)",
    ),
    "out overlaps": (lambda: PLAN(X, out=X[::-1]), ValueError, r"out must not overlap x \(out=x itself is allowed\)"),
    "add of another dtype": (
        lambda: PLAN(X8, add=X),
        TypeError,
        "add must have the dtype of y, float32, got float64",
    ),
    "add of another shape": (
        lambda: PLAN(X, add=X[0]),
        ValueError,
        r"add must have the shape of y, \(2, 3, 4\), got \(3, 4\)",
    ),
}


@pytest.mark.once
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    before = X.copy(), X8.copy()
    PLAN(X)
    with pytest.raises(error, match=message):
        call()
    np.testing.assert_array_equal(X, before[0])
    np.testing.assert_array_equal(X8, before[1])


@pytest.mark.once
def test_it_says_what_it_does():
    said = {
        repr(bn.Plan(ONES, ONES)): "Plan(3 channels along axis 1: y = (x − mean)·gamma/√(var + 1e-05) + beta)",
        repr(
            bn.Plan(ONES, ONES, activation="relu", dtype="f2")
        ): "relu((x − mean)·gamma/√(var + 1e-05) + beta), in float16)",
        repr(bn.Plan(ONES, ONES, activation=("clip", 0, 6))): "clip((x − mean)·gamma/√(var + 1e-05) + beta, 0.0, 6.0))",
    }
    for shown, expected in said.items():
        assert shown.endswith(expected)
    assert re.fullmatch(r"Plan\(3 channels along axis -1: .*√\(var \+ 0\.0\).*\)", repr(bn.Plan.normalizer(ONES, ONES)))


@pytest.mark.once
def test_the_page():
    page = Path(__file__).parents[1] / "docs" / "deploy.md"
    failed, tried = doctest.testfile(str(page), module_relative=False)
    assert tried > 10
    assert failed == 0
