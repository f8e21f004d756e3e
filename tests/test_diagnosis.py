"""Every slip of the catalogue is made by hand and must be named; right gradients must be called correct."""

import hand_written
import handed_in
import numpy as np
import pytest
import slip_by_slip
from hand_written import Pieces
from hypothesis import example, given, settings
from hypothesis import strategies as st

import batchnorm as bn
from batchnorm.gradient import deviations, parameters, slips
from batchnorm.gradient.right import Right

DTYPES = ["float32", "float64"]
SHAPES = {"(N, C)": ((24, 5), 1), "NCHW": ((6, 4, 5, 3), 1), "NHWC": ((6, 5, 3, 4), -1), "channels first": ((4, 17), 0)}
NOT_SUMMED = (
    "sum forgotten in the mean pathway",
    "only the diagonal of the Jacobian",
    "sum forgotten in the variance pathway",
)
NAMELESS = {
    ("batch size in place of n", 2): "correct",
    ("sum over the wrong axes", 2): "correct",
    ("number of positions in place of n", 2): "1/n forgotten",
}
"""What a slip is where there is no other axis than the batch's."""


def names_of(name, axes):
    """Each way of making the slip, and its name if x has so many axes."""
    for which, wrong in enumerate(slip_by_slip.SLIPS[name]):
        if (name, axes) == ("sum without the batch axis", 2):
            yield wrong, NOT_SUMMED[which]
        else:
            yield wrong, NAMELESS.get((name, axes), name)


def problem(shape, axis, dtype, seed=5, eps=1e-5):
    """A batch whose channels have offsets and spreads of their own, so that nothing is 1 by accident."""
    rng = np.random.default_rng(seed)
    channels = np.expand_dims(np.arange(1, shape[axis] + 1), [i for i in range(len(shape)) if i != axis % len(shape)])
    x = (rng.standard_normal(shape) * (0.4 + 0.3 * channels) + channels).astype(dtype)
    dy = (rng.standard_normal(shape) + 0.5).astype(dtype)
    gamma = (rng.random(shape[axis]) + 1.5).astype(dtype)
    return dy, bn.forward(x, gamma, axis=axis, eps=eps)[1], Pieces(x, gamma, eps, axis)


pytestmark = pytest.mark.once  # it is NumPy on top of the statistics


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [pytest.param(*case, marks=[] if case[1] == 1 else pytest.mark.slow) for case in SHAPES.values()],
    ids=SHAPES,
)
@pytest.mark.parametrize("name", slip_by_slip.SLIPS)
def test_every_slip_is_named(name, shape, axis, dtype):
    dy, saved, pieces = problem(shape, axis, dtype)
    for wrong, expected in names_of(name, len(shape)):
        dx = wrong(dy, pieces)
        assert dx.dtype == dtype
        diagnosis = bn.diagnose(dx, dy, saved)
        if dtype == "float32" and name.startswith("eps ") and diagnosis.correct:
            assert name in diagnosis.unseen  # an eps of 1e-5 is next to nothing
            continue
        assert diagnosis.slip == expected, diagnosis
        assert str(diagnosis).startswith(f"{expected}: ")
        assert diagnosis.correct == (expected == "correct")


def is_a_form_of(name, dx, dy, saved):
    """Whether the slip explains dx too, as 2 in place of n = 4 does what a factor of 2 does."""
    right = Right.of(dy, saved)
    (slip,) = (slip for slip in (*slips.SLIPS, *slips.constant_factors(right)) if slip.name == name)
    return any((abs(form.dx(dx.shape) - dx) < 1e-4 * right.largest).all() for form in slip.forms(right))


def test_the_tests_have_the_whole_catalogue():
    assert list(slip_by_slip.SLIPS) == [slip.name for slip in slips.SLIPS]
    in_rstd = deviations.SPREADS + deviations.DEVIATIONS
    in_parameters = parameters.FACTORS + parameters.PARAMETER_SLIPS + in_rstd
    assert list(slip_by_slip.PARAMETER_SLIPS) == [name for name, *_ in in_parameters]


