"""The layer: PyTorch's semantics, its state dict, and state that changes only if everything succeeds."""

import copy
import pickle
import re
import sys
import weakref

import numpy as np
import pytest
from oracle import FLOAT32_STATISTICS

import batchnorm as bn

pytestmark = pytest.mark.once  # numbers per channel and calls of functions that are tested on every level


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
    np.testing.assert_allclose(layer.running_mean, mean, rtol=FLOAT32_STATISTICS)
    np.testing.assert_allclose(layer.running_var, var, rtol=FLOAT32_STATISTICS)
    assert layer.num_batches_tracked == 3


def test_momentum_none_is_the_mean_of_all_batches(batches):
    layer = bn.BatchNorm(4, momentum=None, dtype=np.float64)
    for x in batches:
        layer(x)
    wide = [x.astype(np.float64) for x in batches]
    mean = np.mean([x.mean(axis=(0, 2)) for x in wide], axis=0)
    var = np.mean([x.var(axis=(0, 2), ddof=1) for x in wide], axis=0)
    np.testing.assert_allclose(layer.running_mean, mean, rtol=FLOAT32_STATISTICS)
    np.testing.assert_allclose(layer.running_var, var, rtol=FLOAT32_STATISTICS)


def test_biased_running_variance_is_a_choice(batches):
    mean, var = np.zeros(4), np.zeros(4)
    bn.update_running(mean, var, bn.forward(batches[0])[1], momentum=1.0, unbiased=False)
    np.testing.assert_allclose(var, batches[0].astype(np.float64).var(axis=(0, 2)), rtol=FLOAT32_STATISTICS)


def test_training_and_evaluation_are_the_functions(batches):
    layer = bn.BatchNorm(4)
    layer.gamma[...], layer.beta[...] = [1, 2, 3, 4], [4, 3, 2, 1]
    x, dy = batches[0], batches[0] ** 2
    y, saved = bn.forward(x, layer.gamma, layer.beta)
    assert layer(x).tobytes() == y.tobytes()
    dx, dgamma, dbeta = bn.backward(dy, saved)
    assert layer.backward(dy).tobytes() == dx.tobytes()
    assert (layer.dgamma.tobytes(), layer.dbeta.tobytes()) == (dgamma.tobytes(), dbeta.tobytes())
    assert layer.eval(keep_input=True) is layer
    state = snapshot(layer)
    fixed = layer.running_mean, layer.running_var
    assert layer(x).tobytes() == bn.inference(x, *fixed, layer.gamma, layer.beta).tobytes()
    dx, dgamma, dbeta = bn.inference_backward(dy, x, *fixed, layer.gamma)
    assert layer.backward(dy).tobytes() == dx.tobytes()
    assert (layer.dgamma.tobytes(), layer.dbeta.tobytes()) == (dgamma.tobytes(), dbeta.tobytes())
    assert snapshot(layer) == state
    assert layer.train().training


def test_backward_uses_the_parameters_of_its_own_forward(batches):
    layer = bn.BatchNorm(4).eval(keep_input=True)
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
    assert layer.eval(keep_input=True)(batches[0]).tobytes() == expected
    assert layer.backward(batches[0]).shape == batches[0].shape
    assert layer.dgamma is layer.dbeta is None
    tracked = bn.BatchNorm(4, affine=False).eval(keep_input=True)
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
    "complex": (
        lambda s: s.update(bias=np.ones(3, complex)),
        TypeError,
        "bias must hold real numbers, got dtype compl",
    ),
    "None": (lambda s: s.update(bias=None), TypeError, "bias must hold real numbers, got None"),
    "masked": (lambda s: s.update(bias=np.ma.ones(3)), TypeError, "bias must not be a masked array"),
    "too large for float32": (
        lambda s: s.update(bias=np.full(3, 1e300)),
        ValueError,
        "bias must be finite, got inf in float32",
    ),
    "NaN": (lambda s: s.update(running_mean=np.full(3, np.nan, "f4")), ValueError, "running_mean must be finite"),
    "infinite": (lambda s: s.update(weight=np.full(3, np.inf, "f4")), ValueError, "weight must be finite, got inf"),
    "negative variance": (
        lambda s: s.update(running_var=np.float32([1, -2, 3])),
        ValueError,
        "running_var must not be negative, got -2",
    ),
    "counter negative": (lambda s: s.update(num_batches_tracked=-1), ValueError, "num_batches_tracked must be one"),
    "counter without room": (
        lambda s: s.update(num_batches_tracked=2**63 - 1),
        ValueError,
        r"num_batches_tracked must be one number, 0 to 2\*\*62, got 9223372036854775807",
    ),
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


