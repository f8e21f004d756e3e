"""docs/derivation.md cannot drift: each formula holds for the package's results, each line of code is in its file.

Formulas are read by sympy's LaTeX parser. It knows single letters only, so names are replaced by letters first; and it
skips what it does not understand, so the letters that come out are counted against those that went in.
"""

import doctest
import re
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import batchnorm as bn

sympy = pytest.importorskip("sympy")
parser = pytest.importorskip("sympy.parsing.latex")
pytest.importorskip("antlr4")

pytestmark = pytest.mark.once  # the formulas are of the mathematics, not of the kernels

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "derivation.md").read_text()
BLOCK = re.compile(r"```math\n(.+?)\n```\n\[`([\w.]+)`\]\((\S+)\)\n```(?:python|cython)\n(.+?)\n```", re.DOTALL)
BLOCKS = BLOCK.findall(TEXT)
FUNCTIONS = re.findall(r"```python\n(def .+?)```", TEXT, re.DOTALL)
INDICES = "ijk"
N, EPS, STEP = 5, 0.03, 1e-3

# LaTeX and the letter that stands for it; the longer ones first.
LETTERS = {
    r"\frac{\partial \mathrm{rstd}}{\partial x_i}": "V_i",
    r"\frac{\partial \hat{x}_j}{\partial x_i}": "O_{ji}",
    r"\dot{\sigma^2}": "U",
    r"\dot{\mu}": "N",
    r"\dot{x}": "X",
    r"\dot{y}": "Y",
    r"\mathrm{gx}": "Z",
    r"\frac{\partial \mathrm{rstd}}{\partial \sigma^2}": "R",
    r"\frac{\partial \mu}{\partial x_i}": "M_i",
    r"\frac{\partial \sigma^2}{\partial x_i}": "S_i",
    r"\frac{\partial (x_j - \mu)}{\partial x_i}": "D_{ji}",
    r"\frac{\partial y_j}{\partial x_i}": "J_{ji}",
    r"\mathrm{dgamma}": "A",
    r"\mathrm{dbeta}": "B",
    r"\mathrm{dxhat}": "C",
    r"\mathrm{dmean}": "E",
    r"\mathrm{scale}": "F",
    r"\mathrm{offset}": "G",
    r"\mathrm{slope}": "H",
    r"\mathrm{dvar}": "K",
    r"\mathrm{rstd}": "r",
    r"\mathrm{sum}": "T",
    r"\mathrm{dx}": "W",
    r"\mathrm{dy}": "g",
    r"\hat{x}": "h",
    r"\varepsilon": "e",
    r"\sigma^2": "v",
    r"\delta": "d",
    r"\gamma": "c",
    r"\beta": "b",
    r"\mu": "m",
}


def slope(f):
    """Derivative at 0 by the five-point rule."""
    return (f(-2 * STEP) - 8 * f(-STEP) + 8 * f(STEP) - f(2 * STEP)) / (12 * STEP)


