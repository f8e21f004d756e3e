"""The operators `torch.ops.batchnorm`, and their derivatives.

Decisions:

- `statistics` is the float64 table per channel of `batchnorm.Saved`, as the kernels left it. Operators pass it on
  instead of `Saved`, which PyTorch could not trace.
- It is a function of x, so it gets no gradient of its own: `double_backward` assigns all of it to x. If `fixed`, mean
  and variance are constants.
- `limits` are an activation, (low, high, slope); empty for none.
- y and dx have the memory order of x; if x has gaps, they are contiguous.
- An operator is a schema, a function of arrays, a fake kernel and a rule for gradients, registered at the dispatcher.
  PyTorch's `custom_op` does the same but takes 40 µs per call.
- Plain tensors do not go through the dispatcher, which takes 7 µs to convert the arguments twice.
"""

# ruff: noqa: ARG001 (fake kernels have the arguments of the operators)

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, library

import batchnorm as bn

from .. import _activation, _arrays, functional
from .._arrays import Array
from .._kernels.runtime import STATISTICS_ROWS
from ..fixed import table_of
from .tensors import as_array, as_tensor, as_tensor_like, dense

_LIBRARY = library.Library("batchnorm", "DEF")

_THROUGH: dict[bool, functional.Through] = {False: ("mean", "variance"), True: ()}
"""The paths of the gradient, indexed by whether the statistics are fixed."""


def _maybe_array(tensor: Tensor | None) -> Array | None:
    return None if tensor is None else as_array(tensor)


def _parameter_dtype(x: Tensor, weight: Tensor | None) -> torch.dtype:
    """The dtype of dgamma and dbeta."""
    if weight is not None:
        return weight.dtype
    return x.dtype if x.dtype.itemsize > 2 else torch.float32


def _saved(x: Tensor, statistics: Tensor, weight: Tensor | None, eps: float, limits: Sequence[float]) -> bn.Saved:
    """The `Saved` of `forward`, rebuilt."""
    array, layout = _arrays.lay_out(as_array(x), 1)
    full = np.dtype(np.float64 if x.dtype is torch.float64 else np.float32)
    dtype = full if weight is None else as_array(weight).dtype
    low_high_slope = (limits[0], limits[1], limits[2]) if limits else None
    return bn.Saved(array, eps, layout, statistics.numpy(), (array.dtype, dtype, dtype), limits=low_high_slope)


def _activation_of(limits: Sequence[float]) -> "_activation.Activation | None":
    return _activation.activation_of((limits[0], limits[1], limits[2])) if limits else None


def _no_forward_mode(ctx: Any, *tangents: Tensor | None) -> None:
    raise NotImplementedError("input must have no tangent: batchnorm.torch has no forward mode, batchnorm.jvp has")


def _operator(
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    keep: Callable[[Any, Any, Any], None],
    gradients: Callable[..., Any],
) -> Callable[..., Any]:
    """Register and return an operator; `keep(ctx, inputs, output)` keeps what `gradients(ctx, …)` needs."""
    _LIBRARY.define(schema)
    name = schema.split("(")[0]
    operator = getattr(torch.ops.batchnorm, name).default

    def recorded(ctx: Any, *inputs: Any) -> Any:
        if type(inputs[0]) is Tensor and not torch._C._len_torch_dispatch_stack():
            output = compute(*inputs)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                output = operator(*inputs)
        keep(ctx, inputs, output)
        return output

    rules = {"forward": recorded, "backward": gradients, "jvp": _no_forward_mode}
    function: Any = type(name, (torch.autograd.Function,), {name: staticmethod(rule) for name, rule in rules.items()})
    _LIBRARY.impl(name, compute, "CPU")
    _LIBRARY.impl(name, function.apply, "Autograd")
    library.register_fake(f"batchnorm::{name}", fake, lib=_LIBRARY)

    def call(*inputs: Any) -> Any:
        return operator(*inputs) if torch.compiler.is_compiling() else function.apply(*inputs)

    return call


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | None,
    batches: Tensor | None,
    eps: float,
    limits: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """y with the statistics of the batch, and these statistics; moves the running ones, if there are any."""
    x = dense(x)
    y, saved = bn.forward(
        as_array(x),
        _maybe_array(weight),
        _maybe_array(bias),
        eps=eps,
        activation=_activation_of(limits),
        num_threads=torch.get_num_threads(),
    )
    if running_mean is not None and running_var is not None:
        if momentum is None:
            momentum = 1.0 if batches is None else 1.0 / float(batches)
        update_running(running_mean, running_var, saved, momentum)
    return as_tensor_like(x, y), torch.from_numpy(saved._statistics)


def update_running(running_mean: Tensor, running_var: Tensor, saved: bn.Saved, momentum: float) -> None:
    """Move the running statistics, and tell autograd that they have changed."""
    if running_mean.dtype.itemsize > 2:
        bn.update_running(as_array(running_mean), as_array(running_var), saved, momentum=momentum)
        torch.autograd.graph.increment_version(running_mean)
        torch.autograd.graph.increment_version(running_var)
    else:  # 16-bit statistics could not move by small steps
        mean, var = running_mean.float(), running_var.float()
        bn.update_running(as_array(mean), as_array(var), saved, momentum=momentum)
        running_mean.copy_(mean)
        running_var.copy_(var)