# Assigning, and PyTorch's other names.


@pytest.mark.parametrize("name", ["gamma", "beta", "running_mean", "running_var"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64", ">f8"])
def test_what_is_assigned_is_copied_in_the_dtype_of_the_layer(name, dtype):
    layer = bn.BatchNorm(4)
    own = getattr(layer, name)
    setattr(layer, name, np.arange(4).astype(dtype)[::-1])
    assert getattr(layer, name) is own
    assert own.dtype == np.float32
    assert own.tolist() == [3, 2, 1, 0]
    setattr(layer, name, own[::-1])
    assert own.tolist() == [0, 1, 2, 3]


def test_an_optimizer_may_hold_the_arrays(batches, tmp_path):
    layer = bn.BatchNorm(4)
    held = [layer.gamma, layer.beta, layer.running_mean, layer.running_var]
    layer(batches[0])
    layer.backward(batches[1][:1].repeat(8, axis=0))
    layer.gamma = layer.gamma - np.float64(0.1) * layer.dgamma
    layer.beta -= 0.1 * layer.dbeta
    layer.save(tmp_path / "layer")
    layer.recalibrate(batches, progress=False)
    layer.reset_parameters()
    layer.load_state_dict(bn.BatchNorm.load(tmp_path / "layer").state_dict())
    layer(batches[1])
    now = [layer.gamma, layer.beta, layer.running_mean, layer.running_var]
    assert all(one is other for one, other in zip(now, held, strict=True))
    held[0][...] = 0
    assert (layer(batches[0]) == layer.beta.reshape(4, 1)).all()


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, TypeError, "gamma must hold real numbers, got None"),
        (1.0, ValueError, r"gamma must have shape \(4,\), got \(\)"),
        (np.ones(3), ValueError, r"gamma must have shape \(4,\), got \(3,\)"),
        (np.ones(4, complex), TypeError, "gamma must hold real numbers, got dtype complex128"),
        (np.ones(4, object), TypeError, "gamma must hold real numbers, got dtype object"),
        (["1"] * 4, TypeError, "gamma must hold real numbers, got dtype <U1"),
    ],
    ids=str,
)
def test_what_does_not_fit_cannot_be_assigned(value, error, message):
    layer = bn.BatchNorm(4)
    before = snapshot(layer)
    with pytest.raises(error, match=message):
        layer.gamma = value
    assert snapshot(layer) == before
    with pytest.raises(ValueError, match="this layer was made without gamma"):
        bn.BatchNorm(4, affine=False).gamma = np.ones(4)
    for number in (2, -0.1, np.nan):
        with pytest.raises(ValueError, match="momentum, the weight of the new batch"):
            layer.momentum = number
    with pytest.raises(ValueError, match="num_batches_tracked must be one number"):
        layer.num_batches_tracked = -1


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32"])
def test_a_state_of_another_dtype_is_converted(dtype):
    layer = bn.BatchNorm(3)
    layer.load_state_dict(
        {name: np.asarray(value).astype(dtype) + 1 for name, value in GOOD.items()} | {"num_batches_tracked": 7}
    )
    assert layer.gamma.dtype == np.float32
    assert (layer.gamma.tolist(), layer.running_var.tolist()) == ([2, 2, 2], [2, 2, 2])


def test_a_state_without_a_counter_begins_at_0(batches):
    layer = bn.BatchNorm(4)
    layer(batches[0])
    state = layer.state_dict()
    del state["num_batches_tracked"]
    layer.load_state_dict(state)
    assert layer.num_batches_tracked == 0
    assert layer.running_mean.any()