@settings(max_examples=40)
@example((16, 5, 1), "variance taken for the inverse standard deviation", "float32", 1e-3, 20243)
@given(
    shape=st.tuples(st.integers(4, 40), st.integers(2, 6), st.integers(1, 5)),
    name=st.sampled_from(list(slip_by_slip.SLIPS)),
    dtype=st.sampled_from(DTYPES),
    eps=st.sampled_from([1e-5, 1e-3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_slip_is_named_on_any_data(shape, name, dtype, eps, seed):
    if name == "number of channels in place of n" and shape[1] == shape[0] * shape[2]:
        return  # then it is n
    dy, saved, pieces = problem(shape, 1, dtype, seed, eps)
    for wrong, expected in names_of(name, 2 if shape[2] == 1 else 3):
        dx = wrong(dy, pieces)
        diagnosis = bn.diagnose(dx, dy, saved)
        if diagnosis.slip != expected:  # then these data must be unable to tell them apart
            alike = (*diagnosis.unseen, *diagnosis.rivals)
            assert expected in alike or is_a_form_of(diagnosis.slip, dx, dy, saved), diagnosis


@settings(max_examples=40)
@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple),
    axis=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    style=st.sampled_from([hand_written.graph, hand_written.compact]),
    offset=st.sampled_from([0.0, 10.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_right_gradient_is_correct(shape, axis, dtype, style, offset, seed):
    shape = (*shape, 3)
    axis %= len(shape)
    rng = np.random.default_rng(seed)
    x, dy = (rng.standard_normal(shape) + offset).astype(dtype), rng.standard_normal(shape).astype(dtype)
    gamma = rng.standard_normal(shape[axis]).astype(dtype)
    n = x.size // shape[axis]
    if n < 3:
        return
    # Of three values dy has one direction to itself, in which there may be next to nothing.
    right = ("correct", "this dy cannot tell") if n == 3 else ("correct",)
    _, saved = bn.forward(x, gamma, axis=axis)
    for dx in (bn.backward(dy, saved).dx, sum(bn.pathways(dy, saved)), style(dy, Pieces(x, gamma, 1e-5, axis))):
        diagnosis = bn.diagnose(dx, dy, saved)
        assert diagnosis.slip in right, diagnosis
        assert diagnosis.correct == (diagnosis.slip == "correct")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_batch_of_float32_summed_by_numpy_is_correct(dtype):
    """20000 values added one after the other lose digits, which is no slip."""
    dy, saved, pieces = problem((20000, 3), 1, dtype)
    diagnosis = bn.diagnose(hand_written.right(dy, pieces), dy, saved)
    assert diagnosis.correct, diagnosis
    assert diagnosis.error < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", slip_by_slip.PARAMETER_SLIPS)
def test_slips_in_the_gradients_of_the_parameters(name, dtype):
    dy, saved, pieces = problem((6, 5, 4), 1, dtype, eps=1e-2)
    dx, dgamma, dbeta = bn.backward(dy, bn.forward(pieces.x, saved.gamma, saved.gamma, eps=1e-2)[1])
    wrong_dgamma, wrong_dbeta = slip_by_slip.PARAMETER_SLIPS[name](dy, pieces)
    diagnosis = bn.diagnose(dx, dy, saved, wrong_dgamma.ravel(), dbeta)
    assert (diagnosis.slip, diagnosis.dgamma, diagnosis.dbeta) == ("correct", name, "correct")
    assert not diagnosis.correct
    assert f"dgamma: {name}: " in str(diagnosis)
    if wrong_dbeta is not None:
        diagnosis = bn.diagnose(dx, dy, saved, dgamma, wrong_dbeta.ravel())
        assert (diagnosis.slip, diagnosis.dgamma, diagnosis.dbeta) == ("correct", "correct", name)
    assert bn.diagnose(dx, dy, saved, dgamma, dbeta).correct
    assert bn.diagnose(dx, dy, saved, dgamma + 1, dbeta).dgamma == "unknown"


@pytest.mark.parametrize("dtype", DTYPES)
def test_transposed_layouts(dtype):
    dy, saved, _ = problem((6, 4, 5, 5), 1, dtype)
    dx = bn.backward(dy, saved).dx
    for wrong in (
        dx.transpose(0, 2, 3, 1),
        dx.transpose(0, 1, 3, 2),
        dx.transpose(0, 2, 3, 1).reshape(dx.shape),
        dx.swapaxes(0, 1),
    ):
        diagnosis = bn.diagnose(wrong, dy, saved)
        assert diagnosis.slip == "transposed layout", diagnosis
    dy, saved, _ = problem((7, 4), 1, dtype)
    dx = bn.backward(dy, saved).dx
    assert "(1, 0)" in str(bn.diagnose(dx.T, dy, saved))
    assert bn.diagnose(dx.T + 1, dy, saved).slip == "unknown"


HIDING = {
    "ones": lambda p: np.ones_like(p.x),
    "zeros": lambda p: np.zeros_like(p.x),
    "constant": lambda p: 0 * p.x + p.gamma,
    "proportional to xhat": lambda p: p.gamma * p.xhat,
    "y": lambda p: p.gamma * p.xhat + p.mean,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hiding", HIDING.values(), ids=HIDING)
def test_a_dy_that_cannot_tell(hiding, dtype):
    """Whatever dx is: the right one, one without the paths, or 0."""
    _, saved, pieces = problem((24, 5), 1, dtype)
    dy = hiding(pieces)
    for dx in (bn.backward(dy, saved).dx, dy * pieces.gamma * pieces.rstd, np.zeros_like(dy)):
        diagnosis = bn.diagnose(dx, dy, saved)
        assert diagnosis.slip == "this dy cannot tell"
        assert not diagnosis.correct
        assert str(diagnosis).startswith(
            "this dy cannot tell: in every channel it is a constant plus a multiple of xhat"
        )
    if dy.any():
        assert "wrong all the same" not in str(bn.diagnose(bn.backward(dy, saved).dx, dy, saved))
        assert "all the same" in str(bn.diagnose(dy + 3, dy, saved))


def test_two_values_in_a_channel_never_tell():
    dy, saved, _ = problem((2, 5), 1, "float64")
    assert "two values in a channel" in str(bn.diagnose(bn.backward(dy, saved).dx, dy, saved))


def test_one_channel_that_tells_is_enough():
    dy, saved, pieces = problem((24, 5), 1, "float64")
    dy[:, 1:] = 1
    assert bn.diagnose(slip_by_slip.SLIPS["variance pathway missing"][0](dy, pieces), dy, saved).slip == (
        "variance pathway missing"
    )


def test_what_these_data_could_not_have_shown():
    dy, _, pieces = problem((24, 5), 1, "float64")
    _, saved = bn.forward(pieces.x, eps=0.0)
    diagnosis = bn.diagnose(bn.backward(dy, saved).dx, dy, saved)
    expected = {
        "gamma forgotten",
        "gamma forgotten in a pathway",
        "gamma applied twice",
        "gamma applied twice in a pathway",
        "divided by gamma",
        "eps added twice",
        "eps outside the root",
        "eps forgotten",
    }
    assert set(diagnosis.unseen) == expected
    assert "these data would not have shown: gamma forgotten" in str(diagnosis)


def test_what_no_slip_explains(rng):
    dy, saved, _ = problem((24, 5), 1, "float64")
    direct, mean, variance = bn.pathways(dy, saved)
    diagnosis = bn.diagnose(direct + 0.3 * mean + 4 * variance, dy, saved)
    assert diagnosis.slip == "unknown"
    np.testing.assert_allclose(diagnosis.pathways, (1, 0.3, 4), rtol=1e-9)
    assert "1·direct + 0.3·mean + 4·variance" in str(diagnosis)
    noise = bn.diagnose(rng.standard_normal(dy.shape), dy, saved)
    assert noise.slip == "unknown"
    without_gamma = bn.pathways(dy, bn.forward(saved.x)[1])
    diagnosis = bn.diagnose(without_gamma.direct + 0.3 * without_gamma.mean, dy, saved)
    assert diagnosis.slip == "unknown"
    assert "without gamma, nearest is 1·direct + 0.3·mean + " in str(diagnosis)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_that_rounding_does_not_explain(dtype):
    dy, saved, _ = problem((24, 5), 1, dtype)
    dx = bn.backward(dy, saved).dx
    for factor in (1 + 3e-4, 0.37, -1.5):
        diagnosis = bn.diagnose(dx * dx.dtype.type(factor), dy, saved)
        assert diagnosis.slip == "constant factor"
        assert f"dx is {factor:.4g}" in str(diagnosis)
    assert bn.diagnose(dx * (1 + np.finfo(dtype).eps), dy, saved).correct


def test_the_dtype_of_dx_counts():
    dy, saved, _ = problem((24, 5), 1, "float64")
    nearly = bn.backward(dy, saved).dx * (1 + 1e-7)
    assert bn.diagnose(nearly, dy, saved).slip == "constant factor"
    assert bn.diagnose(nearly.astype("f"), dy, saved).slip == "correct"


STYLES = {style.__name__: style for style in hand_written.RIGHT}


@pytest.mark.parametrize("offset", [0, 10, 300, 1e3, 1e4, 1e5])
@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_float32_far_from_zero_is_not_accused(style, offset):
    """Rounding moves the mean by some eps·|x|, with one channel in one direction alone, as many a slip does."""
    for seed, shape in enumerate([(24, 1), (301, 1), (24, 8), (6, 3, 5, 4), (2000, 2)]):
        rng = np.random.default_rng(seed)
        x = (rng.standard_normal(shape) + offset).astype("f")
        dy, gamma = rng.standard_normal(shape).astype("f"), (rng.random(shape[1]) + 0.5).astype("f")
        diagnosis = bn.diagnose(style(dy, Pieces(x, gamma, 1e-5, 1)), dy, bn.forward(x, gamma)[1])
        assert diagnosis.correct or (diagnosis.slip == "this x cannot tell" and offset == 1e5), (shape, diagnosis)


def test_float32_that_has_nothing_left_to_tell():
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((500, 2)) + 1e6).astype("f"), rng.standard_normal((500, 2)).astype("f")
    _, saved = bn.forward(x)
    dx = bn.backward(dy, saved).dx
    assert bn.diagnose(dx, dy, saved).correct
    diagnosis = bn.diagnose(dx * 1.1, dy, saved)
    assert diagnosis.slip == "this x cannot tell"
    assert "where float32 arithmetic may lose all of dx" in str(diagnosis)
    assert not diagnosis.correct
    assert bn.diagnose(0 * dx, dy, saved).slip == "zero everywhere"


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("offset", [0, 300])
def test_float32_slips_are_seen_far_from_zero(offset, channels):
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((50, channels)) + offset).astype("f")
    dy, gamma = (rng.standard_normal(x.shape) + 0.5).astype("f"), (rng.random(channels) + 1.5).astype("f")
    pieces, saved = Pieces(x, gamma, 1e-5, 1), bn.forward(x, gamma)[1]
    for name in ("variance pathway missing", "mean pathway missing", "n - 1 in place of n", "rstd not cubed"):
        for wrong in slip_by_slip.SLIPS[name][:1]:
            diagnosis = bn.diagnose(wrong(dy, pieces), dy, saved)
            assert diagnosis.slip == name, diagnosis


@pytest.mark.parametrize("channels", [1, 5])
def test_a_variance_that_was_lost_to_cancellation(channels):
    """E[x²] − μ² is right by the book, and loses the digits of σ² in float32."""
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((60, channels)) + 100).astype("f")
    dy, gamma = rng.standard_normal(x.shape).astype("f"), (rng.random(channels) + 1.5).astype("f")
    pieces = Pieces(x, gamma, 1e-5, 1)
    pieces.var = (x * x).mean(axis=0, keepdims=True) - pieces.mean**2
    pieces.rstd = 1 / np.sqrt(pieces.var + pieces.eps)
    pieces.xhat = pieces.xmu * pieces.rstd
    diagnosis = bn.diagnose(hand_written.compact(dy, pieces), dy, bn.forward(x, gamma)[1])
    assert diagnosis.slip == "variance lost to cancellation", diagnosis
    assert diagnosis.error > 1e-4


def handed_in_problem(dtype, shape):
    rng = np.random.default_rng(0)
    channel = np.arange(1, shape[1] + 1).reshape(-1, *[1] * (len(shape) - 2))
    x = (rng.standard_normal(shape) * (0.1 + 0.1 * channel) + 0.3 * channel).astype(dtype)
    dy, gamma = (rng.standard_normal(shape) + 0.5).astype(dtype), (rng.random(shape[1]) + 1.5).astype(dtype)
    return x, dy, gamma, bn.forward(x, gamma)[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24, 5), (6, 4, 5, 3)], ids=str)
