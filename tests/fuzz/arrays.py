"""Arrays of any shape, arrangement and content, and wrong arguments: the right answer to the last digits, or an error
that wrote nothing. Never a crash."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(1, str(Path(__file__).parents[1] / "support"))

import oracle
from fuzz.source import choose, main
from shapes import ARRANGEMENTS

import batchnorm as bn

LONGEST = 3000
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, 3e38]
SPREAD = [1.0, 1e-3, 1e3, 1e-20, 1e15]
OFFSET = [0.0, 1.0, -100.0, 1e4, 1e6]


def shape_of(source):
    """Two to five dimensions, small, or one of them long."""
    shape = [source.integer(0, 7) if source.integer(0, 15) == 0 else source.integer(1, 7)]
    shape += [source.integer(1, 6) for _ in range(source.integer(1, 4))]
    if source.integer(0, 3) == 0:
        where = source.integer(0, len(shape) - 1)
        shape[where] = source.integer(1, max(1, LONGEST // max(1, int(np.prod(shape) // max(1, shape[where])))))
    return tuple(shape)


def values(source, shape, dtype, spread, offset):
    bits = np.frombuffer(source.data(16), np.uint64)
    with np.errstate(over="ignore", under="ignore"):
        return (np.random.default_rng(bits).standard_normal(shape) * spread + offset * spread).astype(dtype)


@np.errstate(invalid="ignore", over="ignore")
def spoil(source, call):
    """One argument made wrong."""
    how = source.integer(0, 9)
    x = call["x"]
    if how == 0:
        call["x"] = x.astype(choose(source, ["i4", "f2", "c8", "O", "U8"]))
    elif how == 1:
        call["axis"] = choose(source, [x.ndim, -x.ndim - 1, 2**70, 1.0, None, "1"])
    elif how == 2:
        call["eps"] = choose(source, [-1.0, np.nan, np.inf, None, "0", 1j])
    elif how == 3:
        call["gamma"] = np.ones(source.integer(0, 9), choose(source, ["f4", "f8", "i4"]))
    elif how == 4:
        call["beta"] = np.ones((source.integer(0, 3), source.integer(0, 3)))
    elif how == 5:
        call["out"] = np.empty(shape_of(source), choose(source, ["f4", "f8", ">f4", "i8"]))
    elif how == 6:
        call["out"] = np.empty(x.shape, x.dtype)
        call["out"].flags.writeable = False
    elif how == 7:
        room = np.empty(x.size + 1, x.dtype)
        call["x"], call["out"] = room[:-1].reshape(x.shape), room[1:].reshape(x.shape)
        call["x"][...] = x
    elif how == 8:
        call["num_threads"] = choose(source, [0, -1, 2**40, 1.5, "2"])
    else:
        call["x"] = choose(
            source, [x.reshape(-1), x.tolist()[0] if len(x) else [], np.ma.masked_array(x), None, object()]
        )
    return call


def remember(call):
    return {
        name: value.tobytes() for name, value in call.items() if type(value) is np.ndarray and value.dtype != object
    }


def target(source):
    dtype = choose(source, ["f4", "f8", "f2"])
    shape = shape_of(source)
    axis = source.integer(-len(shape), len(shape) - 1)
    channels = shape[axis]
    x = values(source, shape, dtype, choose(source, SPREAD), choose(source, OFFSET))
    dy = values(source, shape, dtype, 1.0, choose(source, [0.0, 1.0]))
    gamma, beta = (
        values(source, channels, choose(source, ["f4", dtype]), 1.0, 1.0) if source.integer(0, 1) else None
        for _ in "gb"
    )
    special = source.integer(0, 4) == 0 and x.size
    if special:
        with np.errstate(over="ignore", under="ignore"):
            x.flat[source.integer(0, x.size - 1)] = choose(source, SPECIAL)
    call = {
        "x": ARRANGEMENTS[choose(source, list(ARRANGEMENTS))](x),
        "gamma": gamma,
        "beta": beta,
        "axis": axis,
        "eps": choose(source, [1e-5, 0.0, 1e-12, 1.0]),
        "num_threads": choose(source, [None, 1, 2, 5]),
    }
    if source.integer(0, 3) == 0:
        call = spoil(source, call)
        before = remember(call)
        try:
            bn.forward(**call)
        except (TypeError, ValueError):
            assert remember(call) == before, "written in spite of an error"
            return "refused"
        return "accepted"
    if source.integer(0, 3) == 0:
        call["out"] = np.empty(shape, dtype)
    y, saved = bn.forward(**call)
    dy = ARRANGEMENTS[choose(source, list(ARRANGEMENTS))](dy)
    gradients = bn.backward(dy, saved, num_threads=call["num_threads"])
    if not x.size:
        assert y.shape == shape
        assert gradients.dx.shape == shape
        return "empty"
    judge_plan(source, call)
    if not special and call["eps"]:
        judge_after(source, call, dy, y, saved)
        if dtype != "f2":
            judge_selection(source, call, x, dy)
    if dtype == "f2":
        judge_rounding(call, dy, y, gradients)
    else:
        judge(call, x, dy, y, saved, gradients, special)
    return f"{dtype}{' special' if special else ''}"


def judge_after(source, call, dy, y, saved):
    """ReLU in the same call, and what is added before it, give what they give in calls of their own."""
    add = values(source, y.shape, y.dtype, 1.0, 0.0) if source.integer(0, 1) and y.itemsize > 2 else None
    after = {"activation": "relu", "add": add, "out": np.empty(y.shape, y.dtype)}
    result, noted = bn.forward(**call | after)
    pre = y if add is None else y + add
    assert np.array_equal(result, np.where(pre <= 0, 0, pre).astype(y.dtype), equal_nan=True), "not what two calls give"
    passed = np.where(result > 0, dy, 0).astype(y.dtype)
    got, expected = bn.backward(dy, noted), bn.backward(passed, saved)
    assert y.itemsize == 2 or np.array_equal(got.dx, expected.dx, equal_nan=True), "dx is not what two calls give"


def judge_plan(source, call):
    """A plan gives what inference gives, in any order of memory, and rounds what it makes of bytes once."""
    channels = call["x"].shape[call["axis"]]
    draw = np.random.default_rng(np.frombuffer(source.data(16), np.uint64))
    mean, var = 50 * draw.standard_normal(channels), 100 * draw.random(channels) + 0.01
    numbers = mean, var, call["gamma"], call["beta"]
    how = {"axis": call["axis"], "eps": call["eps"], "activation": choose(source, [None, "relu", ("clip", -1.0, 1.0)])}
    plan, order = bn.Plan(*numbers, **how), choose(source, ["K", "C"])
    y = plan(call["x"], order=order, num_threads=call["num_threads"])
    assert np.array_equal(y, bn.inference(call["x"], *numbers, **how), equal_nan=True), "not what inference gives"
    arrangement = choose(source, [name for name in ARRANGEMENTS if name != "foreign byte order"])
    x = ARRANGEMENTS[arrangement](draw.integers(0, 256, call["x"].shape).astype(choose(source, ["u1", "i1"])))
    exact = bn.inference(x.astype("f8"), *numbers, **how).astype("f4")
    assert np.array_equal(plan(x, order=order, num_threads=call["num_threads"]), exact), "not rounded once"


def judge_selection(source, call, x, dy):
    """With a mask, lengths or weights: the oracle's numbers for what counts, whatever lies elsewhere."""
    axis, places = call["axis"], np.delete(x.shape, call["axis"])
    draw = np.random.default_rng(np.frombuffer(source.data(16), np.uint64))
    name = choose(source, ["mask", "weights", *(["lengths"] if x.ndim == 3 else [])])
    mask, weights = draw.random(places) < choose(source, [0.02, 0.5, 0.98]), None
    if name == "lengths":
        lengths = draw.integers(0, places[1] + 1, places[0])
        mask = np.arange(places[1]) < lengths[:, None]
    if name == "weights":
        weights = draw.exponential(size=places) * mask
        mask = np.ones(places, bool)
    given = {"mask": mask, "weights": weights, "lengths": lengths if name == "lengths" else None}[name]
    if not mask.any() or (weights is not None and not weights.any()):
        return
    spoiled = [np.moveaxis(a, axis, -1).copy() for a in (x, dy)]
    for array in spoiled:
        array[~mask] = np.nan
    x_given, dy_given = (np.moveaxis(a, -1, axis) for a in spoiled)
    y, saved = bn.forward(**call | {"x": x_given, "out": None, name: given, "fill": 5.0})
    dx, dgamma, dbeta = bn.backward(dy_given, saved, num_threads=call["num_threads"])
    x, dy, y, dx = (np.moveaxis(a, axis, -1) for a in (x, dy, y, dx))
    assert (y[~mask] == 5).all()
    assert (dx[~mask] == 0).all()
    t = oracle.truth(x[mask], dy[mask], call["gamma"], call["beta"], 1, call["eps"], weights)
    errors = oracle.errors_by_name(y[mask], saved, OfGradients(dx[mask], dgamma, dbeta), t, 1)
    oracle.assert_close(errors, x.dtype)


