"""Layers that the systems themselves made, predicted and trained, where they are installed: `nox -s frameworks`.

Predictions of both sides are held against the same formula in long double, so that each has to be right by itself.
"""

import os

import numpy as np
import pytest

import batchnorm as bn

PREDICTED = 2.0**-21
"""Of y, relative to its terms: what float32 makes of a handful of operations."""
FOLLOWED = 1e-5
"""Of running statistics, whose batch variances these systems calculate in float32."""

pytestmark = [
    pytest.mark.once,  # what is compared is not the kernels
    pytest.mark.filterwarnings("ignore"),  # they are those of these systems
]


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(1).normal(1, 2, (8, 6, 5, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def trained():
    """gamma, beta, mean and variance, the latter from far below eps on."""
    rng = np.random.default_rng(2)
    gamma, beta, mean = rng.uniform(0.5, 2, 3), rng.standard_normal(3), rng.standard_normal(3)
    return [values.astype(np.float32) for values in (gamma, beta, mean, np.array([1e-6, 0.3, 4.0]))]


def assert_predicts(y, layer, x, axis=-1):
    """y is act(gamma·(x − μ)/√(σ² + eps) + beta), within float32's rounding of its terms."""
    shape = [-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]
    gamma, beta, mean, var = (
        np.asarray(getattr(layer, name), np.longdouble).reshape(shape)
        for name in ("gamma", "beta", "running_mean", "running_var")
    )
    scale = gamma / np.sqrt(var + np.longdouble(layer.eps))
    size = np.abs(scale) * (np.abs(x) + np.abs(mean)) + np.abs(beta)
    error = float((np.abs(np.asarray(y, np.float64) - (scale * (x - mean) + beta)) / size).max())
    assert error <= PREDICTED
    return error


@pytest.fixture(scope="module")
def worst():
    """The largest error of each side, printed at the end with -s."""
    errors = {}
    yield lambda system, *values: errors.setdefault(system, []).append(max(values))
    for system, values in errors.items():
        print(f"\n{system}: {max(values):.1e}", end="")


def check(system, state, predict, x, worst, *, axis=-1, prefix="", **options):
    """A system's state, read: both predict the same. Returns the layer."""
    layer = bn.from_state(state, system, prefix=prefix, axis=axis, **options).eval()
    worst(system, assert_predicts(predict(x), layer, x, axis), assert_predicts(layer(x), layer, x, axis))
    return layer


def other_layer(trained, eps=1e-4):
    """A layer whose eps is no system's default, to be written."""
    layer = bn.BatchNorm(3, axis=-1, eps=eps)
    layer.gamma, layer.beta, layer.running_mean, layer.running_var = trained
    layer.num_batches_tracked = 12
    return layer


def assert_followed(layer, mean, var):
    assert layer.running_mean == pytest.approx(np.asarray(mean).reshape(-1), rel=FOLLOWED, abs=1e-6)
    assert layer.running_var == pytest.approx(np.asarray(var).reshape(-1), rel=FOLLOWED)


def test_torch(x, trained, worst):
    torch = pytest.importorskip("torch", exc_type=ImportError)
    images = np.ascontiguousarray(np.moveaxis(x, -1, 1))

    def predict(module):
        return lambda x: module(torch.from_numpy(x)).detach().numpy()

    theirs = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3, momentum=0.25))
    with torch.no_grad():
        for tensor, values in zip(theirs[1].state_dict().values(), [*trained, 7], strict=True):
            tensor.copy_(torch.as_tensor(values))
    theirs.eval()
    layer = check("torch", theirs.state_dict(), predict(theirs[1]), images, worst, axis=1, prefix="1", momentum=0.25)
    assert layer.num_batches_tracked == 7
    ours = other_layer(trained)
    fresh = torch.nn.BatchNorm2d(**bn.convention("torch").arguments(ours))
    fresh.load_state_dict({name: torch.from_numpy(values) for name, values in bn.to_state(ours, "torch").items()})
    worst("torch", assert_predicts(predict(fresh.eval())(images), ours, images, 1))
    theirs.train()
    predict(theirs[1])(images)
    layer.train()(images)
    assert_followed(layer, theirs[1].running_mean, theirs[1].running_var)
    assert layer.num_batches_tracked == int(theirs[1].num_batches_tracked) == 8


@pytest.fixture(scope="module")
def keras():
    os.environ.setdefault("KERAS_BACKEND", "torch")
    return pytest.importorskip("keras", exc_type=ImportError)


def test_keras(keras, x, trained, worst):
    def predict(module):
        return lambda x: keras.ops.convert_to_numpy(module(x, training=False))

    theirs = keras.layers.BatchNormalization(momentum=0.75, name="bn")
    theirs.build(x.shape)
    theirs.set_weights(trained)
    layer = check("keras", theirs.get_weights(), predict(theirs), x, worst, momentum=0.75)
    named = {variable.path: keras.ops.convert_to_numpy(variable.value) for variable in theirs.weights}
    assert (check("keras", named, predict(theirs), x, worst, prefix="bn").gamma == layer.gamma).all()
    system = bn.convention("keras")
    assert (theirs.epsilon, keras.layers.BatchNormalization().momentum) == (system.eps, system.momentum)
    ours = other_layer(trained)
    fresh = keras.layers.BatchNormalization(**system.arguments(ours))
    fresh.build(x.shape)
    state = bn.to_state(ours, "keras", prefix=fresh.name)
    fresh.set_weights([state[variable.path] for variable in fresh.weights])
    worst("keras", assert_predicts(predict(fresh)(x), ours, x))
    theirs(x, training=True)
    layer.train()(x)
    assert_followed(layer, *map(keras.ops.convert_to_numpy, (theirs.moving_mean, theirs.moving_variance)))


