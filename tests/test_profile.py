"""`python -m batchnorm profile`, run as users run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import search_path

import batchnorm as bn
from batchnorm import __main__, _output
from batchnorm.profile import measure, networks, report

pytest.importorskip("matplotlib")

COMMAND = [sys.executable, "-W", "error", "-m", "batchnorm"]
PASSES = ["forward", "backward", "inference"]

pytestmark = pytest.mark.once  # the command chooses its level itself


def run(*arguments, path=None, stdout=subprocess.PIPE, **environment):
    environment = os.environ | {"COLUMNS": "80"} | ({"PYTHONPATH": search_path(path)} if path else {}) | environment
    environment.pop("PYTHONUNBUFFERED", None)
    pipes = {"stdout": stdout, "stderr": subprocess.PIPE, "encoding": environment.get("PYTHONIOENCODING")}
    return subprocess.run([*COMMAND, *arguments], text=True, env=environment, timeout=60, **pipes)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    files = ["--json", str(folder / "profile.json"), "--plot", str(folder / "profile.png")]
    done = run("profile", "--quick", "--shape", "4x3x5x5", "--shape", "64x8", "--threads", "1,2", *files)
    assert done.returncode == 0
    assert all("the machine is busy" in line for line in done.stderr.splitlines())
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
    assert max(map(len, lines[:-1])) <= 105
    assert "1 and 2 threads" in lines[-1]
    assert "numpy" in lines[-1]
    assert "batchnorm 0." in lines[-1]


def test_json_has_every_figure_in_si_units(measured):
    report = measured[1]
    assert report.keys() == {"machine", "command", "results", "totals"}
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
        (["--plot", "profile.gif"], "argument --plot: must end in .png or .pdf or .svg, got 'profile.gif'"),
        (["--plot", "profile"], "got 'profile'"),
        (["--shape", "99999999x99999999"], "argument --shape: must fit in memory; 99999999x99999999 needs "),
        (["--network", "resnet50", "--batch", "99999999"], "argument --batch: must fit in memory; 99999999x64x"),
    ],
    ids=" ".join,
)
def test_bad_arguments_are_refused_before_anything_is_measured(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(measure, "every_pass", None)
    monkeypatch.setattr(measure, "activations", None)
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
    requirement = (
        "torch" if package == "torch" else "'rich>=13' 'matplotlib>=3.8' 'ml_dtypes>=0.5'"
    )  # whatever index there is
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"python -m batchnorm profile: {package} is missing, install it with python -m pip install {requirement}\n"
    )


@pytest.mark.parametrize(("network", "layers"), [("resnet50", 53), ("densenet121", 121), ("mobilenet_v2", 52)])
def test_networks_have_all_their_layers(network, layers):
    assert sum(networks.NETWORKS[network].values()) == layers


def row(milliseconds, shape=(4, 3), layers=1, stalled=(), **facts):
    """A row of half that for the limit, ten times that for NumPy."""

    def timing(factor):
        return measure.Timing(factor * milliseconds / 1e3, factor * milliseconds / 500, 3)

    given = {"threads": 2, "name": "forward", "bytes": 96, **facts}
    timings = {"numpy": timing(10), "batchnorm": timing(1)}
    errors = {"numpy": 2e-7 * layers, "batchnorm": 1e-8}
    return measure.Result(shape, layers, limit=timing(0.5), timings=timings, errors=errors, stalled=stalled, **given)


@pytest.fixture
def printed(monkeypatch, capsys):
    """What the command prints about rows that were not measured."""

    def printed(rows, *arguments):
        def every_pass(*_):
            yield from rows
            if arguments == ("interrupted",):
                raise KeyboardInterrupt

        monkeypatch.setattr(measure, "every_pass", every_pass)
        status = __main__.main(["profile", *(() if arguments == ("interrupted",) else arguments)])
        return status, *capsys.readouterr()

    return printed


def test_interrupt_prints_what_was_measured(printed, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    status, out, err = printed([row(500)], "interrupted")
    assert status == 130
    assert [line.split()[:3] for line in out.splitlines() if "forward" in line] == [["forward", "2", "5000000"]]
    assert err == "python -m batchnorm profile: interrupted\n"


def test_interrupt_while_a_command_is_imported_is_one_line(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    assert __main__.main(["profile"]) == 130
    assert capsys.readouterr() == ("", "python -m batchnorm profile: interrupted\n")


def test_a_network_has_a_total_of_all_its_layers(printed, tmp_path):
    file = tmp_path / "profile.json"
    rows = [row(1, layers=3), row(2, layers=1, shape=(8, 3)), row(7, shape=(8, 3), name="backward")]
    status, out, _ = printed(rows, "--network", "resnet50", "--json", str(file))
    assert status == 0
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("all 4 layers"))
    assert lines[start + 1].split()[:5] == ["forward", "2", "50000", "5000", "10.0"]
    first, second = json.loads(file.read_text())["totals"]
    assert first["contestants"]["batchnorm"]["best"] == pytest.approx(3 * 0.001 + 0.002)
    assert first["contestants"]["batchnorm"]["median"] == pytest.approx(2 * (3 * 0.001 + 0.002))
    assert first["contestants"]["numpy"]["error"] == 6e-7
    assert first["limit"]["best"] == pytest.approx(0.0025)
    assert (first["bytes"], first["pass"], second["pass"]) == (4 * 96, "forward", "backward")


def test_shapes_have_no_total(printed):
    assert "all " not in printed([row(1)], "--shape", "4x3")[1]


def test_a_stalled_row_is_marked_and_nothing_follows_from_it(printed):
    out = printed([row(1), row(3000, shape=(8, 3), stalled=("batchnorm",))])[1]
    sound, stalled = (line.split() for line in out.splitlines() if line.startswith("  forward"))
    assert sound[2:7] == ["10000", "1000", "10.0", "0.0", "2.00"]
    assert stalled[2:7] == ["30000000", "3000000*", "–", "–", "–"]
    assert "*: stalled" in out
    assert "*: stalled" not in printed([row(1)])[1]


def test_a_stalled_row_does_not_stretch_the_plot(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    edges = []
    monkeypatch.setattr(pyplot, "close", lambda figure: edges.append(figure.axes[0].get_xlim()[1]))
    late = row(1, shape=(8, 3))
    late = late._replace(stalled=("batchnorm",), timings={**late.timings, "batchnorm": measure.Timing(9.0, 9.0, 3)})
    for rows in ([row(1)], [row(1), late]):
        report.draw(tmp_path / "a.svg", rows, ["numpy", "batchnorm"], "")
    assert edges[0] == pytest.approx(edges[1])


def test_a_row_that_stalls_is_measured_again(monkeypatch):
    """A team that is slower than one thread: at first by far, then not."""
    problem = measure.activations((8, 3), 1, "float32")
    team = iter([9.0, 1.0])

    def in_turns(calls, _seconds):
        return dict.fromkeys(calls, measure.Timing(next(team), 9.0, 3))

    monkeypatch.setattr(measure, "in_turns", in_turns)
    monkeypatch.setattr(measure, "turn", lambda _call: [1.0])
    found = measure.measured(problem, "forward", 2, ["batchnorm"], 0.1)
    assert found["stalled"] == ()
    assert found["timings"] == {"batchnorm": measure.Timing(1.0, 9.0, 6)}
    team = iter([9.0] * measure.TRIES)
    assert measure.measured(problem, "forward", 2, ["batchnorm"], 0.1)["stalled"] == ("batchnorm",)


@pytest.mark.parametrize(("load", "warned"), [(1e6, True), (0.0, False)])
def test_a_busy_machine_is_said_before_anything_is_measured(load, warned, printed, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    err = printed([row(1)])[2]
    assert err.startswith("python -m batchnorm profile: the machine is busy, load ") == warned
    assert bool(err) == warned


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG\r\n"), (".pdf", b"%PDF-"), (".svg", b"<?xml"), (".PNG", b"\x89PNG\r\n")]
)
def test_the_suffix_says_what_a_plot_is(tmp_path, suffix, start):
    pytest.importorskip("matplotlib").use("Agg")
    file = tmp_path / f"plot{suffix}"
    report.draw(file, [row(1)], ["numpy", "batchnorm"], "")
    assert file.read_bytes().startswith(start)


@pytest.mark.parametrize("arguments", [["explain"], ["--version"], ["profile", "--help"]], ids=" ".join)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(arguments):
    with open("/dev/full", "w") as full:
        done = run(*arguments, stdout=full)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith(": cannot write to standard output: No space left on device\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_file_that_cannot_be_written_is_named(printed, monkeypatch):
    monkeypatch.setattr(_output, "file", Path)
    with pytest.raises(SystemExit, match="profile: cannot write /dev/full: No space left on device"):
        printed([row(1)], "--json", "/dev/full")


def test_a_closed_pipe_is_silent():
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as closed:
        done = run("explain", stdout=closed)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_the_terminal_cannot_show_is_a_question_mark(encoding):
    done = run("explain", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, "")
    assert "mean ?  = ?x/n" in done.stdout


def test_version():
    assert run("--version").stdout == f"batchnorm {bn.__version__}\n"


def test_the_limit_does_what_it_says():
    for threads in (1, 3):
        problem = measure.activations((5, 7), 1, "float64")
        calls = measure.limit(problem, threads)
        calls["backward"]()
        np.testing.assert_array_equal(problem.out, problem.x + problem.dy)
        calls["forward"]()
        np.testing.assert_array_equal(problem.out, problem.x)
