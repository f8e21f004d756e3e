"""A trained network, deployed in three ways
=========================================

Deploying a trained network: as layers in evaluation, as plans, or folded into the convolutions.

A small convolutional network learns handwritten digits. Then it makes the same predictions in three ways, which differ
in what must be shipped: `bn.BatchNorm` in evaluation, `bn.Plan.of(layer)`, and weights from `bn.fold`, which need only
NumPy. Decisions:

- A block is convolution → batch norm → relu, with the relu in the pass of batch norm. Arrays are channels last,
  (N, H, W, C), and weights (H, W, in, out), so that a convolution is one matrix product and y needs no transposition.
- The folded network is first written to a file and then used from there, by a function that knows neither the layers
  nor batchnorm.
- Two ways can only disagree if the margin, the distance between the two largest logits of an image, is as small as the
  difference between their logits. The layers in float64 give the right answer.
- A deployed network usually fails because of its inputs. So the first plan also shows how far images have moved from
  its statistics if they are inverted or not scaled. A folded network has no statistics left for such a comparison.
- Times are measured only with `--time`, because they differ from run to run. Everything else is repeatable.
"""

from collections.abc import Callable, Mapping
from functools import partial, reduce
from itertools import islice
from pathlib import Path
from timeit import repeat
from typing import Any, NamedTuple

import numpy as np
from digits import BATCH, Array, Generator, Labels, Layer, Linear, Network, fit, load, options, split
from numpy.lib.stride_tricks import sliding_window_view

import batchnorm as bn
from batchnorm.drift import Drift

Step = Callable[[Array], Array]

SHAPE = (8, 8, 1)
CHANNELS = (16, 32)
KERNEL = 3
LEFT = 8 - 2 * (KERNEL - 1)
LEARNING_RATE = 0.1
CALLS = 200


def windows(x: Array) -> Array:
    """The values that each place of the output sees, (N, H − 2, W − 2, 3, 3, C), without a copy."""
    return np.moveaxis(sliding_window_view(x, (KERNEL, KERNEL), axis=(1, 2)), 3, 5)


def convolve(x: Array, weight: Array) -> Array:
    return np.tensordot(windows(x), weight, axes=3)


def folded(arrays: Mapping[str, Array], x: Array) -> Array:
    """The logits, computed from the arrays of the file."""
    x = x.reshape(-1, *SHAPE)
    for name in ("first", "second"):
        x = np.maximum(convolve(x, arrays[f"{name}.weight"]) + arrays[f"{name}.bias"], 0)
    return x.reshape(len(x), -1) @ arrays["dense.weight"] + arrays["dense.bias"]


class Convolution:
    """A convolution without padding and without a bias, which batch norm would subtract again."""

    def __init__(self, inputs: int, outputs: int, generator: Generator) -> None:
        shape = (KERNEL, KERNEL, inputs, outputs)
        self.weight = generator.normal(0, np.sqrt(2 / np.prod(shape[:3])), shape).astype(np.float32)
        self.parameters = [self.weight]

    def forward(self, x: Array) -> Array:
        self.x = x
        return self.predict(x)

    def backward(self, dy: Array) -> Array:
        self.gradients = [np.tensordot(windows(self.x), dy, axes=((0, 1, 2), (0, 1, 2)))]
        dx = np.zeros_like(self.x)
        _, H, W, _ = dy.shape
        for i, j in np.ndindex(KERNEL, KERNEL):
            dx[:, i : i + H, j : j + W] += dy @ self.weight[i, j].T
        return dx

    def predict(self, x: Array) -> Array:
        return convolve(x, self.weight)


class Norm:
    """Batch norm and relu, in one pass."""

    def __init__(self, channels: int) -> None:
        self.layer = bn.BatchNorm(channels, axis=-1, activation="relu")
        self.parameters = [self.layer.gamma, self.layer.beta]

    def forward(self, x: Array) -> Array:
        return self.layer.train()(x)

    def backward(self, dy: Array) -> Array:
        dx = self.layer.backward(dy)
        self.gradients = [self.layer.dgamma, self.layer.dbeta]
        return dx

    def predict(self, x: Array) -> Array:
        return self.layer.eval()(x)


