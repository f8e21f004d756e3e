"""Statistics that add up: exact by the oracle, the same however the data is cut, and the fused call bit for bit."""

import math
import pickle
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ULPS, assert_close, largest_errors, rows, truth, ulps
from shapes import VIEWS

import batchnorm as bn

DTYPES = ["float32", "float64"]


def exact(x, axis=1):
    """μ and Σ(x − μ)² in long double."""
    d = rows(x, axis)
    first = d[:, :1]
    mean = (d - first).mean(axis=1, keepdims=True)
    return (first + mean)[:, 0], ((d - first - mean) ** 2).sum(axis=1)


def parts(array, cuts):
    return np.split(array, sorted(cuts))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_moments_are_those_of_forward(view, dtype, rng):
    x = (rng.standard_normal(view) + 3).astype(dtype)
    moments, (_, saved) = bn.Moments.of(x), bn.forward(x)
    assert moments.count == view[0] * view[2]
    assert moments.mean.tobytes() == saved.mean.tobytes()
    assert moments.mean_low.tobytes() == saved.mean_low.tobytes()
    assert moments.var().tobytes() == saved.var.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_split_phases_are_the_fused_call(view, dtype, rng):
    """When nothing is merged: the same bits in y, dx, dgamma, dbeta and the running statistics."""
    x, dy = (rng.standard_normal(view) + 3).astype(dtype), rng.standard_normal(view).astype(dtype)
    gamma, beta = rng.standard_normal((2, view[1])).astype(dtype)
    y, saved = bn.forward(x, gamma, beta)
    split_y, split = bn.forward(x, gamma, beta, moments=bn.Moments.of(x))
    assert split_y.tobytes() == y.tobytes()
    for how in ({}, {"through": ("mean",)}, {"dmean": gamma, "dvar": beta}, {"need": ("dgamma", "dbeta")}):
        whole = bn.backward(dy, saved, **how)
        in_steps = bn.backward(dy, split, sums=bn.grad_sums(dy, split), **how)
        for got, expected in zip(in_steps, whole, strict=True):
            assert (got is None) == (expected is None)
            assert got is None or got.tobytes() == expected.tobytes()
    assert split.count == saved.count


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", [(40, 7, 1), (24, 5, 9), (12, 3, 100)], ids=str)
@pytest.mark.parametrize("cuts", [(3,), (1, 2, 3), (0, 0, 5), (12,)], ids=str)
def test_parts_of_a_batch_are_the_batch(view, cuts, dtype, offset, rng):
    """Each part by itself with merged statistics and sums, against the oracle on the whole."""
    x, dy = (rng.standard_normal(view) + offset).astype(dtype), rng.standard_normal(view).astype(dtype)
    gamma, beta = rng.standard_normal((2, view[1])).astype(dtype)
    moments = sum((bn.Moments.of(part) for part in parts(x, cuts)), bn.Moments(0, np.zeros(view[1]), np.zeros(view[1])))
    done = [bn.forward(part, gamma, beta, moments=moments) for part in parts(x, cuts)]
    each = [bn.grad_sums(part, saved) for part, (_, saved) in zip(parts(dy, cuts), done, strict=True)]
    sums = sum(each[1:], each[0])
    gradients = [bn.backward(part, saved, sums=sums) for part, (_, saved) in zip(parts(dy, cuts), done, strict=True)]
    y = np.concatenate([y for y, _ in done])
    whole = bn.Gradients(np.concatenate([g.dx for g in gradients]), gradients[0].dgamma, gradients[0].dbeta)
    assert_close(largest_errors(x, dy, gamma, beta, 1, 1e-5, y, done[0][1], whole), x.dtype)
    assert all(g.dgamma.tobytes() == gradients[0].dgamma.tobytes() for g in gradients)
    local = bn.backward(parts(dy, cuts)[0], done[0][1])
    assert_sum = each[0].sum_dy.astype(dtype)
    np.testing.assert_array_equal(local.dbeta, assert_sum)


