"""`python -m batchnorm profile`, run as users run it."""

import json
import os
import subprocess
import sys

import pytest

from batchnorm import __main__, profile

pytest.importorskip("matplotlib")

COMMAND = [sys.executable, "-W", "error", "-m", "batchnorm"]
PASSES = ["forward", "backward", "inference"]


@pytest.fixture(scope="session")
def level():
    """The command chooses its level itself, so once is enough."""


def run(*arguments, path=None):
    environment = os.environ | {"COLUMNS": "80"} | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=environment, timeout=60)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    files = ["--json", str(folder / "profile.json"), "--plot", str(folder / "profile.png")]
    done = run("profile", "--quick", "--shape", "4x3x5x5", "--shape", "64x8", "--threads", "1,2", *files)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout, json.loads((folder / "profile.json").read_text()), (folder / "profile.png").read_bytes()


def test_table_has_a_row_for_every_pass_and_number_of_threads(measured):
    lines = measured[0].splitlines()
    first, second = lines.index("4x3x5x5".ljust(len(lines[0]))), lines.index("64x8".ljust(len(lines[0])))
    for start in (first, second):
        rows = [line.split() for line in lines[start + 1 : start + 7]]
        assert [row[:2] for row in rows] == [[name, threads] for name in PASSES for threads in "12"]
        assert {len(row) for row in rows} == {9}


def test_table_fits_100_columns_and_ends_with_the_machine(measured):
    lines = measured[0].splitlines()
    assert max(map(len, lines[:17])) <= 100
    assert "1 and 2 threads" in lines[-1]
    assert "numpy" in lines[-1]
    assert "batchnorm 0." in lines[-1]


def test_json_has_every_figure_in_si_units(measured):
    report = measured[1]
    assert report.keys() == {"machine", "command", "results"}
    assert report["machine"].keys() >= {"processor", "versions", "kernels", "threads"}
    assert report["command"]["shape"] == [[4, 3, 5, 5], [64, 8]]
    assert [(row["shape"], row["pass"], row["threads"]) for row in report["results"]] == [
        (shape, name, threads) for shape in ([4, 3, 5, 5], [64, 8]) for threads in (1, 2) for name in PASSES
    ]
    for row in report["results"]:
        assert row["bytes"] == (3 if row["pass"] == "backward" else 2) * (1200 if len(row["shape"]) == 4 else 2048)
        assert 0 < row["limit"]["best"] <= row["limit"]["median"] < 1
        assert row["contestants"].keys() == {"numpy", "batchnorm"}
        for figures in row["contestants"].values():
            assert 0 < figures["best"] <= figures["median"] < 1
            assert figures["calls"] >= 3
            assert figures["bytes_per_second"] == pytest.approx(row["bytes"] / figures["best"])
            assert figures["over_limit"] == pytest.approx(figures["best"] / row["limit"]["best"])
            assert figures["error"] < 1e-5
        assert row["contestants"]["batchnorm"]["over_batchnorm"] == 1
        assert row["contestants"]["batchnorm"]["error"] <= 2**-22


def test_picture_is_a_png(measured):
    assert measured[2].startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("axis", ["1", "0", "-1"])
def test_float64_is_held_against_a_wider_type_on_every_axis(tmp_path, axis):
    file = tmp_path / "profile.json"
    done = run("profile", "--quick", "--shape", "4x3x5", "--axis", axis, "--dtype", "float64", "--json", str(file))
    assert done.returncode == 0, done.stderr
    errors = [row["contestants"]["batchnorm"]["error"] for row in json.loads(file.read_text())["results"]]
    assert 0 < max(errors) <= 2**-50


def test_torch_sees_the_same_layers(tmp_path):
    pytest.importorskip("torch", exc_type=ImportError)
    file = tmp_path / "profile.json"
    shapes = ["--shape", "2x5x5x3", "--axis", "-1"]
    done = run("profile", "--quick", *shapes, "--against", "numpy,torch", "--json", str(file))
    assert done.returncode == 0, done.stderr
    for row in json.loads(file.read_text())["results"]:
        assert list(row["contestants"]) == ["numpy", "torch", "batchnorm"]
        assert row["contestants"]["torch"]["error"] < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "3x"], "argument --shape: must be two or more positive whole numbers joined by x"),
        (["--shape", "3x0x2"], "got '3x0x2'"),
        (["--shape", "7"], "got '7'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--threads", "0"], "argument --threads: must be whole numbers from 1 to 4096 joined by commas"),
        (["--threads", "1,,2"], "got '1,,2'"),
        (["--against", "foo"], "argument --against: must be names out of numpy, torch joined by commas, got 'foo'"),
        (["--axis", "7"], "argument --axis: must be from -4 to 3 for shape "),
        (["--shape", "3x4", "--axis", "-3"], "argument --axis: must be from -2 to 1 for shape 3x4, got -3"),
        (["--axis", "first"], "argument --axis: invalid int value: 'first'"),
        (["--network", "lenet"], "argument --network: invalid choice: 'lenet'"),
        (["--network", "resnet50", "--shape", "3x4"], "not allowed with argument"),
        (["--network", "resnet50", "--batch", "0"], "argument --batch: must be a positive whole number, got '0'"),
        (["--batch", "4"], "argument --batch: must come with --network, got 4 alone"),
        (["--json", "missing/profile.json"], "argument --json: must be a file that can be written"),
        (["--json", "."], "got '.'"),
        (["--plot", "missing/profile.png"], "argument --plot: must be a file that can be written"),
    ],
    ids=" ".join,
)
def test_bad_arguments_are_refused_before_anything_is_measured(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(profile, "profile", None)
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["profile", *arguments])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert message in err
    assert out == ""


def test_refusal_and_help_as_the_shell_sees_them():
    refused, helped = run("profile", "--shape", "3x"), run()
    assert (refused.returncode, helped.returncode) == (2, 2)
    assert refused.stderr.splitlines()[-1].startswith("python -m batchnorm profile: error: argument --shape: ")
    assert "profile" in helped.stderr
    assert "Traceback" not in refused.stderr + helped.stderr


@pytest.mark.parametrize("package", ["rich", "matplotlib", "torch"])
def test_missing_package_is_one_line_that_says_what_to_install(tmp_path, package):
    stub = tmp_path / package
    stub.mkdir()
    (stub / "__init__.py").write_text("raise ImportError")
    options = ["--quick", "--against", "torch" if package == "torch" else "numpy", "--plot", str(tmp_path / "a.png")]
    done = run("profile", *options, path=tmp_path)
    requirement = "torch" if package == "torch" else "batchnorm[profile]"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"python -m batchnorm profile: {package} is missing, install it with python -m pip install '{requirement}'\n"
    )


@pytest.mark.parametrize(("network", "layers"), [("resnet50", 53), ("densenet121", 121), ("mobilenet_v2", 52)])
def test_networks_have_all_their_layers(network, layers):
    assert sum(profile.NETWORKS[network].values()) == layers


def test_interrupt_prints_what_was_measured(monkeypatch, capsys):
    def interrupted(*_):
        timing = profile.Timing(0.5, 1.0, 3)
        yield profile.Result(
            (4, 3), 1, 2, "forward", 96, timing, {"numpy": timing, "batchnorm": timing}, {"numpy": 0, "batchnorm": 0}
        )
        raise KeyboardInterrupt

    monkeypatch.setattr(profile, "profile", interrupted)
    assert __main__.main(["profile"]) == 130
    out, err = capsys.readouterr()
    assert [line.split()[:3] for line in out.splitlines() if "forward" in line] == [["forward", "2", "500000"]]
    assert err == "python -m batchnorm profile: interrupted\n"
