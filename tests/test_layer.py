"""The layer: PyTorch's semantics, its state dict, and state that changes only when everything went well."""

import copy
import pickle

import numpy as np
import pytest

import batchnorm as bn


def snapshot(layer):
    return pickle.dumps((layer.state_dict(), layer.num_batches_tracked, layer.training))


@pytest.fixture
def batches(rng):
    return [(rng.standard_normal((n, 4, 3)) * 2 + 1).astype(np.float32) for n in (8, 5, 3)]


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, 0.37])
def test_running_statistics_follow_the_batches(momentum, batches):
    layer = bn.BatchNorm(4, momentum=momentum, dtype=np.float64)
    mean, var = np.zeros(4), np.ones(4)
    for x in batches:
        layer(x)
        wide = x.astype(np.float64)
        mean = (1 - momentum) * mean + momentum * wide.mean(axis=(0, 2))
        var = (1 - momentum) * var + momentum * wide.var(axis=(0, 2), ddof=1)
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-14)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-14)
    assert layer.num_batches_tracked == 3


def test_momentum_none_is_the_mean_of_all_batches(batches):
    layer = bn.BatchNorm(4, momentum=None, dtype=np.float64)
    for x in batches:
        layer(x)
    wide = [x.astype(np.float64) for x in batches]
    np.testing.assert_allclose(layer.running_mean, np.mean([x.mean(axis=(0, 2)) for x in wide], axis=0), rtol=1e-13)
    np.testing.assert_allclose(
        layer.running_var, np.mean([x.var(axis=(0, 2), ddof=1) for x in wide], axis=0), rtol=1e-13
    )


def test_biased_running_variance_is_a_choice(batches):
    mean, var = np.zeros(4), np.zeros(4)
    bn.update_running(mean, var, bn.forward(batches[0])[1], momentum=1.0, unbiased=False)
    np.testing.assert_allclose(var, batches[0].astype(np.float64).var(axis=(0, 2)), rtol=1e-13)


def test_training_and_evaluation_are_the_functions(batches):
    layer = bn.BatchNorm(4)
    layer.gamma[...], layer.beta[...] = [1, 2, 3, 4], [4, 3, 2, 1]
    x, dy = batches[0], batches[0] ** 2
    y, saved = bn.forward(x, layer.gamma, layer.beta)
    assert layer(x).tobytes() == y.tobytes()
    dx, dgamma, dbeta = bn.backward(dy, saved)
    assert layer.backward(dy).tobytes() == dx.tobytes()
    assert (layer.dgamma.tobytes(), layer.dbeta.tobytes()) == (dgamma.tobytes(), dbeta.tobytes())
    assert layer.eval() is layer
    state = snapshot(layer)
    fixed = layer.running_mean, layer.running_var
    assert layer(x).tobytes() == bn.inference(x, *fixed, layer.gamma, layer.beta).tobytes()
    dx, dgamma, dbeta = bn.inference_backward(dy, x, *fixed, layer.gamma)
    assert layer.backward(dy).tobytes() == dx.tobytes()
    assert (layer.dgamma.tobytes(), layer.dbeta.tobytes()) == (dgamma.tobytes(), dbeta.tobytes())
    assert snapshot(layer) == state
    assert layer.train().training


def test_backward_uses_the_parameters_of_its_own_forward(batches):
    layer = bn.BatchNorm(4).eval()
    layer(batches[0])
    expected = layer.backward(batches[0])
    layer(batches[0])
    layer.gamma *= 3
    layer.running_var += 1
    assert layer.backward(batches[0]).tobytes() == expected.tobytes()


