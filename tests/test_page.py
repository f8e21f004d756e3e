"""`python -m batchnorm explain --html` and `--plot`: every number is right, wherever the sliders stand.

The page is opened in Chromium, headless, where Playwright and a Chromium of the system are there (`nox -s page`).
"""

import itertools
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from processes import python, search_path

import batchnorm as bn
from batchnorm import __main__

PATHS = ("direct", "mean", "variance")
SUBSETS = [paths for size in range(4) for paths in itertools.combinations(PATHS, size)]
EPS = (0.0, 1e-5, 1e-3, 0.01, 0.1, 1.0)
BETA = 0.5
NUMBER, TABLE = re.compile(r"-?\d+\.\d+"), re.compile(r"[\s\d.-]*\d[\s\d.-]*")
VOID = {"meta", "link", "input", "br"}

pytestmark = pytest.mark.once  # no promise here depends on the level


def explain(*arguments, **environment):
    command = [sys.executable, "-W", "error", "-m", "batchnorm", "explain", *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "gradient.html"
    done = explain("--html", path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"written to {path}\n", "")
    return path


def shown(text):
    """A number as the page writes it."""
    assert re.fullmatch(r"−?\d+(\.\d+)?", text), text
    return float(text.replace("−", "-"))


def agrees(text, expected, known_to=0.0):
    """To the shown digits."""
    unit = 10.0 ** -len(text.partition(".")[2])
    return abs(shown(text) - expected) <= unit * (0.5 + 1e-6) + 1e-12 * abs(expected) + known_to


def truth(x, dy, gamma, eps, on=PATHS):
    """Every name on the page, from the library and the formulas of docs/derivation.md."""
    x, dy = np.array(x, float), np.array(dy, float)
    n = x.size
    y, saved = bn.forward(x[:, None], [gamma], [BETA], eps=eps)
    dxhat, dvar, dmean = bn.moment_gradients(dy[:, None], saved)
    parts = dict(zip(PATHS, (part[:, 0] for part in bn.pathways(dy[:, None], saved)), strict=True))
    full = bn.backward(dy[:, None], saved)
    rstd = float(saved.rstd[0])
    xmu = x - x.mean()
    if "direct" in on:
        dx = bn.backward(dy[:, None], saved, through=tuple(path for path in on if path != "direct")).dx[:, 0]
    else:
        dx = sum((parts[path] for path in on), np.zeros(n))
    named = {"direct": parts["direct"], "through_mean": parts["mean"], "through_variance": parts["variance"], "dx": dx}
    per_sample = {
        **named,
        "x": x,
        "dy": dy,
        "xmu": xmu,
        "sq": xmu**2,
        "xhat": xmu * rstd,
        "y": y[:, 0],
        "dxhat": dxhat[:, 0],
        "dsq": np.full(n, dvar[0] / n),
        "dxmu": gamma * dy * rstd + dvar[0] * 2 * xmu / n,
        "doubled": 2 * xmu,
    }
    single = {
        "mean": x.mean(),
        "var": x.var(),
        "rstd": rstd,
        "gamma": gamma,
        "beta": BETA,
        "dgamma": full.dgamma[0],
        "dbeta": full.dbeta[0],
        "drstd": gamma * (dy * xmu).sum(),
        "dvar": dvar[0],
        "dmean": dmean[0],
        "share": 1 / n,
        "slope": -0.5 * rstd**3,
        "diagonal": bn.centering_matrix(n)[0, 0],
        "other": bn.centering_matrix(n)[0, 1],
        **{f"sum_{name}": part.sum() for name, part in named.items()},
        **{f"along_{name}": (part * xmu * rstd).sum() for name, part in named.items()},
    }
    return single | {f"{name}{i}": value for name, values in per_sample.items() for i, value in enumerate(values, 1)}


def assert_true(texts, expected):
    """Each (name, text) of the page is the expected number; nothing is missing."""
    assert {name for name, _ in texts} == expected.keys()
    wrong = [(name, text, expected[name]) for name, text in texts if not agrees(text, expected[name])]
    assert wrong == []


class Outline(HTMLParser):
    """Elements as (tag, attributes, text right inside), which have to be nested as they are opened."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts = [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        assert len(dict(attributes)) == len(attributes)
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, self.getpos()

    def handle_data(self, data):
        if self.open:
            self.open[-1][2] += data

    def numbers(self):
        return [(given["data-show"], text) for _, given, text in self.elements if "data-show" in given]


def test_the_page_is_one_small_file_that_fetches_nothing(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.encode()) < 150_000
    assert "//" not in re.sub(r"(?m)^\s*//.*$", "", text)  # no address; comments of the script apart
    assert not re.search(r"@import|\bfetch\(|XMLHttpRequest|\bsrc=", text)
    assert set(re.findall(r'href="([^"]*)"', text)) == {"data:,"}
    assert set(re.findall(r"url\(([^)]*)\)", text)) == {f"#to-{name}" for name in ("forward", *PATHS)}
    assert "default-src 'none'" in text


def test_the_page_is_well_formed(file):
    text = file.read_text(encoding="utf-8")
    elements = Outline(text).elements
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    assert "<!-- " not in text
    assert not re.search(r"\{\w+(:\d)?\}", re.sub(r"(?s)<(script|style)>.*?</\1>", "", text))
    ids = [given["id"] for _, given, _ in elements if "id" in given]
    assert len(ids) == len(set(ids))
    named = [given[key] for _, given, _ in elements for key in ("for", "aria-labelledby") if key in given]
    assert set(" ".join(named).split()) <= set(ids)
    assert [tag for tag, _, _ in elements if re.fullmatch(r"h\d", tag)][:2] == ["h1", "h2"]


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 123456789])
def test_without_a_script_every_number_is_there(seed, tmp_path):
    assert explain("--html", tmp_path / "a.html", "--seed", seed).returncode == 0
    texts = Outline((tmp_path / "a.html").read_text(encoding="utf-8")).numbers()
    given = dict(texts)
    x, dy = ([shown(given[f"{name}{i}"]) for i in range(1, 5)] for name in ("x", "dy"))
    assert_true(texts, truth(x, dy, 1.5, 1e-5))


def test_it_has_the_numbers_of_the_terminal_and_is_repeatable(file, tmp_path):
    pytest.importorskip("rich")
    assert explain("--html", tmp_path / "a.html").returncode == 0
    assert explain("--html", tmp_path / "b.html", "--seed", 1).returncode == 0
    assert (tmp_path / "a.html").read_bytes() == file.read_bytes() != (tmp_path / "b.html").read_bytes()
    texts = dict(Outline(file.read_text(encoding="utf-8")).numbers())
    terminal = explain().stdout
    rows = [NUMBER.findall(line) for line in terminal.splitlines() if TABLE.fullmatch(line)]
    for name, first, column in (
        *(("x", 0, 0), ("xmu", 0, 1), ("xhat", 0, 2), ("y", 0, 3)),
        *(("dy", 4, 0), ("direct", 4, 1), ("through_mean", 4, 3), ("through_variance", 4, 5), ("dx", 4, 7)),
    ):
        for i in range(4):
            assert agrees(texts[f"{name}{i + 1}"], float(rows[first + i][column]), known_to=5e-5)


@pytest.mark.parametrize("kind", ["html", "plot"])
@pytest.mark.parametrize("target", ["missing/a.svg", "."])
def test_what_cannot_be_written_is_refused(kind, target, tmp_path):
    done = explain(f"--{kind}", tmp_path / target)
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"python -m batchnorm explain: error: argument --{kind}: must ")
    assert last.endswith(f"got '{tmp_path / target}'")
    assert not any(tmp_path.iterdir())


def test_a_picture_has_a_suffix_that_says_what_it_is(tmp_path):
    done = explain("--plot", tmp_path / "a.gif")
    assert done.returncode == 2
    assert "argument --plot: must end in .png or .pdf or .svg, got " in done.stderr


@pytest.mark.parametrize(
    ("problem", "status", "told"),
    [
        ("KeyboardInterrupt", 130, "interrupted"),
        ("OSError(28, 'No space left on device')", 1, "cannot write PATH: No space left on device"),
    ],
)
def test_an_old_page_stays_until_the_new_one_is_whole(problem, status, told, tmp_path):
    path = tmp_path / "a.html"
    path.write_text("old")
    done = python(
        "import os, sys; from batchnorm import __main__\n"
        f"def fails(*_): raise {problem}\n"
        "os.replace = fails\n"
        f"sys.exit(__main__.main(['explain', '--html', {str(path)!r}]))"
    )
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr == f"python -m batchnorm explain: {told.replace('PATH', str(path))}\n"
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.html"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_only_a_regular_file_is_replaced():
    done = explain("--html", "/dev/full")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "python -m batchnorm explain: '/dev/full' must be a regular file\n"


def test_without_matplotlib_it_says_what_to_install(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('no matplotlib')\n")
    done = explain("--plot", tmp_path / "a.png", PYTHONPATH=search_path(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "python -m batchnorm explain: matplotlib is missing, install it with python -m pip install matplotlib\n"
    )
    assert os.listdir(tmp_path) == ["matplotlib.py"]


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG\r\n"), (".pdf", b"%PDF-"), (".SVG", b"<?xml")])
def test_the_suffix_says_what_a_picture_is(suffix, start, tmp_path):
    pytest.importorskip("matplotlib")
    done = explain("--plot", tmp_path / f"a{suffix}")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / f"a{suffix}").read_bytes().startswith(start)


def test_the_picture_has_the_graph_of_the_page_with_its_numbers(file, tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    assert __main__.main(["explain", "--plot", str(tmp_path / "a.png")]) == 0
    (figure,) = drawn
    figure.canvas.draw()
    texts, whole = figure.axes[0].texts, figure.bbox
    for text in texts:
        extent = text.get_window_extent()
        assert whole.x0 <= extent.x0 < extent.x1 <= whole.x1, text.get_text()
        assert whole.y0 <= extent.y0 < extent.y1 <= whole.y1, text.get_text()
    svg = re.search(r"(?s)<svg .*?</svg>", file.read_text(encoding="utf-8"))[0]
    in_page = ["".join(re.split(r"<[^>]*>", text)) for text in re.findall(r"(?s)<text [^>]*>(.*?)</text>", svg)]
    assert sorted(text.get_text() for text in texts) == sorted(in_page)


# In a browser.


@pytest.fixture
def opened(browser, file):
    """Opens the page; at the end there was no message, no error, and no request but for the file."""
    contexts, told = [], []

    def opened(width=1280, scheme="light", **options):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, **options)
        page = context.new_page()
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: told.append(request.url) if request.url != file.as_uri() else None)
        page.goto(file.as_uri())
        contexts.append(context)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [line for line in told if line != "data:,"] == []


NUMBERS = """() => [...document.querySelectorAll("[data-show]")]
    .map(element => [element.dataset.show, element.textContent])"""
MOVE = """values => { for (const [name, value] of Object.entries(values)) {
    const slider = document.getElementById("in-" + name);
    slider.value = value;
    slider.dispatchEvent(new Event("input", {bubbles: true}));
}}"""


def numbers(page):
    return [(name, text) for name, text in page.evaluate(NUMBERS) if text]


def move(page, x, dy, gamma, eps):
    values = {f"{name}{i}": value for name, row in (("x", x), ("dy", dy)) for i, value in enumerate(row, 1)}
    page.evaluate(MOVE, {**values, "gamma": gamma, "eps": EPS.index(eps)})


def switch(page, on):
    for path in PATHS:
        page.set_checked(f"input[name={path}]", path in on)


def verdicts(page):
    return page.locator(".verdict:visible").all_inner_texts()


def test_the_script_begins_with_the_numbers_of_the_library(opened, file):
    assert numbers(opened()) == Outline(file.read_text(encoding="utf-8")).numbers()


CASES = [
    ([1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 0.0, 0.0], 1.0, 1e-5),
    ([-3.0, 6.0, -3.0, 6.0], [6.0, 6.0, -3.0, -3.0], -3.0, 1.0),
    ([0.1, 0.1, 0.1, 0.2], [5.9, -2.7, 0.3, 1.1], 3.0, 0.0),
    ([0.5, 2.0, -1.5, 4.5], [0.0, 0.0, 0.0, 0.0], 1.5, 0.01),
    ([5.9, -2.8, 0.3, 0.0], [-0.1, 4.7, 2.2, -1.9], 0.7, 0.1),
    ([1.1, 1.1, 1.1, 1.1], [1.0, 2.0, -3.0, 4.0], 2.0, 0.0),
    ([1.1, 1.1, 1.1, 1.1], [1.0, 2.0, -3.0, 4.0], 2.0, 1e-5),
    ([2.6, -0.4], [3.1, 5.2], 1.5, 0.0),
    ([2.6, -0.4], [3.1, 5.2], -2.0, 1e-5),
    ([0.0, 0.3], [-3.0, 6.0], 3.0, 1.0),
]


@pytest.mark.parametrize(("x", "dy", "gamma", "eps"), CASES, ids=str)
def test_every_number_follows_the_sliders(opened, x, dy, gamma, eps):
    page = opened()
    page.check(f"input[name=n][value='{len(x)}']")
    move(page, x, dy, gamma, eps)
    assert_true(numbers(page), truth(x, dy, gamma, eps))
    assert page.inner_text("#eps") == ("1e-5" if eps == 1e-5 else f"{eps:g}")
    assert page.locator("#in-x3").is_visible() == page.locator("td[data-show=dx4]").is_visible() == (len(x) == 4)
    alike = [verdict for verdict in verdicts(page) if verdict.startswith("All x are equal.")]
    assert bool(alike) == (len(set(x)) == 1)


@pytest.mark.parametrize("case", [0, 4, 8])
def test_a_switch_takes_its_pathway_out_of_the_sum(opened, case):
    """As `through=` of `backward` does; and there is one sentence, of its own, on what that means."""
    x, dy, gamma, eps = CASES[case]
    page = opened()
    page.check(f"input[name=n][value='{len(x)}']")
    move(page, x, dy, gamma, eps)
    sentences = set()
    for on in SUBSETS:
        switch(page, on)
        expected = truth(x, dy, gamma, eps, on)
        assert_true(numbers(page), expected)
        first, *more = verdicts(page)
        assert first.startswith("The right gradient." if on == PATHS else "Wrong: ")
        assert len(more) == (on == PATHS and len(x) == 2)
        named = dict(re.findall(r"(Σdx·xhat|Σdx) = (−?\d+\.\d+)", first))
        assert all(agrees(text, expected["along_dx" if "·" in name else "sum_dx"]) for name, text in named.items())
        off = {path for path in ("mean", "variance") if path not in on or on == PATHS} if "direct" in on else set()
        assert named.keys() == {{"mean": "Σdx", "variance": "Σdx·xhat"}[path] for path in off}
        sentences.add(first)
    assert len(sentences) == len(SUBSETS) == 8


def test_two_values_have_no_gradient_and_the_page_says_why(opened):
    page = opened()
    page.check("input[name=n][value='2']")
    texts = dict(numbers(page))
    assert texts["dx1"] == texts["dx2"] == "0.000"
    assert abs(shown(texts["direct1"])) > 0.1
    assert verdicts(page)[1].startswith("Two values.")
    page.uncheck("input[name=mean]")
    texts = dict(numbers(page))
    assert texts["dx1"] == texts["dx2"] != "0.000"
    assert len(verdicts(page)) == 1


def test_reset_brings_the_start_back(opened):
    page = opened()
    start = numbers(page)
    move(page, *CASES[1])
    switch(page, ("mean",))
    assert numbers(page) != start
    page.get_by_role("button", name="Reset").click()
    assert numbers(page) == start
    assert all(page.is_checked(f"input[name={path}]") for path in PATHS)
    assert len(verdicts(page)) == 1


def test_bars_go_from_0_to_dx_by_the_three_pathways(opened):
    page = opened()
    values = {name: shown(text) for name, text in numbers(page)}
    scale = None
    for i in range(1, 5):
        bar = page.locator(f".bar.sample{i}")
        zero = float(bar.evaluate("bar => parseFloat(bar.style.getPropertyValue('--zero'))"))
        places = bar.locator("i").evaluate_all(
            "all => all.map(one => [parseFloat(one.style.left), parseFloat(one.style.width)])"
        )
        at = 0.0
        for (left, width), name in zip(places, ("direct", "through_mean", "through_variance", "dx"), strict=True):
            start, end = (0.0, values["dx1"[:2] + str(i)]) if name == "dx" else (at, at + values[f"{name}{i}"])
            scale = scale or width / abs(end - start)
            assert left == pytest.approx(zero + scale * min(start, end), abs=0.1)
            assert width == pytest.approx(scale * abs(end - start), abs=0.1)
            at = end


OUTSIDE = """() => {
    const frame = document.querySelector("svg").getBoundingClientRect();
    return [...document.querySelectorAll("svg text")].filter(text => {
        const box = text.getBoundingClientRect();
        return box.width && (box.left < frame.left || box.right > frame.right);
    }).map(text => text.textContent);
}"""
OVERLAPPING = """() => [...document.querySelectorAll("svg .row")].filter(row => {
    const boxes = [...row.children].map(text => text.getBoundingClientRect()).filter(box => box.width);
    return boxes.some((box, i) => i && box.left < boxes[i - 1].right);
}).map(row => row.textContent)"""


@pytest.mark.parametrize("case", [None, 1, 6, 7])
def test_it_fits_every_screen(opened, case):
    """Nothing has to be scrolled sideways, is cut off or runs into its neighbour, also with the largest numbers."""
    page = opened()
    if case is not None:
        page.check(f"input[name=n][value='{len(CASES[case][0])}']")
        move(page, *CASES[case])
    for width in (320, 360, 819, 820, 1119, 1120, 1280, 1920):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(OUTSIDE) == []
        assert page.evaluate(OVERLAPPING) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_nothing(opened, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = opened(width, scheme)
    for on in (PATHS, ("direct",)):
        switch(page, on)
        found = axe.Axe().run(page).response["violations"]
        assert [(one["id"], one["impact"], one["nodes"][0]["html"]) for one in found] == []
    page.check("input[name=n][value='2']")
    assert axe.Axe().run(page).response["violations"] == []


def test_the_keyboard_reaches_everything_and_shows_where_it_is(opened):
    page = opened()
    reached = []
    while True:
        page.keyboard.press("Tab")
        at = page.evaluate("""() => {
            const {id, name, tagName} = document.activeElement, style = getComputedStyle(document.activeElement);
            return [id || name, tagName, style.outlineStyle, parseFloat(style.outlineWidth)];
        }""")
        if at[1] == "BODY":
            break
        assert at[2:] == ["solid", 3]
        reached.append(at[0])
    sliders = [f"in-{name}{i}" for i in range(1, 5) for name in ("x", "dy")]
    assert reached == ["n", "again", *sliders, "in-gamma", "in-eps", *PATHS]
    before = dict(numbers(page))
    page.focus("#in-x2")
    page.keyboard.press("ArrowRight")
    after = dict(numbers(page))
    assert shown(after["x2"]) == pytest.approx(shown(before["x2"]) + 0.1)
    assert after["dx2"] != before["dx2"]
    page.focus("input[name=variance]")
    page.keyboard.press("Space")
    assert verdicts(page)[0].startswith("Wrong: σ²")


def test_a_screen_reader_hears_what_changed_once_it_has_settled(opened):
    page = opened()
    assert page.inner_text("#status") == ""
    for value in range(3):
        page.evaluate(MOVE, {"x1": value})
    page.uncheck("input[name=mean]")
    page.locator("#status:not(:empty)").wait_for(state="attached")
    texts = dict(numbers(page))
    dx = ", ".join(texts[f"dx{i}"] for i in range(1, 5))
    assert page.text_content("#status") == f"dx is {dx}. {page.locator('.verdict:visible').text_content()}"
    assert page.get_attribute("#status", "role") == "status"
    assert page.get_attribute("#in-eps", "aria-valuetext") == "1e-5"
