"""The site of docs/: every public name is in it, its links lead somewhere, and any screen or reader can use it.

What concerns the built pages needs them: `nox -s docs` builds them and names their folder in BATCHNORM_SITE. The tests
in Chromium run where Playwright and a Chromium of the system are there (`nox -s page`).
"""

import ast
import doctest
import importlib.util
import os
import posixpath
import re
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest

import batchnorm as bn
from batchnorm import layer

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SITE = Path(os.environ.get("BATCHNORM_SITE", ROOT / "nowhere"))
ELSEWHERE = {"__version__", "cs231n", "mpi"}
"""Names of `batchnorm` that have no entry of their own: a number, and modules, whose names have."""

needs_site = pytest.mark.skipif(not SITE.is_dir(), reason="needs the built site, as of nox -s docs")


pytestmark = pytest.mark.once  # no promise here depends on the level


def public(module):
    """What a module offers, by its source: the library it is for may be missing."""
    body = ast.parse(Path(importlib.util.find_spec(f"batchnorm.{module}").origin).read_text()).body
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"}


def imported_by_pages():
    """Modules that the pages import from."""
    text = "".join(page.read_text() for page in DOCS.glob("*.md"))
    return sorted(set(re.findall(r"from batchnorm\.([a-z]\w*) import", text)) | {"conventions", "cs231n"})


def public_names():
    names = set(bn.__all__) - ELSEWHERE
    for module in imported_by_pages():
        names |= {f"{module}.{name}" for name in public(module) if name not in names}
    return {f"batchnorm.{name}" for name in names}


def test_every_public_name_is_in_the_api():
    assert {"mpi", "sklearn", "torch"} <= set(imported_by_pages())
    text = (DOCS / "api" / "index.rst").read_text()
    listed = re.findall(r"^(?:   |\.\. data:: )([a-zA-Z][\w.]*)$", text, re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert public_names() - {f"batchnorm.{name}" for name in listed} == set()


def test_every_environment_variable_has_a_row():
    sources = "".join(path.read_text() for path in Path(bn.__file__).parent.rglob("*.py"))
    read = set(re.findall(r"\b(?:BATCHNORM|OMP|GOMP)_[A-Z_]+\b", sources))
    assert read >= {"BATCHNORM_ISA", "OMP_NUM_THREADS"}
    rows = re.findall(r"^\|(.*?)\|", (DOCS / "environment.md").read_text(), re.MULTILINE)
    assert read - set(re.findall(r"`(\w+)`", "".join(rows))) == set()


def test_every_array_of_a_file_has_a_row():
    section = (DOCS / "files.md").read_text().partition("## Layers")[2].partition("\n## ")[0]
    rows = re.findall(r"^\|(.*?)\|", section, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", "".join(rows))) == set(layer._IN_A_FILE)


@pytest.mark.parametrize("name", ["start", "check", "files"])
def test_examples_of_a_page(name):
    failed, tried = doctest.testfile(str(DOCS / f"{name}.md"), module_relative=False)
    assert tried > 0
    assert not failed


class Page(HTMLParser):
    """What a page has and what it asks for."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads, self.pictures, self.title, self.lang = set(), [], [], [], "", None
        self.in_title = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if "id" in given:
            self.ids.add(given["id"])
        if tag == "html":
            self.lang = given.get("lang")
        elif tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") != "canonical":
            self.loads.append(given["href"])
        elif "src" in given:
            self.loads.append(given["src"])
        if tag == "img":
            self.pictures.append(given)
        self.in_title = tag == "title" and not self.title

    def handle_data(self, data):
        self.title += data if self.in_title else ""
        self.in_title = False


@pytest.fixture(scope="module")
def pages():
    """Each page by its path in the site."""
    found = {path.relative_to(SITE).as_posix(): Page(path) for path in SITE.rglob("*.html")}
    assert len(found) > 50
    return found


def inside(page, url):
    """(file, id) that a link within the site leads to."""
    parts = urlsplit(url)
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), unquote(parts.path))) if parts.path else page
    return path, unquote(parts.fragment)


@needs_site
def test_every_link_within_the_site_leads_somewhere(pages):
    broken = []
    for name, page in pages.items():
        for url in [*page.links, *page.loads]:
            if urlsplit(url).scheme:
                continue
            path, anchor = inside(name, url)
            here = (SITE / path).is_file() and (not anchor or path not in pages or anchor in pages[path].ids)
            if not here:
                broken.append((name, url))
    assert broken == []


@needs_site
def test_a_page_loads_nothing_from_elsewhere(pages):
    loads = [(name, url) for name, page in pages.items() for url in page.loads]
    assert ("docs/derivation.html", "../_static/tex-svg.js") in {(name, url.partition("?")[0]) for name, url in loads}
    assert [load for load in loads if urlsplit(load[1]).scheme not in ("", "data") or load[1].startswith("//")] == []


@needs_site
def test_every_page_has_a_title_a_language_and_words_for_its_pictures(pages):
    assert [name for name, page in pages.items() if not page.title or "no title" in page.title] == []
    assert {page.lang for page in pages.values()} == {"en"}
    silent = [(name, one["src"]) for name, page in pages.items() for one in page.pictures if "alt" not in one]
    assert silent == []


@needs_site
def test_every_public_name_has_a_page(pages):
    generated = {anchor for name, page in pages.items() if name.startswith("docs/api/") for anchor in page.ids}
    assert public_names() - generated == set()


@needs_site
@pytest.mark.parametrize("program", ["deploy", "digits", "normalize_images", "sequences", "stop_gradient"])
def test_a_program_ran_and_drew(pages, program):
    name = f"docs/gallery/{program}.html"
    assert f"the picture that {program}.py draws" in "".join(one["alt"] for one in pages[name].pictures)
    assert "sphx-glr-script-out" in (SITE / name).read_text()


# In a browser.

LOOKED_AT = [
    "docs/index.html",
    "docs/deploy.html",
    "docs/derivation.html",
    "docs/conventions.html",
    "docs/api/generated/batchnorm.forward.html",
    "docs/gallery/index.html",
    "docs/gallery/digits.html",
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    """Of the site, served."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=SITE)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def opened(browser, address):
    """Opens a page of the site; at the end there was no message, no error, and no request to elsewhere."""
    contexts, told = [], []

    def opened(name, width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: told.append(request.url))
        page.goto(f"{address}{name}")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [line for line in told if not line.startswith((address, "data:"))] == []


@needs_site
@pytest.mark.parametrize("name", LOOKED_AT)
@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1280, "dark")])
def test_axe_finds_nothing_serious(opened, name, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(opened(name, width, scheme)).response["violations"]
    told = [(one["id"], one["impact"], one["nodes"][0]["html"]) for one in found]
    assert [one for one in told if one[1] not in ("minor", "moderate")] == []


@needs_site
@pytest.mark.parametrize("name", LOOKED_AT)
def test_a_page_is_as_wide_as_a_telephone(opened, name):
    assert opened(name, 360).evaluate("document.documentElement.scrollWidth") == 360


@needs_site
def test_formulas_are_drawn(opened):
    page = opened("docs/derivation.html")
    page.wait_for_selector("mjx-container")
    page.wait_for_function("window.MathJax.startup.promise.then(() => true)")
    formulas = (DOCS / "derivation.md").read_text().count("```math")
    assert page.locator("mjx-container[display=true] > svg").count() == formulas > 40
    assert page.locator("[data-mml-node=merror]").count() == 0


@needs_site
def test_a_search_finds_pages(opened):
    page = opened("search.html?q=momentum")
    page.wait_for_selector("#search-results a[href^='docs/conventions.html']")
