"""`SyncBatchNorm` for processes of `torch.distributed`, on the CPU; PyTorch's own is for GPUs only.

Decisions:

- `batchnorm.mpi.SyncBatchNorm` does the work: the same packets, merged in the same order, and the same protection from
  waiting for a rank that raises. Only the transport is `torch.distributed`, with gloo or another backend that has
  `send` and `recv` for tensors on the CPU.
- Gradients of weight and bias are those of the rank's own values, as in PyTorch, so DistributedDataParallel averages
  them like all others.
- There is no second derivative over several ranks, and `torch.compile` does not compile the module. On one rank, and in
  evaluation, nothing is sent and it is a `BatchNorm`.
"""

import contextlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from .. import functional
from ..moments import Numbers
from ..mpi import SyncBatchNorm as Layer
from ..saved import Saved
from . import operators
from .modules import Norm, check
from .tensors import as_array, as_tensor, as_tensor_like, dense

_TAG = 2015
"""The tag of the messages, which share the process group with those of the program."""


class _Ranks:
    """A process group, with the methods of `batchnorm.mpi.Communicator`."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def Get_rank(self) -> int:  # noqa: N802
        return int(distributed.get_rank(self.group))

    def Get_size(self) -> int:  # noqa: N802
        return int(distributed.get_world_size(self.group))

    def allgather(self, sendobj: Any, /) -> list[Any]:
        gathered = [None] * self.Get_size()
        distributed.all_gather_object(gathered, sendobj, self.group)
        return gathered

    def Allgather(self, sendbuf: Numbers, recvbuf: Numbers, /) -> None:  # noqa: N802
        distributed.all_gather(list(torch.from_numpy(recvbuf)), torch.from_numpy(sendbuf), self.group)

    def Send(self, buf: Numbers, dest: int, /) -> None:  # noqa: N802
        distributed.send(torch.from_numpy(buf), self._in_world(dest), self.group, _TAG)

    def Recv(self, buf: Numbers, source: int, /) -> None:  # noqa: N802
        distributed.recv(torch.from_numpy(buf), self._in_world(source), self.group, _TAG)

    def Sendrecv(self, sendbuf: Numbers, dest: int, sendtag: int, recvbuf: Numbers, source: int, /) -> None:  # noqa: N802
        sending = distributed.isend(torch.from_numpy(sendbuf), self._in_world(dest), self.group, _TAG)
        self.Recv(recvbuf, source)
        sending.wait()

    def _in_world(self, rank: int) -> int:
        return rank if self.group is None else distributed.get_global_rank(self.group, rank)


class _Normalize(torch.autograd.Function):
    """y of this rank's part, with the statistics of all ranks; the layer keeps what `backward` needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, layer: Layer) -> Tensor:
        y = layer(as_array(x), num_threads=torch.get_num_threads())
        ctx.layer, ctx.kept, ctx.dtypes = layer, layer._kept, [None if t is None else t.dtype for t in (weight, bias)]
        ctx.save_for_backward(x)
        return as_tensor_like(x, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dx, *parameters = ctx.layer._backward(as_array(dy), ctx.kept, functional.NEED, None, torch.get_num_threads())
        given = (
            None if dtype is None else as_tensor(gradient).to(dtype)
            for gradient, dtype in zip(parameters, ctx.dtypes, strict=True)
        )
        return as_tensor_like(x, dx), *given, None


class SyncBatchNorm(Norm, torch.nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` on the CPU: y = gamma·(x − μ)/√(σ² + eps) + beta, with μ and σ² over all ranks.

    Ranks may have parts of different sizes, or none. In training, every rank must call the module in every step, and
    the backward pass. If a rank raises an error of its own, the others raise RuntimeError.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype
        As in PyTorch; its other keywords are accepted too.
    activation : "relu", ("leaky_relu", slope) or ("clip", low, high), optional
        Applied in the pass that writes y; see `batch_norm`.

    Examples
    --------
    If `torch.distributed` is not initialized, it is `BatchNorm1d` for x of any number of dimensions.

    >>> import torch
    >>> from batchnorm.torch import SyncBatchNorm
    >>> SyncBatchNorm(1, eps=1e-9)(torch.tensor([[1.0], [3.0]])).detach()
    tensor([[-1.],
            [ 1.]])
    """

    _layer: Layer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_layer"}

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if not self.training or not distributed.is_available() or not distributed.is_initialized():
            return super().forward(input)
        layer = self._made()
        if layer.comm.Get_size() == 1:
            return super().forward(input)
        try:
            self._check_input_dim(input)
            check(input, self.running_mean, self.running_var)
            x = dense(input)
            layer.eps, layer.activation = self.eps, self.activation
            for name, parameter in (("gamma", self.weight), ("beta", self.bias)):
                if parameter is not None:
                    setattr(layer, name, as_array(parameter))
        except Exception:
            with contextlib.suppress(TypeError):
                layer(None)  # type: ignore[call-overload]  # takes part with a refused x, so that no other rank waits
            raise
        y: Tensor = _Normalize.apply(x, self.weight, self.bias, layer)
        if self.track_running_stats:
            kept = layer._kept
            assert isinstance(kept, Saved)
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            operators.update_running(self.running_mean, self.running_var, kept, momentum)
        return y

    def _made(self) -> Layer:
        """The layer that does the work; all ranks make it in their first training step."""
        if self._layer is None:
            double = self.weight is not None and self.weight.dtype is torch.float64
            self._layer = Layer(
                self.num_features,
                _Ranks(self.process_group),
                affine=self.weight is not None,
                bias=self.bias is not None,
                track_running_stats=False,
                eps=self.eps,
                activation=self.activation,
                dtype=np.float64 if double else np.float32,
            )
        return self._layer
