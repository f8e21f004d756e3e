"""The contestants, each in its own process.

- batchnorm and torch are timed both allocating their results and writing to `out=` (not torch's backward pass, which
  has no `out=`). JAX, ONNX Runtime, numba and NumPy allocate; the first two reuse that memory between calls.
- torch: `native_batch_norm` and its backward pass.
- JAX: jitted. Its backward pass is the formula with saved statistics; differentiating the forward pass takes longer.
- ONNX Runtime: only inference, and only with the channels second. It and numba have no 16-bit floats here.
- oneDNN: kernels that frameworks call, with nothing around them; see `onednn.py`. It has no float64.
- numba: the loops that a user would write, parallel over channels, with its fast mathematics.
- With ReLU after the normalization, NumPy and torch make two calls, ONNX Runtime has a graph of two nodes, which it
  fuses if it can, and batchnorm takes `activation=`; "batchnorm alone" is without ReLU. The others are left out.
- The limit is that of `batchnorm.profile`, on the arrays of batchnorm, in its process.
"""

from functools import partial
from importlib import metadata

import numpy as np

from batchnorm.profile import measure
from batchnorm.profile.measure import EPS, LIMITS, OURS

from . import onednn
from .builds import description, measure_of


def torch_out(problem, threads):
    import torch

    if problem.x.ndim == 3 and problem.axis == 2:  # torch 2.13 gets these wrong
        return {}
    torch.set_num_threads(threads)
    x = measure.as_tensor(problem.x).movedim(problem.axis, 1)
    gamma, beta, mean, var = map(measure.as_tensor, problem[2:6])
    y, saved, nothing = torch.empty_like(x), (torch.empty_like(mean), torch.empty_like(var)), torch.empty_like(mean[:0])
    norm = torch.ops.aten.native_batch_norm.out

    def call(statistics, training, to):
        return norm(x, gamma, beta, *statistics, training, 0.1, EPS, out=y, save_mean=to[0], save_invstd=to[1])[0]

    return {
        "forward": lambda: call((None, None), True, saved),
        "inference": lambda: call((mean, var), False, (nothing, nothing)),
    }


def relu_in_numpy(problem, threads=1):
    calls, y = measure.numpy_calls(problem, threads), problem.activated()
    room = problem._replace(dy=np.empty_like(problem.dy))
    backward = measure.numpy_calls(room, threads)["backward"]

    def through_relu():
        np.multiply(problem.dy, y > 0, out=room.dy)
        return backward()

    return {
        "forward": lambda: np.maximum(calls["forward"](), 0),
        "backward": through_relu,
        "inference": lambda: np.maximum(calls["inference"](), 0),
    }


def relu_in_torch(problem, threads):
    import torch

    arrays = problem.x, problem.dy, problem.activated()
    x, dy, y = (measure.as_tensor(array).movedim(problem.axis, 1) for array in arrays)
    gamma, beta = map(measure.as_tensor, problem[2:4])
    calls = measure.torch_calls(problem, threads)
    _, *saved = torch.native_batch_norm(x, gamma, beta, None, None, True, 0.1, EPS)
    grad, of_relu = torch.ops.aten.native_batch_norm_backward, torch.ops.aten.threshold_backward

    def backward():
        return grad(of_relu(dy, y, 0), x, gamma, None, None, *saved, True, EPS, [True, True, True])[0]

    return {
        "forward": lambda: torch.relu_(calls["forward"]()),
        "backward": backward,
        "inference": lambda: torch.relu_(calls["inference"]()),
    }


def relu_in_batchnorm(problem, threads, allocate=False):
    return measure.batchnorm_calls(problem, threads, allocate, activation="relu")