def test_updates_can_be_stopped_later(batches, tmp_path):
    """As in PyTorch: training goes on with the statistics of each batch, evaluation with the running ones."""
    layer = bn.BatchNorm(4)
    layer(batches[0])
    before = layer.state_dict()
    layer.track_running_stats = False
    assert layer(batches[1]).tobytes() == bn.forward(batches[1], layer.gamma, layer.beta)[0].tobytes()
    layer.save(tmp_path / "layer")
    loaded = bn.BatchNorm.load(tmp_path / "layer")
    loaded(batches[1])
    for now in (layer.state_dict(), loaded.state_dict()):
        assert {name: value.tobytes() for name, value in now.items()} == {
            name: value.tobytes() for name, value in before.items()
        }
    expected = bn.inference(batches[1], before["running_mean"], before["running_var"])
    assert layer.eval()(batches[1]).tobytes() == expected.tobytes()
    loaded.track_running_stats = True
    loaded(batches[1])
    assert loaded.num_batches_tracked == 2


def test_without_bias(batches, tmp_path):
    layer = bn.BatchNorm(4, bias=False)
    layer.gamma *= 2
    assert layer.beta is None
    assert list(layer.state_dict()) == ["weight", "running_mean", "running_var", "num_batches_tracked"]
    assert layer(batches[0]).tobytes() == bn.forward(batches[0], layer.gamma)[0].tobytes()
    layer.backward(batches[0])
    assert layer.dgamma is not None
    assert layer.dbeta is None
    layer.save(tmp_path / "layer")
    loaded = bn.BatchNorm.load(tmp_path / "layer")
    assert repr(loaded) == repr(layer)
    assert repr(layer).endswith("dtype=float32, bias=False)")
    evaluated = loaded.eval(keep_input=True)(batches[0])
    assert evaluated.tobytes() == layer.eval()(batches[0]).tobytes()
    loaded.backward(batches[0])
    assert loaded.dbeta is None


def test_biased_running_variance(batches, tmp_path):
    layer = bn.BatchNorm(4, unbiased=False, momentum=1.0, dtype=np.float64)
    layer(batches[0])
    expected = batches[0].astype(np.float64).var(axis=(0, 2))
    np.testing.assert_allclose(layer.running_var, expected, rtol=FLOAT32_STATISTICS)
    layer.save(tmp_path / "layer")
    assert repr(bn.BatchNorm.load(tmp_path / "layer")) == repr(layer)
    assert repr(layer).endswith("dtype=float64, unbiased=False)")


def test_resets(batches):
    layer = bn.BatchNorm(4)
    new = snapshot(layer)
    layer(batches[0])
    layer.gamma *= 2
    layer.reset_running_stats()
    assert (layer.gamma == 2).all()
    assert layer.running_mean.tolist() == [0] * 4
    assert layer.running_var.tolist() == [1] * 4
    assert layer.num_batches_tracked == 0
    layer(batches[0])
    layer.reset_parameters()
    assert snapshot(layer) == new
    bn.BatchNorm(4, affine=False, track_running_stats=False).reset_parameters()


def test_names_of_derived_classes():
    class Frozen(bn.BatchNorm):
        pass

    assert repr(Frozen(2)).startswith("Frozen(2, axis=1")


@pytest.mark.parametrize(("axis", "shape", "hint"), [(1, (2, 5, 5, 3), "axis=-1?"), (-1, (2, 3, 5, 5), "axis=1?")])
def test_the_other_layout_is_suggested(axis, shape, hint):
    with pytest.raises(ValueError, match=r"x must have 3 channels along axis .*; " + re.escape(hint)):
        bn.BatchNorm(3, axis=axis)(np.ones(shape))
    with pytest.raises(ValueError, match=r"got shape \(2, 5\)$"):
        bn.BatchNorm(3, axis=axis)(np.ones((2, 5)))


# What is kept for backward.


def test_no_copy_holds_the_last_batch(rng):
    layer = bn.BatchNorm(3)
    layer(rng.standard_normal((100_000, 3)))
    assert len(pickle.dumps(layer)) < 2000
    for clone in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with pytest.raises(RuntimeError, match="needs a call of the layer before it"):
            clone.backward(np.ones((100_000, 3)))
        clone.gamma += 1
        clone.reset_running_stats()
    assert (layer.gamma == 1).all()
    assert layer.num_batches_tracked == 1
    layer.backward(np.ones((100_000, 3)))


