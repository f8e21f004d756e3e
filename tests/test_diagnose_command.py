"""`python -m batchnorm diagnose` on files, and the picture."""

import sys

import numpy as np
import pytest

import batchnorm as bn
from batchnorm import __main__
from batchnorm.gradient.drawing import MANY

pytestmark = pytest.mark.once  # it is NumPy on top of the statistics


@pytest.fixture
def files(tmp_path, rng, monkeypatch):
    """x, dy and gamma in the working directory; the right gradients, and a wrong dx."""
    x, dy, gamma = rng.standard_normal((12, 3)), rng.standard_normal((12, 3)), np.array([0.5, 2.0, 3.0])
    _, saved = bn.forward(x, gamma, np.zeros(3), eps=1e-3)
    right = bn.backward(dy, saved)
    wrong = gamma * saved.rstd * (dy - dy.mean(axis=0))
    arrays = {"x": x, "dy": dy, "gamma": gamma, "wrong": wrong, **right._asdict()}
    monkeypatch.chdir(tmp_path)
    arrays = {name: array for name, array in arrays.items() if array is not None}
    for name, array in arrays.items():
        np.save(f"{name}.npy", array)
    np.savez("all.npz", **arrays)
    return arrays


GIVEN = ["--x", "x.npy", "--dy", "dy.npy", "--gamma", "gamma.npy", "--eps", "1e-3"]


def diagnose(*arguments):
    return __main__.main(["diagnose", *arguments])


def test_the_exit_status_tells_right_from_wrong(files, capsys):
    assert diagnose("dx.npy", *GIVEN) == 0
    assert capsys.readouterr().out.startswith("correct: dx agrees with the exact gradient")
    assert diagnose("wrong.npy", *GIVEN) == 1
    out, err = capsys.readouterr()
    assert out.startswith("variance pathway missing: ")
    assert out.count("\n") == 1
    assert err == ""
    assert diagnose("dx.npy", *GIVEN, "--dgamma", "dgamma.npy", "--dbeta", "dgamma.npy") == 1
    out = capsys.readouterr().out
    assert out.startswith("dx: ")
    assert "dgamma: correct. dbeta: dgamma and dbeta exchanged" in out


def test_members_of_an_npz_and_other_axes(files, capsys):
    given = ["--x", "all.npz:x", "--dy", "all.npz:dy", "--gamma", "all.npz:gamma", "--eps", "1e-3"]
    assert diagnose("all.npz:dx", *given) == 0
    np.savez("turned.npz", **{name: array.T for name, array in files.items()})
    given = [argument.replace("all", "turned") for argument in given]
    assert diagnose("turned.npz:dx", *given, "--axis", "0") == 0
    assert diagnose("dx.npy", *GIVEN, "--beta", "gamma.npy") == 0


REFUSED = {
    "no file": (["none.npy", *GIVEN], "none.npy: No such file or directory"),
    "no array": (["text.npy", *GIVEN], "dx must be an npy file, or FILE.npz:NAME, without pickled objects: "),
    "pickled": (["pickled.npy", *GIVEN], "dx must be an npy file, or FILE.npz:NAME, without pickled objects: "),
    "empty": (["empty.npy", *GIVEN], "dx must be an npy file, or FILE.npz:NAME, without pickled objects: "),
    "no member": (["all.npz:what", *GIVEN], "dx must be an npy file, or FILE.npz:NAME, without pickled objects: ask"),
    "an npz without a name": (["all.npz", *GIVEN], "dx must be an npy file, or FILE.npz:NAME, without pickled obj"),
    "another shape": (["gamma.npy", *GIVEN], "dx must have the shape of x, (12, 3), or its axes in another order"),
    "no channels like these": (["dx.npy", *GIVEN, "--gamma", "x.npy"], "gamma must have shape (3,), got (12, 3)"),
    "no such axis": (["dx.npy", *GIVEN, "--axis", "2"], "axis "),
    "eps below 0": (["dx.npy", *GIVEN, "--eps", "-1"], "eps "),
    "no such picture": (["dx.npy", *GIVEN, "--plot", "dx.txt"], "Format 'txt' is not supported"),
    "no such folder": (["dx.npy", *GIVEN, "--plot", "none/dx.png"], "none/dx.png: No such file or directory"),
}


@pytest.mark.parametrize(("arguments", "told"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_one_line_and_status_2(files, arguments, told, capsys):
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    np.save("pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name, content in {"text.npy": b"dx", "empty.npy": b""}.items():
        with open(name, "wb") as file:
            file.write(content)
    assert diagnose(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"python -m batchnorm diagnose: {told}")
    assert err.count("\n") == 1


def test_x_and_dy_are_needed(capsys):
    with pytest.raises(SystemExit) as stopped:
        diagnose("dx.npy")
    assert stopped.value.code == 2
    assert "the following arguments are required: --x, --dy" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_a_picture(files, suffix, tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    assert diagnose("wrong.npy", *GIVEN, "--plot", f"dx.{suffix}") == 1
    begins = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
    assert (tmp_path / f"dx.{suffix}").read_bytes().startswith(begins)


def test_what_is_drawn(rng):
    pyplot = pytest.importorskip("matplotlib").pyplot if "matplotlib.pyplot" in sys.modules else None
    pyplot = pyplot or pytest.importorskip("matplotlib.pyplot")
    x, dy = rng.standard_normal((2, 30, 3, 2))
    _, saved = bn.forward(x)
    dx = bn.backward(dy, saved).dx.copy()
    dx[:, 2] -= bn.pathways(dy, saved).mean[:, 2]
    figure = bn.diagnose(dx, dy, saved).plot()
    above, below = figure.axes
    drawn = {line.get_label(): line.get_ydata() for axes in (above, below) for line in axes.get_lines()}
    assert "channel 2 of 3, the first 48 of 60 values" in above.get_title()
    pathways = bn.pathways(dy, saved)
    for name, values in {"given": dx, "right": sum(pathways), **pathways._asdict()}.items():
        np.testing.assert_allclose(drawn[name], values[:, 2].ravel()[:MANY], rtol=1e-12, atol=1e-12)
    pyplot.close(figure)
    figure = bn.diagnose(np.full_like(dx, np.nan).transpose(1, 0, 2), dy, saved).plot()
    assert "given" not in [line.get_label() for line in figure.axes[0].get_lines()]
    pyplot.close(figure)


def test_without_matplotlib(rng, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    x, dy = rng.standard_normal((2, 8, 3))
    with pytest.raises(ImportError, match="plot needs matplotlib, install it with python -m pip install matplotlib"):
        bn.diagnose(dy, dy, bn.forward(x)[1]).plot()
