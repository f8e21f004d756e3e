"""Layers from other systems and back: predictions stay the same, and errors say what is there."""

import doctest
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.conventions import CONVENTIONS

ROUNDING = {np.float32: 2.0**-24, np.float64: 2.0**-53}
"""Of one gamma, relative."""
DOUBLE = 2.0**-50
"""Of the factor of gamma, which is calculated in float64."""
PAGE = Path(__file__).parents[1] / "docs" / "conventions.md"

pytestmark = pytest.mark.once  # arrays of one number per channel are NumPy's work


@pytest.fixture
def layer(rng):
    return made(rng, np.float32)


def made(rng, dtype, eps=1e-5, **arguments):
    """A trained layer; some channels have variances far below and above eps."""
    layer = bn.BatchNorm(9, eps=eps, dtype=dtype, **arguments)
    layer.gamma = rng.uniform(0.5, 2, 9) * rng.choice([-1, 1], 9)
    if layer.beta is not None:
        layer.beta = rng.standard_normal(9)
    layer.running_mean = 3 * rng.standard_normal(9)
    layer.running_var = [0, 1e-12, 1e-7, 1e-5, 1e-3, *rng.uniform(0.5, 2, 3), 1e6]
    layer.num_batches_tracked = 41
    return layer


def wide(array):
    return np.asarray(array, np.longdouble)


def predicted(layer, x):
    """What a layer predicts, without rounding."""
    gamma = 1 if layer.gamma is None else wide(layer.gamma)
    beta = 0 if layer.beta is None else wide(layer.beta)
    return gamma * (x - wide(layer.running_mean)) / np.sqrt(wide(layer.running_var) + wide(layer.eps)) + beta


def darknet(state, x):
    """`normalize_cpu`, `scale_bias` and `add_bias` of Darknet."""
    x = (x - wide(state["rolling_mean"])) / (np.sqrt(wide(state["rolling_variance"])) + wide(0.000001))
    return x * wide(state["scales"]) + wide(state["biases"])


def caffe(state, x, eps=1e-5):
    """Caffe's BatchNorm layer with use_global_stats, and the Scale layer after it."""
    factor = wide(state["factor"])[0]
    scale_factor = 0 if factor == 0 else 1 / factor
    mean, variance = scale_factor * wide(state["mean"]), scale_factor * wide(state["variance"])
    return (x - mean) / np.sqrt(variance + wide(eps)) * wide(state["scale"]) + wide(state["bias"])


def haiku(state, x, eps=1e-5):
    """`hk.BatchNorm` with is_training=False."""
    mean, var = wide(state["~/mean_ema/average"]), wide(state["~/var_ema/average"])
    return (x - mean) * (wide(state["scale"]) / np.sqrt(var + wide(eps))) + wide(state["offset"])


class Average:
    """`hk.ExponentialMovingAverage`."""

    def __init__(self, decay, hidden=0.0, counter=0):
        self.decay, self.hidden, self.counter = decay, hidden, counter

    def __call__(self, value):
        self.counter += 1
        self.hidden = self.hidden * self.decay + value * (1 - self.decay)
        self.average = self.hidden / (1 - self.decay**self.counter)
        return self.average


def assert_same(y, expected, beta, bound):
    """y − beta within a relative bound of what it should be."""
    part = np.abs(expected - (0 if beta is None else wide(beta)))
    assert (np.abs(y - expected) <= bound * part + np.finfo(np.longdouble).eps * np.abs(expected)).all()


def test_the_page():
    if not PAGE.exists():
        pytest.skip("docs are not beside the tests")
    failed, tried = doctest.testfile(str(PAGE), module_relative=False)
    assert tried
    assert not failed