@pytest.mark.parametrize("settings", [{}, {"track_running_stats": False}], ids=str)
def test_evaluation_keeps_x_only_where_asked(settings, rng):
    layer, dy = bn.BatchNorm(3, **settings), np.ones((8, 3))
    for keep in (False, True, False):
        x = rng.standard_normal((8, 3))
        layer.eval(keep_input=keep)(x)
        there = weakref.ref(x)
        del x
        assert (there() is not None) == keep
        if keep:
            assert layer.backward(dy).shape == dy.shape
        else:
            with pytest.raises(RuntimeError, match=r"layer.eval\(keep_input=True\)"):
                layer.backward(dy)
    assert not layer.eval(keep_input=True).train().keep_input


def test_x_that_was_overwritten_is_not_used(rng):
    """y in the place of x is allowed in evaluation; the gradient of gamma would be wrong then."""
    layer, x = bn.BatchNorm(3).eval(keep_input=True), rng.standard_normal((8, 3))
    layer(x)
    layer(x, out=np.empty_like(x))
    layer.backward(x)
    layer(x, out=x)
    with pytest.raises(RuntimeError, match="backward needs x and add, but the last call wrote y over one of them"):
        layer.backward(x)
    with pytest.raises(ValueError, match="out must not overlap x"):
        layer.train()(x, out=x)


# Files that `load` would refuse.

UNSOUND = {
    "NaN": (lambda layer: layer.running_mean.fill(np.nan), "running_mean must be finite, got nan"),
    "infinite": (lambda layer: layer.gamma.fill(np.inf), "weight must be finite, got inf"),
    "negative variance": (lambda layer: layer.running_var.fill(-1), "running_var must not be negative"),
    "eps": (lambda layer: setattr(layer, "eps", -1.0), "eps must be finite and at least 0"),
    "eps that is text": (lambda layer: setattr(layer, "eps", "small"), "could not convert"),
    "channels": (lambda layer: setattr(layer, "num_features", 5), "num_features is 5, but arrays have shapes"),
}


@pytest.mark.parametrize(("spoil", "message"), UNSOUND.values(), ids=UNSOUND)
def test_save_does_not_replace_a_file_by_one_that_load_refuses(spoil, message, tmp_path):
    layer, path = bn.BatchNorm(3), tmp_path / "layer"
    layer.save(path)
    sound = path.read_bytes()
    spoil(layer)
    with pytest.raises(ValueError, match=f"{message}.*") as caught:
        layer.save(path)
    assert path.read_bytes() == sound
    assert [file.name for file in tmp_path.iterdir()] == ["layer"]
    assert "no file was written" in str(caught.value)


# Signals. The interruptions here come before any bytecode; tests/support/interruptions.py sends real ones.


class Stop(BaseException):
    pass


def interrupted(call, when):
    """Run `call` with an exception before its bytecode number `when` in the layer; whether it came so far."""
    seen = 0

    def trace(frame, event, argument):
        nonlocal seen
        if frame.f_code.co_filename.endswith(("batchnorm/layer.py", "batchnorm/_state.py")):
            frame.f_trace_opcodes = True
            if event == "opcode":
                seen += 1
                if seen == when:
                    raise Stop
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 looks for such frames when tracing starts
    sys.settrace(trace)
    try:
        call()
    except Stop:
        return True
    finally:
        sys.settrace(before)
    return False


def numbered(k):
    """A state in which everything is k."""
    return {name: np.full_like(value, k) for name, value in GOOD.items()}


CHANGES = {
    "training": lambda layer, x: layer(x),
    "load_state_dict": lambda layer, _: layer.load_state_dict(numbered(2)),
    "reset_parameters": lambda layer, _: layer.reset_parameters(),
    "reset_running_stats": lambda layer, _: layer.reset_running_stats(),
    "recalibrate": lambda layer, x: layer.recalibrate([x], progress=False),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_exception_anywhere_leaves_the_old_state_or_the_new_one(change, rng):
    x = rng.standard_normal((4, 3)).astype(np.float32)

    def layer():
        made = bn.BatchNorm(3)
        made.load_state_dict(numbered(1))
        return made

    whole = layer()
    old = snapshot(whole)
    change(whole, x)
    allowed = {old, snapshot(whole)}
    assert len(allowed) == 2
    when, came = 1, set()
    while True:
        one = layer()
        if not interrupted(lambda one=one: change(one, x), when):
            break
        came.add(snapshot(one))
        when += 1
    assert came == allowed
    assert when > 30
