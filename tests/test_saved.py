"""What forward leaves for backward: it cannot be changed, and an x that is another array by then is refused."""

import copy
import pickle

import numpy as np
import pytest

import batchnorm as bn
from batchnorm import _kernels
from batchnorm._kernels import per_channel, runtime

pytestmark = [
    pytest.mark.once,  # what is kept and what is refused is the same on every level
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # NumPy gives up changing arrays in place
]

SHAPE = (4, 6)
ONES = np.ones(6)


def resize(x):
    x.resize((40, 6), refcheck=False)


# What x has become, in words.
CHANGES = {
    "a narrower dtype": (lambda x: setattr(x, "dtype", np.float32), r"<float32 \(4, 12\)>"),
    "a wider dtype": (lambda x: setattr(x, "dtype", np.complex128), r"<complex128 \(4, 3\)>"),
    "integers": (lambda x: setattr(x, "dtype", np.int64), r"<int64 \(4, 6\)>$"),
    "the other byte order": (lambda x: setattr(x, "dtype", x.dtype.newbyteorder()), r"<>f8 \(4, 6\)>$"),
    "axes exchanged": (lambda x: setattr(x, "shape", (6, 4)), r"<float64 \(6, 4\)>"),
    "more dimensions": (lambda x: setattr(x, "shape", (4, 6, 1)), r"<float64 \(4, 6, 1\)>"),
    "more values": (resize, r"<float64 \(40, 6\)>"),
    "fewer values": (lambda x: x.resize((1, 6), refcheck=False), r"<float64 \(1, 6\)>"),
}
SAME_MEMORY = ("axes exchanged", "more dimensions")
USES = {
    "backward": lambda dy, saved: bn.backward(dy, saved),
    "backward, sums given": lambda dy, saved: bn.backward(
        dy, saved, sums=bn.GradientSums(saved.count, np.ones(6), np.ones(6))
    ),
    "backward of parameters": lambda dy, saved: bn.backward(dy, saved, need=["dgamma"]),
    "grad_sums": lambda dy, saved: bn.grad_sums(dy, saved),
    "pathways": lambda dy, saved: bn.pathways(dy, saved),
    "moment_gradients": lambda dy, saved: bn.moment_gradients(dy, saved),
    "diagnose": lambda dy, saved: bn.diagnose(dy, dy, saved),
    "x": lambda _, saved: saved.x,
    "pickle": lambda _, saved: pickle.dumps(saved),
    "copy": lambda _, saved: copy.copy(saved),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize(("change", "became"), CHANGES.values(), ids=CHANGES)
def test_an_x_that_became_another_array_is_refused(change, became, use, rng):
    """Even with a dy that is like the new x, and before anything is written."""
    x = rng.standard_normal(SHAPE)
    _, saved = bn.forward(x, ONES, ONES)
    change(x)
    for shape in (x.shape, SHAPE):
        dy = np.ones(shape, x.dtype if shape == x.shape else np.float64)
        message = rf"x must stay what forward saw, <float64 \(4, 6\)>, until backward has run; it is now {became}"
        with pytest.raises(ValueError, match=message):
            use(dy, saved)
    assert "count=4" in repr(saved)


def test_an_x_that_is_itself_again_is_accepted(rng):
    x = rng.standard_normal(SHAPE)
    _, saved = bn.forward(x)
    before = bn.backward(x, saved).dx
    x.shape = (6, 4)
    x.shape = SHAPE
    np.testing.assert_array_equal(bn.backward(x, saved).dx, before)


def test_running_statistics_do_not_ask_for_x(rng):
    x = rng.standard_normal(SHAPE)
    _, saved = bn.forward(x)
    x.shape = (6, 4)
    mean, var = np.zeros(6), np.ones(6)
    bn.update_running(mean, var, saved, momentum=1.0)
    np.testing.assert_array_equal(mean, saved.mean)


class Changes:
    """A parameter that makes another array of x while it is read."""

    def __init__(self, x, change):
        self.x, self.change = x, change

    def __array__(self, dtype=None, copy=None):
        self.change(self.x)
        return ONES


@pytest.mark.parametrize("name", CHANGES)
def test_an_x_that_changes_during_the_call(name, rng):
    """It is refused, or read as it was."""
    change, _ = CHANGES[name]
    for call in (lambda x, gamma: bn.forward(x, gamma)[0], lambda x, gamma: bn.inference(x, ONES, ONES, gamma)):
        x = rng.standard_normal(SHAPE)
        expected = call(x.copy(), ONES)
        if name in SAME_MEMORY:
            np.testing.assert_allclose(call(x, Changes(x, change)).view(np.float64), expected, rtol=1e-12)
        else:
            with pytest.raises((ValueError, KeyError)):
                call(x, Changes(x, change))


BESIDE_A_VIEW = ("forward", "normalize", "normalize_prepared", "backward")


def test_the_doors_of_the_kernels_measure_every_array(rng):
    """Whatever the façade has checked: memory of another size than the view needs is not touched."""
    kernels, view = _kernels.of_type["d"], (*SHAPE, 1)

    def arrays():
        x, y, dy = rng.standard_normal((3, *view))
        rows = {
            "statistics": runtime.STATISTICS_ROWS,
            "gradients": runtime.GRADIENT_ROWS,
            "table": runtime.COEFFICIENT_ROWS,
        }
        return {"x": x, "y": y, "dy": dy} | {name: np.zeros((count, 6)) for name, count in rows.items()}

    calls = {
        "moments": (lambda a: kernels.moments(a["x"], a["statistics"], 0.0, 1), ("statistics",)),
        "forward": (
            lambda a: kernels.forward(a["x"], a["y"], view, a["statistics"], None, None, 0.0, 1),
            ("x", "y", "statistics"),
        ),
        "coefficients": (lambda a: kernels.coefficients(a["statistics"], a["table"]), ("table",)),
        "normalize": (
            lambda a: kernels.normalize(a["x"], a["y"], view, a["statistics"], 1),
            ("x", "y", "statistics"),
        ),
        "normalize_prepared": (
            lambda a: kernels.normalize_prepared(a["x"], a["y"], view, a["table"], True, 1),
            ("x", "y", "table"),
        ),
        "grad_sums": (
            lambda a: kernels.grad_sums(a["dy"], a["x"], a["statistics"], a["gradients"], None, None, 1),
            ("x", "dy", "statistics", "gradients"),
        ),
        "grad_apply": (
            lambda a: kernels.grad_apply(a["dy"], a["x"], a["y"], a["statistics"], a["gradients"], 3, 4.0, 1),
            ("x", "y", "dy", "statistics", "gradients"),
        ),
        "backward": (
            lambda a: kernels.backward(
                a["dy"], a["x"], a["y"], view, a["statistics"], a["gradients"], None, None, 3, 4.0, 1
            ),
            ("x", "y", "dy", "statistics", "gradients"),
        ),
    }
    wrong = {
        "too short": lambda a: a[:-1],
        "too long": lambda a: np.concatenate([a, a]),
        "another dtype": lambda a: a.astype(np.float32),
        "integers of one byte": lambda a: a.astype(np.int8),
        "a gap": lambda a: np.repeat(a, 2, axis=0)[::2],
        "backwards": lambda a: a[::-1],
        "one axis": lambda a: a.ravel(),
    }
    for door, (call, names) in calls.items():
        call(arrays())
        for name in names:
            for how, make in wrong.items():
                if door in BESIDE_A_VIEW and name in ("x", "y", "dy") and how == "one axis":  # the view says the rest
                    continue
                given = arrays()
                given[name] = make(given[name])
                with pytest.raises(ValueError, match=r"must|Buffer|contiguous"):
                    call(given)


@pytest.mark.parametrize(
    "values", [np.ones(5), np.ones(7), np.ones((6, 1)), np.float64(1), np.ones(6, np.int8)], ids=repr
)
def test_the_doors_of_the_kernels_measure_every_parameter(values, rng):
    x, y = rng.standard_normal((2, *SHAPE, 1))
    statistics, gradients = np.zeros((runtime.STATISTICS_ROWS, 6)), np.zeros((runtime.GRADIENT_ROWS, 6))
    kernels = _kernels.of_type["d"]
    for given in ((values, None), (None, values)):
        with pytest.raises(ValueError, match="there must be 6 floating-point numbers"):
            kernels.forward(x, y, x.shape, statistics, *given, 0.0, 1)
        for write in (
            lambda given=given: kernels.grad_sums(y, x, statistics, gradients, *given, 1),
            lambda given=given: kernels.backward(y, x, y, x.shape, statistics, gradients, *given, 3, 4.0, 1),
            lambda given=given: per_channel.channel_gradients(statistics, gradients, *given),
        ):
            with pytest.raises((ValueError, BufferError), match=r"there must be 6 floating-point numbers|readonly"):
                write()


@pytest.mark.parametrize("block", [np.zeros(12), np.zeros(13, np.int8), np.zeros(13, np.float16)], ids=repr)
def test_the_door_of_running_statistics_measures_them(block):
    with pytest.raises(ValueError, match="block must have 13 values of 8 bytes"):
        per_channel.follow(block, np.ones((runtime.STATISTICS_ROWS, 6)), 0.1, 1.0)
    assert not block.any()


def test_what_is_read_only_stays_so(rng):
    """Whoever asks for it to be writeable."""
    x = rng.standard_normal(SHAPE)
    _, saved = bn.forward(x)
    moments, sums = bn.Moments.of(x), bn.grad_sums(x, saved)
    for array in (saved.mean, saved.var, saved.rstd, saved.gamma, moments.mean, moments.m2, sums.sum_dy):
        with pytest.raises(ValueError, match="cannot set WRITEABLE flag to True"):
            array.flags.writeable = True


def test_other_strides_are_refused(rng):
    x = rng.standard_normal(SHAPE)
    dy = rng.standard_normal(SHAPE)
    _, saved = bn.forward(x)
    for strides in ((8, 32), (0, 8)):
        x.strides = strides
        with pytest.raises(ValueError, match="x must stay what forward saw"):
            bn.backward(dy, saved)
