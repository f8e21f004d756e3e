"""Sequences of different lengths
==============================

Sequences of different lengths: what padding does to the statistics of a batch, with and without `lengths=`.

Handwritten numbers of one to eight digits are read from left to right, as a recurrent network would read them: a place
is one column of an image, and its eight pixels are the channels. Decisions:

- The same numbers are padded to the longest length, to twice and to four times that, as if a longer number joined the
  batch. Padding is 0, which is the color of paper, so it does not look wrong.
- The right answer is known: the statistics of the columns themselves, from NumPy, without any padding.
- x is (N, L, C), so the channel axis is 2, and `lengths` says how many places of each number are columns.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from digits import Array, load, options

import batchnorm as bn

NUMBERS = 64
MOST_DIGITS = 8
TIMES = (1, 2, 4)
CHANNELS = 8
COLORS = ("#d9730d", "#b8336a", "#6b2d8c")
RIGHT, OURS = "#555555", "#0b6e99"


class Batch(NamedTuple):
    x: Array
    lengths: Array


class Statistics(NamedTuple):
    mean: Array
    std: Array
    y: Array


def numbers(images: Array, generator: np.random.Generator) -> list[Array]:
    """Each number as (places, channels): the columns of its digits, one after the other."""
    digits = generator.integers(1, MOST_DIGITS + 1, NUMBERS)
    digits[0] = MOST_DIGITS
    drawn = (images[generator.integers(0, len(images), count)] for count in digits)
    return [one.reshape(-1, 8, CHANNELS).transpose(0, 2, 1).reshape(-1, CHANNELS) for one in drawn]


def padded(sequences: list[Array], places: int) -> Batch:
    x = np.zeros((len(sequences), places, CHANNELS), np.float32)
    for row, sequence in zip(x, sequences, strict=True):
        row[: len(sequence)] = sequence
    return Batch(x, np.array([len(sequence) for sequence in sequences]))


def normalized(batch: Batch, lengths: Array | None) -> Statistics:
    y, saved = bn.forward(batch.x, axis=2, lengths=lengths)
    return Statistics(saved.mean, np.sqrt(saved.var), y)


def draw(right: Statistics, wrong: dict[int, Statistics], ours: Statistics, first: int, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=(1, 1, 1.4))
    channels = np.arange(CHANNELS)
    for panel, name in zip(panels, ("mean", "std"), strict=False):
        panel.bar(channels, getattr(right, name), color=RIGHT, alpha=0.25, label="of the data")
        for color, (places, found) in zip(COLORS, wrong.items(), strict=True):
            panel.plot(channels, getattr(found, name), "o--", color=color, label=f"padded to {places}, all counts")
        panel.plot(channels, getattr(ours, name), "D-", color=OURS, label="any padding, with lengths=")
        panel.set_xlabel("channel (row of pixels)")
    panels[0].set_title("mean")
    panels[1].set_title("standard deviation")
    for color, (places, found) in zip(COLORS, wrong.items(), strict=True):
        panels[2].plot(found.y[0, :first, 3], "--", color=color, label=f"padded to {places}")
    panels[2].plot(ours.y[0, :first, 3], color=OURS, linewidth=2)
    panels[2].set_title("y of the first number, channel 3")
    panels[2].set_xlabel("place")
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle("Padding is not data: handwritten numbers of one to eight digits, read column by column")
    figure.savefig(path, dpi=150)


def main() -> None:
    chosen = options("Show what padding does to the statistics of a batch.", "sequences.png")
    images, _ = load()
    sequences = numbers(images, np.random.default_rng(chosen.seed))
    columns = np.concatenate(sequences).astype(np.float64)
    right = Statistics(columns.mean(axis=0), columns.std(axis=0), columns)
    longest = len(sequences[0])
    print(f"{NUMBERS} numbers of 1 to {MOST_DIGITS} digits, {len(columns)} columns of {CHANNELS} pixels\n")
    print(f"{'':23}{'columns':>9}{'mean off by':>14}{'std times':>11}{'y of the first number':>24}")
    wrong: dict[int, Statistics] = {}
    for times in TIMES:
        batch = padded(sequences, times * longest)
        wrong[times * longest] = normalized(batch, None)
        ours = normalized(batch, batch.lengths)
        reference = (sequences[0] - right.mean) / np.sqrt(right.std**2 + 1e-5)
        for name, found in (("all counts", wrong[times * longest]), ("lengths=", ours)):
            off = np.max(abs(found.mean - right.mean) / right.std)
            spread = np.exp(np.mean(np.log(found.std / right.std)))
            change = np.max(abs(found.y[0, :longest] - reference))
            label = f"{times * longest} places, {name}"
            filled = f"{100 * len(columns) / (NUMBERS * times * longest):.0f} %"
            print(f"{label:23}{filled:>9}{off:12.4f} σ{spread:11.4f}{f'off by {change:.4f}':>24}")
    draw(right, wrong, ours, longest, chosen.plot)


if __name__ == "__main__":
    main()
