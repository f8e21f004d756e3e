"""Handwritten digits, on several ranks
====================================

Handwritten digits, trained data-parallel: every rank has a part of each batch, and all have the same network.

    mpiexec -n 4 python -m mpi4py examples/digits_mpi.py

The network of digits.py with `SyncBatchNorm`. For comparison, rank 0 also trains the same network on whole batches in
one process. After every step all parameters of the two are compared. Decisions:

- float64, so that the only difference is a small rounding.
- One Allreduce adds up the gradients of all parameters over the ranks, including gamma and beta, so `SyncBatchNorm`
  leaves those local. The loss is a mean over the batch, so each rank divides by the size of the batch, not by that of
  its part.
- Every rank draws the whole batch from the same seed and takes its part: only statistics and gradients are sent.
"""

import sys

import numpy as np
from digits import SGD, SIZES, Array, BatchNorm, Labels, Network, accuracy, batches, load, softmax_cross_entropy, split
from mpi4py import MPI

from batchnorm.mpi import SyncBatchNorm

LEARNING_RATE = 0.1
EPOCHS = 5
CLOSE = 1e-10


class ParallelBatchNorm:
    """Batch norm over the batch of all ranks."""

    def __init__(self, channels: int, comm: MPI.Comm) -> None:
        self.layer = SyncBatchNorm(channels, comm, dtype=np.float64)
        self.parameters = [self.layer.gamma, self.layer.beta]

    def forward(self, x: Array) -> Array:
        return self.layer.train()(x)

    def backward(self, dy: Array) -> Array:
        dx = self.layer.backward(dy)
        self.gradients = [self.layer.dgamma, self.layer.dbeta]
        return dx

    def predict(self, x: Array) -> Array:
        return self.layer.eval()(x)


def parallel(network: Network, comm: MPI.Comm) -> Network:
    """The same network with batch norms over all ranks."""
    network.layers = [
        ParallelBatchNorm(layer.gamma.size, comm) if isinstance(layer, BatchNorm) else layer for layer in network.layers
    ]
    return network


def add_up_gradients(network: Network, comm: MPI.Comm) -> None:
    """Add up the gradients over the ranks, in one message."""
    gradients = [gradient for layer in network.layers for gradient in layer.gradients]
    flat = np.concatenate([gradient.ravel() for gradient in gradients])
    comm.Allreduce(MPI.IN_PLACE, flat)
    ends = np.cumsum([gradient.size for gradient in gradients])
    for gradient, summed in zip(gradients, np.split(flat, ends[:-1]), strict=True):
        gradient[...] = summed.reshape(gradient.shape)


def step(network: Network, sgd: SGD, x: Array, labels: Labels, samples: int, comm: MPI.Comm) -> float:
    """One step of all ranks, each with its part of a batch of this many samples; returns the loss of the batch."""
    loss, dy = softmax_cross_entropy(network.forward(x), labels)
    network.backward(dy * (len(labels) / samples))
    add_up_gradients(network, comm)
    sgd.step()
    return comm.allreduce(loss * len(labels) / samples)


def difference(one: Network, other: Network) -> float:
    """The largest difference between parameters."""
    pairs = zip(one.layers, other.layers, strict=True)
    return max(
        float(abs(a - b).max())
        for ours, theirs in pairs
        for a, b in zip(ours.parameters, theirs.parameters, strict=True)
    )


def main() -> None:
    comm = MPI.COMM_WORLD
    generator = np.random.default_rng(0)
    x, labels = load()
    x, labels, test_x, test_labels = split(x.astype(np.float64), labels, generator)
    network = parallel(Network(SIZES, np.random.default_rng(1), batch_norm=True, dtype=np.float64), comm)
    alone = Network(SIZES, np.random.default_rng(1), batch_norm=True, dtype=np.float64)
    sgd, sgd_alone = SGD(network, LEARNING_RATE), SGD(alone, LEARNING_RATE)
    show = print if comm.rank == 0 else lambda *_, **__: None
    show(f"{comm.size} ranks\n\nepoch      loss  test accuracy  largest difference from one process after any step")
    apart = 0.0
    for epoch in range(1, EPOCHS + 1):
        losses = []
        for batch, batch_labels in batches(x, labels, generator):
            mine = np.array_split(np.arange(len(batch)), comm.size)[comm.rank]
            losses.append(step(network, sgd, batch[mine], batch_labels[mine], len(batch), comm))
            if comm.rank == 0:
                step(alone, sgd_alone, batch, batch_labels, len(batch), MPI.COMM_SELF)
                apart = max(apart, difference(network, alone))
        percent = accuracy(network, test_x, test_labels)
        show(f"{epoch:5}{np.mean(losses):10.4f}{percent:13.2f} %  {apart:.1e}", flush=True)
    sys.exit(int(comm.bcast(apart) > CLOSE))


if __name__ == "__main__":
    main()
