"""The operators `torch.ops.batchnorm`, and their derivatives.

Decisions:

- `statistics` is what `batchnorm.Saved` has per channel, float64, as the kernels left it. It goes from operator to
  operator in place of `Saved`, which PyTorch could not trace.
- It is a function of x, so it gets no gradient: `double_backward` gives x all of it. Where it is `fixed`, mean and
  variance are constants.
- `limits` are an activation, (low, high, slope); empty for none.
- y and dx lie in memory as x does; if x has gaps, they are contiguous.
"""

# ruff: noqa: ARG001 (fake kernels have the arguments of the operators)

from typing import Any, Sequence  # noqa: UP035 (PyTorch 2.4 knows no other)

import numpy as np
import torch
from torch import Tensor, library

import batchnorm as bn

from .. import _activation, _arrays, functional
from .._arrays import Array
from .._kernels.runtime import STATISTICS_ROWS

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

_THROUGH: dict[bool, functional.Through] = {False: ("mean", "variance"), True: ()}
"""The paths of the gradient, by whether the statistics are fixed."""


def _bfloat16() -> Any:
    try:
        from ml_dtypes import bfloat16
    except ImportError as error:
        raise ImportError(
            "batchnorm.torch needs the package ml_dtypes for bfloat16: python -m pip install ml_dtypes"
        ) from error
    return bfloat16


def _array(tensor: Tensor) -> Array:
    """The tensor's memory as an array."""
    if tensor.dtype is torch.bfloat16:
        bits: Array = tensor.detach().view(torch.uint16).numpy().view(_bfloat16())
        return bits
    array: Array = tensor.detach().numpy()
    return array


def _maybe_array(tensor: Tensor | None) -> Array | None:
    return None if tensor is None else _array(tensor)


def _tensor(array: Array | None) -> Tensor:
    """The array's memory as a tensor."""
    assert array is not None
    if array.dtype.kind == "V":  # bfloat16
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _like(x: Tensor, array: Array | None) -> Tensor:
    """The same of an array that lies as x does, with the very strides of x also along axes of length 1."""
    tensor = _tensor(array)
    return tensor if tensor.stride() == x.stride() else tensor.as_strided(x.shape, x.stride())


def _dense(x: Tensor) -> Tensor:
    """x itself if its values lie together in memory, in any order of the axes."""
    if x.is_contiguous():
        return x
    expected = 1
    for stride, length in sorted((stride, length) for stride, length in zip(x.stride(), x.shape, strict=True)):
        if length != 1:
            if stride != expected:
                return x.contiguous()
            expected *= length
    return x


def _parameter_dtype(x: Tensor, weight: Tensor | None) -> torch.dtype:
    """That of dgamma and dbeta."""
    if weight is not None:
        return weight.dtype
    return x.dtype if x.dtype.itemsize > 2 else torch.float32


def _saved(x: Tensor, statistics: Tensor, weight: Tensor | None, eps: float, limits: Sequence[float]) -> bn.Saved:
    """What `forward` left, put together again."""
    array, layout = _arrays.lay_out(_array(x), 1)
    full = np.dtype(np.float64 if x.dtype is torch.float64 else np.float32)
    dtype = full if weight is None else _array(weight).dtype
    low_high_slope = (limits[0], limits[1], limits[2]) if limits else None
    return bn.Saved(array, eps, layout, statistics.numpy(), (array.dtype, dtype, dtype), limits=low_high_slope)


def _activation_of(limits: Sequence[float]) -> "_activation.Activation | None":
    return _activation.activation_of((limits[0], limits[1], limits[2])) if limits else None


@library.custom_op("batchnorm::forward", mutates_args=(), device_types="cpu")
def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, limits: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """y with the statistics of the batch, and these."""
    x = _dense(x)
    y, saved = bn.forward(
        _array(x),
        _maybe_array(weight),
        _maybe_array(bias),
        eps=eps,
        activation=_activation_of(limits),
        num_threads=torch.get_num_threads(),
    )
    return _like(x, y), torch.from_numpy(saved._statistics)


