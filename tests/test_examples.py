"""The examples run as a reader runs them: in a process of their own, where any warning is an error."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

DIGITS = Path(__file__).parents[1] / "examples" / "digits.py"

needs_extra = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("sklearn", "matplotlib")),
    reason="scikit-learn and matplotlib, of the extra 'examples', are not installed",
)


@pytest.fixture(autouse=True, scope="module")
def level():
    """Once is enough: a process of its own chooses its level itself."""


def run(*arguments, cwd, **environment):
    command = [sys.executable, "-W", "error", str(DIGITS), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )


@needs_extra
def test_digits_learns_and_draws(tmp_path):
    done = run("--epochs", "4", "--plot", "curves.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    reported = re.search(
        r"^test accuracy with batch norm, learning rate 0\.1: (\d+\.\d\d) %$", done.stdout, re.MULTILINE
    )
    assert reported, done.stdout
    assert float(reported[1]) >= 93
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@needs_extra
def test_digits_is_repeatable(tmp_path):
    first, second = (run("--epochs", "1", "--seed", "3", cwd=tmp_path) for _ in range(2))
    assert first.stdout == second.stdout != ""
    assert (tmp_path / "digits.png").exists()


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib"])
def test_digits_names_the_command_for_what_is_missing(tmp_path, missing):
    (tmp_path / missing).mkdir()
    (tmp_path / missing / "__init__.py").write_text(f"raise ImportError('no {missing}')\n")
    done = run(cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "python -m pip install '.[examples]'" in done.stderr


@pytest.mark.parametrize(
    "options",
    [("--epochs", "0"), ("--seed", "-1"), ("--plot", "nowhere/digits.png"), ("--plot", "digits.xyz")],
    ids=" ".join,
)
def test_digits_refuses_bad_options(tmp_path, options):
    done = run(*options, cwd=tmp_path)
    assert done.returncode == 2
    assert f"error: argument {options[0]}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("batch_norm", [False, True])
def test_digits_stops_quietly_when_the_loss_is_not_finite(batch_norm):
    train = runpy.run_path(str(DIGITS))["train"]
    generator = np.random.default_rng(0)
    x, labels = generator.random((640, 64), np.float32), generator.integers(10, size=640)
    curves = train(x, labels, batch_norm, learning_rate=1e30, epochs=2, seed=0)
    assert str(curves) == "diverged"
    assert curves.losses == curves.accuracies == []
