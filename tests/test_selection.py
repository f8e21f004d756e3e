"""Masks, lengths and weights: the batch without what does not count, by the oracle, whatever lies there."""

import doctest
import pickle
from pathlib import Path

import numpy as np
import pytest
from oracle import ULPS, assert_close, errors_by_name, gradient_errors, mean_error, truth, ulps
from shapes import ARRANGEMENTS, VIEWS

import batchnorm as bn

DTYPES = ["float32", "float64"]
FILL = 7.5

dtypes = pytest.mark.parametrize("dtype", DTYPES)
views = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)


def lengths_of(rng, places):
    """Also an empty sequence, a full one and those of one place."""
    lengths = rng.integers(0, places[1] + 1, places[0])
    lengths[:3] = [places[1], 0, 1][: places[0]]
    return rng.permutation(lengths)


# What selects, and the mask that it means.
SELECTS = {
    "mask": lambda rng, places: {"mask": rng.random(places) < 0.6},
    "sparse mask": lambda rng, places: {"mask": rng.random(places) < 0.03},
    "mask of rows": lambda rng, places: {"mask": rng.random((places[0], 1)) < 0.5},
    "mask of columns": lambda rng, places: {"mask": rng.random((1, places[1])) < 0.5},
    "lengths": lambda rng, places: {"lengths": lengths_of(rng, places)},
}
selecting = pytest.mark.parametrize("select", SELECTS.values(), ids=SELECTS)


def as_mask(selects, places):
    if "lengths" in selects:
        return np.arange(places[1]) < selects["lengths"][:, None]
    return np.broadcast_to(selects["mask"], places)


def batch(rng, view, dtype, offset=0.0):
    x, dy = ((rng.standard_normal(view) + mean).astype(dtype) for mean in (offset, 0.2))
    gamma, beta = (rng.uniform(0.5, 2, view[1]).astype(dtype) for _ in range(2))
    return x, dy, gamma, beta


def spoiled(array, mask):
    """With values that must not be looked at where the mask is False; channels on axis 1."""
    hidden = np.broadcast_to(~mask[:, None], array.shape)
    array = array.copy()
    values = np.array([np.nan, np.inf, -np.inf, np.finfo(array.dtype).max], array.dtype)
    array[hidden] = np.resize(values, np.count_nonzero(hidden))
    return array


def compacted(array, mask):
    """(n, C), the values that count."""
    return np.moveaxis(array, 1, -1)[mask]


def assert_right(x, dy, gamma, beta, mask, y, saved, gradients):
    """Everything, against the oracle on what counts; and what does not count is filled."""
    t = truth(*(compacted(a, mask) for a in (x, dy)), gamma, beta)
    found = bn.Gradients(compacted(gradients.dx, mask), gradients.dgamma, gradients.dbeta)
    assert_close(errors_by_name(compacted(y, mask), saved, found, t, 1), x.dtype)
    assert (compacted(y, ~mask) == FILL).all()
    assert (compacted(gradients.dx, ~mask) == 0).all()
    assert saved.count == np.count_nonzero(mask)


@dtypes
@views
@selecting
def test_what_does_not_count_is_as_if_absent(view, dtype, select, rng, always_threaded):
    places = view[0], view[2]
    x, dy, gamma, beta = batch(rng, view, dtype, 3.0)
    selects = select(rng, places)
    mask = as_mask(selects, places)
    hidden_x, hidden_dy = spoiled(x, mask), spoiled(dy, mask)
    results = []
    for threads in (1, 2, 3):
        y, saved = bn.forward(hidden_x, gamma, beta, fill=FILL, num_threads=threads, **selects)
        gradients = bn.backward(hidden_dy, saved, num_threads=threads)
        results.append([a.tobytes() for a in (y, *gradients, saved.mean, saved.var)])
    assert results[0] == results[1] == results[2]
    if mask.any():
        assert_right(x, dy, gamma, beta, mask, y, saved, gradients)
    else:
        assert (y == FILL).all()
        assert not any(a.any() for a in (*gradients, saved.mean, saved.var))