def test_without_parameters_and_without_statistics(batches):
    layer = bn.BatchNorm(4, affine=False, track_running_stats=False)
    assert layer.state_dict() == {}
    assert layer.gamma is layer.beta is layer.running_mean is layer.running_var is None
    expected = bn.forward(batches[0])[0].tobytes()
    assert layer(batches[0]).tobytes() == expected
    assert layer.eval()(batches[0]).tobytes() == expected
    assert layer.backward(batches[0]).shape == batches[0].shape
    assert layer.dgamma is layer.dbeta is None
    tracked = bn.BatchNorm(4, affine=False).eval()
    tracked(batches[0])
    tracked.backward(batches[0])
    assert tracked.dgamma is tracked.dbeta is None


def test_one_value_per_channel_is_refused_in_training():
    layer = bn.BatchNorm(4)
    before = snapshot(layer)
    message = r"more than one value per channel, got x of shape \(1, 4\) with axis=1; use a larger batch, or eval\(\)"
    with pytest.raises(ValueError, match=message):
        layer(np.ones((1, 4), np.float32))
    assert snapshot(layer) == before
    assert layer.eval()(np.ones((1, 4), np.float32)).shape == (1, 4)
    with pytest.raises(ValueError, match="more than one value"):
        bn.BatchNorm(4, track_running_stats=False).eval()(np.ones((1, 4, 1)))
    assert (bn.forward(np.ones((1, 4)), beta=np.arange(4.0))[0] == np.arange(4)).all()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_empty_batch_changes_nothing(momentum, batches):
    layer = bn.BatchNorm(4, momentum=momentum)
    layer(batches[0])
    before = snapshot(layer)
    empty = np.empty((0, 4, 3), np.float32)
    assert layer(empty).shape == (0, 4, 3)
    assert layer.backward(empty).shape == (0, 4, 3)
    assert not layer.dgamma.any()
    assert not layer.dbeta.any()
    assert snapshot(layer) == before


def test_channels_are_checked_before_anything_changes(batches):
    layer = bn.BatchNorm(4)
    layer(batches[0])
    before = snapshot(layer)
    for x in (np.ones((2, 5)), np.ones(4), np.ones((2, 4), int), np.float64(3)):
        with pytest.raises((ValueError, TypeError)):
            layer(x)
    with pytest.raises(ValueError, match="out must have shape"):
        layer(batches[1], out=np.empty(3, np.float32))
    assert snapshot(layer) == before
    with pytest.raises(ValueError, match=r"x must have 4 channels along axis 1, got shape \(2, 5\)"):
        layer(np.ones((2, 5)))


def test_backward_needs_a_call():
    with pytest.raises(RuntimeError, match="needs a call of the layer before it"):
        bn.BatchNorm(4).backward(np.ones((2, 4)))


def test_a_failed_backward_keeps_the_gradients(batches):
    layer = bn.BatchNorm(4)
    layer(batches[0])
    layer.backward(batches[0])
    before = layer.dgamma.copy()
    with pytest.raises(ValueError, match="dy must have the shape of x"):
        layer.backward(batches[1])
    np.testing.assert_array_equal(layer.dgamma, before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_features": -1}, ValueError, "num_features must be at least 0, got -1"),
        ({"num_features": 2.0}, TypeError, "num_features must be an integer, got float"),
        ({"axis": None}, TypeError, "axis must be an integer, got NoneType"),
        ({"eps": -1.0}, ValueError, "eps must be finite"),
        ({"momentum": 1.5}, ValueError, "momentum, the weight of the new batch"),
        ({"momentum": "0.1"}, TypeError, "momentum must be a number, got str"),
        ({"dtype": np.float16}, TypeError, "dtype must be float32 or float64, got float16"),
        ({"dtype": int}, TypeError, "dtype must be float32 or float64, got int64"),
    ],
    ids=str,
)
def test_bad_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        bn.BatchNorm(**{"num_features": 3, **arguments})


