"""Statistics from data engines: the bits of one process, whatever the workers, the chunks and the order of arrival."""

import doctest
import multiprocessing
import pickle
import tracemalloc
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from oracle import rows

import batchnorm as bn

X = np.random.default_rng(0).standard_normal((1000, 3)) * [1, 10, 1e-3] + [0, 5, 1]
PARTS = np.split(X, [1, 17, 300, 300, 999])
WHOLE = bn.population(map(bn.Moments.of, PARTS))


pytestmark = pytest.mark.once  # other tests compare the levels


@pytest.fixture
def small_blocks(monkeypatch):
    """Of this process, so that a few values make many blocks."""
    monkeypatch.setattr("batchnorm.moments.BLOCK_VALUES", 1 << 10)


def peer(name):
    return pytest.importorskip(name, exc_type=ImportError)


def test_moments_are_merged_in_their_order():
    """One after the other; against the whole in long double, and in another order with other bits."""
    assert sum(map(bn.Moments.of, PARTS)) == WHOLE
    assert bn.population(map(bn.Moments.of, PARTS[::-1])) != WHOLE
    d = rows(X, 1)
    mean = d.mean(axis=1)
    m2 = ((d - mean[:, None]) ** 2).sum(axis=1)
    assert abs((mean - WHOLE.mean - WHOLE.mean_low) / np.sqrt(m2 / len(X))).max() < 1e-15
    assert abs(WHOLE.m2 / m2 - 1).max() < 1e-14


def test_moments_and_data_may_take_turns():
    assert bn.population([PARTS[2], bn.Moments.of(PARTS[3]), PARTS[4]]) == bn.population([PARTS[2]]) + bn.population(
        [PARTS[4]]
    )
    nothing = bn.Moments(0, np.zeros(3), np.zeros(3))
    assert bn.population([nothing, *map(bn.Moments.of, PARTS), nothing]) == WHOLE


def test_blocks_are_the_stream(small_blocks):
    """Moments of blocks, whose size the docstring of `Stream` promises to depend on the shape of a sample alone."""
    blocks = [bn.Moments.of(X[start : start + 341]) for start in range(0, 1000, 341)]
    assert bn.population(blocks) == bn.population([X])


@pytest.mark.parametrize("of", [np.asarray, bn.Moments.of])
def test_futures_are_taken_in_their_order(of):
    """They arrive in the opposite one."""
    futures = [Future() for _ in PARTS]

    def arrive():
        for future, part in reversed(list(zip(futures, PARTS, strict=True))):
            future.set_result(of(part))

    thread = Thread(target=arrive)
    thread.start()
    got = bn.population(futures)
    thread.join()
    assert got == bn.population([of(part) for part in PARTS])
    assert got != bn.population([of(part) for part in PARTS[::-1]])


def test_what_fails_in_a_future_is_raised():
    future = Future()
    future.set_exception(OSError("the disk is gone"))
    with pytest.raises(OSError, match="the disk is gone"):
        bn.population([PARTS[0], future])


def of_executor(kind, **options):
    with kind(2, **options) as pool:
        return bn.population([pool.submit(bn.Moments.of, part) for part in PARTS])


def of_pool():
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        return bn.population(pool.imap(bn.Moments.of, PARTS))


def of_joblib():
    joblib = peer("joblib")
    parallel = joblib.Parallel(n_jobs=2, return_as="generator")
    return bn.population(parallel(joblib.delayed(bn.Moments.of)(part) for part in PARTS))


