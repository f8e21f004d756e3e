"""Every test runs on every level of kernels that this processor has, but those marked `once`, which no level changes.

The best level comes first. The others are `slow`, for they hold the same sources to the same truth, compiled otherwise:
`python -m pytest` leaves them out, and CI does not. Tests marked `every_level` say that levels agree; they stay.
"""

import gc
import shutil

import numpy as np
import pytest
from hypothesis import settings

import batchnorm as bn
from batchnorm import _kernels, _threads

settings.register_profile("house", deadline=None, print_blob=True)
settings.load_profile("house")


def pytest_report_header(config):
    known = bn.show_config(mode="dicts")
    chosen = f"tests -m {config.option.markexpr!r}; CI runs -m 'not large'"
    return [f"batchnorm {known['versions']}", f"kernels {known['kernels']}", f"threads {known['threads']}", chosen]


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc):
    """The levels are the innermost parameter, so that those of one case follow each other."""
    best, *others = _kernels.available()
    marked = metafunc.definition.get_closest_marker
    if not marked("every_level"):
        others = [] if marked("once") else [pytest.param(level, marks=pytest.mark.slow) for level in others]
    metafunc.parametrize("level", [best, *others], indirect=True)


def pytest_collection_finish():
    """The tests stay until the end, so the garbage collector need not look at them in every turn."""
    gc.freeze()


@pytest.fixture(autouse=True)
def level(request, monkeypatch):
    """Make the package use this level, which the façade asks for on every call; and threads as if they never slept."""
    _kernels.use(request.param)
    monkeypatch.setattr(_threads, "ASLEEP", 1)
    return request.param


@pytest.fixture
def always_threaded(monkeypatch):
    """Let small arrays use threads too."""
    monkeypatch.setattr(_threads, "SERIAL_VALUES", 0)


@pytest.fixture
def rng():
    return np.random.default_rng(20150211)


@pytest.fixture(scope="session")
def browser():
    """Chromium, headless."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium, as Debian's package chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
