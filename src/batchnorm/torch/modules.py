"""`BatchNorm1d`, `BatchNorm2d` and `BatchNorm3d`, like PyTorch's.

Unlike in PyTorch, a batch that raises an error does not change `num_batches_tracked`.
"""

from typing import Any

import torch
from torch import Tensor

from .. import _activation
from .._activation import Activation
from . import operators
from .tensors import DTYPES


def batch_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    activation: Activation | None = None,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """y = act(gamma·(x − μ)/√(σ² + eps) + beta), a replacement for `torch.nn.functional.batch_norm`.

    In training μ and σ² are those of the batch, and the running statistics move towards them:
    r ← (1 − momentum)·r + momentum·batch.

    Parameters
    ----------
    input : Tensor of float32, float64, float16 or bfloat16, at least 2-D, on the CPU
        x, with channels along axis 1, in any memory order. bfloat16 needs the package ml_dtypes.
    running_mean, running_var : Tensor of shape (C,), optional
        Changed in place in training, if given. In evaluation they normalize x and must be given.
    weight, bias : Tensor of shape (C,), optional
        gamma and beta; 1 and 0 where None.
    training : bool, default False
    momentum : float, default 0.1
        The weight of the new batch. None means the mean of all batches, counted by `num_batches_tracked`.
    eps : float, default 1e-5
    activation : "relu", ("leaky_relu", slope) or ("clip", low, high), optional
        Applied in the pass that writes y, and in the one that writes dx.
    num_batches_tracked : Tensor, optional
        The number of batches so far, including this one. It is only read, and only if momentum is None.

    Returns
    -------
    Tensor
        With x's shape, dtype and memory order.

    Raises
    ------
    TypeError
        If x has an unsupported dtype, or is sparse.
    ValueError
        If x is not on the CPU, has one value per channel in training, or a shape is wrong. Nothing is written then.
    NotImplementedError
        In forward mode, where PyTorch would silently drop the tangent.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import batch_norm
    >>> batch_norm(torch.tensor([[1.0], [3.0]]), None, None, training=True, eps=0.0)
    tensor([[-1.],
            [ 1.]])
    """
    check(input, running_mean, running_var)
    limits = list(_activation.as_limits(activation) or ())
    eps = float(eps)
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean and running_var must be given if training is false, got None")
        y, _ = operators.inference(input, running_mean, running_var, weight, bias, eps, limits)
        return y
    if input.numel() == input.shape[1]:
        raise ValueError(f"input must have more than one value per channel in training, got shape {tuple(input.shape)}")
    running = running_mean, running_var
    y, _ = operators.forward(input, weight, bias, *running, momentum, num_batches_tracked, eps, limits)
    return y


def check(x: Tensor, running_mean: Tensor | None, running_var: Tensor | None) -> None:
    """Raise clear errors for input that PyTorch's dispatcher or NumPy would refuse with less clear ones."""
    if x.device.type not in ("cpu", "meta"):
        raise ValueError(
            f"input must be on the CPU, got {x.device}: batchnorm.torch.revert(model) restores PyTorch's own "
            "modules, input.cpu() copies a tensor to the CPU"
        )
    if x.layout is not torch.strided:
        raise TypeError(f"input must be dense, got {x.layout}: input.to_dense() converts it")
    if x.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"input must have one of the dtypes {names}, got {x.dtype}: input.float() converts it")
    if x.dim() < 2:
        raise ValueError(f"input must have at least 2 dimensions, got shape {tuple(x.shape)}")
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        if running is not None and running.shape != (x.shape[1],):
            raise ValueError(f"{name} must have shape ({x.shape[1]},), got {tuple(running.shape)}")


class Norm(torch.nn.modules.batchnorm._BatchNorm):
    """The common part of the three modules."""

    activation: Activation | None = None

    def __init__(self, *args: Any, activation: Activation | None = None, **kwargs: Any) -> None:
        _activation.as_limits(activation)
        super().__init__(*args, **kwargs)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        self._check_input_dim(input)
        moves = self.training and self.track_running_stats
        known = moves or not self.training
        counter = self.num_batches_tracked if moves else None
        y = batch_norm(
            input,
            self.running_mean if known else None,
            self.running_var if known else None,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            0.0 if self.momentum is None and counter is None else self.momentum,
            self.eps,
            activation=self.activation,
            num_batches_tracked=counter + 1 if counter is not None and self.momentum is None else None,
        )
        if counter is not None:
            counter.add_(1)
        return y

    def extra_repr(self) -> str:
        after = "" if self.activation is None else f", activation={self.activation!r}"
        return f"{super().extra_repr()}{after}"


class BatchNorm1d(Norm, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` on this package's kernels, for x of shape (N, C) or (N, C, L).

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As in PyTorch; its other keywords are accepted too.
    activation : "relu", ("leaky_relu", slope) or ("clip", low, high), optional
        Applied in the pass that writes y; see `batch_norm`.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import BatchNorm1d
    >>> BatchNorm1d(1, eps=1e-9, activation="relu")(torch.tensor([[1.0], [3.0]])).detach()
    tensor([[0.],
            [1.]])
    """


class BatchNorm2d(Norm, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on this package's kernels, for x of shape (N, C, H, W); see `BatchNorm1d`."""


class BatchNorm3d(Norm, torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` on this package's kernels, for x of shape (N, C, D, H, W); see `BatchNorm1d`."""
