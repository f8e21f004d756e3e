"""The table and the plot.

- A row that stalled is marked in both. The plot draws it at the edge, so that it does not stretch the axis.
- The layers of a network are added up, each as many times as it occurs.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .._extras import require
from .measure import CONTESTANTS, OURS, PASSES, Result

NOTES = """
µs: best time. vs: time divided by that of batchnorm. GB/s: traffic that a pass needs (read x,
write y; backward: read x and dy, write dx), per time of batchnorm. limit: time of batchnorm divided
by that of np.copyto (backward: np.add) on as many threads. error: largest difference from {exact},
divided by the largest value, in the first channels. batchnorm writes to an existing out=, the others
allocate their results. load: other work at the start; a busy processor stalls every team of threads."""

STALLED_NOTE = """*: stalled: the threads waited for a processor that was doing other work, and one thread was faster.
Measure again when the machine is quiet, or with --threads 1."""


def threads_text(teams: Sequence[int]) -> str:
    """The numbers of threads in words, such as "1 and 2 threads"."""
    return f"{' and '.join(map(str, teams))} thread{'s' if teams[-1] > 1 else ''}"


def _groups(results: Iterable[Result]) -> Iterator[tuple[str, list[Result]]]:
    """The results of each shape under its name, grouped by pass."""
    for (shape, layers), rows in itertools.groupby(results, lambda row: (row.shape, row.layers)):
        label = "x".join(map(str, shape)) + (f" ×{layers}" if layers > 1 else "") if shape else f"all {layers} layers"
        yield label, sorted(rows, key=lambda row: list(PASSES).index(row.name))


def _cells(row: Result, names: Sequence[str]) -> Iterator[str]:
    """The cells of the table for one pass, without figures that a stalled time would spoil."""
    figures = {name: row.figures(name) for name in names}
    ours = OURS not in row.stalled
    for name in names:
        best = 1e6 * figures[name]["best"]
        yield f"{best:.{0 if best >= 100 else 1}f}{'*' if name in row.stalled else ''}"
    for name in names:
        if name != OURS:
            yield f"{figures[name]['over_batchnorm']:.1f}" if ours and name not in row.stalled else "–"
    yield f"{figures[OURS]['bytes_per_second'] / 1e9:.1f}" if ours else "–"
    yield f"{figures[OURS]['over_limit']:.2f}" if ours else "–"
    for name in names:
        yield f"{figures[name]['error']:.1e}"


def print_table(console: Any, results: Sequence[Result], names: Sequence[str], exact: str, facts: str) -> None:
    """Print the table, what its columns mean, and the machine."""
    box, table = require("rich.box", "profile"), require("rich.table", "profile")
    labels, rivals = [CONTESTANTS[name].label for name in names], [name for name in names if name != OURS]
    # With torch, the table fits in 100 columns only with one space between its columns.
    grid = table.Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, int("torch" not in names), 0, 0))
    grid.add_column("shape\n  pass", min_width=16)
    headers = ["threads", *(f"{label}\nµs" for label in labels), *(f"vs\n{CONTESTANTS[name].label}" for name in rivals)]
    for header in [*headers, "GB/s", "limit", *(f"{label}\nerror" for label in labels)]:
        grid.add_column(header, justify="right", no_wrap=True)
    for label, rows in _groups(results):
        grid.add_row(label, style="bold")
        for row in rows:
            grid.add_row(f"  {row.name}", str(row.threads), *_cells(row, names))
    console.print(grid)
    notes = [NOTES.format(exact=exact), *([STALLED_NOTE] if any(row.stalled for row in results) else []), facts]
    console.print(*notes, sep="\n", highlight=False, soft_wrap=True)


def _largest(results: Sequence[Result]) -> float:
    """The largest time over the limit of those that did not stall."""
    sound = [row.figures(name)["over_limit"] for row in results for name in row.timings if name not in row.stalled]
    return max(sound, default=1.0)


def draw(path: Path, results: Sequence[Result], names: Sequence[str], subtitle: str) -> None:
    """Draw the time over the copy limit, with a line per pass."""
    pyplot, ticker = require("matplotlib.pyplot", "profile"), require("matplotlib.ticker", "profile")
    lines: list[tuple[str, Result | None]] = []
    for label, rows in _groups(results):
        lines += [(label, None), *((f"{row.name}, {threads_text([row.threads])}", row) for row in rows)]
    figure, axes = pyplot.subplots(figsize=(9, 1.7 + 0.23 * len(lines)), layout="constrained")
    places = [(y, row) for y, (_, row) in enumerate(lines) if row is not None]
    edge = _largest(results)
    for y, row in places:
        ratios = [min(row.figures(name)["over_limit"], edge) for name in names]
        axes.hlines(y, min(ratios), max(ratios), color="0.85", linewidth=2)
    for name in names:
        sound = {y: row.figures(name)["over_limit"] for y, row in places if name not in row.stalled}
        late = [y for y, row in places if name in row.stalled]
        colour, label = CONTESTANTS[name].colour, CONTESTANTS[name].label
        axes.plot([*sound.values()], [*sound], "o", color=colour, label=label)
        axes.plot([edge] * len(late), late, ">", color=colour, fillstyle="none")
    if any(row.stalled for row in results):
        axes.plot([], [], ">", color="0.3", fillstyle="none", label="stalled")
    axes.axvline(1, color="0.3", linewidth=1, linestyle="--", label="copy limit")
    axes.set_yticks(range(len(lines)), [label for label, _ in lines])
    for tick, (_, line) in zip(axes.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("bold" if line is None else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set(xscale="log", ylim=(len(lines) - 0.5, -0.5), xlabel="time over the copy limit", axisbelow=True)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if edge < 200 else (1,)))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g×"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(axis="x", color="0.93")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(subtitle, fontsize="small", color="0.35")
    figure.suptitle("Batch normalization: time over the copy limit", fontweight="bold")
    figure.legend(loc="outside lower center", ncols=len(names) + 2, frameon=False)
    figure.savefig(path, dpi=150, format=path.suffix[1:].lower())
    pyplot.close(figure)