@settings(max_examples=150)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=2, max_size=6).filter(lambda sizes: sum(sizes) > 1),
    length=st.sampled_from([1, 1, 3, 50, 90, 700]),
    axis=st.sampled_from([1, -1]),
    dtype=st.sampled_from(DTYPES),
    offset=st.sampled_from([0.0, -7.0, 100.0, 1e6]),
    drift=st.sampled_from([0.0, 3.0]),
    shifted=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_parts_give_what_the_whole_gives(sizes, length, axis, dtype, offset, drift, shifted, seed):
    """However the batch is cut."""
    rng = np.random.default_rng(seed)
    channels, samples = 3, sum(sizes)
    shape = (samples, channels, length) if axis == 1 else (samples, length, channels)
    ramp = drift * np.arange(samples)[:, None, None] / samples
    x, dy = (rng.standard_normal(shape) + offset + ramp).astype(dtype), rng.standard_normal(shape).astype(dtype)
    gamma, beta = rng.uniform(0.5, 2, channels).astype(dtype), (shifted * rng.standard_normal(channels)).astype(dtype)
    cuts = np.cumsum(sizes)[:-1]
    pairs = list(zip(parts(x, cuts), parts(dy, cuts), strict=True))
    moments = sum((bn.Moments.of(part, axis) for part, _ in pairs[1:]), bn.Moments.of(pairs[0][0], axis))
    done = [bn.forward(part, gamma, beta, axis=axis, moments=moments) for part, _ in pairs]
    each = [bn.grad_sums(part, saved) for (_, part), (_, saved) in zip(pairs, done, strict=True)]
    sums = sum(each[1:], each[0])
    backward = [bn.backward(part, saved, sums=sums) for (_, part), (_, saved) in zip(pairs, done, strict=True)]
    y, saved = bn.forward(x, gamma, beta, axis=axis)
    dx, dgamma, dbeta = bn.backward(dy, saved)
    t = truth(x, dy, gamma, beta, axis)
    errors = {
        "y": ulps(np.concatenate([y for y, _ in done]), y.astype(np.longdouble), t.y_terms, axis),
        "dx": ulps(np.concatenate([g.dx for g in backward]), dx.astype(np.longdouble), t.dx_terms, axis),
        "dgamma": ulps(backward[0].dgamma, dgamma.astype(np.longdouble), t.dgamma_terms),
        "dbeta": ulps(backward[0].dbeta, dbeta.astype(np.longdouble), t.dbeta_terms),
    }
    running = [(np.zeros(channels, dtype), np.ones(channels, dtype)) for _ in range(2)]
    for arrays, source in zip(running, (saved, done[0][1]), strict=True):
        bn.update_running(*arrays, source)
    spread = 0.1 * np.maximum(abs(saved.mean), saved.var**0.5)
    for name, expected, got, terms in zip(("mean", "var"), *running, (spread, running[0][1]), strict=True):
        errors[name] = ulps(got, expected.astype(np.longdouble), terms)
    assert max(errors.values()) <= ULPS["parts"][dtype], errors


@settings(max_examples=50)
@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=8),
    offset=st.sampled_from([0.0, -7.0, 1e6]),
    seed=st.integers(0, 2**32 - 1),
)
def test_merging(sizes, offset, seed):
    rng = np.random.default_rng(seed)
    batches = [rng.standard_normal((size, 3)) + offset for size in sizes]
    merged = bn.Moments.of(batches[0])
    for batch in batches[1:]:
        merged += bn.Moments.of(batch)
    whole = np.concatenate(batches)
    assert merged.count == len(whole)
    if len(whole):
        mean, m2 = exact(whole)
        error = (merged.mean.astype(np.longdouble) + merged.mean_low) - mean
        assert abs(error).max() <= 4 * np.spacing(1 + float(abs(whole - whole[0]).max()))
        np.testing.assert_allclose(merged.m2, m2.astype(float), rtol=1e-13, atol=1e-30)
        np.testing.assert_allclose(merged.std(), whole.std(axis=0), rtol=1e-12, atol=1e-9 * abs(offset) * 1e-3)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "bool", "float32", ">f8"])
