"""A network in PyTorch, converted
===============================

A small residual network on handwritten digits, in PyTorch: with its own batch norm and with `batchnorm.torch`.

One model is built, copied, and the copy is converted: `convert(copy.deepcopy(model))` is the whole change. Decisions:

- Both start from the same weights and see the same batches. Rounding decides which ReLUs are open if their input is
  nearly 0, so any two runs diverge after some dozens of steps. A third copy, in float64, shows that both start equally
  close to it.
- The images are 8 × 8 pixels, enlarged to 32 × 32, so that the layers have the sizes of a usual small network.
- The time of a step is the median of all. The networks take turns in every step, so a busy moment affects all of them.
- A fourth copy has no batch norm at all. Subtracting its time from that of the others leaves the share of batch norm.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from batchnorm.torch import convert

COLORS = {"torch.nn": "#d9730d", "batchnorm.torch": "#0b6e99"}
FORMATS = {"NCHW": torch.contiguous_format, "channels last": torch.channels_last}
EARLY = 10


class Block(nn.Module):
    """y = relu(x + bn(conv(relu(bn(conv(x)))))); the shortcut is a 1 × 1 convolution if the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def network() -> nn.Module:
    """Seven convolutions with 32 to 64 channels, and two for shortcuts."""
    stem = nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()
    blocks = Block(32, 32, 1), Block(32, 64, 2), Block(64, 64, 2)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(images.astype(np.float32)).view(-1, 1, 8, 8) / 16
    return functional.interpolate(small, size=32, mode="bilinear"), torch.from_numpy(labels.astype(np.int64))


def batches(x: Tensor, labels: Tensor, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(x), (size,), generator=generator)
        yield x[chosen], labels[chosen]


class Runner:
    """A network with its optimizer, its losses and its times."""

    def __init__(self, model: nn.Module, memory: torch.memory_format) -> None:
        self.model = model.to(memory_format=memory)
        self.memory = memory
        self.dtype = next(model.parameters()).dtype
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, x: Tensor, labels: Tensor) -> None:
        x = x.to(self.dtype).contiguous(memory_format=self.memory)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(self.model(x), labels)
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())


def without_norm(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return model


def train(memory: torch.memory_format, size: int, steps: int, seed: int) -> dict[str, Runner]:
    """The networks by name, trained side by side."""
    torch.manual_seed(seed)
    model = network()
    models = {
        "torch.nn": copy.deepcopy(model),
        "batchnorm.torch": convert(copy.deepcopy(model)),
        "float64": copy.deepcopy(model).double(),
        "no batch norm": without_norm(model),
    }
    runners = {name: Runner(each, memory) for name, each in models.items()}
    for batch in batches(*digits(), size, steps, seed):
        for runner in runners.values():
            runner.step(*batch)
    return runners


def report(name: str, runners: dict[str, Runner]) -> None:
    exact, bare = runners["float64"].losses, statistics.median(runners["no batch norm"].seconds)
    for each in COLORS:
        runner = runners[each]
        off = max(abs(a - b) for a, b in zip(runner.losses[:EARLY], exact, strict=False))
        step = statistics.median(runner.seconds)
        print(
            f"    {name:14} {each:16} {off:10.1e} {runner.losses[-1]:10.4f} {step * 1e3:8.1f} {1 - bare / step:11.0%}"
        )


def plot(path: Path, results: dict[str, dict[str, Runner]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (losses, times) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, style in zip(COLORS, ("-", "--"), strict=True):
        losses.plot(results["NCHW"][name].losses, style, color=COLORS[name], label=name)
    losses.set(xlabel="step", ylabel="loss", yscale="log", title="Training loss, NCHW")
    losses.legend(frameon=False)
    width = 0.38
    for place, runners in enumerate(results.values()):
        bare = 1e3 * statistics.median(runners["no batch norm"].seconds)
        for side, name in zip((-1, 1), COLORS, strict=True):
            step = 1e3 * statistics.median(runners[name].seconds)
            at = place + side * width / 2
            times.bar(at, step, width, color=COLORS[name], label=name if not place else None)
            times.bar(at, bare, width, color="0.75", label="the rest" if not place and side > 0 else None)
            times.annotate(f"{step:.0f}", (at, step), ha="center", va="bottom")
    times.set(xticks=range(len(results)), xticklabels=results, ylabel="ms", title="Time of a training step")
    times.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    for axes in (losses, times):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A residual network in PyTorch, with its batch norm and with batchnorm.torch."
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("torch_resnet.png"))
    arguments = parser.parse_args()
    print(f"{arguments.steps} steps of {arguments.batch} images, {torch.get_num_threads()} threads\n")
    print(f"    {'':14} {'':16} {'off':>10} {'loss':>10} {'ms':>8} {'batch norm':>11}")
    results = {}
    for name, memory in FORMATS.items():
        results[name] = train(memory, arguments.batch, arguments.steps, arguments.seed)
        report(name, results[name])
    plot(arguments.plot, results)
    print(f"\n{arguments.plot}")


if __name__ == "__main__":
    main()