def test_gradients_as_they_are_handed_in(shape, dtype):
    x, dy, gamma, saved = handed_in_problem(dtype, shape)
    for wrong, name in (handed_in.HANDED_IN | (handed_in.FOR_IMAGES if len(shape) > 2 else {})).items():
        diagnosis = bn.diagnose(wrong(dy, x, gamma, 1e-5).astype(dtype), dy, saved)
        same = name == "another eps" and dtype == "float32" and diagnosis.slip == "eps forgotten"  # 1e-8 is 0 here
        assert diagnosis.slip == name or same, (wrong.__name__, diagnosis)


def test_another_eps_is_estimated():
    x, dy, gamma, saved = handed_in_problem("float64", (24, 5))
    for eps in (0.05, 1e-3, 1e-8):
        dx = handed_in.another_eps(eps)(dy, x, gamma, None)
        dgamma = (dy * handed_in.normalized(x, eps)).sum(axis=0)
        words = str(bn.diagnose(dx, dy, saved, dgamma))
        assert words.count(f"is made with eps = {eps:.3g}, but `forward` was given 1e-05") == 2, words


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_and_another_mistake_in_dgamma(dtype):
    x, dy, _, saved = handed_in_problem(dtype, (24, 5))
    xmu, dx = x - x.mean(axis=0), bn.backward(dy, saved).dx
    unbiased = np.sqrt(x.var(axis=0, ddof=1) + x.dtype.type(saved.eps))
    for dgamma, name in (
        ((dy * xmu).mean(axis=0), "x - μ in place of xhat + mean in place of the sum"),
        (-(dy * x).sum(axis=0), "x in place of xhat + wrong sign"),
        ((dy * xmu / unbiased).mean(axis=0), "n - 1 in the variance + mean in place of the sum"),
    ):
        assert bn.diagnose(dx, dy, saved, dgamma).dgamma == name


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_mistakes_in_the_deviation_of_dgamma(dtype):
    x, dy, _, saved = handed_in_problem(dtype, (24, 5))
    xmu, sample, dx = x - x.mean(axis=0), x.std(axis=0, ddof=1), bn.backward(dy, saved).dx
    for std, name in (
        (np.sqrt(sample**2 + x.dtype.type(0.03)), "n - 1 in the variance + another eps"),
        (sample**2, "n - 1 in the variance + variance taken for the standard deviation"),
        (x.std(axis=0) + x.dtype.type(0.01), "eps outside the root + another eps"),
        (x.max(axis=0) - x.min(axis=0), "unknown"),
    ):
        assert bn.diagnose(dx, dy, saved, (dy * xmu / std).sum(axis=0)).dgamma == name


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dy_that_was_reshaped_without_a_transpose_is_in_all_gradients(dtype):
    dy, saved, p = problem((6, 4, 5, 3), 1, dtype)
    g, z = dy.reshape(-1, 4), p.xhat.transpose(0, 2, 3, 1).reshape(-1, 4)
    dx = p.gamma.ravel() * p.rstd.ravel() * (g - g.mean(axis=0) - z * (g * z).mean(axis=0))
    dx = dx.reshape(6, 5, 3, 4).transpose(0, 3, 1, 2)
    diagnosis = bn.diagnose(dx, dy, saved, (g * z).sum(axis=0), g.sum(axis=0))
    assert (diagnosis.slip, diagnosis.dgamma, diagnosis.dbeta) == ("dy reshaped without transposing",) * 3
    assert diagnosis.sure


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moved", [0.3, 0], ids=["mean and variance", "variance"])
def test_dgamma_with_the_running_statistics_of_dx(moved, dtype):
    x, dy, gamma, saved = handed_in_problem(dtype, (24, 5))
    channel = np.arange(1, 6, dtype=dtype)
    std, mean = x.std(axis=0) * (1 + channel / 10), x.mean(axis=0) + x.dtype.type(moved) * channel
    z, g = (x - mean) / std, gamma * dy / std
    dx = g - g.mean(axis=0) - z * (g * z).mean(axis=0)
    diagnosis = bn.diagnose(dx, dy, saved, (dy * z).sum(axis=0), dy.sum(axis=0))
    assert (diagnosis.slip, diagnosis.dgamma, diagnosis.dbeta) == ("running statistics",) * 2 + ("correct",)
    assert bn.diagnose(dx, dy, saved, (dy * z).sum(axis=0) + 1).dgamma == "unknown"
    right = bn.backward(dy, saved)
    assert bn.diagnose(right.dx, dy, saved, (dy * z).sum(axis=0)).dgamma == "unknown"
    assert bn.diagnose(dx, dy, saved, right.dgamma).dgamma == "correct"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24, 5), (6, 4, 5, 3)], ids=str)