def jax(problem, _threads):
    import jax
    from jax import numpy as jnp

    jax.config.update("jax_enable_x64", True)
    axis = problem.axis
    others = tuple(i for i in range(problem.x.ndim) if i != axis)
    column = [-1 if i == axis else 1 for i in range(problem.x.ndim)]
    x, dy, gamma, beta, mean, var = (jnp.asarray(array) for array in problem[:6])
    stored, full = x.dtype, gamma.dtype  # 16-bit floats are computed in float32
    gamma, beta, mean, var = (array.reshape(column) for array in (gamma, beta, mean, var))
    rstd = jax.lax.rsqrt(var + EPS)

    @jax.jit
    def forward(x, gamma, beta):
        x = x.astype(full)
        mean = jnp.mean(x, others, keepdims=True)
        var = jnp.var(x, others, keepdims=True)
        return ((x - mean) * (gamma * jax.lax.rsqrt(var + EPS)) + beta).astype(stored), mean, var

    @jax.jit
    def backward(dy, x, gamma, mean, rstd):
        x, dy = x.astype(full), dy.astype(full)
        xhat = (x - mean) * rstd
        dbeta = jnp.sum(dy, others, keepdims=True)
        dgamma = jnp.sum(dy * xhat, others, keepdims=True)
        n = x.size // gamma.size
        return (gamma * rstd * (dy - dbeta / n - xhat * (dgamma / n))).astype(stored), dgamma, dbeta

    @jax.jit
    def inference(x, mean, var, gamma, beta):
        return ((x.astype(full) - mean) * (gamma * jax.lax.rsqrt(var + EPS)) + beta).astype(stored)

    return {
        "forward": lambda: jax.block_until_ready(forward(x, gamma, beta))[0],
        "backward": lambda: jax.block_until_ready(backward(dy, x, gamma, mean, rstd))[0],
        "inference": lambda: jax.block_until_ready(inference(x, mean, var, gamma, beta)),
    }


def onnx_runtime(problem, threads, relu=False):
    import onnx
    import onnxruntime

    if problem.axis != 1 or problem.x.itemsize == 2:
        return {}
    x, _, *parameters, _, _ = problem
    names = ("x", "gamma", "beta", "mean", "var")
    kind = onnx.helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("BatchNormalization", names, ["pre" if relu else "y"], epsilon=EPS),
            *([onnx.helper.make_node("Relu", ["pre"], ["y"])] if relu else []),
        ],
        "batch_normalization",
        [onnx.helper.make_tensor_value_info("x", kind, x.shape)],
        [onnx.helper.make_tensor_value_info("y", kind, x.shape)],
        [onnx.numpy_helper.from_array(array, name) for name, array in zip(names[1:], parameters, strict=True)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 15)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return {"inference": lambda: session.run(None, {"x": x})[0]}


def numba(problem, threads):
    import numba

    if problem.x.itemsize == 2:
        return {}
    numba.set_num_threads(threads)
    shape, axis = problem.x.shape, problem.axis
    view = (int(np.prod(shape[:axis])), shape[axis], int(np.prod(shape[axis + 1 :])))
    x, dy = (array.reshape(view) for array in (problem.x, problem.dy))
    _, _, gamma, beta, mean, var, _, _ = problem
    eps = x.dtype.type(EPS)
    compiled = numba.njit(parallel=True, fastmath=True)

    @compiled
    def apply(x, mean, rstd, gamma, beta):
        y = np.empty_like(x)
        for c in numba.prange(x.shape[1]):
            scale = gamma[c] * rstd[c]
            for n in range(x.shape[0]):
                for s in range(x.shape[2]):
                    y[n, c, s] = (x[n, c, s] - mean[c]) * scale + beta[c]
        return y

    @compiled
    def statistics(x, eps):
        n_values = x.shape[0] * x.shape[2]
        mean, rstd = np.empty_like(x[0, :, 0]), np.empty_like(x[0, :, 0])
        for c in numba.prange(x.shape[1]):
            total = 0.0
            for n in range(x.shape[0]):
                for s in range(x.shape[2]):
                    total += x[n, c, s]
            centre = x.dtype.type(total / n_values)
            spread = 0.0
            for n in range(x.shape[0]):
                for s in range(x.shape[2]):
                    spread += (x[n, c, s] - centre) ** 2
            mean[c], rstd[c] = centre, 1 / np.sqrt(spread / n_values + eps)
        return mean, rstd

    @compiled
    def backward(dy, x, gamma, mean, rstd):
        dx, dgamma, dbeta = np.empty_like(x), np.empty_like(gamma), np.empty_like(gamma)
        n_values = x.shape[0] * x.shape[2]
        for c in numba.prange(x.shape[1]):
            sum_dy, sum_dy_xmu = 0.0, 0.0
            for n in range(x.shape[0]):
                for s in range(x.shape[2]):
                    sum_dy += dy[n, c, s]
                    sum_dy_xmu += dy[n, c, s] * (x[n, c, s] - mean[c])
            dbeta[c], dgamma[c] = sum_dy, sum_dy_xmu * rstd[c]
            scale, offset = gamma[c] * rstd[c], dbeta[c] / n_values
            slope = dgamma[c] * rstd[c] / n_values
            for n in range(x.shape[0]):
                for s in range(x.shape[2]):
                    dx[n, c, s] = scale * (dy[n, c, s] - offset - (x[n, c, s] - mean[c]) * slope)
        return dx, dgamma, dbeta

    def forward():
        batch_mean, rstd = statistics(x, eps)
        return apply(x, batch_mean, rstd, gamma, beta).reshape(shape)

    rstd = 1 / np.sqrt(var + eps)
    return {
        "forward": forward,
        "backward": lambda: backward(dy, x, gamma, mean, rstd)[0].reshape(shape),
        "inference": lambda: apply(x, mean, 1 / np.sqrt(var + eps), gamma, beta).reshape(shape),
    }


