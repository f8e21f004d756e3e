"""`python -m batchnorm explain --plot FILE`: the graph as a picture, for a slide or on paper."""

import io
import re
from typing import Any

from .._extras import require
from ..reference import Array
from . import graph, numbers

COLOURS = {"forward": "0.45", "direct": "#0a5fb4", "mean": "#a84a00", "variance": "#8228a8"}
CELLS = {"diagonal": "#cfe3f8", "other": "#f8e2cf"}
SOFT, STRIP = "#535b66", "#e9edf3"
SCALE = 70.0
"""Units of the graph per inch, so that text has the same size as on the page."""


def drawn(x: Array, dy: Array, gamma: float, beta: float, eps: float, kind: str) -> bytes:
    """The graph of these numbers, as the bytes of a png, pdf or svg file."""
    require("matplotlib", "explain").use("Agg")
    pyplot, patches = require("matplotlib.pyplot", "explain"), require("matplotlib.patches", "explain")
    found = numbers.worked_out(x, dy, gamma, beta, eps)
    values = numbers.by_name(found)
    figure = pyplot.figure(figsize=(graph.WIDTH / SCALE, graph.HEIGHT / SCALE))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, graph.WIDTH), ylim=(graph.HEIGHT, 0))
    axes.axis("off")

    def write(at: graph.Point, text: str, **style: Any) -> None:
        axes.text(*at, text, **{"fontsize": 11, "ha": "center", "va": "baseline", **style})

    def row(name: str, digits: int, middle: float, y: float, column: float = graph.COLUMN) -> None:
        for i, value in enumerate(found[name]):
            place = middle + column * (i - (found[name].size - 1) / 2)
            write((place, y), numbers.text(value, digits))

    def rectangle(left: float, top: float, width: float, height: float, **style: Any) -> None:
        shape = patches.FancyBboxPatch((left, top), width, height, boxstyle="round,pad=0,rounding_size=4", **style)
        axes.add_patch(shape)

    for edge in graph.EDGES:
        for name, points in graph.lines(edge):
            _arrow(axes, points, COLOURS[name], 1 if name == "forward" else 2)
        text = re.sub(r"\{(\w+):(\d)\}", lambda blank: numbers.text(values[blank[1]], int(blank[2])), edge.label)
        halo = require("matplotlib.patheffects", "explain").withStroke(linewidth=4, foreground="white")
        write(edge.at, text, ha="left", color=SOFT, path_effects=[halo])
    for node in graph.NODES:
        middle = node.left + node.width / 2
        rectangle(node.left, node.top, node.width, graph.BOX, facecolor="white", edgecolor=SOFT)
        rectangle(node.left + 2, node.top + 33, node.width - 4, 15, facecolor=STRIP, edgecolor="none")
        write((middle, node.top + 13), node.label, weight="bold")
        row(node.number, node.digits, middle, node.top + 28)
        row(node.gradient, node.gradient_digits, middle, node.top + 44.5)
    row("doubled", 2, *graph.DOUBLED)
    (left, top), (width, height) = graph.MATRIX, graph.CELL
    for i in range(x.size):
        for j in range(x.size):
            name, corner = "diagonal" if i == j else "other", (left + j * width, top + i * height)
            rectangle(*corner, width - 1, height - 1, facecolor=CELLS[name], edgecolor="none")
            write((corner[0] + width / 2, corner[1] + height - 4), numbers.text(values[name], 2))
    strip_left, strip_top, *strip = graph.STRIP
    rectangle(strip_left, strip_top, *strip, facecolor=STRIP, edgecolor="none")
    for note in graph.NOTES:
        style: dict[str, Any] = {
            "color": COLOURS.get(note.kind, SOFT),
            "weight": "bold" if note.kind in COLOURS else "normal",
        }
        style |= {"ha": "center" if note.degrees else "left", "rotation": note.degrees, "rotation_mode": "anchor"}
        write(note.at, note.text, **style)
    file = io.BytesIO()
    figure.savefig(file, dpi=150, format=kind)
    pyplot.close(figure)
    return file.getvalue()


def _arrow(axes: Any, points: list[graph.Point], colour: str, width: float) -> None:
    path, patches = require("matplotlib.path", "explain").Path, require("matplotlib.patches", "explain")
    codes = [path.MOVETO] + [path.LINETO if len(points) == 2 else path.CURVE3] * (len(points) - 1)
    head = "-|>,head_length=4,head_width=2.5"
    axes.add_patch(
        patches.FancyArrowPatch(path=path(points, codes), arrowstyle=head, color=colour, lw=width, mutation_scale=1)
    )
