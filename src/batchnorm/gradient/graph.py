"""The computation graph of batch normalization, and the position of everything in a picture of it.

- There is one graph: `page` makes an SVG of it, `picture` draws it. It is 344 units wide, so it fits a phone.
- Edges run forward, down the picture. Beside them the three pathways run back from dy to dx, one line per pathway. They
  part at x − μ: the mean pathway continues through μ, the other two go straight to x.
- Boxes and edges name their numbers; `numbers` computes them.
"""

import math
from typing import NamedTuple

WIDTH, HEIGHT = 344, 674
BOX = 50
"""The height of a box: its label, its numbers and their gradients."""
COLUMN = 39
"""The distance between neighbouring numbers of a row."""

Point = tuple[float, float]


class Node(NamedTuple):
    """A box: a label, a row of numbers, and a row of their gradients."""

    number: str
    gradient: str
    label: str
    left: float
    top: float
    width: float = 164
    digits: int = 2
    gradient_digits: int = 2


class Edge(NamedTuple):
    """A line from box to box, straight or around a corner, with the pathways that run back along it."""

    points: tuple[Point, ...]
    paths: tuple[str, ...]
    label: str
    at: Point


class Note(NamedTuple):
    """Text beside the graph: from a point to the right, or upwards around it."""

    text: str
    at: Point
    kind: str = "note"
    degrees: int = 0


NODES = (
    Node("x", "dx", "x", 4, 4, digits=1),
    Node("mean", "dmean", "μ = Σx/n", 206, 86, 134, 3, 3),
    Node("xmu", "dxmu", "x − μ", 4, 168),
    Node("sq", "dsq", "(x − μ)²", 176, 282),
    Node("var", "dvar", "σ² = Σ(x − μ)²/n", 188, 360, 152, 3, 3),
    Node("rstd", "drstd", "rstd = 1/√(σ² + eps)", 188, 438, 152, 3, 3),
    Node("xhat", "dxhat", "xhat = (x − μ)·rstd", 4, 516),
    Node("gamma", "dgamma", "gamma", 176, 516, 78, 2),
    Node("beta", "dbeta", "beta", 262, 516, 78, 2),
    Node("y", "dy", "y = gamma·xhat + beta", 4, 600, gradient_digits=1),
)

EDGES = (
    Edge(((44, 54), (44, 168)), ("direct", "variance"), "1", (78, 115)),
    Edge(((168, 29), (273, 29), (273, 86)), ("mean",), "1/n = {share:2}", (264, 30)),
    Edge(((206, 108), (130, 108), (130, 168)), ("mean",), "−1", (168, 144)),
    Edge(((140, 218), (140, 307), (176, 307)), ("variance",), "2(x − μ) =", (198, 252)),
    Edge(((256, 332), (256, 360)), ("variance",), "1/n = {share:2}", (272, 350)),
    Edge(((256, 410), (256, 438)), ("variance",), "−½·rstd³ = {slope:4}", (120, 428)),
    Edge(((44, 218), (44, 516)), ("direct", "mean"), "rstd = {rstd:3}", (74, 338)),
    Edge(((188, 460), (110, 460), (110, 516)), ("variance",), "x − μ", (152, 502)),
    Edge(((44, 566), (44, 600)), ("direct", "mean", "variance"), "gamma = {gamma:2}", (62, 587)),
    Edge(((215, 566), (215, 618), (168, 618)), (), "xhat", (222, 584)),
    Edge(((301, 566), (301, 634), (168, 634)), (), "1", (308, 584)),
)

LANES = {"forward": 0.0, "direct": -5.0, "mean": 5.0, "variance": 10.0}
"""The distance of each line from the edge, to the left in the direction of the edge."""
DOUBLED = (268.0, 267.0, 37.0)
"""Positions of the local derivatives 2(x − μ), one for each value: the middle, the baseline, their distance."""
MATRIX = (182.0, 176.0)
"""The upper left corner of I − 11ᵀ/n."""
CELL = (39.0, 15.0)
STRIP = (70.0, 388.0, 92.0, 15.0)
"""The part of the legend that shows a row of gradients."""
NOTES = (
    Note("together: I − 11ᵀ/n", (200, 172)),
    Note("direct", (33, 112), "direct", 90),
    Note("variance", (69, 112), "variance", 90),
    Note("mean", (186, 66), "mean"),
    Note("direct", (33, 270), "direct", 90),
    Note("mean", (64, 270), "mean", 90),
    Note("variance", (190, 350), "variance"),
    Note("In each box:", (74, 368)),
    Note("its value,", (74, 383)),
    Note("∂loss/∂value", (74, 399.5)),
    Note("dy comes from the loss.", (62, 666)),
)


def lines(edge: Edge) -> list[tuple[str, list[Point]]]:
    """The lines of an edge: "forward" and its pathways, each as the points of a line or of a quadratic curve.

    The lines of an edge are parallel. A pathway runs from the end of the edge to its start.
    """
    first, last = (_left(*leg) for leg in (edge.points[:2], edge.points[-2:]))
    drawn = []
    for name in ("forward", *edge.paths):
        points = []
        for i, (x, y) in enumerate(edge.points):
            sides = {first} if i == 0 else {last} if i == len(edge.points) - 1 else {first, last}
            points.append((x + LANES[name] * sum(u for u, _ in sides), y + LANES[name] * sum(v for _, v in sides)))
        drawn.append((name, points if name == "forward" else points[::-1]))
    return drawn


def _left(start: Point, end: Point) -> Point:
    """The unit vector to the left of the way from start to end; y grows downwards."""
    u, v = end[0] - start[0], end[1] - start[1]
    return v / math.hypot(u, v), -u / math.hypot(u, v)