def test_the_table_of_the_page_is_the_table():
    if not PAGE.exists():
        pytest.skip("docs are not beside the tests")
    rows = re.findall(r'^\| `"(\w+)"` \|(.+)\|$', PAGE.read_text(), re.MULTILINE)
    cells = {name: [cell.strip() for cell in row.split("|")] for name, row in rows}
    assert list(cells) == list(CONVENTIONS)
    for name, (_, eps, momentum, variance, axis, arrays) in cells.items():
        system = bn.convention(name)
        assert float(eps.split()[0]) == system.eps
        assert ("outside" in eps) == system.eps_outside
        assert momentum.split(" of ")[0].split()[0] == f"{system.momentum:g}"
        assert (momentum.split()[-1] == "new") == (system.momentum_weighs == "new batch")
        assert variance.split(",")[0] == ("unbiased" if system.unbiased else "biased")
        assert int(axis.replace("−", "-")) == system.axis
        names = system.names("{}")
        shown = [names[role] for role in ("gamma", "beta", "running_mean", "running_var")]
        assert re.findall(r"`([^`]+)`", arrays) == [
            shown_name.replace("{}/", "").replace("{}.", "") for shown_name in shown
        ]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("target", CONVENTIONS)
@pytest.mark.parametrize("source", CONVENTIONS)
def test_predictions_survive_every_pair(source, target, dtype, rng):
    """Each step rounds gamma at most once."""
    first = made(rng, dtype, eps=bn.convention(source).eps)
    x = wide(4 * rng.standard_normal((5, 9)))
    here = bn.from_state(bn.to_state(first, source, prefix="net/bn"), source, prefix="net/bn")
    there = bn.from_state(bn.to_state(here, target, prefix="a.b"), target, prefix="a/b")
    back = bn.from_state(bn.to_state(there, source), source)
    bound = ROUNDING[dtype] + DOUBLE * (dtype == np.float64)
    for layer, steps in ((here, 2), (there, 4), (back, 6)):
        assert_same(predicted(layer, x), predicted(first, x), first.beta, 1.01 * steps * bound)
        for name in ("beta", "running_mean", "running_var"):
            assert (getattr(layer, name) == getattr(first, name)).all()
    system = bn.convention(target)
    assert (there.eps, there.axis, there.unbiased) == (system.eps, system.axis, system.unbiased)
    assert there.dtype == dtype


def test_without_a_change_of_eps_no_bit_changes(layer):
    for name, system in CONVENTIONS.items():
        if not system.eps_outside:
            state = bn.to_state(layer, name, eps=layer.eps)
            assert (state[system.names()["gamma"]] == layer.gamma).all()
            again = bn.from_state(state, name, eps=layer.eps)
            assert (again.gamma == layer.gamma).all()


def test_a_change_of_eps_rounds_gamma_once(layer):
    for eps in (1e-8, 1e-5 * (1 + 1e-15), 1e-3, 0.1):
        gamma = bn.to_state(layer, "torch", eps=eps)["weight"]
        ratio = np.sqrt((wide(layer.running_var) + wide(eps)) / (wide(layer.running_var) + wide(1e-5)))
        exact = wide(layer.gamma) * ratio
        assert (np.abs(gamma - exact) <= (0.5 + 1e-6) * np.spacing(np.abs(gamma))).all()


def test_darknet_as_darknet_calculates(layer, rng):
    x = wide(4 * rng.standard_normal((6, 9)))
    state = {
        name: rng.uniform(0.5, 2, 9).astype(np.float32)
        for name in ("scales", "biases", "rolling_mean", "rolling_variance")
    }
    state["rolling_variance"][:3] = 0, 1e-14, 1e-9
    read = bn.from_state(state, "darknet")
    assert_same(predicted(read, x), darknet(state, x), state["biases"], 1.01 * 2.0**-24)
    assert_same(darknet(bn.to_state(read, "darknet"), x), darknet(state, x), state["biases"], 2.02 * 2.0**-24)
    assert_same(darknet(bn.to_state(layer, "darknet"), x), predicted(layer, x), layer.beta, 1.01 * 2.0**-24)
    listed = bn.from_state(
        [state[name] for name in ("biases", "scales", "rolling_mean", "rolling_variance")], "darknet"
    )
    assert (listed.gamma == read.gamma).all()


