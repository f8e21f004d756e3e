"""Handwritten digits, with and without batch norm
===============================================

Handwritten digits: a network with two batch-normalized hidden layers, in NumPy, against the same one without.

The class BatchNorm below shows how the four functions work together: `forward` normalizes a batch and leaves `saved`,
`backward` and `update_running` read it, and `inference` normalizes with the running statistics. (`bn.BatchNorm` is that
class ready-made.) Decisions:

- A hidden layer is linear → batch norm → relu. If batch norm follows, the linear map has no bias: the mean, which is
  subtracted, would contain it, and beta replaces it.
- At each learning rate both networks start from the same weights and see the same batches.
- Noise is added to the training images in every batch, for both networks: there are only 1437 of them.
- The reported result is that of the middle learning rate after the last epoch, not the best one on the test set.
- The samples left over at the end of an epoch are skipped: the statistics of a small batch are noise, and one sample
  has no variance.
- One thread, for batchnorm and for NumPy's matrix products: the arrays are too small to share out, and on a busy
  machine threads that wait for each other take most of the time.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

import batchnorm as bn

Array = NDArray[np.floating]
Labels = NDArray[np.int64]
Generator = np.random.Generator

SIZES = (64, 128, 128, 10)
BATCH = 64
NOISE = 0.1
LEARNING_RATES = (0.02, 0.1, 0.5)
REPORTED = 0.1
COLORS = {True: "#0b6e99", False: "#d9730d"}
NAMES = {True: "with batch norm", False: "without"}


class Layer(Protocol):
    """A part of a network: `backward` leaves the gradients of the parameters, in their order."""

    @property
    def parameters(self) -> Sequence[Array]: ...
    @property
    def gradients(self) -> Sequence[Array]: ...
    def forward(self, x: Array) -> Array: ...
    def backward(self, dy: Array) -> Array: ...
    def predict(self, x: Array) -> Array: ...


class Linear:
    """y = x·weight + bias, the weight drawn for relu (He et al., 2015)."""

    def __init__(self, inputs: int, outputs: int, generator: Generator, bias: bool, dtype: DTypeLike) -> None:
        self.weight = generator.normal(0, np.sqrt(2 / inputs), (inputs, outputs)).astype(dtype)
        self.bias = np.zeros(outputs, dtype) if bias else None
        self.parameters = [self.weight] if self.bias is None else [self.weight, self.bias]

    def forward(self, x: Array) -> Array:
        self.x = x
        return self.predict(x)

    def backward(self, dy: Array) -> Array:
        dweight, dbias = self.x.T @ dy, dy.sum(axis=0)
        self.gradients = [dweight] if self.bias is None else [dweight, dbias]
        return dy @ self.weight.T

    def predict(self, x: Array) -> Array:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class BatchNorm:
    """y = gamma·(x − mean)/√(var + eps) + beta: in training with the statistics of the batch, else the running ones."""

    def __init__(self, channels: int, dtype: DTypeLike = np.float32) -> None:
        self.gamma, self.beta = np.ones(channels, dtype), np.zeros(channels, dtype)
        self.running_mean, self.running_var = np.zeros(channels, dtype), np.ones(channels, dtype)
        self.parameters = [self.gamma, self.beta]

    def forward(self, x: Array) -> Array:
        y, self.saved = bn.forward(x, self.gamma, self.beta)
        bn.update_running(self.running_mean, self.running_var, self.saved)
        return y

    def backward(self, dy: Array) -> Array:
        dx, dgamma, dbeta = bn.backward(dy, self.saved)
        self.gradients = [dgamma, dbeta]
        return dx

    def predict(self, x: Array) -> Array:
        return bn.inference(x, self.running_mean, self.running_var, self.gamma, self.beta)


class Relu:
    """y = max(x, 0)."""

    parameters: tuple[Array, ...] = ()
    gradients: tuple[Array, ...] = ()

    def forward(self, x: Array) -> Array:
        self.positive = x > 0
        return self.predict(x)

    def backward(self, dy: Array) -> Array:
        return dy * self.positive

    def predict(self, x: Array) -> Array:
        return np.maximum(x, 0)


class Network:
    """Hidden layers, each linear → batch norm (if wanted) → relu, and a linear layer to the classes."""

    def __init__(
        self, sizes: tuple[int, ...], generator: Generator, batch_norm: bool, dtype: DTypeLike = np.float32
    ) -> None:
        *hidden, classes = sizes
        self.layers: list[Layer] = []
        for inputs, outputs in pairwise(hidden):
            self.layers.append(Linear(inputs, outputs, generator, not batch_norm, dtype))
            if batch_norm:
                self.layers.append(BatchNorm(outputs, dtype))
            self.layers.append(Relu())
        self.layers.append(Linear(hidden[-1], classes, generator, True, dtype))

    def forward(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, dy: Array) -> None:
        for layer in reversed(self.layers):
            dy = layer.backward(dy)

    def predict(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer.predict(x)
        return x


class SGD:
    """Gradient descent with momentum (the weight of the old velocity, not that of running statistics)."""

    def __init__(self, network: Network, learning_rate: float, momentum: float = 0.9) -> None:
        self.network, self.learning_rate, self.momentum = network, learning_rate, momentum
        self.velocities = [[np.zeros_like(parameter) for parameter in layer.parameters] for layer in network.layers]

    def step(self) -> None:
        for layer, velocities in zip(self.network.layers, self.velocities, strict=True):
            for parameter, velocity, gradient in zip(layer.parameters, velocities, layer.gradients, strict=True):
                velocity *= self.momentum
                velocity -= self.learning_rate * gradient
                parameter += velocity


def softmax_cross_entropy(x: Array, labels: Labels) -> tuple[float, Array]:
    """Mean loss of a batch and its gradient with respect to x."""
    rows = np.arange(len(labels))
    shifted = x - x.max(axis=1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    dx = np.exp(log_softmax)
    dx[rows, labels] -= 1
    return -float(log_softmax[rows, labels].mean()), dx / x.dtype.type(len(labels))


def split(x: Array, labels: Labels, generator: Generator) -> tuple[Array, Labels, Array, Labels]:
    """Training images and labels, then those of the test: a fifth of each class."""
    order = generator.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    test = np.arange(len(order)) % 5 == 0
    return x[order[~test]], labels[order[~test]], x[order[test]], labels[order[test]]


def batches(x: Array, labels: Labels, generator: Generator) -> Iterator[tuple[Array, Labels]]:
    order = generator.permutation(len(x))
    for start in range(0, len(x) - BATCH + 1, BATCH):
        batch = order[start : start + BATCH]
        noise = generator.standard_normal((BATCH, x.shape[1]), dtype=x.dtype.type)
        yield x[batch] + NOISE * noise, labels[batch]


@np.errstate(over="ignore", invalid="ignore")
def train_epoch(network: Network, sgd: SGD, x: Array, labels: Labels, generator: Generator) -> float:
    """Train on every batch once; return the mean loss, or the first one that is not finite."""
    losses = []
    for batch, batch_labels in batches(x, labels, generator):
        loss, dy = softmax_cross_entropy(network.forward(batch), batch_labels)
        if not np.isfinite(loss):
            return loss
        network.backward(dy)
        sgd.step()
        losses.append(loss)
    return float(np.mean(losses))


def fit(network: Network, learning_rate: float, x: Array, labels: Labels, generator: Generator) -> Iterator[float]:
    """Train, and yield the loss of each epoch as long as it is finite."""
    sgd = SGD(network, learning_rate)
    while np.isfinite(loss := train_epoch(network, sgd, x, labels, generator)):
        yield loss


@np.errstate(over="ignore", invalid="ignore")
def accuracy(network: Network, x: Array, labels: Labels) -> float:
    """The percentage of images whose class is predicted correctly."""
    return 100 * float(np.mean(network.predict(x).argmax(axis=1) == labels))


@dataclass
class Curves:
    """Training loss and test accuracy after each epoch; they end when the loss is no longer finite."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    diverged: bool = False

    def __str__(self) -> str:
        return "diverged" if self.diverged else f"{self.accuracies[-1]:.2f} %"


