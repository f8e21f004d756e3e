"""`python -m batchnorm convert`: files with batch norm layers of one system and other arrays."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
from processes import search_path

import batchnorm as bn
from batchnorm import __main__, state_file
from batchnorm.conventions import CONVENTIONS

safetensors = pytest.importorskip("safetensors")
pytest.importorskip("safetensors.numpy")
ml_dtypes = pytest.importorskip("ml_dtypes")

OTHERS = {"conv1.weight": np.ones((4, 3, 3, 3), np.float32), "fc/bias": np.arange(3), "step": np.array(7)}

pytestmark = pytest.mark.once  # files and names are the same at every level of kernels


@pytest.fixture
def network(rng):
    """Two layers of torch among other arrays."""
    arrays = {"conv1.weight": OTHERS["conv1.weight"]}
    for path, channels in (("bn1", 4), ("layer1.0.bn2", 3)):
        arrays |= bn.to_state(trained(rng, channels), "torch", prefix=path)
    return arrays | OTHERS


def trained(rng, channels):
    layer = bn.BatchNorm(channels)
    layer.gamma, layer.beta, layer.running_mean, layer.running_var = rng.uniform(0.5, 2, (4, channels))
    layer.num_batches_tracked = 5
    return layer


def save(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    return str(path)


def load(path):
    if str(path).endswith(".npz"):
        with np.load(path) as file:
            return dict(file)
    return safetensors.numpy.load_file(path)


def convert(*arguments):
    return __main__.main(["convert", *map(str, arguments)])


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        convert(*arguments)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert "Traceback" not in err
    return err.splitlines()[-1].removeprefix("python -m batchnorm convert: error: ")


@pytest.mark.parametrize("target", CONVENTIONS)
@pytest.mark.parametrize("suffixes", [(".npz", ".npz"), (".npz", ".safetensors"), (".safetensors", ".npz")])
def test_there_and_back(network, tmp_path, target, suffixes, capsys):
    """To every system and back to torch: other arrays untouched, layers but for one rounding of gamma each way."""
    start, there = save(tmp_path / f"a{suffixes[0]}", network), tmp_path / f"b{suffixes[1]}"
    assert convert(start, there, "--from", "torch", "--to", target) == 0
    found = load(there)
    for path in ("bn1", "layer1.0.bn2"):
        expected = bn.to_state(bn.from_state(network, "torch", prefix=path), target, prefix=path)
        joined = path if target in ("torch", "mlx", "paddle") else path.replace(".", "/")
        for name, values in expected.items():
            written = found[name.replace(path, joined)]
            assert written.dtype == values.dtype
            assert (written == values).all()
    assert not any(name.endswith("running_mean") for name in found) or target in ("torch", "mlx")
    for name, values in OTHERS.items():
        assert found[name].dtype == values.dtype
        assert (found[name] == values).all()
    assert convert(there, tmp_path / "c.npz", "--from", target, "--to", "torch") == 0
    again = load(tmp_path / "c.npz")
    assert set(again) - set(network) == set()
    for name, values in network.items():
        if "num_batches" not in name:
            assert again[name] == pytest.approx(values, rel=2.0**-22)
    assert "2 layers, 3 other arrays unchanged; written to" in capsys.readouterr().out


def test_what_is_printed(network, tmp_path, capsys):
    network["bn1.running_mean"] = np.zeros(4, np.float16)
    network["bn1.running_var"] = np.ones(4, np.float16)
    network["layer1.0.bn2.weight"] = np.full(3, 1e-5, np.float32)
    network["layer1.0.bn2.running_var"] = np.ones(3, np.float32)
    start = save(tmp_path / "a.npz", network)
    assert convert(start, tmp_path / "b.npz", "--from", "torch", "--to", "keras") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "channels", "gamma", "remarks"]
    assert lines[1].split(maxsplit=2) == ["bn1", "4", "changed by up to 0.049 %  never trained, 16-bit statistics"]
    assert lines[2].split(maxsplit=2) == ["layer1.0.bn2", "3", "changed by up to 0.049 %  |gamma| ≤ 0.0001 everywhere"]
    assert lines[4] == f"2 layers, 3 other arrays unchanged; written to {tmp_path / 'b.npz'}."
    assert lines[6] == (
        "Names: weight → gamma, bias → beta, running_mean → moving_mean, running_var → moving_variance."
    )
    assert lines[7] == "torch, as read: eps=1e-05, momentum=0.1 (weight of the new batch)."
    assert lines[8] == "keras needs: epsilon=0.001, momentum=0.9 (weight of the old value)."
    assert lines[9].startswith("Running variances are unbiased in torch, biased in keras: they were kept.")
    assert len(lines) == 10


def test_eps_of_both_sides(network, tmp_path, capsys):
    start = save(tmp_path / "a.npz", network)
    arguments = [start, start, "--from", "torch", "--to", "torch", "--from-eps", "1e-3", "--eps", "1e-5"]
    assert convert(*arguments) == 0
    found = load(start)  # OUT may be IN
    var = network["bn1.running_var"].astype(float)
    expected = network["bn1.weight"] * np.sqrt((var + 1e-5) / (var + 1e-3))
    assert found["bn1.weight"] == pytest.approx(expected, rel=2.0**-23)
    assert "torch, as read: eps=0.001" in capsys.readouterr().out
    assert convert(start, tmp_path / "b.npz", "--from", "torch", "--to", "flax") == 0
    assert (load(tmp_path / "b.npz")["params/bn1/scale"] == found["bn1.weight"]).all()
    assert "as it was" in capsys.readouterr().out


def test_a_prefix_leaves_the_other_layers(network, tmp_path):
    start = save(tmp_path / "a.npz", network)
    for prefix in ("layer1", "layer1.", "layer1/0", "layer1.0.bn2"):
        assert convert(start, tmp_path / "b.npz", "--from", "torch", "--to", "keras", "--prefix", prefix) == 0
        found = load(tmp_path / "b.npz")
        assert "layer1/0/bn2/gamma" in found
        assert (found["bn1.running_var"] == network["bn1.running_var"]).all()


def test_a_dry_run_writes_nothing(network, tmp_path, capsys):
    start = save(tmp_path / "a.npz", network)
    assert convert(start, "--dry-run", "--from", "torch", "--to", "keras") == 0
    assert convert(start, tmp_path / "b.npz", "--dry-run", "--from", "torch", "--to", "keras") == 0
    assert "nothing was written." in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["a.npz"]


def test_metadata_and_16_bits_of_safetensors(network, tmp_path, capsys):
    network["half"], network["brain"] = np.ones(3, np.float16), np.full(3, 1.5, ml_dtypes.bfloat16)
    network["transposed"] = np.arange(6.0).reshape(2, 3)
    network["bn1.running_var"] = np.full(4, 1.5, ml_dtypes.bfloat16)
    start = save(tmp_path / "a.safetensors", network)
    arguments = ["--from", "torch", "--to", "keras"]
    assert convert(start, tmp_path / "b.safetensors", *arguments) == 0
    with safetensors.safe_open(tmp_path / "b.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("brain").dtype == ml_dtypes.bfloat16
        assert file.get_tensor("bn1/moving_variance").dtype == np.float32
        assert file.get_tensor("step").shape == ()
    assert "no bfloat16" not in capsys.readouterr().out
    assert convert(start, tmp_path / "b.npz", *arguments) == 0
    assert "npz has no bfloat16" in capsys.readouterr().out
    assert convert(tmp_path / "b.npz", tmp_path / "c.safetensors", "--from", "keras", "--to", "torch") == 0
    found = load(tmp_path / "c.safetensors")
    assert found["brain"].dtype == ml_dtypes.bfloat16
    assert found["brain"].tolist() == [1.5] * 3
    assert found["bn1.running_var"].tolist() == [1.5] * 4


def test_arrays_in_another_order_of_memory_are_written_as_they_read(network, tmp_path):
    network["transposed"] = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    start = save(tmp_path / "a.npz", network)
    assert convert(start, tmp_path / "b.safetensors", "--from", "torch", "--to", "keras") == 0
    assert load(tmp_path / "b.safetensors")["transposed"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_layer_at_the_root(tmp_path, rng, capsys):
    start = save(tmp_path / "a.npz", bn.to_state(trained(rng, 2), "flax"))
    assert convert(start, tmp_path / "b.npz", "--from", "flax", "--to", "torch") == 0
    assert sorted(load(tmp_path / "b.npz")) == ["bias", "num_batches_tracked", "running_mean", "running_var", "weight"]
    assert "(root)" in capsys.readouterr().out


def test_no_layers(network, tmp_path, capsys):
    start, out = save(tmp_path / "a.npz", network), tmp_path / "b.npz"
    assert refusal(capsys, start, out, "--from", "keras", "--to", "torch") == (
        "IN must have layers of keras, …/moving_mean and …/moving_variance: "
        "there are layers of torch at 'bn1', 'layer1.0.bn2'"
    )
    assert refusal(capsys, start, out, "--from", "torch", "--to", "keras", "--prefix", "layer2") == (
        "IN must have layers of torch, layer2.running_mean and layer2.running_var: "
        "there are layers of torch at 'layer1.0.bn2', 'bn1'"
    )
    assert "layer.running_mean" in refusal(capsys, start, out, "--from", "torch", "--to", "keras", "--prefix", "layer")
    start = save(tmp_path / "c.npz", OTHERS)
    told = refusal(capsys, start, out, "--from", "torch", "--to", "keras")
    assert told.endswith("there are 'conv1.weight', 'fc/bias', 'step'")
    assert not out.exists()


def test_a_layer_that_cannot_be_converted_is_named_and_nothing_is_written(network, tmp_path, capsys):
    network["layer1.0.bn2.running_var"] = -network["layer1.0.bn2.running_var"]
    start, out = save(tmp_path / "a.npz", network), tmp_path / "b.npz"
    told = refusal(capsys, start, out, "--from", "torch", "--to", "keras")
    assert told.startswith("layer 'layer1.0.bn2': running_var must not be negative, got -")
    assert told.endswith("are mean and var swapped?")
    assert not out.exists()


def test_a_new_name_that_is_taken(network, tmp_path, capsys):
    start = save(tmp_path / "a.npz", network | {"bn1/gamma": np.ones(4)})
    told = refusal(capsys, start, tmp_path / "b.npz", "--from", "torch", "--to", "keras")
    assert told == "'bn1/gamma' must be a new name, but IN has an array of that name"


def test_files_that_are_none(network, tmp_path, capsys):
    arguments = [tmp_path / "out.npz", "--from", "torch", "--to", "keras"]
    network["object"] = np.array([{}], object)
    np.savez(tmp_path / "object.npz", **network)
    assert "Object arrays cannot be loaded" in refusal(capsys, tmp_path / "object.npz", *arguments)
    for name in ("junk.npz", "junk.safetensors"):
        (tmp_path / name).write_bytes(b"junk")
        assert refusal(capsys, tmp_path / name, *arguments).startswith("IN must be a")
    whole = (tmp_path / "object.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    assert refusal(capsys, tmp_path / "cut.npz", *arguments).startswith("IN must be an npz file")
    (tmp_path / "folder.npz").mkdir()
    assert "IN must be a regular file" in refusal(capsys, tmp_path / "folder.npz", *arguments)
    for missing in ([tmp_path / "missing.npz", *arguments], [tmp_path / "missing.safetensors", *arguments]):
        with pytest.raises(SystemExit, match=r"missing\.\w+: No such file or directory"):
            convert(*missing)
    assert not (tmp_path / "out.npz").exists()


def test_files_that_cannot_be_written(network, tmp_path, capsys):
    start = save(tmp_path / "a.npz", network)
    with pytest.raises(SystemExit, match=r"nowhere/b\.npz: No such file or directory"):
        convert(start, tmp_path / "nowhere" / "b.npz", "--from", "torch", "--to", "keras")
    text = save(tmp_path / "text.npz", network | {"text": np.array(["a"])})
    assert convert(text, tmp_path / "b.npz", "--from", "torch", "--to", "keras") == 0
    capsys.readouterr()
    told = refusal(capsys, text, tmp_path / "b.safetensors", "--from", "torch", "--to", "keras")
    assert told == "OUT must be an npz file for 'text' of dtype <U1"
    start = save(tmp_path / "a.safetensors", network | {"file": np.ones(1)})
    told = refusal(capsys, start, tmp_path / "c.npz", "--from", "torch", "--to", "keras")
    assert told == "OUT must be a safetensors file for an array named 'file'"


def test_a_full_disk_is_one_line(network, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(state_file.os, "fsync", full)
    with pytest.raises(SystemExit, match=r"convert: .*b\.npz: No space left on device"):
        convert(save(tmp_path / "a.npz", network), tmp_path / "b.npz", "--from", "torch", "--to", "keras")
    assert os.listdir(tmp_path) == ["a.npz"]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_an_old_file_stays_until_the_new_one_is_whole(network, tmp_path, suffix, monkeypatch):
    start, out = save(tmp_path / "a.npz", network), tmp_path / f"b{suffix}"
    out.write_bytes(b"old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(state_file.os, "replace", interrupted)
    assert convert(start, out, "--from", "torch", "--to", "keras") == 130
    assert out.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == sorted(["a.npz", out.name])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["a.npz", "b.npz", "--from", "torhc", "--to", "keras"], "argument --from: invalid choice: 'torhc'"),
        (["a.npz", "b.npz", "--from", "torch"], "the following arguments are required: --to"),
        (
            ["a.h5", "b.npz", "--from", "torch", "--to", "keras"],
            "argument IN: must end in .npz or .safetensors, got 'a.h5'",
        ),
        (["a.npz", "b", "--from", "torch", "--to", "keras"], "argument OUT: must end in .npz or .safetensors, got 'b'"),
        (["a.npz", "--from", "torch", "--to", "keras"], "argument OUT: must be given unless there is --dry-run"),
        (["a.npz", "b.npz", "--from", "torch", "--to", "keras", "--eps", "-1"], "argument --eps: must be a number, at"),
        (["a.npz", "b.npz", "--from", "torch", "--to", "keras", "--from-eps", "inf"], "at least 0, got 'inf'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments(arguments, told, capsys):
    assert told in refusal(capsys, *arguments)


def test_as_the_shell_sees_it(network, tmp_path):
    start = save(tmp_path / "a.safetensors", network)
    command = [sys.executable, "-W", "error", "-m", "batchnorm", "convert", start, str(tmp_path / "b.npz")]
    done = subprocess.run([*command, "--from", "torch", "--to", "flax"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "flax needs: epsilon=1e-05, momentum=0.9 (weight of the old value)." in done.stdout
    done = subprocess.run([*command, "--from", "keras", "--to", "flax"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("package", ["safetensors", "ml_dtypes"])
def test_a_missing_package_is_one_line_that_says_what_to_install(network, tmp_path, package):
    start = save(tmp_path / "a.safetensors", network)
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise ImportError")
    command = [sys.executable, "-m", "batchnorm", "convert", start, "--dry-run", "--from", "torch", "--to", "flax"]
    environment = os.environ | {"PYTHONPATH": search_path(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    told = f"python -m batchnorm convert: {package} is missing, install it with python -m pip install "
    assert done.stderr.startswith(told)
    assert done.stderr.count("\n") == 1
