"""`batchnorm.sklearn`: scikit-learn's own checks, certified data, StandardScaler, and every way of cutting the data."""

import doctest
import pickle
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from oracle import ULPS, ulps
from pages import run_section

import batchnorm as bn

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import batchnorm.sklearn
from batchnorm.sklearn import Standardizer

# NIST, Statistical Reference Datasets, univariate summary statistics: data, certified mean and standard deviation
# (with n − 1), and relative errors of about a rounding of the data.
NIST = {
    "NumAcc1": ([10000001, 10000003, 10000002], "10000002", "1", 0),
    "NumAcc2": ([1.2, *[1.1, 1.3] * 500], "1.2", "0.1", 1e-14),
    "NumAcc3": ([1000000.2, *[1000000.1, 1000000.3] * 500], "1000000.2", "0.1", 2e-9),
    "NumAcc4": ([10000000.2, *[10000000.1, 10000000.3] * 500], "10000000.2", "0.1", 2e-8),
}
BOTH = [(True, True), (True, False), (False, True), (False, False)]

pytestmark = pytest.mark.once  # other tests compare the levels


@parametrize_with_checks([Standardizer(with_mean=mean, with_std=std) for mean, std in BOTH])
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize("rows", [1, 7, 2000])
@pytest.mark.parametrize("name", NIST)
def test_certified_values(name, rows):
    """Against the certified values up to the rounding of the data, and against exact sums of the rounded data."""
    data, mean, std, error = NIST[name]
    x = np.array(data, np.float64).reshape(-1, 1)
    scaler = Standardizer()
    for start in range(0, len(x), rows):
        scaler.partial_fit(x[start : start + rows])
    n, exact = len(x), [Fraction(float(value)) for value in x[:, 0]]
    centre = sum(exact) / n
    var = sum((value - centre) ** 2 for value in exact) / n
    assert scaler.mean_[0] == pytest.approx(float(centre), rel=2.3e-16)
    assert scaler.var_[0] == pytest.approx(float(var), rel=4e-16)
    assert abs(scaler.mean_[0] / float(mean) - 1) <= 4.5e-16
    assert abs(scaler.scale_[0] * np.sqrt(n / (n - 1)) / float(std) - 1) <= error + 4e-16
    assert scaler.n_samples_seen_ == n


def in_chunks(scaler, x, rows, weights=None):
    start = 0
    for stop in [*np.cumsum(rows), len(x)]:
        if start < min(stop, len(x)):
            scaler.partial_fit(x[start:stop], sample_weight=None if weights is None else weights[start:stop])
        start = stop
    return scaler


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_any_chunks_give_the_same_bits(dtype, weighted, rng):
    """More than two blocks of 2**20 values; the same as of `population`, and as of `fit`."""
    x = (rng.standard_normal((55_000, 40)) * rng.uniform(0.1, 3, 40) + 5).astype(dtype)
    weights = rng.integers(0, 3, len(x)).astype(float) if weighted else None
    population = bn.population([x], weights=[weights] if weighted else None)
    scalers = [
        Standardizer().fit(x, sample_weight=weights),
        Standardizer().fit(np.asfortranarray(x), sample_weight=weights),
        in_chunks(Standardizer(), x, []),
        in_chunks(Standardizer(num_threads=1), x, [1, 26213, 1, 26214], weights),
        in_chunks(Standardizer(), np.asfortranarray(x), [26214, 26214], weights),
        in_chunks(Standardizer(), x, [30_000, 1, 2], weights),
        in_chunks(Standardizer(), x, rng.integers(1, 400, 150), weights),
    ]
    if weighted:
        assert not np.array_equal(scalers.pop(2).mean_, population.mean)
    for scaler in scalers:
        np.testing.assert_array_equal(scaler.mean_, population.mean)
        np.testing.assert_array_equal(scaler.var_, population.var())
        assert scaler.n_samples_seen_ == (weights.sum() if weighted else len(x))
    wide = x.astype(np.longdouble)
    mean = np.average(wide, 0, weights)
    var = np.average((wide - mean) ** 2, 0, weights)
    eps, kind = (2.3e-16, "float64") if dtype == np.float64 else (1.2e-7, "float32")
    assert (abs(population.mean - mean + population.mean_low) / np.sqrt(var)).max() <= ULPS["mean"][kind] * eps
    assert abs(population.var() / var - 1).max() <= ULPS["var"][kind] * eps


def test_statistics_that_are_asked_for_on_the_way_change_nothing(rng):
    x = rng.standard_normal((60_000, 20))
    scaler = Standardizer()
    for start in range(0, len(x), 7001):
        scaler.partial_fit(x[start : start + 7001])
        seen = x[: start + 7001]
        assert scaler.n_samples_seen_ == len(seen)
        np.testing.assert_allclose(scaler.mean_, seen.mean(axis=0), rtol=1e-11, atol=1e-15)
        np.testing.assert_allclose(scaler.transform(seen[-2:]), (seen[-2:] - seen.mean(0)) / seen.std(0), rtol=1e-10)
    np.testing.assert_array_equal(scaler.var_, bn.population([x]).var())


