"""No array of x's size is allocated beyond the result."""

import tracemalloc

import numpy as np
import pytest

import batchnorm as bn

SHAPES = [(32, 16, 28, 28), (8, 64, 7, 7), (4096, 64), (64, 3, 50, 50)]


def peak(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


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


def test_saved_holds_no_copy(rng):
    x = rng.standard_normal((64, 8, 30, 30))
    tracemalloc.start()
    try:
        y, saved = bn.forward(x)
        del y
        assert tracemalloc.get_traced_memory()[0] < 6 * 8 * 8 + 4096
    finally:
        tracemalloc.stop()
    assert saved.x is x
