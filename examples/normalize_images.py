"""Images for a network, and wrong ones
====================================

Images for a network: `bn.Plan.normalizer` against the usual lines of NumPy, and what a plan says about wrong images.

Image files hold bytes, channels last. Networks take floats, channels first, normalized as y = (x/255 − mean)/std.
Decisions:

- A batch is made of crops of scikit-learn's two photographs, at random places, with the usual size for training.
  mean and std are those of ImageNet, as for most vision models.
- The exact result is known: a byte has 256 values, and y of each is a fraction, which is rounded to float32 here.
- "moved" is what the passes over the batch read and write, in bytes per value. "memory" is the peak allocation during a
  call, including the result.
- What a plan says about wrong images depends on how similar the right ones are to the data behind its statistics. So
  they are compared to other crops of the same photographs, as if a network had been trained on these, and to ImageNet.
- Times are measured only with `--time`, because they differ from run to run. Everything else is repeatable.
"""

import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from timeit import repeat
from typing import NamedTuple

import numpy as np
from digits import Array, datasets, options
from numpy.typing import NDArray

import batchnorm as bn
from batchnorm.drift import Drift

Images = NDArray[np.uint8]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROPS = 32
OTHERS = 8
SIDE = 224
CALLS = 20
COLORS = ("#d9730d", "#3f9b5f", "#0b6e99")


def crops(photographs: Images, generator: np.random.Generator) -> Images:
    """Random crops, equally many of each photograph."""
    N, H, W, _ = photographs.shape
    corners = generator.integers(0, (H - SIDE + 1, W - SIDE + 1), (CROPS, 2))
    return np.stack([photographs[n % N, i : i + SIDE, j : j + SIDE] for n, (i, j) in enumerate(corners)])


def by_plan(images: Images, plan: bn.Plan) -> Array:
    return plan(images.transpose(0, 3, 1, 2), order="C")


def by_numpy(images: Images) -> Array:
    x = images.astype(np.float32) / 255
    x = (x - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def by_numpy_in_float64(images: Images) -> Array:
    x = images / 255
    x = (x - MEAN) / STD
    return x.transpose(0, 3, 1, 2).astype(np.float32, order="C")


def exactly(images: Images) -> Array:
    """y of each byte, computed as a fraction and rounded."""
    y = [
        [(Fraction(value, 255) - Fraction(m)) / Fraction(s) for m, s in zip(MEAN, STD, strict=True)]
        for value in range(256)
    ]
    return np.array(y, np.float64).astype(np.float32)[images, np.arange(3)].transpose(0, 3, 1, 2)


class Way(NamedTuple):
    """One way to normalize images."""

    name: str
    call: Callable[[Images], Array]
    passes: tuple[tuple[int, int], ...]
    """Bytes that each pass reads and writes, per value."""


WAYS = (
    Way("Plan.normalizer", partial(by_plan, plan=bn.Plan.normalizer(MEAN, STD, axis=1)), ((1, 4),)),
    Way("NumPy", by_numpy, ((1, 4), (4, 4), (4, 4), (4, 4), (4, 4))),
    Way("NumPy, float64", by_numpy_in_float64, ((1, 8), (8, 8), (8, 8), (8, 4))),
)


def most_memory(call: Callable[[], object]) -> int:
    tracemalloc.start()
    call()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def compare(images: Images) -> None:
    exact = exactly(images)
    print(f"{'':15}{'moved':>9}{'memory':>11}{'correctly rounded':>20}{'largest error':>16}")
    for name, call, passes in WAYS:
        y = call(images)
        right, error = 100 * np.mean(y == exact), abs(y - exact).max()
        memory = most_memory(partial(call, images)) / 1e6
        print(f"{name:15}{np.sum(passes):7} B{memory:8.1f} MB{right:18.2f} %{error:16.1e}")


def measure(images: Images) -> None:
    print(f"\n{'ms':15}{f'{len(images)} crops':>10}{'one crop':>12}")
    for name, call, _ in WAYS:
        calls = (partial(call, images[:size]) for size in (len(images), 1))
        batch, one = (1000 * np.median(repeat(each, number=1, repeat=CALLS)) for each in calls)
        print(f"{name:15}{batch:10.2f}{one:12.3f}")


class Case(NamedTuple):
    """Images from 0 to 1, or images that are mistaken for them."""

    name: str
    x: Array
    drift: Drift


def cases_of(images: Images, plan: bn.Plan) -> list[Case]:
    x = images.astype(np.float32) / 255
    given = {"as they are": x, "BGR": x[..., ::-1], "not divided by 255": 255 * x, "divided twice": x / 255}
    return [Case(name, wrong, plan.drift(wrong)) for name, wrong in given.items()]


def show(cases: list[Case], source: str) -> None:
    print(f"\n{f'statistics of {source}':32}{'largest shift':>13}{'variance ratio':>22}{'divergence':>13}")
    for name, _, drift in cases:
        ratios = f"{drift.ratio.min():.3g} to {drift.ratio.max():.3g}"
        print(f"  {name:30}{abs(drift.shift).max():11.2f} σ{ratios:>22}{drift.kl.sum():13.3g}")
        for hint in drift.hints:
            print(f"    {hint}")


def draw(cases: list[Case], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.8), layout="constrained")
    panels = figure.subplots(2, len(cases), height_ratios=(1.2, 1), sharey="row")
    for (photograph, numbers), (name, x, drift) in zip(panels.T, cases, strict=True):
        photograph.imshow(np.clip(x[0], 0, 1))
        photograph.set_axis_off()
        photograph.set_title(name)
        numbers.axhspan(-1, 1, color="0.9", label="expected: 0 ± 1")
        numbers.set_yscale("symlog", linthresh=2)
        for channel, color in enumerate(COLORS):
            mean, std = drift.shift[channel], np.sqrt(drift.ratio[channel])
            numbers.errorbar(channel, mean, std, fmt="o", color=color, capsize=6, linewidth=2, markersize=5)
        numbers.set_title(f"divergence {drift.kl.sum():.3g}", fontsize=10)
        numbers.set_xticks(range(3), ("first", "second", "third"))
        numbers.set_xlim(-0.6, 2.6)
        numbers.set_xlabel("channel")
        numbers.spines[["top", "right"]].set_visible(False)
        numbers.grid(alpha=0.3, axis="y")
    panels[1, 0].set_ylabel("y: mean ± standard deviation")
    panels[1, 0].legend(frameon=False, loc="upper left")
    figure.suptitle("Images as a network expects them, and after three mistakes")
    figure.savefig(path, dpi=150)


def main() -> None:
    chosen = options("Normalize images, and find wrong ones.", "normalize_images.png", times=True)
    photographs = np.stack(datasets().load_sample_images().images)
    generator = np.random.default_rng(chosen.seed)
    images = crops(photographs, generator)
    print(f"{CROPS} crops of {SIDE} × {SIDE} pixels, {images.nbytes / 1e6:.1f} MB\n")
    compare(images)
    if chosen.time:
        measure(images)
    others = bn.Moments.merge_all(bn.Moments.of(crops(photographs, generator) / 255, axis=-1) for _ in range(OTHERS))
    cases = cases_of(images, bn.Plan.normalizer(others.mean, others.std(), scale=1.0))
    show(cases, "other crops")
    show(cases_of(images, bn.Plan.normalizer(MEAN, STD, scale=1.0)), "ImageNet")
    draw(cases, chosen.plot)


if __name__ == "__main__":
    main()