@pytest.mark.parametrize(("with_mean", "with_std"), BOTH)
@pytest.mark.parametrize("weighted", [False, True])
def test_it_does_what_standard_scaler_does(with_mean, with_std, weighted, rng):
    x = rng.standard_normal((500, 6)) * [1, 10, 1e-8, 1e6, 1, 1] + [0, 100, 1e-3, -1e7, 0, 0]
    x[:, 4], x[:, 5] = 0.1, 1e8 + 1e-8 * rng.standard_normal(500)  # constant, and not to be told from it
    weights = rng.random(500) if weighted else None
    ours, theirs = (
        kind(with_mean=with_mean, with_std=with_std).fit(
            x[:200], sample_weight=None if weights is None else weights[:200]
        )
        for kind in (Standardizer, StandardScaler)
    )
    for scaler in (ours, theirs):
        scaler.partial_fit(x[200:], sample_weight=None if weights is None else weights[200:])
    for name in ("mean_", "var_", "scale_"):
        expected = getattr(theirs, name)
        if expected is None:
            assert getattr(ours, name) is None
        else:
            np.testing.assert_allclose(getattr(ours, name), expected, rtol=1e-8, atol=1e-14)
    if with_mean or with_std or not weighted:  # otherwise it counts rows
        assert ours.n_samples_seen_ == pytest.approx(theirs.n_samples_seen_, rel=1e-14)
    if with_std:
        assert ours.scale_[4:].tolist() == [1, 1]
    y = ours.transform(x)
    np.testing.assert_allclose(y, theirs.transform(x), rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(ours.inverse_transform(y), x, rtol=1e-14, atol=1e-13)


def test_weights_count_like_repeated_rows(rng):
    x, weights = rng.standard_normal((300, 4)), rng.integers(0, 4, 300)
    ours, repeated = Standardizer().fit(x, sample_weight=weights), Standardizer().fit(np.repeat(x, weights, axis=0))
    np.testing.assert_allclose(ours.mean_, repeated.mean_, rtol=1e-13)
    np.testing.assert_allclose(ours.scale_, repeated.scale_, rtol=1e-14)
    assert ours.n_samples_seen_ == repeated.n_samples_seen_ == weights.sum()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_floats_stay_what_they_are(dtype, order, rng):
    x = np.asarray(rng.standard_normal((200, 5)) * 3 + 7, dtype, order=order)
    scaler = Standardizer().fit(x)
    wide = (x - scaler.mean_.astype(np.longdouble)) / np.sqrt(scaler.var_.astype(np.longdouble))
    y = scaler.transform(x)
    assert y.dtype == dtype
    limit = 0.51 if dtype == np.float16 else ULPS["y"][np.dtype(dtype).name]
    assert ulps(y, wide, np.maximum(abs(wide), 1)) <= limit
    back = scaler.inverse_transform(y)
    assert back.dtype == dtype
    np.testing.assert_allclose(back, x, rtol=4 * np.finfo(dtype).eps, atol=16 * np.finfo(dtype).eps)


@pytest.mark.parametrize("offset", [0, 1e3, 1e7, -1e11])
def test_far_from_zero_no_digits_are_lost(offset, rng):
    x = rng.standard_normal((1000, 4)) + offset
    wide = x.astype(np.longdouble) - x[0]
    centred = wide - wide.mean(axis=0)
    expected = centred / np.sqrt((centred**2).mean(axis=0))
    y = Standardizer().fit_transform(x)
    assert ulps(y, expected, np.maximum(abs(expected), 1)) <= ULPS["y"]["float64"]


def test_integers_become_float64():
    x = np.array([[1, 2], [3, 4]])
    assert Standardizer().fit_transform(x).dtype == np.float64
    assert x.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("order", ["C", "F"])
def test_without_a_copy_y_lies_in_x(order, rng):
    x = np.asarray(rng.standard_normal((40, 3)).astype(np.float32), order=order)
    scaler, before = Standardizer(copy=False).fit(x), x.copy(order=order)
    expected = scaler.transform(x, copy=True)
    np.testing.assert_array_equal(x, before)
    y = scaler.transform(x)
    assert np.shares_memory(y, x)
    np.testing.assert_array_equal(y, expected)
    back = scaler.inverse_transform(y)
    assert np.shares_memory(back, x)
    np.testing.assert_allclose(back, before, rtol=1e-6, atol=1e-6)


def memory(call):
    """Allocated by a call: what is left, the most, and its result."""
    tracemalloc.start()
    try:
        result = call()
        return *tracemalloc.get_traced_memory(), result
    finally:
        tracemalloc.stop()


@pytest.mark.measures
@pytest.mark.parametrize("weighted", [False, True])
def test_float32_is_never_copied_to_float64(weighted, rng):
    """`fit` needs one block of 4 MiB, and keeps nothing; `transform` needs only y."""
    x = rng.standard_normal((100_000, 64), np.float32)
    weights = np.ones(len(x)) if weighted else None
    held, fitting, scaler = memory(lambda: Standardizer().fit(x, sample_weight=weights))
    _, transforming, y = memory(lambda: scaler.transform(x))
    _, in_place, _ = memory(lambda: scaler.transform(x, copy=False))
    assert fitting < 0.3 * x.nbytes
    assert held < 0.01 * x.nbytes
    assert x.nbytes < transforming < 1.02 * x.nbytes
    assert in_place < 0.02 * x.nbytes
    assert y.dtype == np.float32


def test_parts_may_differ_in_type_and_in_having_weights(rng):
    x, more, weighted = rng.standard_normal((3, 50, 4)) + 1e6
    weights, x = rng.random(50), x.astype(np.float32)
    scaler = Standardizer().partial_fit(x).partial_fit(more).partial_fit(weighted, sample_weight=weights)
    wide, every = np.concatenate([x, more, weighted]).astype(np.longdouble), [*np.ones(100), *weights]
    mean = np.average(wide, 0, every)
    np.testing.assert_allclose(scaler.mean_, mean.astype(float), rtol=4e-16)
    np.testing.assert_allclose(scaler.var_, np.average((wide - mean) ** 2, 0, every).astype(float), rtol=1e-7)
    assert scaler.n_samples_seen_ == pytest.approx(100 + weights.sum())


def test_a_pickle_has_no_data_and_goes_on(rng):
    x = rng.standard_normal((50_000, 10))
    scaler = Standardizer().partial_fit(x[:40_000])
    pickled = pickle.dumps(scaler)
    assert len(pickled) < 5000
    again = pickle.loads(pickled)
    for name in ("mean_", "var_", "scale_"):
        np.testing.assert_array_equal(getattr(again, name), getattr(scaler, name))
    np.testing.assert_array_equal(again.transform(x), scaler.transform(x))
    again.partial_fit(x[40_000:])
    np.testing.assert_allclose(again.var_, x.var(axis=0), rtol=1e-13)
    np.testing.assert_array_equal(scaler.partial_fit(x[40_000:]).var_, bn.population([x]).var())


def test_fit_forgets_and_a_clone_is_not_fitted(rng):
    x, other = rng.standard_normal((2, 30, 4))
    scaler = Standardizer(with_std=False, num_threads=1).fit(other).fit(x)
    np.testing.assert_array_equal(scaler.mean_, Standardizer().fit(x).mean_)
    copy = clone(scaler)
    assert copy.get_params() == {"copy": True, "num_threads": 1, "with_mean": True, "with_std": False}
    assert not hasattr(copy, "mean_")
    with pytest.raises(NotFittedError):
        copy.transform(x)


def test_in_a_pipeline_with_weights(rng):
    x, weights = rng.standard_normal((100, 3)) * [1, 100, 0.01] + 50, rng.random(100)
    y = x @ [1, 2, 3]
    ours, theirs = (
        make_pipeline(scaler, LinearRegression()).fit(
            x, y, **{f"{type(scaler).__name__.lower()}__sample_weight": weights}
        )
        for scaler in (Standardizer(), StandardScaler())
    )
    np.testing.assert_allclose(ours.predict(x), theirs.predict(x), rtol=1e-12)
    np.testing.assert_allclose(ours[-1].coef_, theirs[-1].coef_, rtol=1e-9)


def test_pandas_in_and_out(rng):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(rng.standard_normal((50, 2)).astype(np.float32), columns=["height", "width"])
    scaler = Standardizer().set_output(transform="pandas")
    y = scaler.fit_transform(frame)
    assert list(y.columns) == scaler.get_feature_names_out().tolist() == scaler.feature_names_in_.tolist()
    assert list(y.columns) == ["height", "width"]
    assert set(map(str, y.dtypes)) == {"float32"}
    np.testing.assert_allclose(y, StandardScaler().fit_transform(frame), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="feature names"):
        scaler.transform(frame[["width", "height"]])


def test_what_is_refused(rng):
    sparse = pytest.importorskip("scipy.sparse")
    x = rng.standard_normal((5, 2))
    scaler = Standardizer().fit(x)
    with pytest.raises(TypeError, match="Sparse data was passed"):
        Standardizer().fit(sparse.csr_array(x))
    with pytest.raises(TypeError, match="Sparse data was passed"):
        scaler.transform(sparse.csr_array(x))
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="contains"):
            scaler.partial_fit([[0, value]])
    for weights, message in [
        ([1, 2], r"sample_weight must have shape \(5,\), one per row, got \(2,\)"),
        ([1, 2, 3, 4, -5], r"sample_weight must not be negative, got -5\.0"),
        ([1, 2, 3, 4, np.nan], "sample_weight contains NaN"),
        ([0] * 5, "sample_weight must have a weight above 0, got only zeros"),
    ]:
        with pytest.raises(ValueError, match=message):
            scaler.fit(x, sample_weight=weights)
    np.testing.assert_array_equal(scaler.mean_, Standardizer().fit(x).mean_)
    assert scaler.n_samples_seen_ == 5


def test_examples():
    failed, tried = doctest.testmod(batchnorm.sklearn)
    assert tried > 0
    assert failed == 0


def test_examples_on_the_page():
    failed, tried = run_section("adapters.md", "scikit-learn: `Standardizer`")
    assert (failed, tried > 0) == (0, True)
