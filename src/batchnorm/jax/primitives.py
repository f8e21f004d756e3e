"""The JAX primitives for batch norm: what each of them computes, and how it is called.

Decisions:

- Four primitives use the batch's own statistics: `forward`; `tangent`, its derivative along a direction; `backward`,
  the transpose of that; and `second`, the derivative of `backward`. `rules.py` has their rules for differentiation.
- The first two arguments are always x and gamma, and the axis counts from the end. So the axes of `vmap`, which come
  first, are a loop in the callback, and each batch has the same bits as alone.
- `table` holds the float64 numbers per channel of `batchnorm.Saved`. float64 may be disabled in JAX, so each number is
  passed as two of uint32.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from .. import _arrays, calculus, fixed, functional
from .._arrays import Array
from .._kernels.runtime import GAMMA, STATISTICS_ROWS
from ..saved import Saved

Shaped = tuple[tuple[int, ...], Any]
"""Shape and dtype of an output."""


def _primitive(name: str, calculate: Callable[..., None], shaped: Callable[..., list[Shaped]]) -> Primitive:
    """A primitive: `calculate` fills a list of outputs from the inputs, with the shapes and dtypes of `shaped`."""
    primitive = Primitive(f"batchnorm_{name}")
    primitive.multiple_results = True

    def results(*inputs: Any, **_: Any) -> list[Any]:
        return [jax.core.ShapedArray(*each) for each in shaped(*inputs)]

    def call(*inputs: Any, **options: Any) -> Any:
        def callback(_: Any, outputs: Any, *inputs: Any) -> None:
            arrays = [np.asarray(buffer) for buffer in (*outputs, *inputs)]
            for i in itertools.product(*map(range, inputs[1].shape[:-1])):
                parts = [array[i] for array in arrays]
                calculate(parts[: len(outputs)], *parts[len(outputs) :], **options)

        return buffer_callback(callback, results(*inputs))(*inputs)

    def batch(inputs: Any, axes: Any, **options: Any) -> tuple[list[Any], list[int]]:
        (length,) = {x.shape[i] for x, i in zip(inputs, axes, strict=True) if i is not None}
        moved = [
            jnp.broadcast_to(x, (length, *x.shape)) if i is None else jnp.moveaxis(x, i, 0)
            for x, i in zip(inputs, axes, strict=True)
        ]
        found = primitive.bind(*moved, **options)
        return found, [0] * len(found)

    primitive.def_impl(jax.jit(primitive.bind, static_argnames=("axis", "eps")))
    primitive.def_abstract_eval(results)
    mlir.register_lowering(primitive, mlir.lower_fun(call, multiple_results=True), platform="cpu")
    batching.primitive_batchers[primitive] = batch
    return primitive


def _like(array: Any) -> Shaped:
    return array.shape, array.dtype


def _statistics(x: Any, gamma: Any) -> list[Shaped]:
    """Shapes and dtypes of mean, var and table."""
    *front, channels = gamma.shape
    dtype = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    return [(gamma.shape, dtype)] * 2 + [((*front, STATISTICS_ROWS, 2 * channels), np.dtype(np.uint32))]


def _fill(outputs: list[Array], results: Any) -> None:
    for output, result in zip(outputs, results, strict=True):
        output[...] = result


def _saved(x: Array, gamma: Array, table: Array, axis: int, eps: float) -> Saved:
    """The `Saved` of `batchnorm.forward`, rebuilt with this gamma."""
    statistics = table.view(np.float64).copy()
    statistics[GAMMA] = gamma
    _, layout = _arrays.lay_out(x, axis)
    return Saved(x, eps, layout, statistics, (x.dtype, gamma.dtype, gamma.dtype))


def _forward(outputs: list[Array], x: Array, gamma: Array, beta: Array, **options: Any) -> None:
    y, mean, var, table = outputs
    _, saved = functional.forward(x, gamma, beta, out=y, **options)
    _fill([mean, var, table.view(np.float64)], [saved.mean, saved.var, saved._statistics])


def _tangent(
    outputs: list[Array], x: Array, gamma: Array, table: Array, dx: Array, dgamma: Array, dbeta: Array, **options: Any
) -> None:
    saved = _saved(x, gamma, table, **options)
    calculus.jvp(dx, saved, dgamma=dgamma, dbeta=dbeta, out=outputs[0])


def _backward(outputs: list[Array], x: Array, gamma: Array, table: Array, dy: Array, **options: Any) -> None:
    dx, dgamma, dbeta = outputs
    _, *found = functional.backward(dy, _saved(x, gamma, table, **options), out=dx)
    _fill([dgamma, dbeta], found)


def _second(
    outputs: list[Array], x: Array, gamma: Array, table: Array, ddx: Array, ddgamma: Array, dy: Array, **options: Any
) -> None:
    saved = _saved(x, gamma, table, **options)
    _, *found = calculus.double_backward(ddx, dy, saved, ddgamma=ddgamma, need=("x", "gamma"))
    _fill(outputs, found)


def _inference(
    outputs: list[Array], x: Array, gamma: Array, beta: Array, mean: Array, var: Array, **options: Any
) -> None:
    var = np.where(var < 0, np.array(np.nan, var.dtype), var)  # a negative variance would be refused
    fixed.inference(x, mean, var, gamma, beta, out=outputs[0], **options)


forward: Primitive = _primitive("forward", _forward, lambda x, gamma, *_: [_like(x), *_statistics(x, gamma)])
tangent: Primitive = _primitive("tangent", _tangent, lambda x, *_: [_like(x)])
backward: Primitive = _primitive("backward", _backward, lambda x, gamma, *_: [_like(x), _like(gamma), _like(gamma)])
second: Primitive = _primitive("second", _second, lambda x, gamma, *_: [_like(x), _like(gamma)])
inference: Primitive = _primitive("inference", _inference, lambda x, *_: [_like(x)])