@pytest.mark.parametrize("shape", [(50,), (50, 3), (5, 3, 7), ()], ids=str)
def test_what_numpy_takes_the_mean_of(shape, dtype, rng):
    """Integers as float64, 1-D data as one channel, a number as one value; in the stream of a data set too."""
    x = rng.integers(0, 2 if dtype == "bool" else 200, shape).astype(dtype)
    axes = tuple(i for i in range(max(x.ndim, 1)) if i != 1)
    numbers = np.atleast_1d(x).astype(float)
    for moments in (bn.Moments.of(x), bn.population([x] if x.ndim < 2 else [x[:2], x[2:]])):
        np.testing.assert_allclose(moments.mean, np.atleast_1d(numbers.mean(axis=axes)), rtol=1e-14)
        np.testing.assert_allclose(moments.var(), np.atleast_1d(numbers.var(axis=axes)), rtol=1e-13)
        assert moments.count == numbers.size // (x.shape[1] if x.ndim > 1 else 1)


def test_one_dimension_is_a_column():
    x = np.arange(4.0)
    assert bn.Moments.of(x) == bn.Moments.of(list(x)) == bn.Moments.of(x, -1) == bn.Moments.of(x[:, None])
    assert bn.Moments.of(x, 0) == bn.Moments.of(x[:, None], 0)
    assert bn.population([x[:1], x[1:]]) == bn.population([x])


def test_sum_adds_up(rng):
    """From the 0 with which it begins."""
    x, dy = rng.standard_normal((2, 9, 3))
    assert sum(bn.Moments.of(part) for part in np.split(x, 3)) == (
        bn.Moments.of(x[:3]) + bn.Moments.of(x[3:6]) + bn.Moments.of(x[6:])
    )
    _, saved = bn.forward(x)
    one = bn.grad_sums(dy, saved)
    np.testing.assert_array_equal(sum([one, one]).sum_dy, 2 * one.sum_dy)
    assert sum([one]) is one


