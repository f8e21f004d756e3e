"""Parts of the gradient, stopped
==============================

Handwritten digits with parts of the gradient stopped: what the paths through mean and variance are good for.

The network of digits.py, four times: with the full gradient, without the path through the variance, without the one
through the mean, and without both, as if the batch's statistics were constants. Decisions:

- `bn.backward(dy, saved, through=...)` is the only difference. All four start from the same weights and see the same
  batches.
- There are several seeds, because two runs of one network differ too: curves are means over them, and bands reach from
  the least to the greatest.
- The learning rate is small, so that the full gradient has no difficulty and any failure is the fault of the gradient.
- Besides loss and accuracy, the picture shows the offset of the first batch norm's input, the mean of `|μ|/σ` over its
  channels. Batch norm removes the offset, so only a wrong gradient has a reason to change it.
"""

from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from digits import SIZES, Array, BatchNorm, Labels, Network, accuracy, fit, load, options, split
from numpy.typing import NDArray

import batchnorm as bn

Through = tuple[Literal["mean", "variance"], ...]

LEARNING_RATE = 0.02
SEEDS = 5


class Variant(NamedTuple):
    """The statistics through which the gradient passes."""

    name: str
    through: Through
    color: str


VARIANTS = (
    Variant("full gradient", ("mean", "variance"), "#0b6e99"),
    Variant("without variance path", ("mean",), "#3f9b5f"),
    Variant("without mean path", ("variance",), "#d9730d"),
    Variant("without both", (), "#8e4585"),
)


class PartialBatchNorm(BatchNorm):
    """Batch norm whose gradient passes through only some of its statistics."""

    def __init__(self, channels: int, through: Through) -> None:
        super().__init__(channels)
        self.through = through

    def backward(self, dy: Array) -> Array:
        dx, dgamma, dbeta = bn.backward(dy, self.saved, through=self.through)
        self.gradients = [dgamma, dbeta]
        return dx

    @property
    def offset(self) -> float:
        """Mean of |μ|/σ over the channels of the last batch."""
        return float(np.mean(abs(self.saved.mean) / np.sqrt(self.saved.var)))


class Epoch(NamedTuple):
    """The state of one run after one epoch."""

    loss: float
    accuracy: float
    offset: float


def train(x: Array, labels: Labels, through: Through, epochs: int, seed: int) -> list[Epoch]:
    generator = np.random.default_rng(seed)
    x, labels, test_x, test_labels = split(x, labels, generator)
    network = Network(SIZES, generator, batch_norm=True)
    network.layers = [
        PartialBatchNorm(layer.gamma.size, through) if isinstance(layer, BatchNorm) else layer
        for layer in network.layers
    ]
    first = next(layer for layer in network.layers if isinstance(layer, PartialBatchNorm))
    return [
        Epoch(loss, accuracy(network, test_x, test_labels), first.offset)
        for loss in islice(fit(network, LEARNING_RATE, x, labels, generator), epochs)
    ]


Runs = dict[Variant, NDArray[np.float64]]  # seed, epoch, what


def draw(runs: Runs, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    for variant, results in runs.items():
        epochs = range(1, results.shape[1] + 1)
        for panel, values in zip(panels, np.moveaxis(results, 2, 0), strict=True):
            panel.plot(epochs, values.mean(axis=0), color=variant.color, label=variant.name, linewidth=2)
            panel.fill_between(
                epochs, values.min(axis=0), values.max(axis=0), color=variant.color, alpha=0.15, linewidth=0
            )
    titles = ("training loss", "test accuracy (%)", "|μ|/σ of the first batch norm's x")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title)
        panel.set_xlabel("epoch")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[1].set_ylim(bottom=max(70, panels[1].get_ylim()[0]), top=100.5)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs), frameon=False)
    figure.suptitle("Handwritten digits with parts of batch normalization's gradient stopped")
    figure.savefig(path, dpi=150)


def main() -> None:
    chosen = options("Train on handwritten digits with parts of the gradient stopped.", "stop_gradient.png", epochs=30)
    x, labels = load()
    seeds = range(chosen.seed, chosen.seed + SEEDS)
    print(f"after epoch {chosen.epochs}, learning rate {LEARNING_RATE}, seeds {seeds[0]} to {seeds[-1]}\n")
    print(f"{'':22}{'training loss':>15}{'test accuracy':>15}{'lowest':>9}{'|μ|/σ':>8}")
    runs: Runs = {}
    for variant in VARIANTS:
        runs[variant] = np.array([train(x, labels, variant.through, chosen.epochs, seed) for seed in seeds])
        loss, percent, offset = runs[variant][:, -1].mean(axis=0)
        lowest = runs[variant][:, -1, 1].min()
        print(f"{variant.name:22}{loss:15.4f}{percent:13.2f} %{lowest:7.2f} %{offset:8.2f}")
    draw(runs, chosen.plot)


if __name__ == "__main__":
    main()