class Reshape:
    """Each sample in another shape."""

    parameters: tuple[Array, ...] = ()
    gradients: tuple[Array, ...] = ()

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def forward(self, x: Array) -> Array:
        self.given = x.shape
        return self.predict(x)

    def backward(self, dy: Array) -> Array:
        return dy.reshape(self.given)

    def predict(self, x: Array) -> Array:
        return x.reshape(len(x), *self.shape)


class ConvNet(Network):
    """Two blocks, convolution → batch norm → relu, and a linear layer to the classes."""

    def __init__(self, generator: Generator) -> None:
        first, second = CHANNELS
        self.convolutions = [Convolution(1, first, generator), Convolution(first, second, generator)]
        self.norms = [Norm(first), Norm(second)]
        self.dense = Linear(LEFT * LEFT * second, 10, generator, bias=True, dtype=np.float32)
        blocks = [layer for block in zip(self.convolutions, self.norms, strict=True) for layer in block]
        self.layers = [Reshape(*SHAPE), *blocks, Reshape(-1), self.dense]

    def steps(self, ready: Callable[[bn.BatchNorm], Step]) -> list[Step]:
        """The steps of a prediction, in order, with each batch norm converted by `ready`."""
        return [ready(layer.layer) if isinstance(layer, Norm) else layer.predict for layer in self.layers]

    def without_batch_norm(self) -> dict[str, Any]:
        """The arrays of the same network without batch norm."""
        arrays: dict[str, Any] = {"dense.weight": self.dense.weight, "dense.bias": self.dense.bias}
        for name, convolution, norm in zip(("first", "second"), self.convolutions, self.norms, strict=True):
            of = norm.layer
            arrays[f"{name}.weight"], arrays[f"{name}.bias"] = bn.fold(
                convolution.weight, None, of.running_mean, of.running_var, of.gamma, of.beta, layout="HWIO", eps=of.eps
            )
        return arrays


class Way(NamedTuple):
    """One way to deploy the network."""

    logits: Step
    arrays: list[Array]


def ways_of(network: ConvNet, path: Path) -> dict[str, Way]:
    """The three ways, the last one from a file."""
    layers: list[Layer] = [*network.convolutions, network.dense]
    weights: list[Array] = [array for layer in layers for array in layer.parameters]
    evaluated, plans = network.steps(bn.BatchNorm.eval), network.steps(bn.Plan.of)
    state: list[Array] = [array for norm in network.norms for array in norm.layer.state_dict().values()]
    fixed: list[Array] = [
        array for plan in plans if isinstance(plan, bn.Plan) for array in (plan.mean, plan.var, plan.gamma, plan.beta)
    ]
    np.savez(path, **network.without_batch_norm())
    with np.load(path) as file:
        arrays = dict(file)
    return {
        "layers": Way(partial(run, evaluated), weights + state),
        "plans": Way(partial(run, plans), weights + fixed),
        "folded": Way(partial(folded, arrays), list(arrays.values())),
    }


def run(steps: list[Step], x: Array) -> Array:
    return reduce(lambda values, step: step(values), steps, x)


def percent(logits: Array, labels: Labels) -> float:
    return 100 * float(np.mean(logits.argmax(axis=1) == labels))


def margins(logits: Array) -> Array:
    *_, second, first = np.sort(logits, axis=1).T
    return first - second


class Inputs(NamedTuple):
    """Images as they may arrive."""

    name: str
    change: Step
    color: str


INPUTS = (
    Inputs("from 0 to 1", lambda x: x, "#0b6e99"),
    Inputs("inverted", lambda x: 1 - x, "#8e4585"),
    Inputs("from 0 to 255", lambda x: 255 * x, "#d9730d"),
)


class Result(NamedTuple):
    """The results for these inputs."""

    accuracy: float
    drift: Drift


