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
from convolution import convolution
from processes import search_path

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAINING = ["digits.py", "stop_gradient.py", "deploy.py"]
SCRIPTS = [*TRAINING, "sequences.py", "normalize_images.py"]

needs_extra = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("sklearn", "matplotlib")),
    reason="scikit-learn and matplotlib, of the extra 'examples', are not installed",
)

pytestmark = pytest.mark.once  # a process of its own chooses its level itself


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
def test_deploy_gives_the_same_predictions_in_three_ways(tmp_path):
    done = run("deploy.py", "--epochs", "4", "--time", "--plot", "three.png", "--save", "folded.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"^(layers|plans|folded) +(\S+) % +360 of 360 +(\S+) +(\S+) +(\d+) +(\d+)$", done.stdout, re.MULTILINE
    )
    names, accuracies, off, errors, counts, sizes = zip(*rows, strict=True)
    assert names == ("layers", "plans", "folded")
    assert len(set(accuracies)) == 1
    assert float(accuracies[0]) >= 93
    assert off[:2] == ("0.0e+00", "0.0e+00")
    assert all(0 < float(error) < 1e-4 for error in (off[2], *errors))
    assert counts == ("14", "12", "6")
    assert len(re.findall(r"^(?:layers|plans|folded) +\d+\.\d{3} +\d+\.\d{3}$", done.stdout, re.MULTILINE)) == 3

    with np.load(tmp_path / "folded.npz", allow_pickle=False) as file:
        arrays = dict(file)
    assert (len(arrays), sum(array.nbytes for array in arrays.values())) == (6, int(sizes[2]))
    x, labels = held_out()
    assert f"{100 * np.mean(folded_classes(arrays, x) == labels):.2f}" == accuracies[0]
    assert (tmp_path / "three.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def held_out():
    """The test images of the examples, for seed 0."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    split = runpy.run_path(str(EXAMPLES / "digits.py"))["split"]
    return split(images / 16, labels, np.random.default_rng(0))[2:]


def folded_classes(arrays, x):
    """What the arrays of the file predict, in long double."""
    x = x.reshape(-1, 1, 8, 8).astype(np.longdouble)
    for name in ("first", "second"):
        weight = arrays[f"{name}.weight"].transpose(3, 2, 0, 1)
        x = np.maximum(convolution(x, weight, arrays[f"{name}.bias"]), 0)
    places = x.transpose(0, 2, 3, 1).reshape(len(x), -1)
    return (places @ arrays["dense.weight"] + arrays["dense.bias"]).argmax(axis=1)


@needs_extra
def test_deploy_shows_what_wrong_inputs_do(tmp_path):
    done = run("deploy.py", "--epochs", "4", cwd=tmp_path)
    rows = re.findall(r"^(from 0 to 1|inverted|from 0 to 255) +(\S+) % +(\S+) σ", done.stdout, re.MULTILINE)
    right, inverted, scaled = ((float(accuracy), float(shift)) for _, accuracy, shift in rows)
    assert right[0] > max(inverted[0], scaled[0])
    assert 0 < right[1] < inverted[1] / 2 < scaled[1] / 100
    hints = [line for line in done.stdout.splitlines() if "divide" in line]
    assert hints == ["from 0 to 255: the data are about 255 times as large as expected: divide x by 255?"]
    assert done.stdout.endswith(f"{hints[0]}\n")


@needs_extra
def test_images_are_normalized_in_one_pass_and_rounded_once(tmp_path):
    """The shares of values that are right, by long double and the counts of each byte."""
    from sklearn.datasets import load_sample_images

    done = run("normalize_images.py", "--time", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"^(Plan\.normalizer|NumPy|NumPy, float64) +(\d+) B +(\S+) MB +(\S+) % +(\S+)$", done.stdout, re.MULTILINE
    )
    plan, single, double = rows
    y = 4 * 32 * 224 * 224 * 3 / 1e6
    assert plan[1:2] + plan[3:] == ("5", "100.00", "0.0e+00")
    assert [row[1] for row in rows] == ["5", "37", "53"]
    assert y - 0.1 < float(plan[2]) < 1.05 * y < 2.9 * y < float(single[2]) < 5.9 * y < float(double[2])

    generator, photographs = np.random.default_rng(0), load_sample_images().images
    corners = generator.integers(0, (427 - 223, 640 - 223), (32, 2))
    x = np.stack([photographs[n % 2][i : i + 224, j : j + 224] for n, (i, j) in enumerate(corners)])
    values = np.arange(256).reshape(-1, 1)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    right = ((values / np.longdouble(255) - mean) / std).astype(np.float32)
    usual = (values.astype(np.float32) / np.float32(255) - mean.astype(np.float32)) / std.astype(np.float32)
    counts = np.stack([np.bincount(x[..., channel].ravel(), minlength=256) for channel in range(3)], axis=1)
    assert f"{100 * counts[usual == right].sum() / x.size:.2f}" == single[3]
    assert len(re.findall(r"^(?:Plan\.normalizer|NumPy.*?) +\d+\.\d\d +\d+\.\d{3}$", done.stdout, re.MULTILINE)) == 3
    assert (tmp_path / "normalize_images.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@needs_extra
def test_wrong_images_are_named(tmp_path):
    """By the statistics of images like these all of them; by other ones those that are far away."""
    done = run("normalize_images.py", cwd=tmp_path)
    found = {}
    for line in done.stdout.partition("statistics of ")[2].splitlines():
        if line.startswith("    "):
            found[list(found)[-1]].append(re.search("BGR|divide x by|once too often", line)[0])
        elif line.startswith("  "):
            found[len(found) // 4, re.split("  +", line)[1]] = []
    named = {
        "as they are": [],
        "BGR": ["BGR"],
        "not divided by 255": ["divide x by"],
        "divided twice": ["once too often"],
    }
    assert found == {(0, name): hints for name, hints in named.items()} | {
        (1, name): [] if name == "BGR" else hints for name, hints in named.items()
    }


@needs_extra
@pytest.mark.parametrize("script", SCRIPTS)
def test_it_is_repeatable(tmp_path, script):
    short = ["--epochs", "1"] if script in TRAINING else []
    first, second = (run(script, *short, "--seed", "3", cwd=tmp_path) for _ in range(2))
    assert first.stdout == second.stdout != ""
    assert (tmp_path / script).with_suffix(".png").exists()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("missing", ["sklearn", "matplotlib", "PIL"])
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
    [
        ("--seed", "-1"),
        ("--plot", "nowhere/digits.png"),
        ("--plot", "digits.xyz"),
        ("--epochs", "0"),
        ("--save", "nowhere/network.npz"),
        ("--save", "network.xyz"),
    ],
    ids=" ".join,
)
def test_it_refuses_bad_options(monkeypatch, capsys, tmp_path, options, script):
    """In this process: it is refused before anything is calculated."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *options])
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert end.value.code == 2
    known = script in {"--epochs": TRAINING, "--save": ["deploy.py"]}.get(options[0], SCRIPTS)
    assert f"error: {'argument' if known else 'unrecognized arguments:'} {options[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("batch_norm", [False, True])
def test_digits_stops_quietly_when_the_loss_is_not_finite(batch_norm):
    train = runpy.run_path(str(EXAMPLES / "digits.py"))["train"]
    generator = np.random.default_rng(0)
    x, labels = generator.random((640, 64), np.float32), generator.integers(10, size=640)
    curves = train(x, labels, batch_norm, learning_rate=1e30, epochs=2, seed=0)
    assert str(curves) == "diverged"
    assert curves.losses == curves.accuracies == []
