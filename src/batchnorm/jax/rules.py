"""The differentiation rules of the primitives, from which JAX derives both modes, in any order.

Decisions:

- The derivative of `forward` is `tangent`, whose transpose is `backward`, and JAX knows both. `custom_vjp` would have
  no forward mode, and JAX must be able to transpose the rule of a `custom_jvp`.
- Second derivatives are those of Σdy·y, linear in dy. They are symmetric in dy and two directions of x, because the
  Jacobian is. So `second` is its own transpose, and also the derivative of `tangent`, with dx instead of dy.
- There are no third derivatives.
- `table` is a function of x but has no derivative here: the rules assign its whole share to x.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from .primitives import backward, forward, inference, second, tangent

Values = tuple[list[Any], list[Any]]
"""Results and their tangents."""


def _known(*tangents: Any) -> bool:
    """Whether one of them is not a symbolic zero."""
    return any(type(value) is not ad.Zero for value in tangents)


def _dense(*tangents: Any) -> list[Any]:
    return [ad.instantiate_zeros(value) for value in tangents]


def _zero(primal: Any) -> Any:
    return ad.Zero(jax.typeof(primal).to_tangent_aval())


def _forward_jvp(primals: Any, tangents: Any, **options: Any) -> Values:
    x, gamma, _ = primals
    y, mean, var, table = forward.bind(*primals, **options)
    moved = tangent.bind(x, gamma, table, *_dense(*tangents), **options)
    return [y, mean, var, table], [*moved, _zero(mean), _zero(var), _zero(table)]


def _tangent_jvp(primals: Any, tangents: Any, **options: Any) -> Values:
    x, gamma, table, dx, dgamma, _ = primals
    of_x, of_gamma, _, *of_directions = tangents
    dy = tangent.bind(*primals, **options)
    moved = _zero(dy[0])
    if _known(*of_directions):
        (moved,) = tangent.bind(x, gamma, table, *_dense(*of_directions), **options)
    if _known(of_x, of_gamma):
        u, a = _dense(of_x, of_gamma)
        along_x, _ = second.bind(x, gamma, table, u, a, dx, **options)
        (along_gamma,) = tangent.bind(x, dgamma, table, u, jnp.zeros_like(a), jnp.zeros_like(a), **options)
        moved = ad.add_tangents(moved, along_x + along_gamma)
    return dy, [moved]


def _backward_jvp(primals: Any, tangents: Any, **options: Any) -> Values:
    x, gamma, table, dy = primals
    of_x, of_gamma, _, of_dy = tangents
    gradients = backward.bind(*primals, **options)
    moved = [_zero(gradient) for gradient in gradients]
    if _known(of_dy):
        moved = backward.bind(x, gamma, table, of_dy, **options)
    if _known(of_x, of_gamma):
        more = second.bind(x, gamma, table, *_dense(of_x, of_gamma), dy, **options)
        moved = [*map(ad.add_tangents, moved[:2], more), moved[2]]
    return gradients, moved


def _second_jvp(primals: Any, tangents: Any, **options: Any) -> Values:
    x, gamma, table, _, _, dy = primals
    *others, of_ddx, of_ddgamma, of_dy = tangents
    if _known(*others, of_dy):
        raise NotImplementedError("batchnorm.jax has first and second derivatives of forward, but no third ones")
    moved = second.bind(x, gamma, table, *_dense(of_ddx, of_ddgamma), dy, **options)
    return second.bind(*primals, **options), moved


def _inference_jvp(primals: Any, tangents: Any, **options: Any) -> Values:
    formula = functools.partial(_inference_formula, **options)
    _, moved = jax.jvp(formula, tuple(primals), tuple(_dense(*tangents)))
    return inference.bind(*primals, **options), [moved]


def _inference_formula(x: Any, gamma: Any, beta: Any, mean: Any, var: Any, axis: int, eps: float) -> Any:
    """y; in every argument, axes of `vmap` may come first."""
    *front, channels = gamma.shape
    shape = *front, *[1] * (x.ndim + axis - len(front)), channels, *[1] * (-axis - 1)
    gamma, beta, mean, var = (number.reshape(shape) for number in (gamma, beta, mean, var))
    return (gamma * (x - mean) / jnp.sqrt(var + eps) + beta).astype(x.dtype)


def _wanted(arguments: Any, gradients: Any) -> list[Any]:
    """The gradients of the arguments that are not constants."""
    pairs = zip(arguments, gradients, strict=True)
    return [gradient if ad.is_undefined_primal(argument) else None for argument, gradient in pairs]


def _tangent_transpose(upstream: Any, x: Any, gamma: Any, table: Any, *directions: Any, **options: Any) -> list[Any]:
    gradients = backward.bind(x, gamma, table, *_dense(*upstream), **options)
    return [None, None, None, *_wanted(directions, gradients)]


def _backward_transpose(upstream: Any, x: Any, gamma: Any, table: Any, _: Any, **options: Any) -> list[Any]:
    return [None, None, None, *tangent.bind(x, gamma, table, *_dense(*upstream), **options)]


def _second_transpose(
    upstream: Any, x: Any, gamma: Any, table: Any, ddx: Any, ddgamma: Any, dy: Any, **options: Any
) -> list[Any]:
    gradients = second.bind(x, gamma, table, *_dense(*upstream), dy, **options)
    return [None, None, None, *_wanted([ddx, ddgamma], gradients), None]


ad.primitive_jvps[forward] = _forward_jvp
ad.primitive_jvps[tangent] = _tangent_jvp
ad.primitive_jvps[backward] = _backward_jvp
ad.primitive_jvps[second] = _second_jvp
ad.primitive_jvps[inference] = _inference_jvp
ad.primitive_transposes[tangent] = _tangent_transpose
ad.primitive_transposes[backward] = _backward_transpose
ad.primitive_transposes[second] = _second_transpose
