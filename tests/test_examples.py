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
from processes import search_path

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAINING = ["digits.py", "stop_gradient.py"]
SCRIPTS = [*TRAINING, "sequences.py"]

needs_extra = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("sklearn", "matplotlib")),
    reason="scikit-learn and matplotlib, of the extra 'examples', are not installed",
)


@pytest.fixture(autouse=True, scope="module")
def level():
    """Once is enough: a process of its own chooses its level itself."""


def run(script, *arguments, cwd, **environment):
    command = [sys.executable, "-W", "error", str(EXAMPLES / script), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )


@needs_extra
def test_digits_learns_and_draws(tmp_path):
    done = run("digits.py", "--epochs", "4", "--plot", "curves.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    reported = re.search(
        r"^test accuracy with batch norm, learning rate 0\.1: (\d+\.\d\d) %$", done.stdout, re.MULTILINE
    )
    assert reported, done.stdout
    assert float(reported[1]) >= 93
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@needs_extra
def test_sequences_show_what_padding_does(tmp_path):
    """With lengths everything is right; without, the worse the more padding there is."""
    done = run("sequences.py", "--plot", "statistics.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\d+ places, (all counts|lengths=) .* ([\d.]+) σ .*off by ([\d.]+)$", done.stdout, re.MULTILINE)
    assert [name for name, *_ in rows] == ["all counts", "lengths="] * 3
    wrong = [float(mean) for name, mean, _ in rows if name == "all counts"]
    assert 0.3 < wrong[0] < wrong[1] < wrong[2]
    assert all((mean, y) == ("0.0000", "0.0000") for name, mean, y in rows if name == "lengths=")
    assert (tmp_path / "statistics.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@needs_extra
def test_stop_gradient_shows_the_drift(tmp_path):
    """Without the path through the mean, what batch norm takes away grows."""
    done = run("stop_gradient.py", "--epochs", "2", "--plot", "curves.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^([a-z ]+?)  +\d.* (\d+\.\d\d)$", done.stdout, re.MULTILINE)
    offsets = {name: float(offset) for name, offset in rows}
    assert list(offsets) == ["full gradient", "without variance path", "without mean path", "without both"]
    whole = max(offsets["full gradient"], offsets["without variance path"])
    assert min(offsets["without mean path"], offsets["without both"]) > 1.2 * whole
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@needs_extra
@pytest.mark.parametrize("script", SCRIPTS)
def test_it_is_repeatable(tmp_path, script):
    short = ["--epochs", "1"] if script in TRAINING else []
    first, second = (run(script, *short, "--seed", "3", cwd=tmp_path) for _ in range(2))
    assert first.stdout == second.stdout != ""
    assert (tmp_path / script).with_suffix(".png").exists()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("missing", ["sklearn", "matplotlib"])
def test_it_names_the_command_for_what_is_missing(tmp_path, missing, script):
    (tmp_path / missing).mkdir()
    (tmp_path / missing / "__init__.py").write_text(f"raise ImportError('no {missing}')\n")
    done = run(script, cwd=tmp_path, PYTHONPATH=search_path(tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"{script} needs scikit-learn and matplotlib: python -m pip install '.[examples]'\n"


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "options",
    [("--seed", "-1"), ("--plot", "nowhere/digits.png"), ("--plot", "digits.xyz"), ("--epochs", "0")],
    ids=" ".join,
)
def test_it_refuses_bad_options(tmp_path, options, script):
    done = run(script, *options, cwd=tmp_path)
    assert done.returncode == 2
    named = options[0] == "--epochs" and script not in TRAINING
    assert ("error: unrecognized arguments: --epochs" if named else f"error: argument {options[0]}") in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("batch_norm", [False, True])
def test_digits_stops_quietly_when_the_loss_is_not_finite(batch_norm):
    train = runpy.run_path(str(EXAMPLES / "digits.py"))["train"]
    generator = np.random.default_rng(0)
    x, labels = generator.random((640, 64), np.float32), generator.integers(10, size=640)
    curves = train(x, labels, batch_norm, learning_rate=1e30, epochs=2, seed=0)
    assert str(curves) == "diverged"
    assert curves.losses == curves.accuracies == []