def _inference(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    limits: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """y with given statistics, and these statistics as the other operators take them."""
    x = dense(x)
    given = as_array(mean), as_array(var), _maybe_array(weight), _maybe_array(bias)
    statistics, _ = table_of(*given, eps, x.shape[1])
    y = bn.inference(
        as_array(x), *given, eps=eps, activation=_activation_of(limits), num_threads=torch.get_num_threads()
    )
    return as_tensor_like(x, y), torch.from_numpy(statistics)


def _backward(
    dy: Tensor, x: Tensor, statistics: Tensor, weight: Tensor | None, eps: float, limits: Sequence[float], fixed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dgamma and dbeta."""
    x = dense(x)
    saved = _saved(x, statistics, weight, eps, limits)
    dx, *parameters = bn.backward(as_array(dy), saved, through=_THROUGH[fixed], num_threads=torch.get_num_threads())
    dgamma, dbeta = map(as_tensor, parameters)
    return as_tensor_like(x, dx), dgamma, dbeta


def _double_backward(
    ddx: Tensor,
    ddgamma: Tensor,
    ddbeta: Tensor,
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    eps: float,
    limits: Sequence[float],
    fixed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `backward` with respect to dy, x and gamma."""
    x = dense(x)
    saved = _saved(x, statistics, weight, eps, limits)
    second = bn.double_backward(
        as_array(ddx),
        as_array(dy),
        saved,
        ddgamma=as_array(ddgamma),
        ddbeta=as_array(ddbeta),
        through=_THROUGH[fixed],
        num_threads=torch.get_num_threads(),
    )
    return as_tensor_like(x, second.dy), as_tensor_like(x, second.x), as_tensor(second.gamma)


def _fake_y(x, *others):  # type: ignore[no-untyped-def]
    return torch.empty_like(dense(x)), x.new_empty((STATISTICS_ROWS, x.shape[1]), dtype=torch.float64)


def _fake_backward(dy, x, statistics, weight, eps, limits, fixed):  # type: ignore[no-untyped-def]
    dgamma, dbeta = (x.new_empty(x.shape[1], dtype=_parameter_dtype(x, weight)) for _ in range(2))
    return torch.empty_like(dense(x)), dgamma, dbeta


def _fake_double_backward(ddx, ddgamma, ddbeta, dy, x, statistics, weight, eps, limits, fixed):  # type: ignore[no-untyped-def]
    g_dy, g_x = (torch.empty_like(dense(x)) for _ in range(2))
    return g_dy, g_x, x.new_empty(x.shape[1], dtype=_parameter_dtype(x, weight))


def _keep(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor, fixed: bool) -> None:
    """Keep what the gradients of `forward` and `inference` need."""
    ctx.fixed, ctx.has_bias = fixed, bias is not None
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(True)
    ctx.save_for_backward(x, statistics, weight)


def _keep_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, *_, ctx.eps, ctx.limits = inputs
    _keep(ctx, x, weight, bias, output[1], fixed=False)


def _keep_inference(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, _, weight, bias, ctx.eps, ctx.limits = inputs
    _keep(ctx, x, weight, bias, output[1], fixed=True)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x, statistics, weight = ctx.saved_tensors
    dx, dgamma, dbeta = backward(dy, x, statistics, weight, ctx.eps, ctx.limits, ctx.fixed)
    return dx, None if weight is None else dgamma, dbeta if ctx.has_bias else None


def _forward_gradients(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, dy), None, None, None, None, None, None


def _inference_gradients(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    dx, dgamma, dbeta = _gradients(ctx, dy)
    return dx, None, None, dgamma, dbeta, None, None


def _keep_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    dy, x, statistics, weight, ctx.eps, ctx.limits, ctx.fixed = inputs
    ctx.save_for_backward(dy, x, statistics, weight)


def _second_gradients(ctx: Any, ddx: Tensor, ddgamma: Tensor, ddbeta: Tensor) -> tuple[Tensor | None, ...]:
    dy, x, statistics, weight = ctx.saved_tensors
    g_dy, g_x, g_gamma = double_backward(
        ddx, ddgamma, ddbeta, dy, x, statistics, weight, ctx.eps, ctx.limits, ctx.fixed
    )
    return g_dy, g_x, None, None if weight is None else g_gamma, None, None, None


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    pass


def _no_third_gradients(ctx: Any, *_: Tensor) -> None:
    raise NotImplementedError("batchnorm.torch has no third derivative")


_COMMON = "Tensor x, Tensor statistics, Tensor? weight, float eps, float[] limits, bool fixed"

double_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = _operator(
    f"double_backward(Tensor ddx, Tensor ddgamma, Tensor ddbeta, Tensor dy, {_COMMON}) -> (Tensor, Tensor, Tensor)",
    _double_backward,
    _fake_double_backward,
    _keep_nothing,
    _no_third_gradients,
)
backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = _operator(
    f"backward(Tensor dy, {_COMMON}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _keep_backward,
    _second_gradients,
)
forward: Callable[..., tuple[Tensor, Tensor]] = _operator(
    "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "float? momentum, Tensor? batches, float eps, float[] limits) -> (Tensor, Tensor)",
    _forward,
    _fake_y,
    _keep_forward,
    _forward_gradients,
)
inference: Callable[..., tuple[Tensor, Tensor]] = _operator(
    "inference(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, float[] limits) "
    "-> (Tensor, Tensor)",
    _inference,
    _fake_y,
    _keep_inference,
    _inference_gradients,
)