def numeric_gradient(loss, x, step=1e-3):
    """By the five-point rule, which leaves O(step⁴)."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        values = []
        for k in (-2, -1, 1, 2):
            moved = x.copy()
            moved[index] += k * step
            values.append(loss(moved))
        gradient[index] = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)
    return gradient


def textbook(x, mean, var, gamma, beta):
    return gamma * (x - mean) / np.sqrt(var + 1e-5) + beta


def test_statistics_of_some_samples(rng):
    """y and the gradient, which goes through the statistics only for the samples that they are of."""
    x, dy = rng.standard_normal((2, 7, 3)) + np.array([2.0, 0.0]).reshape(2, 1, 1)
    gamma, beta = rng.standard_normal((2, 3))
    mask = np.array([1, 0, 1, 1, 0, 0, 1], bool)

    def loss(x, gamma, beta):
        return (textbook(x, x[mask].mean(axis=0), x[mask].var(axis=0), gamma, beta) * dy).sum()

    y, saved = bn.forward(x, gamma, beta, moments=bn.Moments.of(x[mask]))
    np.testing.assert_allclose(y, textbook(x, x[mask].mean(axis=0), x[mask].var(axis=0), gamma, beta), atol=1e-14)
    assert saved.count == 4
    gradients = bn.backward(dy, saved)
    dx = np.where(mask[:, None], gradients.dx, bn.backward(dy, saved, through=()).dx)
    np.testing.assert_allclose(dx, numeric_gradient(lambda x: loss(x, gamma, beta), x), atol=1e-9)
    np.testing.assert_allclose(gradients.dgamma, numeric_gradient(lambda g: loss(x, g, beta), gamma), atol=1e-9)
    np.testing.assert_allclose(gradients.dbeta, numeric_gradient(lambda b: loss(x, gamma, b), beta), atol=1e-9)
    in_steps = bn.backward(dy, saved, sums=bn.grad_sums(dy, saved))
    assert in_steps.dx.tobytes() == gradients.dx.tobytes()


def test_statistics_of_some_samples_of_every_part(rng):
    """Parts with masks of their own: the sums are over all samples, the statistics over fewer."""
    x, dy = rng.standard_normal((2, 8, 3)) + np.array([2.0, 0.0]).reshape(2, 1, 1)
    mask = np.array([1, 0, 1, 1, 0, 0, 1, 0], bool)
    whole = bn.forward(x, moments=bn.Moments.of(x[mask]))[1]
    expected = bn.backward(dy, whole).dx
    moments = bn.Moments.of(x[:5][mask[:5]]) + bn.Moments.of(x[5:][mask[5:]])
    saved = [bn.forward(part, moments=moments)[1] for part in (x[:5], x[5:])]
    sums = bn.grad_sums(dy[:5], saved[0]) + bn.grad_sums(dy[5:], saved[1])
    dx = [bn.backward(part, s, sums=sums).dx for part, s in zip((dy[:5], dy[5:]), saved, strict=True)]
    np.testing.assert_allclose(np.concatenate(dx), expected, rtol=1e-12, atol=1e-14)


def test_statistics_of_other_data(rng):
    """x has no share in them, so only the direct path is left; their own gradients are those of fixed statistics."""
    x, other, dy = rng.standard_normal((5, 3)), rng.standard_normal((2, 3)), rng.standard_normal((5, 3))
    gamma, beta = rng.standard_normal((2, 3))
    y, saved = bn.forward(x, gamma, beta, moments=bn.Moments.of(other))
    np.testing.assert_allclose(y, bn.inference(x, other.mean(axis=0), other.var(axis=0), gamma, beta), atol=1e-14)
    fixed = bn.inference_backward(dy, x, other.mean(axis=0), other.var(axis=0), gamma)
    for got, expected in zip(bn.backward(dy, saved, through=()), fixed, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-13)


def test_an_empty_side_changes_nothing(rng):
    full = bn.Moments.of(rng.standard_normal((9, 4)) + 1e5)
    empty = bn.Moments.of(np.empty((0, 4)))
    assert empty.count == 0
    assert empty + full == full + empty == full
    assert (empty + empty).count == 0
    assert not empty.var().any()


@pytest.mark.once
def test_a_hundred_thousand_merges(rng):
    """Against math.fsum, to 1e-14."""
    values = rng.standard_normal((200_000, 2)) * 3 + 50
    merged = bn.Moments(0, np.zeros(2), np.zeros(2))
    for i in range(0, len(values), 2):
        a, b = values[i], values[i + 1]
        merged += bn.Moments(2, (a + b) / 2, (a - b) ** 2 / 2)
    for c in range(2):
        mean = math.fsum(values[:, c]) / len(values)
        m2 = math.fsum((values[:, c] - mean) ** 2)
        assert abs(merged.mean[c] / mean - 1) < 1e-14
        assert abs(merged.m2[c] / m2 - 1) < 1e-14


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3000, 5), (700, 3, 6, 7), (40, 2, 90, 90)], ids=str)
def test_population_does_not_see_the_batches(shape, dtype, rng, monkeypatch):
    monkeypatch.setattr("batchnorm.moments.BLOCK_VALUES", 1 << 14)
    x = (rng.standard_normal(shape) + 4).astype(dtype)
    whole = bn.population([x])
    for cut in (1, 7, 64, 1000):
        assert bn.population(x[i : i + cut] for i in range(0, len(x), cut)) == whole
    assert bn.population(parts(np.asfortranarray(x), [1, 1, 5, 17])) == whole
    mean, m2 = exact(x)
    np.testing.assert_allclose(whole.mean, mean.astype(float), rtol=1e-15 if dtype == "float64" else 1e-8)
    np.testing.assert_allclose(whole.m2, m2.astype(float), rtol=1e-14 if dtype == "float64" else 1e-7)


def test_population_on_other_axes_and_of_mixed_sizes(rng):
    x = rng.standard_normal((6, 500)) + 1
    assert bn.population([x[:, :3], x[:, 3:]], axis=0) == bn.population([x], axis=0)
    images = [rng.standard_normal((4, 3, size, size)) for size in (5, 8, 5)]
    together = np.concatenate([image.transpose(0, 2, 3, 1).reshape(-1, 3) for image in images])
    mean, m2 = exact(together)
    got = bn.population(images)
    np.testing.assert_allclose(got.mean, mean.astype(float), rtol=0, atol=1e-15)
    np.testing.assert_allclose(got.m2, m2.astype(float), rtol=1e-14)
    last = bn.population([image.transpose(0, 2, 3, 1) for image in images], axis=-1)
    np.testing.assert_allclose(last.m2, m2.astype(float), rtol=1e-14)


@pytest.mark.once
@pytest.mark.slow
def test_population_needs_the_memory_of_one_chunk(level):
    """Ten million rows that are never there at once."""

    def chunks():
        rng = np.random.default_rng(1)
        for _ in range(1000):
            yield rng.standard_normal((10_000, 4), dtype=np.float32)

    tracemalloc.start()
    try:
        moments = bn.population(chunks())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert moments.count == 10_000_000
    np.testing.assert_allclose(moments.var(), 1, rtol=2e-3)
    assert peak < 8 * 2**20


@pytest.mark.once
def test_a_progress_bar_on_a_terminal_alone(rng, monkeypatch, capsys):
    """Where there is a length, too; and the result is the same with it."""
    x = rng.standard_normal((40, 3))
    quiet = bn.population([x, x])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert bn.population([x, x]) == quiet
    assert "population" in capsys.readouterr().err
    assert bn.population(batch for batch in (x, x)) == quiet
    assert bn.population([x, x], progress=False) == quiet
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert bn.population([x, x]) == quiet
    assert capsys.readouterr().err == ""


@pytest.mark.once
def test_recalibrate(rng):
    layer = bn.BatchNorm(3, axis=-1, dtype=np.float64)
    x = rng.standard_normal((90, 4, 3)) * 2 + 5
    layer.recalibrate(x[i : i + 20] for i in range(0, 90, 20))
    np.testing.assert_allclose(layer.running_mean, x.mean(axis=(0, 1)), rtol=1e-14)
    np.testing.assert_allclose(layer.running_var, x.var(axis=(0, 1), ddof=1), rtol=1e-14)
    assert layer.num_batches_tracked == 0
    before = layer.state_dict()
    for bad in ([x[..., :2]], [], [x[:1, :1]], [x, x.astype(complex)]):
        with pytest.raises((TypeError, ValueError)):
            layer.recalibrate(bad)
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    with pytest.raises(RuntimeError, match="recalibrate needs a layer with running statistics"):
        bn.BatchNorm(3, track_running_stats=False).recalibrate([x])


@pytest.mark.once
def test_to_and_from_bytes(rng):
    moments = bn.Moments.of(rng.standard_normal((9, 4)) + 1e5)
    data = moments.to_bytes()
    assert len(data) == 8 * (1 + 3 * 4)
    flat = np.frombuffer(data)
    np.testing.assert_array_equal(flat, [9, *moments.mean, *moments.mean_low, *moments.m2])
    assert bn.Moments.from_bytes(data) == bn.Moments.from_bytes(flat) == pickle.loads(pickle.dumps(moments)) == moments
    assert bn.Moments.from_bytes(bn.Moments.of(np.ones((2, 0))).to_bytes()).mean.shape == (0,)


@pytest.mark.once
def test_moments_cannot_be_changed(rng):
    moments = bn.Moments.of(rng.standard_normal((9, 4)))
    before = moments.to_bytes()
    for name in ("count", "mean", "m2", "anything"):
        with pytest.raises(AttributeError):
            setattr(moments, name, 1)
    for array in (moments.mean, moments.m2, moments.mean_low):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    moments + moments
    assert moments.to_bytes() == before


def test_nan_stays_in_its_channel(rng):
    x = rng.standard_normal((9, 3))
    clean = bn.Moments.of(x) + bn.Moments.of(x)
    x[2, 1] = np.inf
    merged = bn.Moments.of(x) + bn.Moments.of(x)
    assert np.isnan(merged.m2[1])
    np.testing.assert_array_equal(merged.m2[[0, 2]], clean.m2[[0, 2]])


X = np.arange(24.0).reshape(8, 3)
SAVED = bn.forward(X)[1]
OF = bn.Moments.of(X)
SUMS = bn.grad_sums(X, SAVED)
MASKED = bn.forward(X[:4], moments=bn.Moments.of(X[:2]))[1]
BAD = {
    "count negative": (lambda: bn.Moments(-1, [0.0], [0.0]), ValueError, "count must be at least 0, got -1"),
    "count a float": (lambda: bn.Moments(1.0, [0.0], [0.0]), TypeError, "count must be an integer, got float"),
    "mean 2-d": (lambda: bn.Moments(1, [[0.0]], [0.0]), ValueError, r"mean must have shape \(C,\), got \(1, 1\)"),
    "m2 too long": (lambda: bn.Moments(1, [0.0], [0.0, 1.0]), ValueError, r"m2 must have shape \(1,\), got \(2,\)"),
    "m2 negative": (lambda: bn.Moments(1, [0.0], [-1.0]), ValueError, "m2 must not be negative, got -1.0"),
    "of text": (
        lambda: bn.Moments.of(["1"]),
        TypeError,
        "x must have dtype float64, float32, float16 or bfloat16, got <U1",
    ),
    "sum with a start": (lambda: sum([OF], 1), TypeError, "unsupported operand"),
    "ddof too large": (lambda: OF.var(8), ValueError, "ddof must be at least 0 and less than count = 8, got 8"),
    "merge with a number": (lambda: OF.merge(1), TypeError, "other must be Moments, got int"),
    "merge of other channels": (
        lambda: OF + bn.Moments.of(X[:, :2]),
        ValueError,
        "other must have 3 channels, got 2",
    ),
    "bytes of a wrong length": (
        lambda: bn.Moments.from_bytes(bytes(16)),
        ValueError,
        "data must hold a count and three",
    ),
    "bytes with half a value": (
        lambda: bn.Moments.from_bytes(np.full(4, 0.5)),
        ValueError,
        "data must begin with a whole number, the count, got 0.5",
    ),
    "bytes with an infinite count": (
        lambda: bn.Moments.from_bytes(np.full(4, np.inf)),
        ValueError,
        "data must begin with a whole number, the count, got inf",
    ),
    "bytes with a negative count": (
        lambda: bn.Moments.from_bytes(np.full(4, -1.0)),
        ValueError,
        "count must be at least 0, got -1",
    ),
    "forward, no moments": (lambda: bn.forward(X, moments=3), TypeError, "moments must be Moments, got int"),
    "forward, other channels": (
        lambda: bn.forward(X, moments=bn.Moments.of(X[:, :2])),
        ValueError,
        "moments must have 3 channels, got 2",
    ),
    "forward, of nothing": (
        lambda: bn.forward(X, moments=bn.Moments.of(X[:0])),
        ValueError,
        "moments must cover at least one value, got count = 0",
    ),
    "backward, no sums": (lambda: bn.backward(X, SAVED, sums=3), TypeError, "sums must be GradientSums, got int"),
    "backward, other channels": (
        lambda: bn.backward(X, SAVED, sums=bn.grad_sums(X[:, :2], bn.forward(X[:, :2])[1])),
        ValueError,
        "sums must have 3 channels, got 2",
    ),
    "backward, sums of a part": (
        lambda: bn.backward(X, SAVED, sums=bn.grad_sums(X[:4], bn.forward(X[:4])[1])),
        ValueError,
        "sums must cover all values that were normalized, at least 8, got 4",
    ),
    "backward, sums of a part with a mask": (
        lambda: bn.backward(X, bn.forward(X, moments=bn.Moments.of(X[:2]))[1], sums=bn.grad_sums(X[:4], MASKED)),
        ValueError,
        "sums must cover all values that were normalized, at least 8, got 4",
    ),
    "sums with a number": (lambda: SUMS.merge(1), TypeError, "other must be GradientSums, got int"),
    "grad_sums, saved": (lambda: bn.grad_sums(X, X), TypeError, "saved must be what forward returned, got ndarray"),
    "population of nothing": (lambda: bn.population([]), ValueError, "batches must hold at least one batch, got none"),
    "population of an array": (
        lambda: bn.population(np.ones((8, 3, 4))),
        TypeError,
        r"batches must be an iterable of batches, got one array of shape \(8, 3, 4\); pass \[x\]",
    ),
    "population of other channels": (
        lambda: bn.population([X, X[:, :2]]),
        ValueError,
        "a batch must have 3 channels along axis 1, got 2",
    ),
    "population of text": (lambda: bn.population([["1"]]), TypeError, "a batch must have dtype float64, float32"),
}


@pytest.mark.once
@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.once
def test_representations():
    assert repr(bn.Moments(2, [1.0], [8.0])) == "Moments(count=2, mean=[1.], var=[4.])"
    assert repr(bn.GradientSums(2, [1.0], [8.0])) == "GradientSums(count=2, sum_dy=[1.], sum_dy_xmu=[8.])"