ENGINES = {
    "threads": lambda: of_executor(ThreadPoolExecutor),
    "processes": lambda: of_executor(ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn")),
    "multiprocessing": of_pool,
    "joblib": of_joblib,
}


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_engines_of_python(engine):
    assert engine() == WHOLE


# shape, channel axis, axis of the samples
VIEWS = [((1000, 5), 1, 0), ((5, 1000), 0, 1), ((60, 3, 8, 9), 1, 0), ((60, 8, 9, 3), -1, 0), ((3000,), 1, 0)]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int16"])
@pytest.mark.parametrize(("shape", "axis", "sample"), VIEWS, ids=str)
def test_a_dask_array_in_any_chunks(shape, axis, sample, dtype, small_blocks, rng):
    da = peer("dask.array")
    x = (rng.standard_normal(shape) * 3 + 4).astype(dtype)
    length = shape[sample]
    whole = bn.population([x], axis)
    for cut, order in ((7, "C"), (59, "F"), (length - 1, "C"), (length, "F"), ((1, 0, 40, length - 41), "C")):
        chunks = da.from_array(np.array(x, order=order), chunks=-1).rechunk({sample: cut})
        assert bn.population(chunks, axis) == whole, cut


def test_schedulers_and_layers(small_blocks):
    dask, da = peer("dask"), peer("dask.array")
    x = da.from_array(X, chunks=(190, 3))
    for scheduler in ("synchronous", "threads"):
        with dask.config.set(scheduler=scheduler):
            assert bn.population(x) == bn.population([X])
    layers = bn.BatchNorm(3), bn.BatchNorm(3)
    layers[0].recalibrate(x)
    layers[1].recalibrate(PARTS)
    for name, expected in layers[1].state_dict().items():
        np.testing.assert_array_equal(layers[0].state_dict()[name], expected, name)


def test_a_dask_array_in_one_of_xarray(small_blocks):
    xarray = peer("xarray")
    peer("dask.array")
    x = xarray.DataArray(X, dims=("time", "channel")).chunk(time=190)
    assert bn.population(x) == bn.population([X])


def test_a_dask_array_without_samples():
    da = peer("dask.array")
    assert bn.population(da.zeros((0, 3))) == bn.Moments(0, np.zeros(3), np.zeros(3))


def test_only_blocks_are_ever_there(small_blocks):
    """Of an array that is made piece by piece, nothing but the moments of blocks comes back."""
    dask, da = peer("dask"), peer("dask.array")
    x = da.ones((1 << 21,), chunks=1 << 14, dtype=np.float32)
    with dask.config.set(scheduler="synchronous"):
        bn.population(x[: 1 << 15])  # imports what it needs
        tracemalloc.start()
        try:
            moments = bn.population(x)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert (moments.count, moments.mean[0], moments.m2[0]) == (1 << 21, 1, 0)
    assert peak < x.nbytes / 2


def test_a_pickle_of_moments_is_three_numbers_per_channel():
    for channels in (1, 64, 2048):
        moments = bn.Moments.of(np.random.default_rng(0).standard_normal((5, channels)))
        data = pickle.dumps(moments)
        assert pickle.loads(data) == moments
        assert len(data) < 8 * (3 * channels + 1) + 100


def unknown():
    x = peer("dask.array").from_array(X, chunks=(100, 3))
    return x[x[:, 0] > 0]


def data_frame():
    pandas, dataframe = peer("pandas"), peer("dask.dataframe")
    return dataframe.from_pandas(pandas.DataFrame(X, columns=list("abc")), npartitions=3)


REFUSED = {
    "channels in chunks": (
        lambda: bn.population(peer("dask.array").from_array(X, chunks=(100, 2))),
        ValueError,
        r"a dask array must be cut along axis 0 alone, the samples, got \(10, 2\) chunks; pass x\.rechunk\({1: -1}\)",
    ),
    "unknown sizes": (lambda: bn.population(unknown()), ValueError, r"known sizes: pass x\.compute_chunk_sizes\(\)"),
    "a data frame": (lambda: bn.population(data_frame()), TypeError, r"pass x\.to_dask_array\(lengths=True\)"),
    "no such axis": (
        lambda: bn.population(peer("dask.array").from_array(X), 2),
        ValueError,
        "axis must be between -2 and 1",
    ),
    "objects": (
        lambda: bn.population(peer("dask.array").from_array(X.astype(str))),
        TypeError,
        "a batch must have dtype float64, float32, float16 or bfloat16, got <U",
    ),
    "a mask of a dask array": (
        lambda: bn.population(peer("dask.array").from_array(X), mask=[X[:, 0] > 0]),
        TypeError,
        "mask must be None where batches are a dask array: select within each part, with Moments.of",
    ),
    "weights of moments": (
        lambda: bn.population([bn.Moments.of(X)], weights=[X[:, 0]]),
        TypeError,
        "weights must be None where a batch is Moments: select within each part, with Moments.of",
    ),
    "other channels": (
        lambda: bn.population([bn.Moments.of(X), X[:, :2]]),
        ValueError,
        "a batch must have 3 channels along axis 1, got 2",
    ),
    "one table": (lambda: bn.population(peer("pandas").DataFrame(X)), TypeError, r"one array of .*; pass \[x\]"),
    "one tensor": (lambda: bn.population(peer("torch").tensor(X)), TypeError, r"one array of .*; pass \[x\]"),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_what_is_advised_is_taken():
    chosen = bn.population([X[X[:, 0] > 0]])
    assert bn.population(unknown().compute_chunk_sizes()) == chosen
    assert bn.population(peer("dask.array").from_array(X, chunks=(100, 2)).rechunk({1: -1})) == bn.population([X])
    assert bn.population(data_frame().to_dask_array(lengths=True)) == bn.population([X])


@pytest.fixture(scope="module")
def client():
    """Of two processes."""
    distributed = peer("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit="1GB"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.mark.filterwarnings("ignore:Running on a single-machine scheduler")
@pytest.mark.slow
def test_a_cluster_of_processes(client):
    """48 million values that are made there, in chunks that do not end with blocks; none of them comes here."""
    da = peer("dask.array")
    x = da.random.default_rng(1).standard_normal((6_000_000, 8), chunks=(700_000, 8), dtype=np.float32) + 3
    tracemalloc.start()
    try:
        got = bn.population(x)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6 < x.nbytes / 9
    assert got == bn.population(block.compute(scheduler="synchronous") for block in x.blocks)
    assert got == bn.population(x.rechunk({0: 1_000_001}))
    np.testing.assert_allclose(got.mean, 3, atol=3e-3)
    np.testing.assert_allclose(got.var(), 1, atol=3e-3)


@pytest.mark.slow
def test_futures_of_a_cluster(client):
    assert bn.population(client.map(bn.Moments.of, PARTS)) == WHOLE
    assert bn.population(client.scatter(PARTS)) == bn.population([X])


@pytest.mark.filterwarnings("ignore:Running on a single-machine scheduler")
@pytest.mark.slow
def test_a_bag_is_reduced_by_position(client):
    """The tree is that of `split_every` and the partitions, and not of the workers."""
    bag = peer("dask.bag").from_sequence(PARTS, npartitions=3)
    for split_every in (None, 2):
        reduced = bag.reduction(bn.population, bn.population, split_every=split_every)
        assert reduced.compute() == reduced.compute(scheduler="synchronous")
    assert reduced.compute().count == 1000


def test_the_page():
    peer("distributed")
    page = Path(__file__).parents[1] / "docs" / "engines.md"
    if not page.exists():
        pytest.skip("docs are not beside the tests")
    failed, tried = doctest.testfile(str(page), module_relative=False)
    assert tried > 5
    assert failed == 0