OURS_OUT = f"{OURS}, out="
BUILDS = "builds"

# The names for `--against`, and what is measured in each of their processes.
PROCESSES = {
    OURS: {OURS: partial(measure.batchnorm_calls, allocate=True), OURS_OUT: measure.batchnorm_calls, **LIMITS},
    "numpy": {"NumPy": measure.numpy_calls},
    "torch": {"torch": measure.torch_calls, "torch, out=": torch_out},
    "jax": {"JAX": jax},
    "onnxruntime": {"ONNX Runtime": onnx_runtime},
    "onednn": {"oneDNN": onednn.calls},
    "numba": {"numba": numba},
}
ALONE = f"{OURS} alone"
WITH_RELU = {
    OURS: {
        OURS: partial(relu_in_batchnorm, allocate=True),
        OURS_OUT: relu_in_batchnorm,
        ALONE: partial(measure.batchnorm_calls, allocate=True),
        f"{ALONE}, out=": measure.batchnorm_calls,
        **LIMITS,
    },
    "numpy": {"NumPy": relu_in_numpy},
    "torch": {"torch": relu_in_torch},
    "onnxruntime": {"ONNX Runtime": partial(onnx_runtime, relu=True)},
}
RIVALS = [name for name in PROCESSES if name != OURS]
FRAMEWORKS = ("torch", "JAX", "ONNX Runtime")
PACKAGES = {
    "torch": ("torch",),
    "jax": ("jax",),
    "onnxruntime": ("onnx", "onnxruntime"),
    "onednn": (onednn.PACKAGE,),
    "numba": ("numba",),
}


def missing(name):
    """The missing packages that a contestant needs."""
    return [package for package in PACKAGES.get(name, ()) if not any(metadata.distributions(name=package))]


class Bout:
    """The measurements of one process, with the arrays of the last case."""

    def __init__(self, process, threads, directories=None, dtypes=()):
        self.process, self.threads = process, threads
        self.builds = {label: measure_of(path, dtypes) for label, path in (directories or {}).items()}
        self.case = self.problem = self.calls = None

    def answer(self, request, *about):
        return getattr(self, request)(*about)

    def descriptions(self):
        return {label: description(build) for label, build in self.builds.items()}

    def contestants(self, relu):
        if self.builds:
            return {label: build.batchnorm_calls for label, build in self.builds.items()}
        return (WITH_RELU if relu else PROCESSES)[self.process]

    def calls_of(self, which, shape, axis, dtype, relu=False):
        """The calls of a case, which includes whether ReLU follows; a new case gets fresh arrays."""
        case = shape, axis, dtype, relu
        if self.case != case:
            self.case, self.problem, self.calls = case, None, None
            self.problem = measure.activations(shape, axis, dtype)
            mine = self.contestants(relu).items()
            self.calls = {name: prepare(self.problem, self.threads) for name, prepare in mine}
        return {name: passes[which] for name, passes in self.calls.items() if which in passes}

    def errors(self, which, *case):
        """The error of each result against the reference in a wider dtype."""
        calls = self.calls_of(which, *case)
        *_, relu = self.case
        reference = relu_in_numpy if relu else measure.numpy_calls
        exact = reference(self.problem.widened())[which]()
        results = {name: call() for name, call in calls.items() if name not in (*LIMITS, ALONE, f"{ALONE}, out=")}
        if self.process != "torch":  # its results have the channels second, which `error` expects
            results = {name: np.asarray(result) for name, result in results.items()}
        return {name: self.problem.error(result, exact) for name, result in results.items()}

    def times(self, which, *case):
        return {name: measure.turn(call) for name, call in self.calls_of(which, *case).items()}

    def times_with_pauses(self, pause, which, *case):
        calls = self.calls_of(which, *case)
        return {name: measure.turn(call, pause=pause) for name, call in calls.items()}