@pytest.fixture
def values(rng):
    """What the package says about one batch, by the letters of the formulas."""
    x, dy = rng.standard_normal((N, 1)) * 2 + 3, rng.standard_normal((N, 1))
    gamma, beta = np.array([1.7]), np.array([-0.4])
    y, saved = bn.forward(x, gamma, beta, eps=EPS)
    xhat, _ = bn.forward(x, eps=EPS)
    dx, dgamma, dbeta = bn.backward(dy, saved)
    dxhat, dvar, dmean = bn.moment_gradients(dy, saved)
    parts = [bn.forward(part)[1] for part in (x[:-2], x[-2:])]
    eye = np.eye(N)
    moved = [lambda h, i=i: bn.forward(x + h * eye[:, [i]], eps=EPS)[1] for i in range(N)]
    direction, u = rng.standard_normal((2, N, 1))
    tangents, second = bn.jvp(direction, saved), bn.double_backward(u, dy, saved)
    normalized = [lambda h, i=i: bn.forward(x + h * eye[:, [i]], eps=EPS)[0][:, 0] for i in range(N)]
    return {
        "R": slope(lambda h: bn.forward(x, eps=EPS + h)[1].rstd[0]),
        "M": np.array([slope(lambda h, f=f: f(h).mean[0]) for f in moved]),
        "S": np.array([slope(lambda h, f=f: f(h).var[0]) for f in moved]),
        "D": np.array([slope(lambda h, f=f: f(h).x[:, 0] - f(h).mean[0]) for f in moved]).T,
        "J": bn.jacobian(x, gamma, eps=EPS)[0],
        "A": dgamma[0],
        "B": dbeta[0],
        "C": dxhat[:, 0],
        "E": dmean[0],
        "K": dvar[0],
        "r": saved.rstd[0],
        "W": dx[:, 0],
        "g": dy[:, 0],
        "h": xhat[:, 0],
        "e": EPS,
        "v": saved.var[0],
        "d": eye,
        "c": gamma[0],
        "b": beta[0],
        "m": saved.mean[0],
        "x": x[:, 0],
        "y": y[:, 0],
        "n": N,
        # Any pivot, and the two parts of the batch that are merged.
        "p": 2.5,
        "m_{a}": parts[0].mean[0],
        "m_{b}": parts[1].mean[0],
        "n_{a}": N - 2,
        "n_{b}": 2,
        "Q_{a}": parts[0].var[0] * (N - 2),
        "Q_{b}": parts[1].var[0] * 2,
        "Q": saved.var[0] * N,
        # What has no name outside the kernel is made of what has; its formula defines it, its last use checks it.
        "T": dgamma[0] / saved.rstd[0],
        "F": bn.backward(np.ones_like(dy), saved, through=()).dx[0, 0],
        "G": (bn.pathways(dy, saved).mean)[0, 0],
        "V": np.array([slope(lambda h, f=f: f(h).rstd[0]) for f in moved]),
        "O": np.array([slope(f) for f in normalized]).T,
        "N": tangents.dmean[0],
        "U": tangents.dvar[0],
        "X": direction[:, 0],
        "Y": tangents.dy[:, 0],
        "Z": second.x[:, 0],
        "u": u[:, 0],
        "q": second.gamma[0] / saved.rstd[0],
        "H": (bn.pathways(dy, saved).variance[:, 0] / (x[:, 0] - saved.mean[0]))[0],
    }


def read(latex):
    """A sympy expression of letters, indexed where they have indices."""
    for name, letter in LETTERS.items():
        latex = latex.replace(name, letter)
    # A letter before a bracket is a factor, not a function.
    latex = re.sub(r"(?<=[\w})])(?<!\^\{n\})\s*\(", r" \\cdot (", latex)
    expression = parser.parse_latex(latex, backend="antlr")
    symbols = [part for part in sympy.preorder_traversal(expression) if isinstance(part, sympy.Symbol)]
    found = Counter(str(symbol)[0] for symbol in symbols if str(symbol) not in INDICES)
    written = Counter(re.findall(r"[A-Za-z]", re.sub(r"\\[a-z]+|_\{[^}]*\}|_\w", "", latex)))
    assert found == written, f"{latex} was read as {expression}"
    indexed = {}
    for symbol in set(symbols):
        letter, _, indices = str(symbol).partition("_")
        names = [name for name in indices if name in INDICES]
        if names:
            indexed[symbol] = sympy.IndexedBase(letter)[tuple(sympy.Symbol(name) for name in names)]
    return expression.xreplace(indexed)


def evaluate(expression, values, free):
    """The number that an expression is, with the free indices given."""
    expression = expression.subs({sympy.Symbol("n"): N} | free).doit()
    numbers = {}
    for part in expression.atoms(sympy.Indexed):
        where = tuple(int(index) - 1 for index in part.indices)
        numbers[part] = sympy.Float(float(values[str(part.base)][where]), 17)
    expression = expression.xreplace(numbers)
    return float(expression.xreplace({symbol: values[str(symbol)] for symbol in expression.free_symbols}))


