"""`python -m batchnorm explain`: batch normalization of four values, with all its numbers, in the terminal.

- The numbers come from the library: `forward`, `moment_gradients`, `pathways` and `backward`. A central difference of
  the loss Σ y·dy is shown beside each gradient, as a direct check.
- x occurs in y in three ways: by itself, in the mean, in the variance. Each is a pathway, and the difference beside it
  moves x in that place alone.
- `--html` and `--plot` write the same four values as a page with sliders (`page`) and as a picture (`picture`).
- Values have one decimal and no two are equal, so that one can follow them with pencil and paper.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from .. import _output, functional, state_file
from .._extras import require
from ..reference import Array
from . import pathways

GAMMA, BETA, EPS = 1.5, 0.5, 1e-5
STEP = 1e-5
GIVEN = ("x", "dy")
WIDTH = 80

FORWARD = """
[bold]Forward.[/] One channel of n = {n} values; gamma = {gamma}, beta = {beta}, eps = {eps}.

  mean μ  = Σx/n           = {mean:8.4f}
  var  σ² = Σ(x − μ)²/n    = {var:8.4f}
  rstd    = 1/√(σ² + eps)  = {rstd:8.4f}
"""

BACKWARD = """
[bold]Backward.[/] dy is the gradient of a loss with respect to y. μ and σ² depend on
the batch, so x reaches the loss in three ways, and dx has three terms:

  dxhat = dy·gamma
  dvar  = Σ dxhat·(x − μ)·(−½)·rstd³            = {dvar:8.4f}
  dmean = −rstd·Σ dxhat + dvar·(−2/n)·Σ(x − μ)  = {dmean:8.4f}
  dx    = dxhat·rstd + dmean/n + dvar·2(x − μ)/n
        =   direct   +  mean   +    variance