def test_dgamma_as_it_is_handed_in(shape, dtype):
    x, dy, _, saved = handed_in_problem(dtype, shape)
    dx = bn.backward(dy, saved).dx
    for case, (wrong, name) in handed_in.PARAMETERS.items():
        if case == "no eps" and dtype == "float32":
            continue
        diagnosis = bn.diagnose(dx, dy, saved, np.asarray(wrong(dy, x), dtype))
        assert diagnosis.dgamma == (name if isinstance(name, str) else name[len(shape) > 2]), (case, diagnosis)
        assert diagnosis.slip == "correct"
    wrong = bn.diagnose(dx, dy, saved, np.ones((1, shape[1]), dtype))
    assert wrong.dgamma == "wrong shape"
    assert "the values are wrong too" in str(wrong)
    for wrong in (dy.sum(axis=handed_in.over(x), keepdims=True), dy.sum(axis=1), dy, dy.sum()):
        diagnosis = bn.diagnose(dx, dy, saved, dbeta=wrong)
        assert diagnosis.dbeta in ("wrong shape", "sum over the wrong axes", "sum over the channels too"), diagnosis
        assert f"dbeta must have shape ({shape[1]},), got {wrong.shape}" in str(diagnosis)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named(bad):
    dy, saved, _ = problem((24, 5), 1, "float64")
    dx = bn.backward(dy, saved).dx.copy()
    dx[2, 3] = bad
    diagnosis = bn.diagnose(dx, dy, saved)
    assert diagnosis.slip == "not finite"
    assert str(diagnosis).startswith(f"not finite: dx is {bad} at (2, 3), one of 1 such value")
    assert diagnosis.error == np.inf
    assert np.isnan(diagnosis.pathways).all()