def compare(ways: dict[str, Way], x: Array, labels: Labels) -> dict[str, Array]:
    """Print a row for each way, and return the logits of all."""
    logits = {name: way.logits(x) for name, way in ways.items()}
    exact = ways["layers"].logits(x.astype(np.float64))
    print(f"{'':8}{'accuracy':>10}{'same class':>12}{'off the layers':>16}{'off float64':>13}{'arrays':>8}{'bytes':>8}")
    for name, way in ways.items():
        same = np.sum(logits[name].argmax(axis=1) == logits["layers"].argmax(axis=1))
        off, error = (abs(logits[name] - other).max() for other in (logits["layers"], exact))
        size = sum(array.nbytes for array in way.arrays)
        shares = f"{percent(logits[name], labels):8.2f} %{f'{same} of {len(x)}':>12}"
        print(f"{name:8}{shares}{off:16.1e}{error:13.1e}{len(way.arrays):8}{size:8}")
    print(f"\nlogits up to {abs(exact).max():.1f}, smallest margin {margins(exact).min():.1e}")
    return logits


def measure(ways: dict[str, Way], x: Array) -> None:
    print(f"\n{'ms':8}{f'batch of {BATCH}':>12}{'one image':>12}")
    for name, way in ways.items():
        calls = (partial(way.logits, x[:size]) for size in (BATCH, 1))
        batch, one = (1000 * np.median(repeat(call, number=1, repeat=CALLS)) for call in calls)
        print(f"{name:8}{batch:12.3f}{one:12.3f}")


def try_inputs(network: ConvNet, logits: Step, x: Array, labels: Labels) -> dict[Inputs, Result]:
    """Print the effect of inputs on accuracy, and what the first plan says about them."""
    plan, convolution = bn.Plan.of(network.norms[0].layer), network.convolutions[0]
    results = {}
    print(f"\n{'images':14}{'accuracy':>10}{'largest shift':>15}{'variance ratio':>22}")
    for inputs in INPUTS:
        given = inputs.change(x)
        drift = plan.drift(convolution.predict(given.reshape(-1, *SHAPE)))
        results[inputs] = Result(percent(logits(given), labels), drift)
        ratios = f"{drift.ratio.min():.3g} to {drift.ratio.max():.3g}"
        print(f"{inputs.name:14}{results[inputs].accuracy:8.2f} %{abs(drift.shift).max():13.2f} σ{ratios:>22}")
    for inputs, (_, drift) in results.items():
        for hint in drift.hints:
            print(f"\n{inputs.name}: {hint}")
    return results


def draw(logits: dict[str, Array], results: dict[Inputs, Result], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    margin = margins(logits["layers"])
    order, off = np.argsort(margin), abs(logits["folded"] - logits["layers"]).max(axis=1)
    left.semilogy(margin[order], color="#555555", linewidth=2, label="margin: largest logit − second largest")
    left.semilogy(off[order], ".", color="#0b6e99", markersize=4, label="difference: folded − layers, largest of ten")
    left.set_title("rounding is far from changing a prediction")
    left.set_xlabel("test image, by margin")
    left.legend(frameon=False, loc="center right")
    for inputs, (accuracy, drift) in results.items():
        right.semilogy(drift.kl, "o-", color=inputs.color, label=f"images {inputs.name}: {accuracy:.2f} % right")
    right.set_title("divergence from the first statistics (nats)")
    right.set_xlabel("channel")
    right.set_ylim(top=1e8)
    right.legend(frameon=False, loc="upper right")
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    figure.suptitle("A network in use: folding does not change its predictions, wrong inputs do")
    figure.savefig(path, dpi=150)


def main() -> None:
    chosen = options(
        "Deploy a network with batch norm in three ways.", "deploy.png", epochs=12, save="deploy.npz", times=True
    )
    x, labels = load()
    generator = np.random.default_rng(chosen.seed)
    x, labels, test_x, test_labels = split(x, labels, generator)
    network = ConvNet(generator)
    for _ in islice(fit(network, LEARNING_RATE, x, labels, generator), chosen.epochs):
        pass
    ways = ways_of(network, chosen.save)
    print(f"{len(test_x)} test images after epoch {chosen.epochs}\n")
    logits = compare(ways, test_x, test_labels)
    if chosen.time:
        measure(ways, test_x)
    draw(logits, try_inputs(network, ways["plans"].logits, test_x, test_labels), chosen.plot)


if __name__ == "__main__":
    main()