def train(x: Array, labels: Labels, batch_norm: bool, learning_rate: float, epochs: int, seed: int) -> Curves:
    generator = np.random.default_rng(seed)
    x, labels, test_x, test_labels = split(x, labels, generator)
    network = Network(SIZES, generator, batch_norm)
    curves = Curves()
    for loss in islice(fit(network, learning_rate, x, labels, generator), epochs):
        curves.losses.append(loss)
        curves.accuracies.append(accuracy(network, test_x, test_labels))
    curves.diverged = len(curves.losses) < epochs
    return curves


Sweep = dict[tuple[float, bool], Curves]


def draw(sweep: Sweep, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 6), layout="constrained")
    axes = figure.subplots(2, len(LEARNING_RATES), sharex=True, sharey="row")
    for (learning_rate, batch_norm), curves in sweep.items():
        column = LEARNING_RATES.index(learning_rate)
        style = {"color": COLORS[batch_norm], "label": f"{NAMES[batch_norm]}: {curves}", "linewidth": 2}
        epochs = range(1, len(curves.losses) + 1)
        axes[0, column].semilogy(epochs, curves.losses, **style)
        axes[1, column].plot(epochs, curves.accuracies, **style)
    for column, learning_rate in enumerate(LEARNING_RATES):
        axes[0, column].set_title(f"learning rate {learning_rate}")
        axes[1, column].set_xlabel("epoch")
        axes[1, column].legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.72))
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("test accuracy (%)")
    axes[1, 0].set_ylim(0, 102)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    figure.suptitle("Handwritten digits, two hidden layers, with and without batch normalization")
    figure.savefig(path, dpi=150)


