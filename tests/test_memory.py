"""No array of x's size is allocated beyond the result; little is kept; without memory nothing changes; any size."""

import gc
import platform
import sys
import tracemalloc

import numpy as np
import pytest
from processes import WORKLOAD, succeeds

import batchnorm as bn

SHAPES = [(32, 16, 28, 28), (8, 64, 7, 7), (4096, 64), (64, 3, 50, 50)]


def traced(call):
    """Bytes held by what a call returns, and the most that there were during it.

    The least of three times: another thread, as one of pytest-xdist, may allocate something meanwhile.
    """
    found = []
    for _ in range(3):
        tracemalloc.start()
        try:
            kept = call()
            found.append(tracemalloc.get_traced_memory())
        finally:
            tracemalloc.stop()
        del kept
    return tuple(map(min, zip(*found, strict=True)))


def peak(call):
    return traced(call)[1]


@pytest.mark.once
@pytest.mark.measures
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("axis", [1, -1])
def test_only_the_result_is_allocated(shape, axis, rng):
    x = rng.standard_normal(shape).astype(np.float32)
    if axis == -1:
        x = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    channels = shape[1]
    dy, out = x.copy(), np.empty_like(x)
    gamma, beta, mean, var = np.ones((4, channels), np.float32)
    table = 16 * 8 * channels + 4096
    _, saved = bn.forward(x, gamma, beta, axis=axis)
    calls = {
        "forward": lambda out: bn.forward(x, gamma, beta, axis=axis, out=out),
        "backward": lambda out: bn.backward(dy, saved, out=out),
        "backward through the mean": lambda out: bn.backward(dy, saved, through=["mean"], out=out),
        "backward of the statistics": lambda out: bn.backward(dy, saved, dmean=mean, dvar=var, out=out),
        "inference": lambda out: bn.inference(x, mean, var, gamma, beta, axis=axis, out=out),
        "inference_backward": lambda out: bn.inference_backward(dy, x, mean, var, gamma, axis=axis, out=out),
    }
    for name, call in calls.items():
        call(None)
        assert peak(lambda call=call: call(None)) <= x.nbytes + table, name
        assert peak(lambda call=call: call(out)) <= table, name


@pytest.mark.once
@pytest.mark.measures
def test_saved_holds_no_copy(rng):
    x = rng.standard_normal((64, 8, 30, 30))
    held, _ = traced(lambda: bn.forward(x)[1])
    assert held < 6 * 8 * 8 + 4096
    assert bn.forward(x)[1].x is x


# References: every argument is let go, after success and after an error.


def argument_sets(rng):
    x, dy, out = (rng.standard_normal((6, 3, 50)) for _ in range(3))
    gamma, beta, mean, var = np.ones((4, 3))
    _, saved = bn.forward(x, gamma, beta)
    layer = bn.BatchNorm(3, dtype=np.float64)
    return {
        "forward": (bn.forward, (x, gamma, beta), {"out": out}),
        "backward": (bn.backward, (dy, saved), {"out": out, "dmean": mean, "dvar": var}),
        "inference": (bn.inference, (x, mean, var, gamma, beta), {"out": out}),
        "inference_backward": (bn.inference_backward, (dy, x, mean, var, gamma), {"out": out}),
        "update_running": (bn.update_running, (mean, var, saved), {}),
        "layer": (layer, (x,), {"out": out}),
        "Moments.of": (bn.Moments.of, (x,), {}),
        "grad_sums": (bn.grad_sums, (dy, saved), {}),
    }


@pytest.mark.once
@pytest.mark.parametrize("name", argument_sets(np.random.default_rng(0)))
def test_arguments_are_let_go(name, rng):
    function, arguments, keywords = argument_sets(rng)[name]
    watched = [*arguments, *keywords.values()]

    def counts():
        gc.collect()
        return [sys.getrefcount(argument) for argument in watched]

    wrong = [
        ((), {"no_such_argument": 1}),
        ((None, *arguments[1:]), keywords),
        ((np.array(["no number"]), *arguments[1:]), keywords),
        (arguments, keywords | {"num_threads": 0}),
    ]
    function(*arguments, **keywords)
    layer_keeps = counts()
    for _ in range(50):
        function(*arguments, **keywords)
        for positional, named in wrong:
            with pytest.raises((TypeError, ValueError, AttributeError)):
                function(*positional, **named)
    assert counts() == layer_keeps


