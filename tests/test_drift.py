"""Drift says how far data have moved, and what may be behind it."""

import numpy as np
import pytest

import batchnorm as bn

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

pytestmark = pytest.mark.once  # moments are tested elsewhere on every level


def data(rng, mean=MEAN, std=STD):
    return rng.normal(mean, std, (8, 40, 40, 3))


def test_shift_ratio_and_divergence(rng):
    """KL against a numerical integral of p·ln(p/q)."""
    mean, var = rng.standard_normal(3), rng.random(3) + 0.2
    x = data(rng) + 0.3
    found = bn.Plan(mean, var, axis=-1, eps=0.0).drift(x)
    m, v = x.mean(axis=(0, 1, 2), dtype=np.longdouble), x.var(axis=(0, 1, 2), dtype=np.longdouble)
    np.testing.assert_allclose(found.shift, ((m - mean) / np.sqrt(var)).astype(float), rtol=1e-12)
    np.testing.assert_allclose(found.ratio, (v / var).astype(float), rtol=1e-12)
    for c in range(3):
        t = np.linspace(float(m[c] - 12 * np.sqrt(v[c])), float(m[c] + 12 * np.sqrt(v[c])), 20_001)
        log_p = -((t - m[c]) ** 2) / (2 * v[c]) - np.log(2 * np.pi * v[c]) / 2
        log_q = -((t - mean[c]) ** 2) / (2 * var[c]) - np.log(2 * np.pi * var[c]) / 2
        assert found.kl[c] == pytest.approx(float(np.sum(np.exp(log_p) * (log_p - log_q)) * (t[1] - t[0])), rel=1e-9)
    assert found.worst(2).tolist() == np.argsort(-found.kl)[:2].tolist()
    shifted = bn.Plan(mean, var, axis=-1, eps=0.5).drift(x).shift
    np.testing.assert_allclose(shifted, ((m - mean) / np.sqrt(var + 0.5)).astype(float), rtol=1e-12)


def test_data_moments_and_bytes_are_taken_alike(rng):
    plan = bn.Plan.normalizer(MEAN, STD)
    x = (255 * data(rng)).clip(0, 255).astype(np.uint8)
    whole, parts = plan.drift(x), plan.drift(bn.Moments.of(x[:3], -1) + bn.Moments.of(x[3:], -1))
    np.testing.assert_allclose(whole.kl, parts.kl, rtol=1e-9)
    assert whole.hints == parts.hints == ()
    mask = np.zeros((8, 40, 40), bool)
    mask[:3] = True
    np.testing.assert_allclose(plan.drift(x, mask=mask).kl, plan.drift(x[:3]).kl, rtol=1e-9)


HINTS = {
    "as expected": (lambda x: x, ()),
    "slightly moved": (lambda x: 1.5 * x + 0.1, ()),
    "scaled up": (lambda x: 255 * x, ("255 times as large as expected: divide x by 255?",)),
    "scaled down": (lambda x: x / 255, ("255 times as small as expected: was x divided by 255 once too often?",)),
    "reversed": (lambda x: x[..., ::-1], ("channels taken in the order (2, 1, 0) fit better (BGR for RGB?)",)),
    "rolled": (lambda x: x[..., [1, 2, 0]], ("channels taken in the order (2, 0, 1) fit better",)),
}


@pytest.mark.parametrize("name", HINTS)
def test_hints(name, rng):
    change, expected = HINTS[name]
    mean, std = np.array([0.2, 0.5, 0.9]), np.array([0.1, 0.2, 0.15])
    found = bn.Plan.normalizer(mean, std, scale=1).drift(change(data(rng, mean, std)))
    assert len(found.hints) == len(expected)
    assert all(hint.endswith(end) for hint, end in zip(found.hints, expected, strict=True))
    assert [line for line in str(found).splitlines() if line.startswith("hint: ")] == [
        f"hint: {h}" for h in found.hints
    ]


def test_statistics_that_were_never_trained(rng):
    (hint,) = bn.Plan.of(bn.BatchNorm(8)).drift(rng.standard_normal((64, 8))).hints
    assert hint == "mean 0 and var 1 in every channel are what a new layer has: were the statistics ever trained?"


def test_channels_without_spread():
    """Where neither has any, nothing has moved; where only the data or only the plan have none, they differ by far."""
    x = np.array([[1.0, 1.0, 0.0, 2.0], [1.0, 1.0, 4.0, 2.0]])
    found = bn.Plan([1.0, 1.0, 2.0, 1.0], [0.0, 4.0, 0.0, 0.0], eps=0.0).drift(x)
    assert found.shift.tolist() == [0, 0, 0, np.inf]
    assert found.ratio.tolist() == [1, 0, np.inf, 1]
    assert found.kl[0] == 0
    assert (found.kl[1:] == np.inf).all()
    nothing = bn.Plan([0.0], [1.0]).drift(np.array([[np.nan], [1.0]]))
    assert nothing.worst().tolist() == [0]
    assert np.isnan(nothing.kl[0])


def test_the_table_has_the_worst_channels_first(rng):
    mean = np.arange(30.0)
    x = rng.standard_normal((500, 30)) + mean
    x[:, 17] += 5
    x[:, 4] *= 3
    lines = str(bn.Plan(mean, np.ones(30)).drift(x)).splitlines()
    assert lines[0].split() == ["channel", "mean", "expected", "shift", "std", "expected", "ratio", "kl"]
    assert len({len(line) for line in lines[:11]}) == 1
    assert [int(line.split()[0]) for line in lines[1:3]] in ([17, 4], [4, 17])
    assert lines[11] == "and 20 channels that have moved less"


def test_the_plot(tmp_path, rng):
    pytest.importorskip("matplotlib")
    bn.Plan.normalizer(MEAN, STD, scale=1).drift(255 * data(rng), plot=tmp_path / "drift.png")
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")


BAD = {
    "channels": (lambda plan: plan.drift(np.ones((2, 4))), r"x must have 3 channels, got 4"),
    "no value": (lambda plan: plan.drift(np.ones((0, 3))), "x must have at least one value per channel, got none"),
    "a mask of moments": (
        lambda plan: plan.drift(bn.Moments.of(np.ones((2, 3))), mask=[True, True]),
        "mask, lengths and weights must come with data, but x is Moments",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call(bn.Plan.normalizer(MEAN, STD))
