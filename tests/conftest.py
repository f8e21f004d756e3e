"""Every test runs once on every level of kernels that this processor has."""

import shutil

import numpy as np
import pytest
from hypothesis import settings

import batchnorm as bn
from batchnorm import _kernels, _threads

settings.register_profile("house", deadline=None, print_blob=True)
settings.load_profile("house")


def pytest_report_header():
    config = bn.show_config(mode="dicts")
    return [f"batchnorm {config['versions']}", f"kernels {config['kernels']}", f"threads {config['threads']}"]


@pytest.fixture(params=_kernels.available(), autouse=True, scope="session")
def level(request):
    """Make the package use this level; the façade asks for the kernels on every call."""
    before = _kernels.level
    _kernels.use(request.param)
    yield request.param
    _kernels.use(before)


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