@pytest.mark.once
@pytest.mark.measures
def test_many_calls_need_no_more_memory(level):
    program = """
x = x[:1, :, :2].copy()
def calls(n):
    for _ in range(n):
        results(1)
        try:
            bn.forward(x, np.ones(5))
        except ValueError:
            pass
import gc, os
def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
calls(1000)
before = resident()
calls(33_000)
print(resident() - before)
"""
    assert int(succeeds(WORKLOAD + program, BATCHNORM_ISA=level, timeout=120)) < 1 << 19


# No memory: an error, and everything as it was.

STARVED = """
import resource, sys
import numpy as np
import batchnorm as bn

def limited(room):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))

def fails(call):
    try:
        call()
    except MemoryError as error:
        return str(error)
    sys.exit("no MemoryError")

x = np.ones((300, 200_000), np.float32)
x[0] = 3
out = np.zeros_like(x)
layer = bn.BatchNorm(200_000)
layer(x[:2])
before = {name: value.copy() for name, value in layer.state_dict().items()}
"""


@pytest.mark.once
@pytest.mark.measures
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")
@pytest.mark.parametrize(
    ("room", "call", "message"),
    [
        (8 << 20, "layer(x, num_threads=1)", "Unable to allocate"),
        (20 << 20, "layer(x, out=out, num_threads=1)", "no memory for the sums of"),
        (20 << 20, "bn.Moments.of(x, num_threads=1)", "no memory for the sums of"),
    ],
)
def test_without_memory_nothing_changes(room, call, message, level):
    program = f"""
limited({room})
print(fails(lambda: {call}))
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert not out.any()
for name, value in layer.state_dict().items():
    assert value.tobytes() == before[name].tobytes(), name
assert layer(x).shape == x.shape
"""
    assert message in succeeds(STARVED + program, BATCHNORM_ISA=level)


# Sizes that do not fit into 32 bits.


@pytest.mark.slow
@pytest.mark.measures
def test_more_than_two_to_the_31_values(level):
    """Memory that was never written costs nothing, so all but three values of each channel are 0."""
    channels, rows = 2, (1 << 30) + 20
    for shape, axis, where in [
        ((rows, channels), 1, (slice(-3, None), 1)),
        ((channels, rows), 0, (1, slice(-3, None))),
    ]:
        x = np.zeros(shape, np.float32)
        x[where] = 2.0
        moments = bn.Moments.of(x, axis)
        mean = np.longdouble(6) / rows
        assert moments.count == rows
        assert moments.mean[0] == moments.m2[0] == 0
        assert abs(moments.mean[1] - mean) <= np.spacing(float(mean))
        assert abs(moments.m2[1] - (12 - 6 * mean)) <= 4 * np.spacing(12.0)


@pytest.mark.large
def test_forward_and_backward_of_more_than_two_to_the_31_values():
    """17 GiB. All samples are equal, so the statistics, and the results at every place, are those of one sample."""
    sample = np.random.default_rng(0).standard_normal((2, 1 << 14)).astype(np.float32)
    x = np.empty(((1 << 16) + 1, 2, 1 << 14), np.float32)
    x[...] = sample
    expected, small = bn.forward(sample[None])
    y, saved = bn.forward(x)
    np.testing.assert_allclose(saved.mean, small.mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(saved.var, small.var, rtol=1e-9)
    for start in range(0, len(x), 4096):
        assert abs(y[start : start + 4096] - expected).max() < 1e-6
    sums = bn.grad_sums(y, saved)
    np.testing.assert_allclose(sums.sum_dy_xmu * saved.rstd, len(x) * (1 << 14), rtol=1e-4)
    y[:, :, 0] += 1  # of xhat alone dx is 0 but for eps
    dx, want = bn.backward(y, saved, out=y).dx, expected.copy()
    want[:, :, 0] += 1
    want = bn.backward(want, small).dx
    for start in range(0, len(x), 4096):
        assert abs(dx[start : start + 4096] - want).max() < 1e-6


FAULTS = """
import resource
import numpy as np
import batchnorm as bn

x = np.random.default_rng(0).standard_normal((1, 1280, 7, 7), dtype=np.float32)
mean, var = np.zeros((2, 1280), np.float32)
y, saved = bn.forward(x, num_threads=1)
for call in (
    lambda: bn.forward(x, num_threads=1),
    lambda: bn.backward(x, saved, num_threads=1),
    lambda: bn.inference(x, mean, var, num_threads=1),
):
    for _ in range(50):
        call()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(200):
        call()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 200)
"""


@pytest.mark.once
@pytest.mark.measures
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries return memory at other times")
def test_calls_in_a_row_get_the_same_memory():
    """A new process with one small layer does not return memory in each call, to get it back as new pages."""
    assert max(map(float, succeeds(FAULTS).split())) < 5
