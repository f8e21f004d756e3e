"""`python -m batchnorm explain --html FILE`: the gradient as one page with sliders.

- The page is one file and needs no network: no font, no library, no link. Its own policy forbids loading anything.
- `page.html` is a template with three kinds of blanks. An element with `data-show="NAME"` shows a number. The text
  between `<!-- each i: LIST -->` and `<!-- end i -->` is repeated for each word of the list. Comments like
  `<!-- graph -->` are replaced by what is made here.
- The numbers come from the library and appear without JavaScript. The script computes them again when a slider moves; a
  test compares them to the library.
"""

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .._version import __version__
from ..reference import Array
from . import graph, numbers

EPS = {0.0: "0", 1e-5: "1e-5", 1e-3: "0.001", 0.01: "0.01", 0.1: "0.1", 1.0: "1"}
"""The values of the slider for eps, and how they are shown."""

_REPEATED = re.compile(r"<!-- each (\w+): ([^>]*?) -->(.*?)<!-- end \1 -->\n?", re.DOTALL)
_NUMBER = re.compile(r'data-show="(\w+)"(?: data-digits="(\d)")?[^>]*>')
_IN_LABEL = re.compile(r"\{(\w+):(\d)\}")


class Start(NamedTuple):
    """The initial positions of the sliders."""

    four: tuple[Array, Array]
    two: tuple[Array, Array]
    gamma: float
    beta: float
    eps: float


def page(start: Start) -> str:
    """The page."""
    made = {
        "graph": _graph(),
        "start": _json(start),
        "last eps": str(len(EPS) - 1),
        "eps": EPS[start.eps],
        "version": html.escape(__version__),
    }
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    text = re.sub("<!-- (" + "|".join(made) + ") -->", lambda blank: made[blank[1]], text)
    text = _repeated(text)
    found = numbers.worked_out(*start.four, start.gamma, start.beta, start.eps)
    return _filled(text, numbers.by_name(found))


def _json(start: Start) -> str:
    """The script's initial values: only numbers, so nothing in them could end the element that holds them."""
    cases = {str(x.size): {"x": x.tolist(), "dy": dy.tolist()} for x, dy in (start.four, start.two)}
    eps = {"eps": list(EPS).index(start.eps), "offered": list(EPS.values())}
    values = {"cases": cases, "gamma": start.gamma, "beta": start.beta, **eps}
    return json.dumps(values)


def _repeated(text: str) -> str:
    def copies(block: re.Match[str]) -> str:
        name, words, inside = block.groups()
        return "".join(_repeated(inside.replace(f"{{{name}}}", word)) for word in words.split())

    return _REPEATED.sub(copies, text)


def _filled(text: str, values: Mapping[str, float]) -> str:
    def filled(element: re.Match[str]) -> str:
        name, digits = element.groups()
        return element[0] + numbers.text(values[name], int(digits or 3))

    return _NUMBER.sub(filled, text)


def _shown(name: str, digits: int, x: float, y: float, kind: str = "n") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" data-show="{name}" data-digits="{digits}"></text>'


def _row(name: str, digits: int, middle: float, y: float, column: float = graph.COLUMN) -> str:
    """One number, or one per sample; the last two are hidden if there are only two."""
    if name not in numbers.PER_SAMPLE:
        return _shown(name, digits, middle, y)
    places = [middle + column * (i - 1.5) for i in range(4)]
    texts = [_shown(f"{name}{i}", digits, at, y, f"n sample{i}") for i, at in enumerate(places, 1)]
    return f'<g class="row">{"".join(texts)}</g>'


def _node(node: graph.Node) -> str:
    left, top, width = node.left, node.top, node.width
    middle = left + width / 2
    return (
        f'<rect class="box" x="{left}" y="{top}" width="{width}" height="{graph.BOX}" rx="7"/>'
        f'<rect class="strip" x="{left + 2}" y="{top + 33}" width="{width - 4}" height="15" rx="5"/>'
        f'<text class="name" x="{middle:g}" y="{top + 13}">{html.escape(node.label)}</text>'
        + _row(node.number, node.digits, middle, top + 28)
        + _row(node.gradient, node.gradient_digits, middle, top + 44.5)
    )


def _edge(edge: graph.Edge) -> str:
    drawn = ""
    for name, points in graph.lines(edge):
        first, *rest = (f"{x:g} {y:g}" for x, y in points)
        kind = "Q" if len(rest) == 2 else "L"
        drawn += f'<path class="line {name}" d="M{first}{kind}{" ".join(rest)}" marker-end="url(#to-{name})"/>'
    label = _IN_LABEL.sub(r'<tspan data-show="\1" data-digits="\2"></tspan>', html.escape(edge.label))
    return f'{drawn}<text class="local" x="{edge.at[0]}" y="{edge.at[1]}">{label}</text>'


def _matrix() -> str:
    """I − 11ᵀ/n, the two ways from x to x − μ in one."""
    (left, top), (width, height) = graph.MATRIX, graph.CELL
    cells = ""
    for i in range(4):
        for j in range(4):
            name, x, y = "diagonal" if i == j else "other", left + j * width, top + i * height
            cells += (
                f'<g class="sample{max(i, j) + 1}"><rect class="cell {name}" x="{x:g}" y="{y:g}" width="{width - 1:g}" '
                f'height="{height - 1:g}" rx="2"/>{_shown(name, 2, x + width / 2 - 0.5, y + height - 4)}</g>'
            )
    return cells


def _graph() -> str:
    left, top, width, height = graph.STRIP
    parts = [*map(_edge, graph.EDGES), *map(_node, graph.NODES), _row("doubled", 2, *graph.DOUBLED), _matrix()]
    parts.append(f'<rect class="strip" x="{left}" y="{top}" width="{width}" height="{height}" rx="5"/>')
    return "\n".join([*parts, *map(_note, graph.NOTES)])


def _note(note: graph.Note) -> str:
    x, y = note.at
    turned = f' style="text-anchor: middle" transform="rotate(-{note.degrees} {x} {y})"' if note.degrees else ""
    return f'<text class="{note.kind}" x="{x}" y="{y}"{turned}>{html.escape(note.text)}</text>'
