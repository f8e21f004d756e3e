"""`python -m batchnorm explain`: what it prints is right, fits a terminal and needs no more than it says."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from processes import search_path

NUMBER = re.compile(r"-?\d+\.\d+")

pytestmark = pytest.mark.once  # a process of its own chooses its level itself


def run(*arguments, **environment):
    command = [sys.executable, "-W", "error", "-m", "batchnorm", "explain", *arguments]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )


def rows(printed, width):
    """The rows of a table with that many columns, as numbers."""
    found = [NUMBER.findall(line) for line in printed.splitlines() if re.fullmatch(r"[\s\d.-]+", line)]
    return np.array([row for row in found if len(row) == width], float)


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 5, 11, 123456789])
def test_every_number_can_be_followed(seed):
    done = run("--seed", str(seed))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "…" not in done.stdout
    assert "\x1b" not in done.stdout
    x, xmu, xhat, y = rows(done.stdout, 4).T
    near = {"rtol": 0, "atol": 2e-4}
    np.testing.assert_allclose(xmu, x - x.mean(), **near)
    np.testing.assert_allclose(xhat, xmu / np.sqrt(x.var() + 1e-5), **near)
    np.testing.assert_allclose(y, 1.5 * xhat + 0.5, **near)
    four, two = rows(done.stdout, 9)[:4], rows(done.stdout, 9)[4:]
    _, direct, direct_too, mean, mean_too, variance, variance_too, dx, dx_too = four.T
    for gradient, difference in ((direct, direct_too), (mean, mean_too), (variance, variance_too), (dx, dx_too)):
        np.testing.assert_allclose(gradient, difference, **near)
    np.testing.assert_allclose(direct + mean + variance, dx, rtol=0, atol=3e-4)
    assert abs(dx.sum()) < 4e-4
    assert abs(direct).max() > 0.01
    x, y, _, dx, difference, no_mean, no_mean_too, new_x, new_y = two.T
    assert not dx.any()
    assert not difference.any()
    np.testing.assert_allclose(no_mean, no_mean_too, **near)
    assert no_mean[0] == no_mean[1] != 0
    np.testing.assert_allclose(new_x, x - no_mean, **near)
    np.testing.assert_array_equal(new_y, y)


def test_it_is_repeatable_and_follows_the_seed():
    assert run().stdout == run("--seed", "0").stdout != run("--seed", "1").stdout


def test_colour_where_it_is_asked_for():
    """Pipes have none, which the first test sees; NO_COLOR leaves bold and dim, as its convention says."""
    colour = re.compile(r"\x1b\[3\dm")
    environment = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    assert colour.search(run(**environment).stdout)
    assert not colour.search(run(NO_COLOR="1", **environment).stdout)


@pytest.mark.parametrize("seed", ["-1", "x", "1.5", ""])
def test_a_bad_seed_is_refused(seed):
    done = run(f"--seed={seed}")
    assert done.returncode == 2
    assert f"argument --seed: must be a whole number, at least 0, got {seed!r}" in done.stderr


def test_without_rich_it_names_the_command(tmp_path):
    (tmp_path / "rich.py").write_text("raise ImportError('no rich')\n")
    done = run(PYTHONPATH=search_path(tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "python -m batchnorm explain: rich is missing, install it with python -m pip install 'rich>=13'\n"
    )