def judge(call, x, dy, y, saved, gradients, special):
    """Every channel by itself: NaN where it is not finite, else the oracle's numbers."""
    axis = call["axis"]
    ok = np.isfinite(oracle.rows(x, axis)).all(axis=1)
    for array in (y, gradients.dx):
        by_channel = oracle.rows(array, axis)
        assert np.isnan(by_channel[~ok]).all(), "not NaN"
    assert np.isnan(saved.var[~ok]).all()
    assert (saved.var[ok] >= 0).all()
    spread = abs(x).max(initial=0, where=np.isfinite(x))
    if not ok.any() or (special and x.dtype == np.float64 and spread > 1e100) or (call["eps"] == 0 and special):
        return
    take = [slice(None)] * x.ndim
    take[axis] = ok
    take = tuple(take)
    parts = {name: None if call[name] is None else call[name][ok] for name in ("gamma", "beta")}
    errors = oracle.largest_errors(
        x[take],
        dy[take],
        parts["gamma"],
        parts["beta"],
        axis,
        call["eps"],
        y[take],
        OfChannels(saved.mean[ok], saved.mean_low[ok], saved.var[ok]),
        OfGradients(
            gradients.dx[take],
            *(None if g is None else g[ok] for g in (gradients.dgamma, gradients.dbeta)),
        ),
    )
    # If one value is all of a float64 variance, its rounding does not average out.
    oracle.assert_close(errors, x.dtype, times=2 if x.dtype == np.float64 and spread > 1e30 else 1)


def judge_rounding(call, dy, y, gradients):
    """16-bit results are those of float32, rounded."""
    full, saved = bn.forward(**call | {"x": call["x"].astype("f4"), "out": None})
    with np.errstate(over="ignore", under="ignore"):
        assert np.array_equal(y, full.astype("f2"), equal_nan=True)
        dx = bn.backward(dy.astype("f4"), saved).dx.astype("f2")
    assert np.array_equal(gradients.dx, dx, equal_nan=True)


class OfChannels:
    def __init__(self, mean, mean_low, var):
        self.mean, self.mean_low, self.var = mean, mean_low, var


class OfGradients:
    def __init__(self, dx, dgamma, dbeta):
        self.dx, self.dgamma, self.dbeta = dx, dgamma, dbeta


if __name__ == "__main__":
    main(target, __doc__)