def test_caffe_as_caffe_calculates(layer, rng):
    x = wide(4 * rng.standard_normal((6, 9)))
    state = {name: rng.uniform(0.5, 2, 9) for name in ("mean", "variance", "scale", "bias")}
    state["factor"] = np.array([999.98236])
    read = bn.from_state(state, "caffe")
    assert_same(predicted(read, x), caffe(state, x), state["bias"], 1e-12)
    assert read.running_var == pytest.approx(state["variance"] / 999.98236, rel=1e-15)
    assert_same(caffe(bn.to_state(layer, "caffe"), x), predicted(layer, x), layer.beta, 1e-18)
    blobs = [state[name].reshape(1, 9, 1, 1) for name in ("mean", "variance")]
    assert (bn.from_state([*blobs, state["factor"]], "caffe").running_var == read.running_var).all()
    assert bn.from_state([*blobs, state["factor"]], "caffe").gamma is None
    four = bn.from_state([*blobs, state["factor"], state["scale"]], "caffe")
    assert (four.gamma is not None, four.beta) == (True, None)


def test_a_caffe_net_that_was_never_trained_has_a_factor_of_0(rng):
    state = {
        "mean": np.zeros(3),
        "variance": np.zeros(3),
        "factor": np.zeros(1),
        "scale": np.ones(3),
        "bias": np.zeros(3),
    }
    x = wide(rng.standard_normal((4, 3)))
    assert_same(predicted(bn.from_state(state, "caffe"), x), caffe(state, x), None, 1e-15)


@pytest.mark.parametrize("counter", [1, 3, 40])
def test_haiku_as_haiku_calculates(counter, rng):
    averages = {"mean": Average(0.9), "var": Average(0.9)}
    for _ in range(counter):
        values = {name: rng.uniform(1, 2, (1, 1, 1, 4)) for name in averages}
        for name, average in averages.items():
            average(values[name])
    scale, offset = rng.uniform(1, 2, (2, 1, 1, 1, 4))
    params = {"net/~/bn": {"scale": scale, "offset": offset}}
    kept = {
        f"net/~/bn/~/{name}_ema": {"hidden": ema.hidden, "average": ema.average, "counter": np.int32(counter)}
        for name, ema in averages.items()
    }
    read = bn.from_state(params | kept, "haiku", prefix="net/~/bn", momentum=0.9)
    assert (read.num_batches_tracked, read.momentum) == (counter, 0.1)
    x = wide(rng.standard_normal((2, 3, 3, 4)))
    told = {"scale": scale, "offset": offset}
    told |= {f"~/{name}_ema/average": ema.average for name, ema in averages.items()}
    assert_same(predicted(read, x), haiku(told, x), offset, 1e-15)
    written = bn.to_state(read, "haiku")
    assert_same(haiku(written, x), haiku(told, x), offset, 1e-15)
    for name, ema in averages.items():
        assert written[f"~/{name}_ema/hidden"] == pytest.approx(ema.hidden.ravel(), rel=1e-14)
        assert written[f"~/{name}_ema/counter"] == counter
        again = Average(0.9, written[f"~/{name}_ema/hidden"], int(written[f"~/{name}_ema/counter"]))
        assert again(1.0) == pytest.approx(ema(1.0).ravel(), rel=1e-14)


def test_haiku_does_not_forget_statistics_that_nobody_counted(layer):
    uncounted = bn.from_state(bn.to_state(layer, "keras"), "keras")
    written = bn.to_state(uncounted, "haiku")
    ema = Average(0.99, written["~/mean_ema/hidden"], int(written["~/mean_ema/counter"]))
    assert ema(0.0) == pytest.approx(0.99 * layer.running_mean, rel=1e-6)
    new = bn.to_state(bn.BatchNorm(3), "haiku")
    assert (new["~/mean_ema/counter"], new["~/var_ema/hidden"].any()) == (0, False)
    uncounted.momentum = 0.0
    assert bn.to_state(uncounted, "haiku")["~/mean_ema/counter"] == 0