@pytest.mark.parametrize(("formula", "name", "path", "code"), BLOCKS, ids=[block[0][:50] for block in BLOCKS])
def test_a_formula_holds(formula, name, path, code, values):
    left, right = (
        map(read, formula.split("="))
        if formula.count("=") == 1
        else map(read, re.split(r"(?<!j)(?<!k)(?<!i)=", formula))
    )
    indices = sorted({str(i) for side in (left, right) for part in side.atoms(sympy.Indexed) for i in part.indices})
    bound = {str(total.limits[0][0]) for side in (left, right) for total in side.atoms(sympy.Sum)}
    free = [index for index in indices if index not in bound]
    for chosen in product(range(1, N + 1), repeat=len(free)):
        given = {sympy.Symbol(index): value for index, value in zip(free, chosen, strict=True)}
        assert abs(evaluate(left, values, given) - evaluate(right, values, given)) < 1e-11


@pytest.mark.skipif(not (ROOT / "src").exists(), reason="the sources are not here")
@pytest.mark.parametrize(("formula", "name", "path", "code"), BLOCKS, ids=[block[0][:50] for block in BLOCKS])
def test_a_line_of_code_is_in_its_file(formula, name, path, code):
    file = (ROOT / "docs" / path).resolve()
    assert file.name == name
    lines = [line.strip() for line in file.read_text().splitlines()]
    assert all(line in lines for line in code.splitlines())


def test_every_formula_is_followed_by_code():
    formulas, functions = TEXT.split("## 10. One function to learn from")
    assert len(BLOCKS) == formulas.count("```math") > 20
    assert formulas.count("```") == 4 * len(BLOCKS)
    assert functions.count("```") == 2 * len(FUNCTIONS) == 4


@pytest.mark.parametrize("code", FUNCTIONS, ids=["along the graph", "compact"])
def test_the_functions_at_the_end_are_the_gradient(code, rng):
    namespace = {"np": np}
    exec(code, namespace)
    x, dy = rng.standard_normal((2, 9, 4))
    gamma = rng.standard_normal(4)
    expected = bn.backward(dy, bn.forward(x, gamma, np.zeros(4), eps=EPS)[1])
    for got, wanted in zip(namespace["backward"](dy, x, gamma, EPS), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-13)
    assert len(code.splitlines()) <= 8


def test_the_questions():
    failed, tried = doctest.testfile(str(ROOT / "docs" / "faq.md"), module_relative=False)
    assert tried > 10
    assert failed == 0


def test_a_wrong_formula_would_be_seen(values):
    """The reader itself: signs, indices, factors and forgotten terms make a difference."""
    right = evaluate(read(r"-\frac{1}{2} \mathrm{rstd}^3 \sum_{j=1}^{n} \mathrm{dxhat}_j (x_j - \mu)"), values, {})
    assert abs(right - values["K"]) < 1e-12
    for wrong in (
        r"\frac{1}{2} \mathrm{rstd}^3 \sum_{j=1}^{n} \mathrm{dxhat}_j (x_j - \mu)",
        r"-\frac{1}{2} \mathrm{rstd}^2 \sum_{j=1}^{n} \mathrm{dxhat}_j (x_j - \mu)",
        r"-\frac{1}{2} \mathrm{rstd}^3 \sum_{j=1}^{n} \mathrm{dxhat}_j",
        r"-\mathrm{rstd}^3 \sum_{j=1}^{n} \mathrm{dxhat}_j (x_j - \mu)",
    ):
        assert abs(evaluate(read(wrong), values, {}) - values["K"]) > 1e-3
    for unreadable in (r"\mathrm{rstd} \unknown{x} + \mu", r"\sum_{j=1}^{n} \cdot (x_j - \mu) + \mathrm{rstd}"):
        with pytest.raises((AssertionError, parser.LaTeXParsingError)):
            read(unreadable)
