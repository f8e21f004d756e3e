"""`python -m bench`, run as its users run it: that it tells builds apart, and measures what it says it measures."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm as bn
from batchnorm._kernels import runtime

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.once,  # a process of its own chooses its level itself
    pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="the benchmarks are in a clone only"),
]
pytest.importorskip("rich")

LATE = """

def _late(function):
    import functools, time

    @functools.wraps(function)
    def late(*args, **kwargs):
        time.sleep(0.005)
        return function(*args, **kwargs)

    return late


forward = _late(forward)
"""


def bench(*arguments):
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """Two installed builds that differ in their version and in the time of forward."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("old", "new")}
    for name, folder in folders.items():
        for place in {Path(bn.__file__).parent, Path(runtime.__file__).parent.parent}:
            ignored = shutil.ignore_patterns("__pycache__", "*.pyx")
            shutil.copytree(place, folder / "batchnorm", dirs_exist_ok=True, ignore=ignored)
        (folder / "batchnorm" / "_version.py").write_text(f'__version__ = "{name}"\n')
    with (folders["old"] / "batchnorm" / "functional.py").open("a") as module:
        module.write(LATE)
    # A build may come from a time when it measured otherwise, or not at all.
    shutil.rmtree(folders["old"] / "batchnorm" / "profile")
    return folders


def test_builds_are_told_apart(builds, tmp_path):
    output = tmp_path / "builds.md"
    named = [f"--build={name}={builds[name]}" for name in ("new", "old")]
    done = bench("--quick", "--only", "32×64", "--threads", "1", *named, "--output", str(output))
    assert done.returncode == 0, done.stderr
    for name in builds:
        assert f"- {name}: {name}, " in done.stdout
        assert str(builds[name]) in done.stdout
    (row,) = re.findall(r"\| float32 \| 1 \| forward \| 1 \| ([\d.]+) \|", done.stdout)
    assert float(row) > 50
    assert re.search(r"^- [\d.]+: 32×64 forward, float32, 1 threads, [\d.]+ µs for ", done.stdout, re.MULTILINE)
    found = json.loads(output.with_suffix(".json").read_text())
    assert found["builds"].keys() == {"new", "old"}
    for cell in found["rows"]:
        assert cell["best"].keys() == {"new", "old"}
        assert (cell["best"]["old"] > 0.005) == (cell["pass"] == "forward")
    assert output.read_text() in done.stdout


def test_one_build_is_held_against_the_installed_one(builds):
    done = bench(
        "--quick", "--only", "32×64", "--threads", "1", "--dtype", "float64", "--build", f"old={builds['old']}"
    )
    assert done.returncode == 0, done.stderr
    (row,) = re.findall(r"\| float64 \| 1 \| forward \| 1 \| ([\d.]+) \|", done.stdout)
    assert float(row) < 0.02
    assert f"- installed: {bn.__version__}, " in done.stdout


def test_a_build_has_its_own_kernels_for_every_dtype(builds):
    code = """
import sys
from bench.builds import measure_of
from batchnorm.profile import measure

for directory in (*sys.argv[1:], None):
    build = measure_of(directory, ["float32", "float16"])
    build.batchnorm_calls(build.activations((2, 2), 1, "float16"), 1)["inference"]()
    print(*sorted(kernels.__file__ for kernels in build.functional._kernels.of_type.values()), sep="\\t")
assert measure_of(None, []) is measure is sys.modules["batchnorm.profile.measure"]
"""
    command = [sys.executable, "-c", code, *map(str, builds.values())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    folders = [folder / "batchnorm" / "_kernels" for folder in builds.values()] + [Path(runtime.__file__).parent]
    for line, folder in zip(lines, folders, strict=True):
        files = [Path(file) for file in line.split("\t")]
        assert {file.parent for file in files} == {folder}
        assert [file.name.partition("_")[0] for file in files] == ["float16", "float32", "float64"]


def test_rivals_have_the_names_that_profile_knows():
    done = bench("--quick", "--only", "32×64", "--threads", "1", "--against", "numpy")
    assert done.returncode == 0, done.stderr
    assert "| shape | pass | batchnorm µs | out= µs | GB/s | over limit | NumPy |" in done.stdout


def test_the_layers_of_a_network_are_added_up(tmp_path):
    output = tmp_path / "layers.md"
    done = bench("--quick", "--only", "4×", "--threads", "1", "--against", "numpy", "--output", str(output))
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.with_suffix(".json").read_text())["rows"]
    for which in ("forward", "backward", "inference"):
        (twice, once) = (row["best"] for row in rows if row["pass"] == which)
        ours = [min(time for name, time in best.items() if name.startswith("batchnorm")) for best in (twice, once)]
        seconds = 2 * ours[0] + ours[1]
        ratio = (2 * twice["NumPy"] + once["NumPy"]) / seconds
        assert f"| three layers | float32 | 1 | {which} | {1e3 * seconds:.2f} | {ratio:.2f} |" in done.stdout


def test_relu_is_held_against_two_calls():
    done = bench("--quick", "--only", "32×64", "--threads", "1", "--relu", "--against", "numpy")
    assert done.returncode == 0, done.stderr
    assert "| batchnorm µs | out= µs | GB/s | over limit | batchnorm alone | NumPy |" in done.stdout
    assert "is wrong" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "NumPy"], "must be names out of numpy, torch, jax, onnxruntime, onednn, numba joined by commas"),
        (["--build", "old=/nonexistent"], "must be NAME=DIRECTORY with a package batchnorm in it"),
        (["--relu", "--against", "jax"], "not with --build, and against numpy, torch, onnxruntime alone"),
        (["--only", "nothing"], "no shape's name holds 'nothing'"),
        (["--output", "/nonexistent/a.md"], "must be in a directory that exists"),
    ],
    ids=" ".join,
)
def test_bad_arguments_are_refused(arguments, message):
    done = bench(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_two_builds_have_two_directories(builds):
    done = bench("--quick", *(f"--build={name}={builds['old']}" for name in ("one", "two")))
    assert done.returncode == 2
    assert "two builds have the same directory" in done.stderr


def test_simulated_ranks_take_the_time_of_their_longest_chain():
    """With a message of 10 and 3 between two: log₂P of both, and where P is no power of two, 2 and 1 more."""
    pytest.importorskip("mpi4py")
    program = """
import numpy as np
from bench import simulation
for ranks in (2, 3, 6, 8, 300, 4096):
    taken = simulation.simulate(ranks, np.full(1, 10.0), np.full(1, 3.0), lambda *_: None, [np.empty(0)] * ranks)
    print(ranks, taken[0], simulation.bits_are_equal(ranks))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    times = {2: 13, 3: 36, 6: 49, 8: 39, 300: 127, 4096: 156}
    assert done.stdout.splitlines() == [f"{ranks} {float(time)} True" for ranks, time in times.items()], done.stderr


def test_a_case_may_have_time_for_a_single_call():
    """On a machine so busy that one call fills a turn, the call is both the median and the slowest tenth."""
    program = """
from bench.busy import report
case = ((32, 64), 0.001), "torch", 2
print(report({case: [1e-6, 3e-6]}, {case: [0.05]}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.endswith("| (32, 64) | 1 | torch | 2 | 2 | 3 | 50000 | 50000 |\n"), done.stderr