@pytest.mark.parametrize(
    ("name", "momentum", "ours"),
    [("torch", 0.3, 0.3), ("keras", 0.99, 0.01), ("flax", 0.9, 0.1), ("tensorflow", 1.0, 1.0), ("caffe", 0.999, 0.001)],
)
def test_momentum_has_the_direction_of_the_system(name, momentum, ours, layer):
    read = bn.from_state(bn.to_state(layer, name), name, momentum=momentum)
    assert read.momentum == ours
    system = bn.convention(name)
    assert system.arguments(read)[system.momentum_argument] == momentum


def test_arguments_are_those_of_the_constructor(layer):
    layer.momentum = 0.2
    told = {name: system.arguments(layer, eps=0.5) for name, system in CONVENTIONS.items()}
    assert told["torch"] == {"num_features": 9, "eps": 0.5, "momentum": 0.2}
    assert told["keras"] == told["keras2"] == {"axis": 1, "epsilon": 0.5, "momentum": 0.8}
    assert told["nnx"] == {"num_features": 9, "axis": 1, "epsilon": 0.5, "momentum": 0.8}
    assert told["haiku"] == {"eps": 0.5, "decay_rate": 0.8}
    assert told["paddle"] == {"num_features": 9, "epsilon": 0.5, "momentum": 0.8}
    assert told["darknet"] == {}
    assert bn.convention("keras").arguments(layer)["epsilon"] == 0.001


def test_only_torch_has_the_mean_of_all_batches(layer):
    layer.momentum = None
    assert bn.convention("torch").arguments(layer)["momentum"] is None
    told = (
        "momentum=None, the mean of all batches, exists in torch but not in keras: give layer.momentum a number first"
    )
    with pytest.raises(ValueError, match=re.escape(told)):
        bn.convention("keras").arguments(layer)
    with pytest.raises(ValueError, match="exists in torch but not in haiku"):
        bn.to_state(layer, "haiku")
    assert bn.to_state(layer, "keras")["gamma"].shape == (9,)


def same(read, layer):
    return all(
        (getattr(read, name) == getattr(layer, name)).all() for name in ("gamma", "beta", "running_mean", "running_var")
    )