@pytest.mark.parametrize("arranged", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
@pytest.mark.parametrize("axis", [0, 1, 2])
@selecting
def test_arrangements_and_axes(arranged, axis, select, rng):
    places = 9, 21
    selects = select(rng, places)
    mask = as_mask(selects, places)
    x, dy, gamma, beta = batch(rng, (9, 33, 21), "float32")
    given, given_dy = (arranged(np.moveaxis(spoiled(a, mask), 1, axis)) for a in (x, dy))
    y, saved = bn.forward(given, gamma, beta, axis=axis, fill=FILL, **selects)
    dx, dgamma, dbeta = bn.backward(given_dy, saved)
    found = bn.Gradients(np.moveaxis(dx, axis, 1), dgamma, dbeta)
    assert_right(x, dy, gamma, beta, mask, np.moveaxis(y, axis, 1), saved, found)


@pytest.mark.parametrize("shape", [(6, 5, 7, 8), (6, 5, 3, 4, 2), (50, 4)])
@pytest.mark.parametrize("with_axis", [False, True])
def test_shapes_of_masks(shape, with_axis, rng):
    """With 1 at the channel axis or without it; lists too, and 1 in place of other lengths."""
    x, dy, gamma, beta = batch(rng, shape, "float64")
    others = shape[:1] + shape[2:]
    for lengths in (others, (others[0], *[1] * (len(others) - 1)), (1, *others[1:])):
        mask = rng.random(lengths) < 0.6
        full = np.broadcast_to(mask, others)
        given = mask[:, None] if with_axis else mask.tolist()
        y, saved = bn.forward(x, gamma, beta, mask=given, fill=FILL)
        if full.any():
            assert_right(x, dy, gamma, beta, full, y, saved, bn.backward(dy, saved))


@dtypes
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("view", [(40, 7, 1), (24, 5, 9), (12, 3, 300), (2, 3, 9001)], ids=str)
@selecting
def test_offsets(view, select, offset, dtype, rng):
    places = view[0], view[2]
    x, dy, gamma, beta = batch(rng, view, dtype, offset)
    selects = select(rng, places)
    mask = as_mask(selects, places)
    if mask.any():
        y, saved = bn.forward(spoiled(x, mask), gamma, beta, fill=FILL, **selects)
        assert_right(x, dy, gamma, beta, mask, y, saved, bn.backward(spoiled(dy, mask), saved))


@dtypes
@pytest.mark.parametrize("view", [(400, 7, 1), (64, 5, 9), (12, 3, 300)], ids=str)
@pytest.mark.parametrize("scale", [1e30, 1e-30])
@selecting
def test_sums_that_cannot_be_trusted(view, select, scale, dtype, rng):
    """Too large, too small, and with an outlier where it is first looked for the mean."""
    places = view[0], view[2]
    x, dy, gamma, beta = batch(rng, view, dtype)
    x, eps = (x * scale).astype(dtype), 0.0
    selects = select(rng, places)
    mask = as_mask(selects, places)
    if np.count_nonzero(mask) < 20:
        return
    n, _, s = np.argwhere(np.broadcast_to(mask[:, None], view))[0]
    x[n, :, s] *= 1e5
    y, saved = bn.forward(spoiled(x, mask), gamma, beta, eps=eps, **selects)
    found = bn.backward(spoiled(dy, mask), saved)
    t = truth(compacted(x, mask), compacted(dy, mask), gamma, beta, eps=eps)
    assert ulps(compacted(y, mask), t.y, t.y_terms) <= ULPS["y"][dtype]
    gradients = bn.Gradients(compacted(found.dx, mask), found.dgamma, found.dbeta)
    assert_close(gradient_errors(gradients, t, t, 1), dtype)


@dtypes
@views
def test_equal_values_have_no_spread(view, dtype, rng):
    x = np.full(view, 0.1, dtype)
    mask = rng.random((view[0], view[2])) < 0.7
    beta = rng.standard_normal(view[1]).astype(dtype)
    y, saved = bn.forward(spoiled(x, mask), None, beta, mask=mask)
    assert not saved.var.any()
    assert (compacted(y, mask) == beta).all()


@dtypes
@views
def test_all_that_counts_is_no_selection(view, dtype, rng):
    """The same bits as without."""
    x, dy, gamma, beta = batch(rng, view, dtype)
    y, saved = bn.forward(x, gamma, beta)
    expected = [a.tobytes() for a in (y, *bn.backward(dy, saved))]
    places = view[0], view[2]
    for selects in ({"mask": np.ones(places, bool)}, {"lengths": np.full(view[0], view[2])}):
        y, saved = bn.forward(x, gamma, beta, **selects)
        assert [a.tobytes() for a in (y, *bn.backward(dy, saved))] == expected


# ---- Weights


def weights_of(rng, places, kind):
    if kind == "equal":
        return np.full(places, 0.3)
    weights = rng.exponential(size=places)
    if kind == "some 0":
        weights[rng.random(places) < 0.4] = 0
    return np.ldexp(weights, 200) if kind == "large" else weights


@dtypes
@views
@pytest.mark.parametrize("kind", ["equal", "any", "some 0", "large"])
def test_weights(view, dtype, kind, rng, always_threaded):
    """They belong to the statistics, and to the share that a value has in them; not to dgamma and dbeta."""
    places = view[0], view[2]
    x, dy, gamma, beta = batch(rng, view, dtype, 3.0)
    weights = weights_of(rng, places, kind)
    if not weights.any():
        return
    results = []
    for threads in (1, 2):
        y, saved = bn.forward(x, gamma, beta, weights=weights, num_threads=threads)
        gradients = bn.backward(dy, saved, num_threads=threads)
        results.append([a.tobytes() for a in (y, *gradients)])
    assert results[0] == results[1]
    t = truth(x, dy, gamma, beta, weights=weights)
    assert_close(errors_by_name(y, saved, gradients, t, 1), x.dtype)
    assert saved.count == np.count_nonzero(weights)


@dtypes
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_weights_of_samples_and_axes(axis, dtype, rng):
    x, dy, gamma, beta = batch(rng, (6, 5, 7, 8), dtype)
    weights = rng.random((6, 1, 1))
    t = truth(x, dy, gamma, beta, weights=np.broadcast_to(weights, (6, 7, 8)))
    given, given_dy = (np.moveaxis(a, 1, axis) for a in (x, dy))
    y, saved = bn.forward(given, gamma, beta, axis=axis, weights=weights)
    dx, dgamma, dbeta = bn.backward(given_dy, saved)
    found = bn.Gradients(np.moveaxis(dx, axis, 1), dgamma, dbeta)
    assert_close(errors_by_name(np.moveaxis(y, axis, 1), saved, found, t, 1), dtype)


@dtypes
@pytest.mark.parametrize("view", [(40, 7, 1), (12, 3, 300)], ids=str)
def test_powers_of_two_in_weights_change_no_bit(view, dtype, rng):
    x, dy, gamma, beta = batch(rng, view, dtype)
    weights = rng.random((view[0], view[2]))
    results = []
    for power in (0, 1, -300, 300):
        y, saved = bn.forward(x, gamma, beta, weights=np.ldexp(weights, power))
        results.append([a.tobytes() for a in (y, *bn.backward(dy, saved), saved.mean, saved.var)])
    assert results == results[:1] * 4


@dtypes
def test_weights_0_and_1_are_the_statistics_of_a_mask(dtype, rng):
    x, dy, gamma, beta = batch(rng, (24, 5, 9), dtype)
    mask = rng.random((24, 9)) < 0.6
    (_, masked), (y, saved) = bn.forward(x, mask=mask), bn.forward(x, gamma, beta, weights=mask.astype(int))
    np.testing.assert_allclose(saved.mean, masked.mean, rtol=1e-6)
    np.testing.assert_allclose(saved.var, masked.var, rtol=1e-6)
    t = truth(x, dy, gamma, beta, weights=mask)
    assert_close(errors_by_name(y, saved, bn.backward(dy, saved), t, 1), dtype)
    direct = bn.backward(dy, saved, through=()).dx
    assert np.array_equal(compacted(bn.backward(dy, saved).dx, ~mask), compacted(direct, ~mask))


@dtypes
def test_upstream_gradients_of_weighted_statistics(dtype, rng):
    """(w/W)·(dmean + 2·dvar·(x − μ)) more in dx; through the mean alone; x is not looked at where nothing needs it."""
    x, dy, *_ = batch(rng, (30, 5, 4), dtype)
    weights = rng.random((30, 4))
    dmean, dvar = rng.standard_normal((2, 5))
    _, saved = bn.forward(x, weights=weights)
    t = truth(x, dy, weights=weights)
    share = (weights / weights.sum())[:, None]
    got = bn.backward(np.zeros_like(x), saved, dmean=dmean, dvar=dvar).dx
    expected = share * (dmean[:, None] + 2 * dvar[:, None] * t.xmu)
    assert ulps(got, expected, np.maximum(abs(expected), share)) <= ULPS["dx"][dtype]
    through_mean = bn.backward(dy, saved, through="mean").dx
    assert ulps(through_mean, t.paths["direct"] + t.paths["mean"], t.dx_terms, 1) <= ULPS["dx"][dtype]


@dtypes
@pytest.mark.parametrize("view", [(40, 7, 1), (2, 4, 5), (12, 3, 300)], ids=str)
def test_one_value_with_a_weight_has_no_spread(view, dtype, rng):
    for _ in range(50):
        x, _, gamma, beta = batch(rng, view, dtype)
        x *= x.dtype.type(1000)
        weights = np.zeros((view[0], view[2]))
        n, s = rng.integers(view[0]), rng.integers(view[2])
        weights[n, s] = rng.random()
        y, saved = bn.forward(x, gamma, beta, eps=1e-12, weights=weights)
        assert not saved.var.any()
        assert np.array_equal(saved.mean, x[n, :, s])
        assert np.array_equal(y[n, :, s], beta)


@dtypes
def test_weights_of_very_different_size(dtype, rng):
    """The mean is as exact if the first block has little weight as if the last one has."""
    for heavy in (0.5, 20.0, 1000.0):
        x, dy, gamma, beta = batch(rng, (292, 5, 1), dtype)
        weights = np.zeros((292, 1))
        for light, other in ((92, 285), (285, 92)):
            weights[light], weights[other] = 0.045, heavy
            _, saved = bn.forward(x, gamma, beta, weights=weights)
            t = truth(x, dy, gamma, beta, weights=weights)
            assert mean_error(saved, t, x.dtype) <= ULPS["mean"][dtype]


def test_a_weight_of_0_far_from_the_mean(rng):
    """Its part in the paths is 0, also where they would overflow."""
    x, dy = rng.standard_normal((2, 40, 5)).astype(np.float32)
    x *= 1e15
    weights = np.zeros(40)
    weights[3] = 1
    _, saved = bn.forward(x, weights=weights)
    dx = bn.backward(dy, saved).dx
    assert np.isfinite(dx).all()
    assert np.array_equal(np.delete(dx, 3, 0), np.delete(bn.backward(dy, saved, through=()).dx, 3, 0))


# ---- Statistics that add up


@dtypes
@selecting
@pytest.mark.parametrize("view", [(24, 5, 9), (40, 3, 300), (400, 20, 1)], ids=str)
def test_steps_are_the_fused_call(view, select, dtype, rng):
    places = view[0], view[2]
    x, dy, gamma, beta = batch(rng, view, dtype)
    selects = select(rng, places)
    mask = as_mask(selects, places)
    if not mask.any():
        return
    x, dy = spoiled(x, mask), spoiled(dy, mask)
    y, saved = bn.forward(x, gamma, beta, **selects)
    moments = bn.Moments.of(x, **selects)
    again, in_steps = bn.forward(x, gamma, beta, moments=moments, **selects)
    assert again.tobytes() == y.tobytes()
    sums = bn.grad_sums(dy, in_steps)
    assert sums.count == moments.count == np.count_nonzero(mask)
    for how in ({}, {"through": "mean"}, {"dmean": gamma, "dvar": beta}, {"need": ("dgamma", "dbeta")}):
        whole, split = bn.backward(dy, saved, **how), bn.backward(dy, in_steps, sums=sums, **how)
        for got, expected in zip(split, whole, strict=True):
            assert got is None if expected is None else got.tobytes() == expected.tobytes()


@dtypes
@pytest.mark.parametrize("cuts", [(3,), (1, 2, 3), (0, 0, 5), (12,)], ids=str)
def test_weighted_parts_are_the_whole(cuts, dtype, rng):
    x, dy, gamma, beta = batch(rng, (12, 5, 9), dtype, 100.0)
    weights = rng.random((12, 9))
    weights[0] = 0
    split = [np.split(a, cuts) for a in (x, dy, weights)]
    moments = sum(bn.Moments.of(part, weights=w) for part, _, w in zip(*split, strict=True))
    done = [bn.forward(part, gamma, beta, moments=moments, weights=w) for part, _, w in zip(*split, strict=True)]
    sums = sum(bn.grad_sums(part, saved) for (_, saved), part in zip(done, split[1], strict=True))
    gradients = [bn.backward(part, saved, sums=sums) for (_, saved), part in zip(done, split[1], strict=True)]
    t = truth(x, dy, gamma, beta, weights=weights)
    found = bn.Gradients(np.concatenate([g.dx for g in gradients]), gradients[0].dgamma, gradients[0].dbeta)
    assert_close(errors_by_name(np.concatenate([y for y, _ in done]), done[0][1], found, t, 1), dtype)


def test_weighted_moments(rng):
    x, weights = rng.standard_normal((50, 3)), rng.random(50)
    moments = bn.Moments.of(x, weights=weights)
    assert moments.count == 50
    np.testing.assert_allclose([moments.weight, moments.weight_squares], [weights.sum(), (weights**2).sum()], 1e-15)
    np.testing.assert_allclose(moments.var(ddof=1), np.cov(x, rowvar=False, aweights=weights).diagonal(), 1e-12)
    assert bn.Moments.from_bytes(moments.to_bytes()) == moments == pickle.loads(pickle.dumps(moments))
    assert len(moments.to_bytes()) == 8 * (3 + 3 * 3)
    assert bn.Moments.of(x, weights=10 * weights) != moments
    parts = bn.Moments.of(x[:20], weights=weights[:20]) + bn.Moments.of(x[20:], weights=weights[20:])
    np.testing.assert_allclose(parts.m2, moments.m2, 1e-12)
    assert bn.Moments.of(x[:, 0], weights=weights).mean.tolist() == pytest.approx(moments.mean[:1].tolist())
    nothing = bn.Moments.of(x, weights=0 * weights)
    assert (nothing.count, nothing.weight) == (0, 0)
    assert nothing + moments == moments == moments + nothing


@pytest.mark.parametrize("name", ["mask", "lengths", "weights"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_population_does_not_depend_on_the_cuts(name, axis, rng, monkeypatch):
    monkeypatch.setattr("batchnorm.moments.BLOCK_VALUES", 500)
    x = rng.standard_normal((40, 3, 7))
    chosen = {
        "mask": rng.random((40, 7)) < 0.5,
        "lengths": rng.integers(0, 8, 40),
        "weights": rng.random((40, 7)),
    }[name]
    found = []
    for cuts in ([], [1], [3, 3, 20], list(range(1, 40))):
        batches = [np.moveaxis(part, 1, axis) for part in np.split(x, cuts)]
        found.append(bn.population(batches, axis, **{name: np.split(chosen, cuts)}))
    assert all(moments == found[0] for moments in found)
    places = np.arange(7) < chosen[:, None] if name == "lengths" else chosen
    t = truth(x, x, weights=places.astype(float))
    np.testing.assert_allclose(found[0].mean, t.mean.astype(float), rtol=1e-12)
    np.testing.assert_allclose(found[0].var(), t.var.astype(float), rtol=1e-12)


# ---- Fixed statistics, activations, 16 bits


@dtypes
@views
@selecting
def test_inference(view, dtype, select, rng, always_threaded):
    places = view[0], view[2]
    x, dy, gamma, beta = batch(rng, view, dtype)
    mean, var = rng.standard_normal(view[1]), rng.uniform(0.5, 2, view[1])
    selects = select(rng, places)
    mask = as_mask(selects, places)
    plain = bn.inference(x, mean, var, gamma, beta)
    y = bn.inference(spoiled(x, mask), mean, var, gamma, beta, fill=FILL, **selects)
    assert np.array_equal(y, np.where(mask[:, None], plain, plain.dtype.type(FILL)))
    in_place = spoiled(x, mask)
    assert np.array_equal(bn.inference(in_place, mean, var, gamma, beta, fill=FILL, out=in_place, **selects), y)
    need = ("dx", "dgamma", "dbeta", "dmean", "dvar")
    found = bn.inference_backward(spoiled(dy, mask), spoiled(x, mask), mean, var, gamma, need=need, **selects)
    direct = bn.inference_backward(dy, x, mean, var, gamma).dx
    assert np.array_equal(found.dx, np.where(mask[:, None], direct, 0))
    dbeta = np.where(mask[:, None], dy, 0).sum(axis=(0, 2), dtype=float)
    np.testing.assert_allclose(found.dbeta, dbeta, rtol=1e-5, atol=1e-5)


@dtypes
@views
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("name", ["mask", "lengths", "weights"])
def test_activations(view, dtype, added, name, rng, always_threaded):
    """One call gives the bits of two; the gradient of `add` is 0 where nothing counts."""
    places = view[0], view[2]
    x, dy, gamma, beta = batch(rng, view, dtype)
    selects = {"weights": rng.random(places)} if name == "weights" else SELECTS[name](rng, places)
    mask = np.ones(places, bool) if name == "weights" else as_mask(selects, places)
    counts = mask[:, None]
    add = rng.standard_normal(view).astype(dtype) if added else None
    plain, saved_plain = bn.forward(x, gamma, beta, **selects)
    pre = plain + add if added else plain
    expected = np.where(counts, np.maximum(pre, 0), plain.dtype.type(FILL))
    given = spoiled(x, mask), None if add is None else spoiled(add, mask)
    y, saved = bn.forward(given[0], gamma, beta, activation="relu", add=given[1], fill=FILL, **selects)
    assert np.array_equal(y, expected)
    g = np.where(counts & (pre > 0), dy, 0).astype(dtype)
    found, wanted = bn.backward(spoiled(dy, mask), saved), bn.backward(g, saved_plain)
    for got, right in zip(found, wanted, strict=True):
        assert np.array_equal(got, right)
    assert np.array_equal(found.dadd, g) if added else found.dadd is None
    sums = bn.grad_sums(spoiled(dy, mask), saved)
    assert np.array_equal(bn.backward(spoiled(dy, mask), saved, sums=sums).dx, found.dx)


@pytest.mark.parametrize("view", [(40, 7, 1), (24, 5, 9), (12, 3, 300), (300, 3, 1)], ids=str)
@pytest.mark.parametrize("name", [*SELECTS, "weights"])
def test_16_bits(view, name, rng):
    """Rounded once: half an ulp of a result, which may be twice the terms that ulps are measured at."""
    places = view[0], view[2]
    x, dy, gamma, beta = batch(rng, view, "float16", 3.0)
    selects = {"weights": rng.random(places)} if name == "weights" else SELECTS[name](rng, places)
    mask = np.ones(places, bool) if name == "weights" else as_mask(selects, places)
    if not mask.any():
        return
    weights = compacted(selects["weights"][:, None], mask) if name == "weights" else None
    y, saved = bn.forward(spoiled(x, mask), gamma, beta, fill=FILL, **selects)
    found = bn.backward(spoiled(dy, mask), saved)
    t = truth(compacted(x, mask), compacted(dy, mask), gamma, beta, weights=weights)
    assert y.dtype == found.dx.dtype == np.float16
    assert ulps(compacted(y, mask), t.y, t.y_terms) <= 1.02
    assert ulps(compacted(found.dx, mask), t.dx, t.dx_terms, 1) <= 1.02
    assert (compacted(y, ~mask) == FILL).all()
    assert found.dgamma.dtype == np.float16
    assert ulps(found.dgamma, t.dgamma, t.dgamma_terms) <= 0.51


# ---- Layers


@pytest.mark.once
def test_a_layer_follows_what_counts(rng):
    x, dy, *_ = batch(rng, (8, 3, 10), "float64")
    lengths = np.array([10, 0, 3, 1, 7, 5, 2, 9])
    mask = as_mask({"lengths": lengths}, (8, 10))
    weights = rng.random((8, 10))
    for selects, value in (({"lengths": lengths}, mask), ({"mask": mask}, mask), ({"weights": weights}, weights)):
        layer = bn.BatchNorm(3, momentum=1.0, dtype=np.float64)
        y = layer(x, fill=FILL, **selects)
        expected, saved = bn.forward(x, np.ones(3), np.zeros(3), fill=FILL, **selects)
        assert y.tobytes() == expected.tobytes()
        assert layer.backward(dy).tobytes() == bn.backward(dy, saved).dx.tobytes()
        rows = np.moveaxis(x, 1, 0).reshape(3, -1)
        weighed = {
            "aweights" if "weights" in selects else "fweights": value.astype(float if "weights" in selects else int)
        }
        covariance = np.cov(rows, **{name: array.reshape(-1) for name, array in weighed.items()})
        np.testing.assert_allclose(layer.running_var, covariance.diagonal(), rtol=1e-12)
        np.testing.assert_allclose(layer.running_mean, np.average(rows, axis=1, weights=value.reshape(-1)), rtol=1e-12)
        again = bn.BatchNorm(3, dtype=np.float64)
        again.recalibrate([x[:3], x[3:]], **{name: np.split(array, [3]) for name, array in selects.items()})
        if "weights" not in selects:
            np.testing.assert_allclose(again.running_var, layer.running_var, rtol=1e-12)


@pytest.mark.once
def test_evaluation(rng):
    x, dy, *_ = batch(rng, (8, 3, 10), "float32")
    lengths = rng.integers(0, 11, 8)
    counts = as_mask({"lengths": lengths}, (8, 10))[:, None]
    layer = bn.BatchNorm(3).eval(keep_input=True)
    plain = layer(x)
    layer.backward(dy)
    assert np.array_equal(layer(x, lengths=lengths, fill=FILL), np.where(counts, plain, np.float32(FILL)))
    dx = layer.backward(dy)
    assert np.array_equal(dx, np.where(counts, bn.inference_backward(dy, x, np.zeros(3), np.ones(3)).dx, 0))
    assert np.array_equal(layer(x, weights=np.ones((8, 10))), plain)


@pytest.mark.once
def test_a_batch_that_is_masked_as_a_whole_is_empty(rng):
    x, dy, *_ = batch(rng, (8, 3, 10), "float32")
    layer = bn.BatchNorm(3)
    y = layer(np.full_like(x, np.nan), lengths=np.zeros(8, int), fill=FILL)
    assert (y == FILL).all()
    assert not layer.backward(np.full_like(dy, np.nan)).any()
    assert not layer.dgamma.any()
    assert not layer.dbeta.any()
    assert layer.num_batches_tracked == 0
    assert (layer.running_mean == 0).all()
    assert (layer.running_var == 1).all()
    _, saved = bn.forward(x, mask=np.zeros((8, 10), bool))
    mean, var = np.zeros(3), np.ones(3)
    bn.update_running(mean, var, saved)
    assert (mean == 0).all()
    assert (var == 1).all()


@pytest.mark.once
def test_one_value_is_too_few_for_training(rng):
    x = rng.standard_normal((8, 3, 10))
    mask, lengths = np.zeros((8, 10), bool), np.zeros(8, int)
    mask[2, 3], lengths[5] = True, 1
    out = np.full_like(x, 5)
    for selects in ({"mask": mask}, {"lengths": lengths}, {"weights": 0.1 * mask}):
        layer = bn.BatchNorm(3, dtype=np.float64)
        with pytest.raises(ValueError, match="training needs more than one value per channel, got 1 of x"):
            layer(x, out=out, **selects)
        assert layer.num_batches_tracked == 0
        assert (out == 5).all()
        _, saved = bn.forward(x, **selects)
        assert saved.count == 1
        assert not saved.var.any()
        with pytest.raises(ValueError, match="unbiased variance needs more than one value"):
            bn.update_running(np.zeros(3), np.ones(3), saved)


# ---- What is saved


@pytest.mark.once
def test_a_copy_of_what_is_saved(rng):
    x, dy, *_ = batch(rng, (8, 5, 10), "float32")
    for selects in (
        {"mask": rng.random((8, 10)) < 0.5},
        {"lengths": rng.integers(0, 11, 8)},
        {"weights": rng.random((8, 10))},
    ):
        for array in (x, np.asfortranarray(x)):
            _, saved = bn.forward(array, **selects)
            copy = pickle.loads(pickle.dumps(saved))
            assert np.array_equal(bn.backward(dy, copy).dx, bn.backward(dy, saved).dx)
            assert copy.count == saved.count


@pytest.mark.once
def test_a_mask_may_change_after_the_call(rng):
    x, dy, *_ = batch(rng, (8, 5, 10), "float32")
    for name, array in {
        "mask": rng.random((8, 10)) < 0.5,
        "lengths": rng.integers(0, 11, 8),
        "weights": rng.random((8, 10)),
    }.items():
        _, saved = bn.forward(x, **{name: array})
        before = bn.backward(dy, saved).dx
        array[...] = 1
        assert np.array_equal(bn.backward(dy, saved).dx, before)


@pytest.mark.once
def test_what_explains_gradients_takes_no_selection(rng):
    x, dy, *_ = batch(rng, (8, 5, 10), "float32")
    _, saved = bn.forward(x, mask=rng.random((8, 10)) < 0.5)
    for explain in (bn.pathways, bn.moment_gradients, lambda dy, saved: bn.diagnose(dy, dy, saved)):
        with pytest.raises(ValueError, match="saved must be of a batch whose values all count the same"):
            explain(dy, saved)


# ---- Bad input

X = np.linspace(-3, 5, 4 * 3 * 5).reshape(4, 3, 5)
MASK = np.ones((4, 5), bool)
MASK[1:, 3:] = False
BAD = {
    "a mask of numbers": (
        {"mask": np.ones((4, 5))},
        TypeError,
        "mask must have dtype bool, True where x counts, got float64",
    ),
    "a mask with channels": (
        {"mask": np.ones((4, 3, 5), bool)},
        ValueError,
        r"mask must have shape \(4, 5\) or \(4, 1, 5\)",
    ),
    "a mask that is too short": (
        {"mask": np.ones((4, 4), bool)},
        ValueError,
        r"or length 1 along any axis, got \(4, 4\)",
    ),
    "a mask of samples": ({"mask": np.ones(4, bool)}, ValueError, r"mask must have shape \(4, 5\) .*, got \(4,\)"),
    "lengths too many": (
        {"lengths": [1, 2, 3]},
        ValueError,
        r"lengths must have shape \(4,\), one per sequence, got \(3,\)",
    ),
    "lengths too long": ({"lengths": [1, 2, 3, 6]}, ValueError, "lengths must be 0 to 5, got 1 to 6"),
    "lengths negative": ({"lengths": [1, 2, 3, -1]}, ValueError, "lengths must be 0 to 5, got -1 to 3"),
    "lengths of floats": ({"lengths": [1.0, 2, 3, 4]}, TypeError, "lengths must be integers, got dtype float64"),
    "lengths of booleans": ({"lengths": [True] * 4}, TypeError, "lengths must be integers, got dtype bool"),
    "weights negative": ({"weights": -np.ones((4, 5))}, ValueError, "weights must be finite and at least 0, got -1.0"),
    "weights NaN": ({"weights": np.full((4, 5), np.nan)}, ValueError, "weights must be finite and at least 0, got nan"),
    "weights infinite": (
        {"weights": np.full((4, 5), np.inf)},
        ValueError,
        "weights must be finite and at least 0, got inf",
    ),
    "weights all 0": ({"weights": np.zeros((4, 5))}, ValueError, "weights must not all be 0"),
    "weights too large": (
        {"weights": np.full((4, 5), 1e200)},
        ValueError,
        "the largest of the weights must be 0, or 1e-150 to",
    ),
    "weights of samples": ({"weights": np.ones(4)}, ValueError, r"weights must have shape \(4, 5\)"),
    "weights of text": ({"weights": "abc"}, TypeError, "weights must have dtype float64"),
    "two of the three": (
        {"mask": MASK, "lengths": [1] * 4},
        ValueError,
        "at most one .* can be given, got mask and lengths",
    ),
    "all three": (
        {"mask": MASK, "lengths": [1] * 4, "weights": MASK},
        ValueError,
        "at most one of mask, lengths and weights can be given, got mask and lengths and weights",
    ),
    "fill of text": ({"mask": MASK, "fill": "0"}, TypeError, "fill must be a number, got str"),
}


@pytest.mark.once
@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(arguments, error, message):
    out = np.full_like(X, 5)
    calls = [
        lambda: bn.forward(X, out=out, **arguments),
        lambda: bn.BatchNorm(3, dtype=np.float64)(X, out=out, **arguments),
    ]
    if "fill" not in arguments and not message.startswith("weights must not all"):
        calls.append(lambda: bn.Moments.of(X, **arguments))
    if "weights" not in arguments:
        calls.append(lambda: bn.inference(X, np.zeros(3), np.ones(3), out=out, **arguments))
    for call in calls:
        with pytest.raises(error, match=message):
            call()
    assert (out == 5).all()


@pytest.mark.once
def test_lengths_need_sequences():
    message = r"lengths need x with 3 dimensions \(sequences, positions and channels\), got x of shape \(4, 3\)"
    with pytest.raises(ValueError, match=message):
        bn.forward(X[..., 0], lengths=[1, 1, 1, 1])


@pytest.mark.once
def test_moments_and_sums_that_do_not_fit():
    with pytest.raises(ValueError, match="moments must cover at least one value"):
        bn.forward(X, moments=bn.Moments(0, np.zeros(3), np.zeros(3)), mask=MASK)
    _, saved = bn.forward(X, mask=MASK)
    short = bn.GradientSums(saved.count - 1, np.zeros(3), np.zeros(3))
    with pytest.raises(ValueError, match=f"at least {saved.count}, got {saved.count - 1}"):
        bn.backward(X, saved, sums=short)
    with pytest.raises(ValueError, match="weight must be at least 0, got -1"):
        bn.Moments(3, [0.0], [1.0], weight=-1)


@pytest.mark.once
def test_population_wants_as_many_as_batches():
    for lengths, came in (([[5] * 4], "fewer"), ([[5] * 4] * 3, "more")):
        with pytest.raises(ValueError, match=f"lengths must have one item per batch, got {came}"):
            bn.population([X, X], lengths=lengths)


@pytest.mark.once
def test_the_page():
    page = Path(__file__).parent.parent / "docs" / "masks.md"
    if not page.exists():
        pytest.skip("docs are not beside the tests")
    failed, tried = doctest.testfile(str(page), module_relative=False)
    assert tried
    assert not failed
