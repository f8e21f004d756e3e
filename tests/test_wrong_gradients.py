"""Wrong gradients as students write them are named, and no name is given as sure that is not theirs."""

from itertools import product

import hand_written
import numpy as np
import pytest
import wrong_deviations  # noqa: F401
import wrong_formulas  # noqa: F401, adds to ALL
import wrong_images  # noqa: F401
import wrong_pairs  # noqa: F401
from wrong_gradients import ALL, EPS, Kept
from wrong_terms import PLACES

import batchnorm as bn

DTYPES = ["float64", "float32"]

pytestmark = pytest.mark.once  # it is NumPy on top of the statistics


def diagnosed(case, shape, dtype, rng, offset=0.4):
    """What is said of the case for random data with no gamma of 1, the acceptable sets of slips, and the set named."""
    channel = np.arange(1, shape[1] + 1).reshape(1, -1, *[1] * (len(shape) - 2))
    x = (rng.standard_normal(shape) * (0.2 + 0.3 * channel) + offset * channel).astype(dtype)
    dy = (rng.standard_normal(shape) + 0.5).astype(dtype)
    gamma = (rng.random(shape[1]) + 1.5).astype(dtype)
    dx = case.gradient(dy, Kept(x, gamma))
    assert dx.dtype == dtype
    diagnosis = bn.diagnose(dx, dy, bn.forward(x, gamma, eps=EPS)[1])
    return diagnosis, [as_set(name) for name in case.names], as_set(diagnosis.slip)


def as_set(name):
    return frozenset(name.split(" + "))


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", ALL, ids=[case.gradient.__name__ for case in ALL])
def test_they_are_named(case, dtype):
    diagnosis, acceptable, named = diagnosed(
        case, (6, 4, 5, 4) if case.images else (24, 5), dtype, np.random.default_rng(1)
    )
    assert named in acceptable, diagnosis
    assert diagnosis.slip in str(diagnosis)
    assert PLACES.get(case.gradient.__name__, "") in str(diagnosis)
    assert diagnosis.sure == (", not sure" not in str(diagnosis).replace(";", ",") and diagnosis.slip != "unknown")


def test_there_are_enough_of_them():
    assert len({case.gradient.__name__ for case in ALL}) == len(ALL) >= 120
    assert sum(" + " in case.names[0] for case in ALL) >= 40
    assert sum(case.images for case in ALL) >= 25


@pytest.mark.parametrize("seed", [*range(30), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(30, 120))])
def test_no_wrong_name_is_sure_on_any_data(seed):
    """Few values, few channels and counts that coincide make slips look alike. Then the answer must say so."""
    rng = np.random.default_rng(seed)
    case, channels = ALL[rng.integers(len(ALL))], int(rng.integers(2, 6))
    images = tuple(map(int, (rng.integers(2, 6), channels, rng.integers(2, 6), channels)))
    shape = images if case.images else (int(rng.integers(4, 40)), channels)
    diagnosis, acceptable, named = diagnosed(case, shape, DTYPES[seed % 2], rng, rng.choice([0, 0.4, 5]))
    if named not in acceptable and diagnosis.slip != "this dy cannot tell":
        unseen = any(names & set(diagnosis.unseen) for names in acceptable)
        assert unseen if diagnosis.correct else not diagnosis.sure, (shape, diagnosis)


@pytest.mark.parametrize("rival", ["constant factor 2", "constant factor the number of channels"])
def test_coincidences_are_rivals(rng, rival):
    """With two channels, twice as much and as often as there are channels are the same."""
    x, dy = rng.standard_normal((9, 2)), rng.standard_normal((9, 2))
    _, saved = bn.forward(x, np.array([1.5, 2.5]))
    diagnosis = bn.diagnose(2 * bn.backward(dy, saved).dx, dy, saved)
    assert rival in (diagnosis.slip, *diagnosis.rivals)
    assert not diagnosis.sure
    assert "these data do not tell it from " in str(diagnosis)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24, 5), (16, 2)], ids=str)
def test_running_statistics_are_sure_only_if_both_are_others(shape, dtype, rng):
    """Any μ or σ alone may come from elsewhere, and a μ of 0 in every channel from a forgotten one."""
    x, dy = rng.standard_normal((2, *shape)).astype(dtype)
    x += rng.standard_normal(shape[1]).astype(dtype)
    own, away = x.mean(axis=0), (rng.random(shape[1]) / 2 + 0.2).astype(dtype)
    gamma = (rng.random(shape[1]) + 1.5).astype(dtype)
    _, saved = bn.forward(x, gamma)
    for mean, std, sure in (
        (own + away, x.std(axis=0) * (1 + away), True),
        (own, x.std(axis=0) * (1 + away), False),
        (0 * own, x.std(axis=0) * (1 + away), False),
        (0 * own + 0.7, x.std(axis=0) * (1 + away), False),
        (own + away, np.sqrt(x.var(axis=0) + x.dtype.type(1e-5)), False),
        (own + away, x.std(axis=0, ddof=1), False),
    ):
        z, g = (x - mean) / std, dy * gamma / std
        diagnosis = bn.diagnose(g - g.mean(axis=0) - z * (g * z).mean(axis=0), dy, saved)
        assert (diagnosis.slip, diagnosis.sure) == ("running statistics", sure), diagnosis
        assert ("σ is another, of running statistics perhaps" in str(diagnosis)) == (mean is own)


STYLES = [style.__name__ for style in hand_written.RIGHT]


@pytest.mark.parametrize(("dtype", "shape"), [*product(DTYPES, [(24, 5), (6, 4, 5, 4)])], ids=str)
@pytest.mark.parametrize("style", hand_written.RIGHT, ids=STYLES)
def test_right_gradients_as_they_are_published_are_correct(style, dtype, shape, rng):
    x, dy = rng.standard_normal((2, *shape)).astype(dtype)
    gamma = (rng.random(shape[1]) + 1.5).astype(dtype)
    dx = style(dy, hand_written.Pieces(x, gamma, 1e-5, 1))
    diagnosis = bn.diagnose(dx, dy, bn.forward(x, gamma)[1])
    assert diagnosis.correct, diagnosis
    assert diagnosis.sure