def test_the_gradient_that_is_one_minus_one():
    dy, saved, _ = problem((24, 5), 1, "float64")
    diagnosis = bn.diagnose(np.zeros_like(dy), dy, saved)
    assert diagnosis.slip == "zero everywhere"
    assert "not 1 − 1 = 0 but the matrix I − 11ᵀ/n" in str(diagnosis)
    _, nothing = bn.forward(saved.x, np.zeros(5))
    assert bn.diagnose(np.zeros_like(dy), dy, nothing).correct


@pytest.mark.parametrize("style", [hand_written.graph, hand_written.paper], ids=["without", "with"])
def test_the_second_term_of_dmean_is_nobodys_business(style):
    """It is 0: a gradient without it is right, and the answer does not mention it."""
    dy, saved, pieces = problem((24, 5), 1, "float64")
    words = str(bn.diagnose(style(dy, pieces), dy, saved))
    assert words.startswith("correct: dx agrees with the exact gradient to ")
    assert "left out" not in words
    assert "term of dmean" not in words


X = np.arange(24.0).reshape(2, 3, 4)
SAVED = bn.forward(X)[1]
NAN = np.where(X == 5, np.nan, X)
BAD = {
    "saved": (lambda: bn.diagnose(X, X, X), TypeError, "saved must be what forward returned, got ndarray"),
    "dy of another layout": (
        lambda: bn.diagnose(X, X.swapaxes(1, 2), SAVED),
        ValueError,
        "dy must have the shape of x",
    ),
    "dx of another shape": (
        lambda: bn.diagnose(X[0], X, SAVED),
        ValueError,
        r"dx must have the shape of x, \(2, 3, 4\), or its axes in another order, got \(3, 4\)",
    ),
    "dx of integers": (
        lambda: bn.diagnose(X.astype(int), X, SAVED),
        TypeError,
        "dx must have dtype float64, float32, float16 or bfloat16",
    ),
    "NaN in dy": (lambda: bn.diagnose(X, NAN, SAVED), ValueError, r"dy must be finite, got nan at \(0, 1, 1\)"),
    "NaN in x": (
        lambda: bn.diagnose(X, X, bn.forward(NAN)[1]),
        ValueError,
        r"x must be finite, got nan at \(0, 1, 1\)",
    ),
    "dgamma of integers": (
        lambda: bn.diagnose(X, X, SAVED, np.ones(3, int)),
        TypeError,
        "dgamma must have dtype float64, float32, float16 or bfloat16, got int",
    ),
    "n = 1": (
        lambda: bn.diagnose(X[:1, :, :1], X[:1, :, :1], bn.forward(X[:1, :, :1])[1]),
        ValueError,
        r"x must have at least 2 values per channel, got shape \(1, 3, 1\)",
    ),
    "no channels": (
        lambda: bn.diagnose(np.ones((4, 0)), np.ones((4, 0)), bn.forward(np.ones((4, 0)))[1]),
        ValueError,
        r"x must have channels, got shape \(4, 0\) with axis=1",
    ),
    "n = 0": (
        lambda: bn.diagnose(X[:0], X[:0], bn.forward(X[:0])[1]),
        ValueError,
        "x must have at least 2 values per channel",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