Each "diff" is the central difference of the loss, step {step:g}, when x is moved
in that way alone: by itself, in μ, in σ², or in all three.
"""

CENTERING = """
[bold]Not 1 − 1 = 0.[/] ∂(x − μ)/∂x is not a number but the matrix I − 11ᵀ/n: each x
moves its own deviation by {diagonal:g} and the other {others} by {other:g}. Its columns add up
to 0, and so does dx ({total:.0e}): adding a constant to all of x changes nothing.
"""

TWO = """
[bold]Two values,[/] eps = 0. Whatever they are, xhat is −1 and 1: there is nothing to
gain by moving them, and the right dx is 0. Without the mean pathway dx moves
both by the same amount, step after step, and y does not change:
"""


def loss(dy: Array, direct: Array, of_mean: Array, of_var: Array, eps: float) -> float:
    """Σ y·dy, with a separate x for each of the three ways in which x occurs in y."""
    xhat = (direct - of_mean.mean()) / np.sqrt(of_var.var() + eps)
    return float((dy * (GAMMA * xhat + BETA)).sum())


def differences(dy: Array, x: Array, eps: float, moves: tuple[bool, bool, bool]) -> Array:
    """Central differences of the loss by each value, moving only these occurrences of x."""

    def at(moved: Array) -> float:
        direct, of_mean, of_var = (moved if moves_too else x for moves_too in moves)
        return loss(dy, direct, of_mean, of_var, eps)

    steps = STEP * np.eye(x.size)
    return np.array([(at(x + step) - at(x - step)) / (2 * STEP) for step in steps])


DIRECT, MEAN, VARIANCE, ALL = (True, False, False), (False, True, False), (False, False, True), (True, True, True)
WITHOUT_MEAN = (True, False, True)


def _numbers(rng: np.random.Generator, n: int, least: int = -30) -> Array:
    """Distinct values with one decimal, at least least/10."""
    return rng.choice(np.arange(least, 60), n, replace=False) / 10


def _table(columns: Sequence[tuple[str, str, Array]]) -> Any:
    """Columns of numbers: header, style, values."""
    table = require("rich.table", "explain").Table
    box = require("rich.box", "explain")
    grid = table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1))
    for header, style, _ in columns:
        grid.add_column(header, style=style, header_style=style, justify="right", no_wrap=True)
    # Given numbers have one decimal; adding 0 turns −0 into 0.
    texts = [
        [f"{round(value, 4) + 0.0:.{1 if name in GIVEN else 4}f}" for value in values] for name, _, values in columns
    ]
    for row in zip(*texts, strict=True):
        grid.add_row(*row)
    return grid


def _four_values(show: Callable[[Any], None], rng: np.random.Generator) -> None:
    x, dy = _numbers(rng, 4), _numbers(rng, 4)
    column = x[:, None]
    y, saved = functional.forward(column, [GAMMA], [BETA], eps=EPS)
    xhat = (x - saved.mean) * saved.rstd
    show(
        FORWARD.format(
            n=x.size, gamma=GAMMA, beta=BETA, eps=EPS, mean=saved.mean[0], var=saved.var[0], rstd=saved.rstd[0]
        )
    )
    show(_table([("x", "", x), ("x − μ", "", x - saved.mean), ("xhat", "", xhat), ("y", "bold", y[:, 0])]))
    _, dvar, dmean = pathways.moment_gradients(dy[:, None], saved)
    paths = pathways.pathways(dy[:, None], saved)
    dx = functional.backward(dy[:, None], saved).dx
    show(BACKWARD.format(dvar=dvar[0], dmean=dmean[0], step=STEP))
    columns = [("dy", "", dy)]
    for name, style, values, moves in (
        ("direct", "green", paths.direct, DIRECT),
        ("mean", "yellow", paths.mean, MEAN),
        ("variance", "magenta", paths.variance, VARIANCE),
        ("dx", "bold", dx, ALL),
    ):
        columns += [(name, style, values[:, 0]), ("diff", "dim", differences(dy, x, EPS, moves))]
    show(_table(columns))
    row = pathways.centering_matrix(x.size)[0]
    show(CENTERING.format(diagonal=row[0], other=row[1], others=x.size - 1, total=abs(dx.sum())))


def _two_values(show: Callable[[Any], None], rng: np.random.Generator) -> None:
    x, dy = _numbers(rng, 2), _numbers(rng, 2, least=1)
    y, saved = functional.forward(x[:, None], [GAMMA], [BETA], eps=0.0)
    dx = functional.backward(dy[:, None], saved).dx
    without = functional.backward(dy[:, None], saved, through=("variance",)).dx
    after = functional.forward(x[:, None] - without, [GAMMA], [BETA], eps=0.0)[0]
    show(TWO)
    show(
        _table(
            [
                ("x", "", x),
                ("y", "bold", y[:, 0]),
                ("dy", "", dy),
                ("dx", "bold", dx[:, 0]),
                ("diff", "dim", differences(dy, x, 0.0, ALL)),
                ("no mean", "yellow", without[:, 0]),
                ("diff", "dim", differences(dy, x, 0.0, WITHOUT_MEAN)),
                ("new x", "", x - without[:, 0]),
                ("new y", "bold", after[:, 0]),
            ]
        )
    )


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 0, got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of the numbers (default 0)")
    parser.add_argument("--html", type=_output.file, metavar="FILE", help="write a page with sliders, for any browser")
    parser.add_argument("--plot", type=_output.picture, metavar="FILE", help="draw the graph (png, pdf, svg)")


def run(arguments: argparse.Namespace, _error: Callable[[str], NoReturn]) -> int:
    """Print the example, or write it as a page or a picture."""
    if arguments.html or arguments.plot:
        _write(arguments)
    else:
        _print(arguments.seed)
    return 0


def _print(seed: int) -> None:
    console = require("rich.console", "explain").Console
    screen = console()
    screen = console(width=max(WIDTH, screen.width) if screen.is_terminal else WIDTH)
    rng = np.random.default_rng(seed)
    for part in (_four_values, _two_values):
        part(lambda what: screen.print(what, highlight=False, soft_wrap=isinstance(what, str)), rng)
    screen.print("\nMore: help(batchnorm.pathways), docs/derivation.md.", highlight=False)


def _write(arguments: argparse.Namespace) -> None:
    """Write the page and the picture, with the numbers that are printed for this seed."""
    from . import page, picture  # here, because nothing else needs them

    rng = np.random.default_rng(arguments.seed)
    four = _numbers(rng, 4), _numbers(rng, 4)
    two = _numbers(rng, 2), _numbers(rng, 2, least=1)
    files: list[tuple[Path, bytes]] = []
    if arguments.plot:
        files.append((arguments.plot, picture.drawn(*four, GAMMA, BETA, EPS, arguments.plot.suffix[1:].lower())))
    if arguments.html:
        files.append((arguments.html, page.page(page.Start(four, two, GAMMA, BETA, EPS)).encode()))
    for path, data in files:
        try:
            state_file.replace(path, data)
        except OSError as problem:
            raise SystemExit(f"python -m batchnorm explain: cannot write {path}: {problem.strerror}") from None
        except ValueError as problem:
            raise SystemExit(f"python -m batchnorm explain: {problem}") from None
        print(f"written to {path}")