def test_states_of_every_form(layer, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    flat = bn.to_state(layer, "torch", prefix="layer1.0.bn1", eps=1e-5)
    assert next(iter(flat)) == "layer1.0.bn1.weight"
    np.savez(tmp_path / "a.npz", **flat, other=np.ones((2, 2)))
    safetensors.save_file(flat, tmp_path / "a.safetensors")
    slashes = {name.replace(".", "/"): values for name, values in flat.items()}
    nested = {"layer1": {"0": {"bn1": {name.rpartition(".")[2]: values for name, values in flat.items()}}}}
    with_index = {"layer1": {0: nested["layer1"]["0"]}}
    forms = [
        flat,
        slashes,
        nested,
        with_index,
        np.load(tmp_path / "a.npz"),
        safetensors.load_file(tmp_path / "a.safetensors"),
    ]
    for form in forms:
        for prefix in ("layer1.0.bn1", "layer1/0/bn1", "layer1.0.bn1."):
            read = bn.from_state(form, "torch", prefix=prefix)
            assert same(read, layer)
            assert (read.num_batches_tracked, read.training) == (41, True)
    for listed in (list(flat.values()), tuple(flat.values()), list(flat.values())[:4]):
        assert same(bn.from_state(listed, "torch"), layer)


def test_of_an_npz_file_only_the_layer_is_read(layer, tmp_path):
    np.savez(tmp_path / "a.npz", **bn.to_state(layer, "keras", prefix="bn", eps=1e-5), other=np.array([{}], object))
    with np.load(tmp_path / "a.npz") as file:
        assert same(bn.from_state(file, "keras", prefix="bn"), layer)
        with pytest.raises(ValueError, match="there are layers of keras at 'bn'"):
            bn.from_state(file, "keras", prefix="bm")


def test_lists_are_in_the_order_of_the_system(layer):
    gamma, beta, mean, var = layer.gamma, layer.beta, layer.running_mean, layer.running_var
    for name in ("keras", "keras2", "tensorflow", "onnx", "paddle"):
        assert same(bn.from_state([gamma, beta, mean, var], name), layer)
    assert same(bn.from_state([mean, var, [1.0], gamma, beta], "caffe", dtype=np.float32), layer)
    plain = bn.from_state([mean, var], "keras")
    assert (plain.gamma, plain.affine) == (None, False)


def test_colons_of_tensorflow(layer):
    state = bn.to_state(layer, "keras2", prefix="block/bn", eps=1e-5)
    assert list(state)[2] == "block/bn/moving_mean:0"
    for name in ("keras", "keras2"):
        assert same(bn.from_state(state, name, prefix="block/bn"), layer)


def test_what_arrays_may_be(layer):
    state = bn.to_state(layer, "torch", eps=1e-5)
    shaped = {name: values.reshape(1, -1, 1, 1) if values.ndim else values for name, values in state.items()}
    assert same(bn.from_state(shaped, "torch"), layer)
    assert bn.from_state({name: values.tolist() for name, values in state.items()}, "torch").dtype == np.float64
    assert bn.from_state(state | {"weight": layer.gamma.astype(float)}, "torch").dtype == np.float64
    assert bn.from_state(state | {"weight": np.arange(9)}, "torch").dtype == np.float32
    assert bn.from_state(state, "torch", dtype=np.float64).dtype == np.float64
    one = bn.from_state({"moving_mean": np.ones((1, 1)), "moving_variance": np.ones(1)}, "keras")
    assert one.num_features == 1


def test_arrays_of_16_bits():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for dtype in (np.float16, ml_dtypes.bfloat16):
        small = {name: np.full(4, 1.5, dtype) for name in ("running_mean", "running_var")}
        assert bn.from_state(small, "torch").running_var.tolist() == [1.5] * 4
    voids = {name: values.view("V2") for name, values in small.items()}  # as np.load returns bfloat16
    assert bn.from_state(voids, "torch").running_mean.tolist() == [1.5] * 4


def test_the_layer_has_arrays_of_its_own(layer):
    state = {name: values.copy() for name, values in bn.to_state(layer, "keras", eps=1e-5).items()}
    read = bn.from_state(state, "keras", eps=1e-5)
    read(np.ones((2, 3, 9), np.float32) * np.arange(3, dtype=np.float32)[:, None])
    read.gamma[:] = 7
    assert same(bn.from_state(state, "keras"), layer)
    bn.to_state(layer, "keras", eps=1e-5)["gamma"][:] = 7
    assert not (layer.gamma == 7).any()


def test_gamma_and_beta_are_there_if_the_state_has_them():
    statistics = {"moving_mean": np.zeros(2), "moving_variance": np.ones(2)}
    beta = bn.from_state(statistics | {"beta": np.ones(2)}, "keras")
    assert (beta.gamma.tolist(), beta.beta.tolist()) == ([1, 1], [1, 1])
    gamma = bn.from_state(statistics | {"gamma": np.ones(2)}, "keras")
    assert (gamma.gamma.tolist(), gamma.beta) == ([1, 1], None)
    plain = bn.from_state(statistics, "keras")
    assert (plain.gamma, plain.beta) == (None, None)
    assert list(bn.to_state(plain, "keras")) == ["moving_mean", "moving_variance"]
    assert list(bn.to_state(plain, "torch")) == ["weight", "running_mean", "running_var", "num_batches_tracked"]
    assert bn.to_state(plain, "onnx", eps=1e-3)["B"].tolist() == [0, 0]


def test_options_of_the_layer(layer):
    state = bn.to_state(layer, "keras")
    read = bn.from_state(state, "keras", axis=1, activation="relu", eps=0.25)
    assert (read.axis, read.activation, read.eps) == (1, "relu", 0.25)
    assert "unbiased=False" in repr(read)


def test_evaluation_is_that_of_the_formula(rng):
    layer = made(rng, np.float64)
    x = rng.standard_normal((4, 9))
    for name in CONVENTIONS:
        read = bn.from_state(bn.to_state(layer, name), name, axis=1).eval()
        assert np.allclose(read(x), layer.eval()(x), rtol=1e-12, atol=1e-12)


def test_a_variance_of_0_where_eps_is_0(layer):
    told = "eps must be positive if a running variance is 0, as in channel 0, got 0"
    with pytest.raises(ValueError, match=told):
        bn.to_state(layer, "torch", eps=0.0)
    with pytest.raises(ValueError, match=told):
        bn.from_state(bn.to_state(layer, "darknet"), "darknet", eps=0.0)
    layer.eps = 0.0
    assert bn.to_state(layer, "torch")["weight"][0] == 0  # as y = beta
    assert bn.to_state(layer, "torch", eps=0.0)["weight"][0] == layer.gamma[0]


def test_a_gamma_that_does_not_fit_is_an_error(layer):
    layer.gamma = np.full(9, 1e38)
    with pytest.raises(ValueError, match=r"gamma must be finite in float32, got 3\.1\d*e\+39 in channel 0"):
        bn.to_state(layer, "torch", eps=1e-2)


STATE = {
    "a/bn/gamma": np.ones(3),
    "a/bn/beta": np.ones(3),
    "a/bn/moving_mean": np.array([1.0, -2.0, 3.0]),
    "a/bn/moving_variance": np.ones(3),
    "a/conv/kernel": np.ones((3, 3)),
}


@pytest.mark.parametrize(
    ("change", "system", "prefix", "error", "told"),
    [
        (
            {"a/bn/moving_mean": np.ones(3), "a/bn/moving_variance": np.array([1.0, -2.0, 3.0])},
            *("keras", "a/bn", ValueError),
            "running_var must not be negative, got -2 in channel 1 of a/bn/moving_variance; are mean and var swapped?",
        ),
        (
            *({}, "keras", "a/bm", ValueError),
            "state must have 'a/bm/moving_mean', 'a/bm/moving_variance' (keras, prefix 'a/bm'), "
            "got there are layers of keras at 'a/bn'",
        ),
        (
            *({}, "torch", "a.bn", ValueError),
            "state must have 'a.bn.running_mean', 'a.bn.running_var' (torch, prefix 'a.bn'), "
            "got there are layers of keras at 'a/bn'",
        ),
        (
            *({"a/bn/moving_variance": None}, "keras", "a/bn", ValueError),
            "state must have 'a/bn/moving_variance' (keras, prefix 'a/bn'), "
            "got only 'a/bn/gamma', 'a/bn/beta', 'a/bn/moving_mean' of that layer; there are 'a/bn/gamma'",
        ),
        (
            *({"a/bn/gamma": np.ones(4)}, "keras", "a/bn", ValueError),
            "the arrays of a layer must have the same number of channels, got a/bn/gamma (4,), a/bn/beta (3,)",
        ),
        (
            *({"a/bn/gamma": np.ones((3, 3))}, "keras", "a/bn", ValueError),
            "a/bn/gamma must have one number per channel, shape (C,), got shape (3, 3)",
        ),
        (
            *({"a/bn/gamma": np.float64(1)}, "keras", "a/bn", ValueError),
            "a/bn/gamma must have one number per channel, shape (C,), got shape ()",
        ),
        (
            {"a/bn/gamma": ["1", "2", "3"]},
            "keras",
            "a/bn",
            TypeError,
            "a/bn/gamma must hold real numbers, got dtype <U1",
        ),
        (
            {"a/bn/beta": np.ones(3, complex)},
            "keras",
            "a/bn",
            TypeError,
            "must hold real numbers, got dtype complex128",
        ),
        ({"a/bn/beta": [[1], [2, 3]]}, "keras", "a/bn", ValueError, "a/bn/beta must be an array of numbers: "),
        ({"a/bn/beta": np.ma.ones(3)}, "keras", "a/bn", TypeError, "a/bn/beta must not be a masked array"),
        (
            *({"a/bn/beta": np.array([1, np.nan, 1])}, "keras", "a/bn", ValueError),
            "a/bn/beta must be finite in float64, got nan in channel 1",
        ),
        ({"a.bn.beta": np.ones(3)}, "keras", "a/bn", ValueError, "got both 'a/bn/beta' and 'a.bn.beta'"),
    ],
)
def test_what_is_wrong_is_said_with_what_is_there(change, system, prefix, error, told):
    state = {name: values for name, values in {**STATE, **change}.items() if values is not None}
    with pytest.raises(error) as caught:
        bn.from_state(state, system, prefix=prefix)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        (
            (STATE, "pytorch"),
            ValueError,
            "convention must be one of torch, keras, keras2, tensorflow, flax, nnx, haiku, ",
        ),
        (("bn", "torch"), TypeError, "state must be a mapping or a sequence of arrays, got str"),
        ((np.ones((4, 3)), "torch"), TypeError, "got ndarray"),
        (
            ([np.ones(3)] * 4, "flax"),
            ValueError,
            "state must be a mapping, got a sequence: flax has no order of arrays",
        ),
        (([np.ones(3)] * 3, "keras"), ValueError, "or (running_mean, running_var) in keras, got 3 arrays"),
        (({}, "torch"), ValueError, "got there is nothing"),
        (([1.0, 1.0, [1.0], [1.0]], "onnx"), ValueError, "gamma must have one number per channel"),
        (
            ([[1.0], [1.0], [1.0], [1.0], -1], "torch"),
            ValueError,
            "num_batches_tracked must be one integer, at least 0, got",
        ),
        (([[1.0], [1.0], -1.0], "caffe"), ValueError, "factor must be one number, at least 0, got -1.0"),
    ],
)
def test_wrong_arguments(arguments, error, told):
    with pytest.raises(error) as caught:
        bn.from_state(*arguments)
    assert told in str(caught.value)


