"""The same input gives the same bits: any number of threads, any level, any platform, fused or in steps, run after run.

`golden.json` has a digest of the results for every view. `PYTHONPATH=tests/support python tests/test_bits.py` writes
it anew: a change users see, so CHANGELOG has to name it.
"""

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from processes import search_path, succeeds
from shapes import VIEWS

import batchnorm as bn
from batchnorm import _kernels, _threads
from batchnorm._kernels import runtime

THREADS = [1, 2, 3, 5, 8, 64]
DTYPES = ["float32", "float64"]
THROUGH = [(), ("mean",), ("variance",)]
GOLDEN = Path(__file__).with_name("golden.json")


def bell(rng, shape):
    """Nearly normal numbers of 24 bits. Made of integers, because `standard_normal` needs the C library's logarithm."""
    return rng.integers(-(1 << 21), 1 << 21, (4, *np.atleast_1d(shape))).sum(axis=0) / (1 << 20)


def as_it_is(x):
    return x


def misleading(x):
    """Channels that are summed again in float64: by an outlier, padding, or squares that float32 cannot hold."""
    x[0, 0::5, 0] = 1e6
    x[: 1 + len(x) // 3, 1::5] = -1e3
    x[:, 2::5] *= 1e30
    x[:, 3::5] *= 1e-30
    return x


def everything(view, dtype, num_threads=None, made=as_it_is):
    """The bytes of all results for one view, by name, in the order of the digests."""
    rng = np.random.default_rng(7)
    x, dy = made((bell(rng, view) + 2).astype(dtype)), bell(rng, view).astype(dtype)
    gamma, beta = (bell(rng, view[1]).astype(dtype) for _ in range(2))
    running = np.zeros(view[1], dtype), np.ones(view[1], dtype)
    y, saved = bn.forward(x, gamma, beta, num_threads=num_threads)
    bn.update_running(*running, saved, unbiased=saved.count > 1)
    gradients = bn.backward(dy, saved, num_threads=num_threads)
    inference = bn.inference(x, *running, gamma, beta, num_threads=num_threads)
    fixed = bn.inference_backward(dy, x, *running, gamma, num_threads=num_threads)
    partial = [bn.backward(dy, saved, through=through, num_threads=num_threads).dx for through in THROUGH]
    upstream = bn.backward(dy, saved, dmean=gamma, dvar=beta, num_threads=num_threads).dx
    statistics = bn.inference_backward(dy, x, *running, gamma, need=("dmean", "dvar"), num_threads=num_threads)
    return as_bytes(
        {"y": y, "mean": saved.mean, "var": saved.var, "rstd": saved.rstd}
        | dict(zip(("running_mean", "running_var"), running, strict=True))
        | gradients._asdict()
        | {"inference": inference}
        | {f"{name} of inference": array for name, array in fixed._asdict().items()}
        | {f"dx through {through}": dx for through, dx in zip(THROUGH, partial, strict=True)}
        | {"dx, upstream": upstream, "dmean": statistics.dmean, "dvar": statistics.dvar}
    )


def as_bytes(arrays):
    return {name: array.tobytes() for name, array in arrays.items() if array is not None}


def differing(results, expected):
    """The names of the results that have other bits."""
    assert results.keys() == expected.keys()
    return [name for name in expected if results[name] != expected[name]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_number_of_threads(view, dtype, always_threaded):
    one = everything(view, dtype, 1)
    for threads in THREADS[1:]:
        assert differing(everything(view, dtype, threads), one) == [], f"{threads} threads"
    assert differing(everything(view, dtype), one) == []


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_sums_that_are_made_again(view, always_threaded):
    """Any number of threads and any level."""
    one = everything(view, "float32", 1, misleading)
    for threads in (2, 3, 64):
        assert differing(everything(view, "float32", threads, misleading), one) == [], f"{threads} threads"
    for other in _kernels.available():
        with other_level(other):
            assert differing(everything(view, "float32", 2, misleading), one) == [], other


@contextlib.contextmanager
def other_level(name):
    before = _kernels.level
    _kernels.use(name)
    yield
    _kernels.use(before)


def further(view, dtype):
    """The bytes of what `golden.json` does not have: 16-bit floats, activations, residuals, selected values."""
    rng = np.random.default_rng(8)
    x, dy, add = (bell(rng, view).astype(dtype) for _ in range(3))
    mean, var = bell(rng, view[1]), abs(bell(rng, view[1])) + 1
    places = view[0], view[2]
    selects = {
        "all": {},
        "mask": {"mask": rng.random(places) < 0.6},
        "lengths": {"lengths": rng.integers(0, view[2] + 1, view[0])},
        "weights": {"weights": rng.integers(1, 9, places)},
    }
    found = {}
    for name, select in selects.items():
        y, saved = bn.forward(x, activation=("leaky_relu", 0.1), add=add, **select)
        gradients = bn.backward(dy, saved)
        results = {"y": y, "mean": saved.mean, "var": saved.var, "dx": gradients.dx, "dadd": gradients.dadd}
        if name != "weights":
            results["inference"] = bn.inference(x, mean, var, activation="relu", **select)
        found |= {f"{result} of {name}": array for result, array in results.items()}
    return as_bytes(found)


@pytest.mark.once
@pytest.mark.parametrize(
    ("results", "dtype"),
    [
        *((further, dtype) for dtype in [*DTYPES, "float16"]),
        *(pytest.param(everything, dtype, marks=pytest.mark.slow) for dtype in DTYPES),  # test_any_platform has it too
    ],
)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_level(view, results, dtype):
    best, *others = _kernels.available()
    expected = results(view, dtype)
    for other in others:
        with other_level(other):
            assert differing(results(view, dtype), expected) == [], f"{other} against {best}"


def digests():
    return {
        f"{name}, {dtype}": hashlib.sha256(b"".join(everything(view, dtype).values())).hexdigest()
        for name, view in VIEWS.items()
        for dtype in DTYPES
    }


@pytest.mark.every_level
def test_any_platform():
    """x86-64 and aarch64, glibc and musl, GCC and Clang, and all versions of Python and NumPy have to agree."""
    expected = json.loads(GOLDEN.read_text())
    found = digests()
    assert [name for name in expected if found.get(name) != expected[name]] == []
    assert found.keys() == expected.keys()


def digest(environment, before=""):
    """Digest of all results, calculated by a new process."""
    program = f"{before}\nimport test_bits\nprint(test_bits.digest_here())"
    here = Path(__file__).parent
    return succeeds(program, timeout=300, PYTHONPATH=search_path(here, here / "support"), **environment)


ALWAYS_THREADED = "from batchnorm import _threads; _threads.SERIAL_VALUES = 0"


def digest_here():
    return hashlib.sha256(json.dumps(digests()).encode()).hexdigest()


@pytest.mark.slow
def test_a_process_of_its_own(level):
    """The level by the environment, as a user sets it; and the settings of OpenMP that could change an order."""
    expected = digest_here()
    assert digest({"BATCHNORM_ISA": level}) == expected
    assert digest({"BATCHNORM_ISA": level, "OMP_NUM_THREADS": "1"}) == expected
    assert (
        digest({"BATCHNORM_ISA": level, "BATCHNORM_NUM_THREADS": "3", "OMP_DYNAMIC": "true"}, ALWAYS_THREADED)
        == expected
    )


@pytest.mark.slow
@pytest.mark.measures
def test_the_smallest_stacks(level):
    """A kernel that needs more would end the process; musl's threads have 128 KiB, and smaller ones are not used."""
    small = {"BATCHNORM_NUM_THREADS": "3", "OMP_STACKSIZE": f"{_threads.STACK}B"}
    assert digest({"BATCHNORM_ISA": level, **small}, ALWAYS_THREADED) == digest_here()


@pytest.mark.parametrize("made", [as_it_is, misleading])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_steps_are_the_fused_call(view, dtype, made, rng):
    """moments then normalize is forward, grad_sums then grad_apply is backward: the seam for merging over machines."""
    x, dy = made((rng.standard_normal(view) + 2).astype(dtype)), rng.standard_normal(view).astype(dtype)
    kernels = _kernels.of_type[x.dtype.char]
    y, dx = np.empty_like(x), np.empty_like(x)
    statistics = np.zeros((runtime.STATISTICS_ROWS, view[1]))
    gradients, n = np.zeros((runtime.GRADIENT_ROWS, view[1])), view[0] * view[2]
    table = np.zeros((runtime.COEFFICIENT_ROWS, view[1]))
    gamma, beta = rng.standard_normal((2, view[1]))
    statistics[runtime.GAMMA], statistics[runtime.BETA] = gamma, beta
    kernels.moments(x, statistics, 1e-5, 2)
    kernels.normalize(x, y, view, statistics, 2)
    prepared_y = np.empty_like(y)
    kernels.normalize_prepared(x, prepared_y, view, table, kernels.coefficients(statistics, table), 2)
    kernels.grad_sums(dy, x, statistics, gradients, None, None, 2)
    kernels.grad_apply(dy, x, dx, statistics, gradients, 3, n, 2)
    fused_y, saved = bn.forward(x, gamma, beta)
    fused = bn.backward(dy, saved)
    assert y.tobytes() == prepared_y.tobytes() == fused_y.tobytes()
    assert statistics[runtime.RSTD].tobytes() == saved.rstd.tobytes()
    assert dx.tobytes() == fused.dx.tobytes()
    assert gradients[runtime.DGAMMA].tobytes() == fused.dgamma.tobytes()
    for bits, through in enumerate(THROUGH):
        kernels.grad_apply(dy, x, dx, statistics, gradients, bits, n, 2)
        assert dx.tobytes() == bn.backward(dy, saved, through=through).dx.tobytes()


@pytest.mark.parametrize("made", [as_it_is, misleading])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_in_place_is_out_of_place(view, dtype, made, rng, always_threaded):
    x, dy = made((rng.standard_normal(view) + 2).astype(dtype)), rng.standard_normal(view).astype(dtype)
    mean, var = rng.standard_normal(view[1]), rng.random(view[1])
    expected = bn.inference(x, mean, var)
    _, saved = bn.forward(x.copy())
    expected_dx = bn.backward(dy, saved).dx
    fixed_dx = bn.inference_backward(dy, x, mean, var).dx
    assert bn.inference(x.copy(), mean, var, out=None).tobytes() == expected.tobytes()
    fixed = dy.copy()
    assert bn.inference_backward(fixed, x, mean, var, out=fixed, num_threads=2).dx is fixed
    assert fixed.tobytes() == fixed_dx.tobytes()
    assert bn.inference(x, mean, var, out=x, num_threads=2) is x
    assert x.tobytes() == expected.tobytes()
    for through in THROUGH:
        partial = dy.copy()
        bn.backward(partial, saved, through=through, out=partial, num_threads=2)
        assert partial.tobytes() == bn.backward(dy, saved, through=through).dx.tobytes()
    assert bn.backward(dy, saved, out=dy, num_threads=2).dx is dy
    assert dy.tobytes() == expected_dx.tobytes()


def placed(values, address):
    """The values at so many bytes from the beginning of a line of the cache."""
    room = np.empty(values.nbytes + 128, np.uint8)
    start = -room.ctypes.data % 64 + address
    array = room[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    array[...] = values
    return array


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", [*DTYPES, "float16"])
@pytest.mark.parametrize("view", [(41, 160, 1), (41, 32, 1), (19, 64, 12)], ids=str)
def test_columns_at_any_address(view, dtype, activation, rng):
    """Where a line begins changes no bits, and nothing that is not finite reaches the channels beside it."""
    x, dy = (rng.standard_normal(view).astype(dtype) for _ in range(2))
    good = np.delete(np.arange(view[1]), [1, 5, 17, 30])

    def results(x, dy):
        with np.errstate(invalid="ignore"):
            y, saved = bn.forward(x, activation=activation)
            dx = bn.backward(dy, saved).dx
        return [array.tobytes() for array in (y[:, good], saved.mean[good], saved.var[good], dx[:, good])]

    expected = results(placed(x, 0), placed(dy, 0))
    x[3, [1, 17]], x[7, 5], x[9, 30] = np.nan, np.inf, -np.inf
    dy[4, 5] = np.nan
    for address in range(0, 64, x.itemsize):
        assert results(placed(x, address), placed(dy, (3 * address) % 64)) == expected, address


STREAMED = [(4200, 1029, 1), (70000, 61, 1), (132000, 64, 1), (9000, 512, 1), (21, 50, 4099), (32, 2700, 49)]
STREAMED += [(48, 900, 100)]  # lines that end one channel and begin the next
STREAMED += [(300, 900, 20), (3, 90000, 17)]  # rows of one channel that have no whole line, or one


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
@pytest.mark.parametrize("view", STREAMED, ids=str)
def test_results_written_around_the_cache(view, dtype, rng):
    """What passes of 32 MiB and more write is streamed to memory, whatever its address; a result in place is not."""
    x, dy = (rng.standard_normal(view, np.float32).astype(dtype, copy=False) for _ in range(2))
    assert 2 * x.nbytes >= 1 << 25
    gamma, beta = rng.standard_normal((2, view[1])).astype(dtype)
    y, saved = bn.forward(x, gamma, beta)
    dx = bn.backward(dy, saved).dx
    fixed = saved.mean, saved.var, gamma, beta
    normalized = bn.inference(x, *fixed)
    some = np.s_[:, ::97]
    few = [np.ascontiguousarray(array[some]) for array in (x, dy)]
    y_some, saved_some = bn.forward(few[0], gamma[::97], beta[::97])
    dx_terms = (abs(dy).max() * abs(gamma).max() * saved.rstd.max()).astype(dtype)
    for streamed, plain, terms in (
        (y, y_some, abs(y).max()),
        (dx, bn.backward(few[1], saved_some).dx, dx_terms),
        (normalized, bn.inference(few[0], *(array[::97] for array in fixed)), abs(y).max()),
    ):
        np.testing.assert_allclose(streamed[some], plain, rtol=0, atol=4 * np.spacing(terms))
    for shift in (1, 2, 3):
        room = np.empty(x.size + 4, dtype)
        out = room[shift : shift + x.size].reshape(view)
        assert bn.forward(x, gamma, beta, out=out, num_threads=shift)[0].tobytes() == y.tobytes()
        assert bn.backward(dy, saved, out=out, num_threads=shift).dx.tobytes() == dx.tobytes()
        assert bn.inference(x, *fixed, out=out, num_threads=shift).tobytes() == normalized.tobytes()
    assert bn.backward(dy, saved, out=dy).dx.tobytes() == dx.tobytes()
    assert bn.inference(x, *fixed, out=x).tobytes() == normalized.tobytes()


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(digests(), indent=1) + "\n")