def test_flax_linen(x, trained, worst):
    jax, nn = pytest.importorskip("jax"), pytest.importorskip("flax.linen")
    gamma, beta, mean, var = trained

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(use_running_average=not train, momentum=0.75, name="bn")(x)

    variables = {"params": {"bn": {"scale": gamma, "bias": beta}}, "batch_stats": {"bn": {"mean": mean, "var": var}}}
    made = Network().init(jax.random.key(0), x, True)
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, variables)
    layer = check(
        "flax", variables, lambda x: Network().apply(variables, x, False), x, worst, prefix="bn", momentum=0.75
    )
    default = nn.BatchNorm()
    system = bn.convention("flax")
    assert (default.epsilon, default.momentum, default.axis) == (system.eps, system.momentum, system.axis)
    ours = other_layer(trained)
    told = nn.BatchNorm(use_running_average=True, **(system.arguments(ours) | {"axis": -1}))
    state = bn.to_state(ours, "flax")
    written = {
        top: {name: state[f"{top}/{name}"] for name in names} for top, names in told.init(jax.random.key(0), x).items()
    }
    worst("flax", assert_predicts(told.apply(written, x), ours, x))
    _, moved = Network().apply(variables, x, True, mutable=["batch_stats"])
    layer.train()(x)
    assert_followed(layer, moved["batch_stats"]["bn"]["mean"], moved["batch_stats"]["bn"]["var"])


def test_flax_nnx(x, trained, worst):
    nnx = pytest.importorskip("flax.nnx")

    class Network(nnx.Module):
        def __init__(self):
            self.blocks = nnx.List([nnx.BatchNorm(3, momentum=0.75, rngs=nnx.Rngs(0))])

    network = Network()
    theirs = network.blocks[0]
    for variable, values in zip((theirs.scale, theirs.bias, theirs.mean, theirs.var), trained, strict=True):
        variable[...] = values
    network.eval()
    for state in (nnx.state(network), nnx.to_pure_dict(nnx.state(network))):
        layer = check("nnx", state, theirs, x, worst, prefix="blocks/0", momentum=0.75)
    ours = other_layer(trained)
    fresh = nnx.BatchNorm(**bn.convention("nnx").arguments(ours), use_running_average=True, rngs=nnx.Rngs(0))
    nnx.update(fresh, bn.to_state(ours, "nnx"))
    worst("nnx", assert_predicts(fresh(x), ours, x))
    network.train()
    theirs(x)
    layer.train()(x)
    assert_followed(layer, theirs.mean[...], theirs.var[...])


def test_haiku(x, trained, worst):
    jax, haiku = pytest.importorskip("jax"), pytest.importorskip("haiku")

    def transformed(**arguments):
        def forward(x, training):
            return haiku.BatchNorm(create_scale=True, create_offset=True, name="bn", **arguments)(x, training)

        return haiku.transform_with_state(forward)

    theirs = transformed(decay_rate=0.75)
    params, state = theirs.init(None, x, True)
    params["bn"] = {"scale": trained[0].reshape(1, 1, 1, 3), "offset": trained[1].reshape(1, 1, 1, 3)}
    for scale in (1, 0.5, 2):
        _, state = theirs.apply(params, state, None, scale * x, True)
    layer = check(
        "haiku",
        {**params, **state},
        lambda x: theirs.apply(params, state, None, x, False)[0],
        *(x, worst),
        prefix="bn",
        momentum=0.75,
    )
    assert layer.num_batches_tracked == 3
    ours = other_layer(trained)
    told = transformed(**bn.convention("haiku").arguments(ours))
    flat = bn.to_state(ours, "haiku", prefix="bn")
    shaped = [
        {
            module: {name: flat[f"{module}/{name}"].reshape(old.shape) for name, old in values.items()}
            for module, values in tree.items()
        }
        for tree in told.init(None, x, True)
    ]
    worst("haiku", assert_predicts(told.apply(*shaped, None, x, False)[0], ours, x))
    # What goes on from the state that was written is what goes on in Haiku itself.
    flat = bn.to_state(layer, "haiku", prefix="bn")
    again = {
        module: {name: flat[f"{module}/{name}"].reshape(np.shape(old)) for name, old in values.items()}
        for module, values in state.items()
    }
    _, expected = theirs.apply(params, state, None, 3 * x, True)
    _, moved = theirs.apply(params, again, None, 3 * x, True)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-6, atol=1e-7), expected, moved))


def test_jax_arrays_of_16_bits(trained):
    jnp = pytest.importorskip("jax.numpy")
    state = {"mean": jnp.ones(3, jnp.bfloat16), "var": jnp.full(3, 1.5, jnp.bfloat16)}
    assert bn.from_state(state, "nnx").running_var.tolist() == [1.5] * 3


def test_tensors_that_numpy_cannot_read_are_named():
    torch = pytest.importorskip("torch", exc_type=ImportError)
    wants, bfloat16 = torch.ones(3, requires_grad=True), torch.ones(3, dtype=torch.bfloat16)
    for tensor, told in ((wants, "not require grad"), (bfloat16, "be readable as a NumPy array")):
        with pytest.raises(TypeError, match=f"running_mean must {told}"):
            bn.from_state({"running_mean": tensor, "running_var": torch.ones(3)}, "torch")