def options(
    description: str, plot: str, epochs: int | None = None, save: str | None = None, times: bool = False
) -> argparse.Namespace:
    """The command line: seed and picture, and the other options that have a default here."""
    parser = argparse.ArgumentParser(description=description)
    if epochs is not None:
        parser.add_argument("--epochs", type=int, default=epochs, metavar="N", help="epochs of training (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of everything random (%(default)s)")
    parser.add_argument("--plot", type=Path, default=plot, metavar="FILE", help="the picture (%(default)s)")
    if save is not None:
        parser.add_argument("--save", type=Path, default=save, metavar="FILE", help="the network (%(default)s)")
    if times:
        parser.add_argument("--time", action="store_true", help="measure times too")
    chosen = parser.parse_args()
    if epochs is not None and chosen.epochs < 1:
        parser.error(f"argument --epochs: must be at least 1, got {chosen.epochs}")
    if chosen.seed < 0:
        parser.error(f"argument --seed: must be at least 0, got {chosen.seed}")
    for name, suffix in (("plot", ".png"), ("save", ".npz")):
        path = getattr(chosen, name, None)
        if path is not None and (path.suffix != suffix or not path.parent.is_dir()):
            parser.error(f"argument --{name}: must be a {suffix} file in an existing folder, got {path}")
    return chosen


def datasets() -> ModuleType:
    """scikit-learn's data sets; one thread from here on."""
    try:
        import matplotlib.figure  # noqa: F401
        import sklearn.datasets
        from threadpoolctl import threadpool_limits
    except ImportError:
        script = Path(sys.argv[0]).name
        sys.exit(f"{script} needs scikit-learn and matplotlib: python -m pip install '.[examples]'")
    threadpool_limits(1)
    return sklearn.datasets


def load() -> tuple[Array, Labels]:
    """Images from 0 to 1 and their labels; one thread from here on."""
    images, labels = datasets().load_digits(return_X_y=True)
    return (images / 16).astype(np.float32), labels


def main() -> None:
    chosen = options("Train on handwritten digits with and without batch normalization.", "digits.png", epochs=30)
    x, labels = load()
    sweep: Sweep = {}
    print(f"test accuracy after epoch {chosen.epochs}\n")
    print(f"learning rate{NAMES[True]:>18}{NAMES[False]:>12}")
    for rate in LEARNING_RATES:
        for batch_norm in NAMES:
            sweep[rate, batch_norm] = train(x, labels, batch_norm, rate, chosen.epochs, chosen.seed)
        print(f"{rate:13}{sweep[rate, True]!s:>18}{sweep[rate, False]!s:>12}")
    draw(sweep, chosen.plot)
    print(f"\ntest accuracy with batch norm, learning rate {REPORTED}: {sweep[REPORTED, True]}")


if __name__ == "__main__":
    main()