def test_state_dict_round_trip(batches):
    layer = bn.BatchNorm(4)
    layer.gamma[...] = [1, 2, 3, 4]
    for x in batches:
        layer(x)
    state = layer.state_dict()
    assert {name: (value.shape, str(value.dtype)) for name, value in state.items()} == {
        "weight": ((4,), "float32"),
        "bias": ((4,), "float32"),
        "running_mean": ((4,), "float32"),
        "running_var": ((4,), "float32"),
        "num_batches_tracked": ((), "int64"),
    }
    other = bn.BatchNorm(4)
    other.load_state_dict(state)
    state["weight"][...] = -1
    assert (layer.gamma == [1, 2, 3, 4]).all()
    assert snapshot(other) == snapshot(layer)
    assert other.eval()(batches[0]).tobytes() == layer.eval()(batches[0]).tobytes()


GOOD = bn.BatchNorm(3).state_dict()
BAD_STATES = {
    "missing": (lambda s: s.pop("bias"), ValueError, r"missing \['bias'\]"),
    "unknown": (lambda s: s.update(extra=1), ValueError, r"unknown \['extra'\]"),
    "shape": (lambda s: s.update(weight=np.ones(4, "f4")), ValueError, r"weight must have shape \(3,\), got \(4,\)"),
    "dtype": (lambda s: s.update(bias=np.ones(3)), TypeError, "bias must have dtype float32, got float64"),
    "integers": (lambda s: s.update(bias=np.ones(3, int)), TypeError, "bias must have dtype float32"),
    "NaN": (lambda s: s.update(running_mean=np.full(3, np.nan, "f4")), ValueError, "running_mean must be finite"),
    "infinite": (lambda s: s.update(weight=np.full(3, np.inf, "f4")), ValueError, "weight must be finite, got inf"),
    "negative variance": (
        lambda s: s.update(running_var=np.float32([1, -2, 3])),
        ValueError,
        "running_var must not be negative, got -2",
    ),
    "counter negative": (lambda s: s.update(num_batches_tracked=-1), ValueError, "num_batches_tracked must be one"),
    "counter an array": (lambda s: s.update(num_batches_tracked=[1, 2]), ValueError, "num_batches_tracked must be one"),
    "counter a float": (
        lambda s: s.update(num_batches_tracked=1.0),
        TypeError,
        "num_batches_tracked must be an integer",
    ),
}


@pytest.mark.parametrize(("spoil", "error", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_bad_states_are_refused_whole(spoil, error, message):
    layer = bn.BatchNorm(3)
    layer(np.arange(12, dtype=np.float32).reshape(4, 3))
    before = snapshot(layer)
    state = {name: value + 1 for name, value in GOOD.items()}
    spoil(state)
    with pytest.raises(error, match=message):
        layer.load_state_dict(state)
    assert snapshot(layer) == before


def test_saved_can_be_copied_whatever_the_order_of_its_axes(rng):
    """pickle writes an array whose axes are permuted in another order than it lies in memory."""
    x, dy = (np.moveaxis(rng.standard_normal((4, 5, 6, 3)), -1, 1) for _ in range(2))
    _, saved = bn.forward(x)
    expected = bn.backward(dy, saved)
    for clone in (pickle.loads(pickle.dumps(saved)), pickle.loads(pickle.dumps(saved, 2)), copy.deepcopy(saved)):
        for got, want in zip(bn.backward(dy, clone), expected, strict=True):
            assert (got is None and want is None) or got.tobytes() == want.tobytes()


def test_layers_and_saved_can_be_copied(batches):
    layer = bn.BatchNorm(4)
    layer(batches[0])
    dx = layer.backward(batches[0])
    _, saved = bn.forward(batches[0])
    for clone in (pickle.loads(pickle.dumps(saved)), copy.deepcopy(saved)):
        assert bn.backward(batches[0], clone).dx.tobytes() == dx.tobytes()
    for clone in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert snapshot(clone) == snapshot(layer)
        clone(batches[0])
        assert clone.backward(batches[0]).tobytes() == dx.tobytes()
        assert clone.num_batches_tracked == layer.num_batches_tracked + 1