def test_numbers_are_checked():
    with pytest.raises(ValueError, match="momentum, the weight of the old value, must be between 0 and 1, got 2"):
        bn.from_state(STATE, "keras", prefix="a/bn", momentum=2)
    with pytest.raises(ValueError, match="eps must be finite and at least 0"):
        bn.from_state(STATE, "keras", prefix="a/bn", eps=-1.0)
    with pytest.raises(ValueError, match="eps must be finite and at least 0"):
        bn.to_state(bn.BatchNorm(3), "keras", eps=np.nan)
    with pytest.raises(ValueError, match="prefix must come with a mapping, got 'bn' with a sequence"):
        bn.from_state([np.ones(3)] * 4, "keras", prefix="bn")
    with pytest.raises(ValueError, match="layer must have running statistics"):
        bn.to_state(bn.BatchNorm(3, track_running_stats=False), "keras")


def test_a_system_of_ones_own(layer):
    mxnet = replace(bn.convention("keras"), name="mxnet", momentum=0.9, axis=1, running_var="{}/moving_var")
    assert bn.convention(mxnet) is mxnet
    state = bn.to_state(layer, mxnet, prefix="bn0")
    assert "bn0/moving_var" in state
    read = bn.from_state(state, mxnet, prefix="bn0")
    assert (read.axis, read.momentum, read.eps) == (1, 0.1, 0.001)


def test_unlike_in_the_paper_a_running_variance_may_be_biased(rng):
    """The flag reaches the updates of the layer."""
    x = rng.standard_normal((5, 2))
    for name, ddof in (("keras", 0), ("keras2", 1)):
        read = bn.from_state([np.zeros(2), np.ones(2)], name, momentum=0.0)
        read(x)
        assert read.running_var == pytest.approx(x.var(axis=0, ddof=ddof))