@library.custom_op("batchnorm::inference", mutates_args=(), device_types="cpu")
def inference(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    limits: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """y with given statistics, and these as the other operators take them."""
    x = _dense(x)
    given = _array(mean), _array(var), _maybe_array(weight), _maybe_array(bias)
    statistics, _ = functional.table_of(*given, eps, x.shape[1])
    y = bn.inference(_array(x), *given, eps=eps, activation=_activation_of(limits), num_threads=torch.get_num_threads())
    return _like(x, y), torch.from_numpy(statistics)


@library.custom_op("batchnorm::backward", mutates_args=(), device_types="cpu")
def backward(
    dy: Tensor, x: Tensor, statistics: Tensor, weight: Tensor | None, eps: float, limits: Sequence[float], fixed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dgamma and dbeta."""
    x = _dense(x)
    saved = _saved(x, statistics, weight, eps, limits)
    dx, *parameters = bn.backward(_array(dy), saved, through=_THROUGH[fixed], num_threads=torch.get_num_threads())
    dgamma, dbeta = map(_tensor, parameters)
    return _like(x, dx), dgamma, dbeta


@library.custom_op("batchnorm::double_backward", mutates_args=(), device_types="cpu")
def double_backward(
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
    x = _dense(x)
    saved = _saved(x, statistics, weight, eps, limits)
    second = bn.double_backward(
        _array(ddx),
        _array(dy),
        saved,
        ddgamma=_array(ddgamma),
        ddbeta=_array(ddbeta),
        through=_THROUGH[fixed],
        num_threads=torch.get_num_threads(),
    )
    return _like(x, second.dy), _like(x, second.x), _tensor(second.gamma)


@library.custom_op("batchnorm::update_running", mutates_args=("running_mean", "running_var"), device_types="cpu")
def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    x: Tensor,
    statistics: Tensor,
    momentum: float | None,
    batches: Tensor | None,
) -> None:
    """Move the running statistics; without momentum they become the mean of those of all batches, with this one."""
    if momentum is None:
        momentum = 1.0 if batches is None else 1.0 / float(batches)
    running = running_mean, running_var
    exact = [tensor.detach() if tensor.dtype.itemsize > 2 else tensor.float() for tensor in running]
    saved = _saved(_dense(x), statistics, None, 0.0, [])
    bn.update_running(_array(exact[0]), _array(exact[1]), saved, momentum=momentum)
    for tensor, moved in zip(running, exact, strict=True):
        if moved.dtype != tensor.dtype:  # 16 bits, which could not move by small steps
            tensor.copy_(moved)


@forward.register_fake
def _(x, weight, bias, eps, limits):  # type: ignore[no-untyped-def]
    return torch.empty_like(_dense(x)), x.new_empty((STATISTICS_ROWS, x.shape[1]), dtype=torch.float64)


@inference.register_fake
def _(x, mean, var, weight, bias, eps, limits):  # type: ignore[no-untyped-def]
    return torch.empty_like(_dense(x)), x.new_empty((STATISTICS_ROWS, x.shape[1]), dtype=torch.float64)


@backward.register_fake
def _(dy, x, statistics, weight, eps, limits, fixed):  # type: ignore[no-untyped-def]
    dgamma, dbeta = (x.new_empty(x.shape[1], dtype=_parameter_dtype(x, weight)) for _ in range(2))
    return torch.empty_like(_dense(x)), dgamma, dbeta


@double_backward.register_fake
def _(ddx, ddgamma, ddbeta, dy, x, statistics, weight, eps, limits, fixed):  # type: ignore[no-untyped-def]
    g_dy, g_x = (torch.empty_like(_dense(x)) for _ in range(2))
    return g_dy, g_x, x.new_empty(x.shape[1], dtype=_parameter_dtype(x, weight))


@update_running.register_fake
def _(running_mean, running_var, x, statistics, momentum, batches):  # type: ignore[no-untyped-def]
    return None


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """For the gradients of `forward` and `inference`."""
    x, *running, weight, bias, ctx.eps, ctx.limits = inputs
    ctx.fixed, ctx.has_bias = bool(running), bias is not None
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], weight)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x, statistics, weight = ctx.saved_tensors
    dx, dgamma, dbeta = backward(dy, x, statistics, weight, ctx.eps, ctx.limits, ctx.fixed)
    return dx, None if weight is None else dgamma, dbeta if ctx.has_bias else None


def _forward_gradients(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, dy), None, None


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


forward.register_autograd(_forward_gradients, setup_context=_keep)
inference.register_autograd(_inference_gradients, setup_context=_keep)
backward.register_autograd(_second_gradients, setup_context=_keep_backward)
