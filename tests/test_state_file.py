"""State files: what was saved comes back; anything else is an error, and nothing of it is loaded or executed."""

import contextlib
import io
import itertools
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import python

import batchnorm as bn

pytestmark = pytest.mark.once  # files are the same on every level

SETTINGS = [
    {},
    {"axis": -1, "eps": 1e-3, "momentum": None, "dtype": np.float64},
    {"momentum": 0.25, "affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False, "dtype": np.float64},
]


def trained(rng, **settings):
    layer = bn.BatchNorm(3, **settings)
    layer(rng.standard_normal((8, 3)) * 3 + 2)
    if layer.affine:
        layer.gamma[:], layer.beta[:] = rng.standard_normal((2, 3))
    return layer


def snapshot(layer):
    return repr(layer), {name: (value.dtype, value.tobytes()) for name, value in layer.state_dict().items()}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_was_saved_comes_back(settings, rng, tmp_path):
    layer = trained(rng, **settings)
    layer.save(tmp_path / "layer")
    assert snapshot(bn.BatchNorm.load(tmp_path / "layer")) == snapshot(layer)
    assert bn.BatchNorm.load(str(tmp_path / "layer")).training
    with np.load(tmp_path / "layer", allow_pickle=False) as arrays:
        assert set(layer.state_dict()) <= set(arrays.files)


def test_the_same_layer_is_the_same_file(rng, tmp_path):
    layer = trained(rng)
    for name in "ab":
        layer.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_no_channels(tmp_path):
    bn.BatchNorm(0).save(tmp_path / "none")
    assert bn.BatchNorm.load(tmp_path / "none").num_features == 0


def test_a_compressed_file_is_read(rng, tmp_path):
    layer = trained(rng)
    layer.save(tmp_path / "layer")
    with np.load(tmp_path / "layer") as arrays:
        np.savez_compressed(tmp_path / "small.npz", **arrays)
    assert snapshot(bn.BatchNorm.load(tmp_path / "small.npz")) == snapshot(layer)


def test_safetensors(rng, tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    layer, other = trained(rng), bn.BatchNorm(3)
    numpy.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other.load_state_dict(numpy.load_file(tmp_path / "layer.safetensors"))
    assert snapshot(other) == snapshot(layer)


# Files that are not what `save` writes.


class Executed:
    """An object that is noticed when it is unpickled."""

    def __reduce__(self):
        return os.abort, ()


def npy(array, **how):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), **how)
    return file.getvalue()


def header(text, version=b"\x01\x00", data=b""):
    text = text.encode("latin1")
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + data


def described(descr="'<f4'", shape="(3,)", more="", data=bytes(12)):
    return header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, {more}}}\n", data=data)


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """The parts of a good file."""
    layer = bn.BatchNorm(3)
    layer.gamma[:] = [1, 2, 3]
    path = tmp_path_factory.mktemp("good") / "layer"
    layer.save(path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


CHANGED = {
    "pickled array": (
        {"weight.npy": npy(np.array([Executed()] * 3, object), allow_pickle=True)},
        r"'descr': '\|O'.* unlike the one that NumPy writes for one number per channel",
    ),
    "pickle": ({"weight.npy": pickle.dumps(Executed())}, "unlike version 1.0 of the npy format"),
    "another name": ({"gamma.npy": npy(np.ones(3, np.float32))}, "it holds 'gamma.npy', which is none of"),
    "a name without .npy": ({"weight": npy(np.ones(3, np.float32))}, "it holds 'weight', which is none of"),
    "a name that ends before its end": (
        {"weight.npy": None, "weight.npy/.exe": npy(np.ones(3, np.float32))},
        r"it holds 'weight.npy\\x00.exe', which is none of",
    ),
    "a path": ({"../weight.npy": npy(np.ones(3, np.float32))}, "which is none of"),
    "weight missing": ({"weight.npy": None}, r"missing \['weight'\]"),
    "eps missing": ({"eps.npy": None}, "eps is missing"),
    "too few channels": ({"weight.npy": npy(np.ones(2, np.float32))}, "num_features is 3, but arrays have shapes"),
    "two dimensions": ({"weight.npy": npy(np.ones((3, 1), np.float32))}, r"'shape': \(3, 1\), \}., unlike"),
    "float64 instead of float32": ({"weight.npy": npy(np.ones(3))}, "weight must have dtype float32, got float64"),
    "float16": ({"weight.npy": npy(np.ones(3, np.float16))}, "'<f2'.*, unlike .* float32, float64 or int64"),
    "big-endian": ({"weight.npy": npy(np.ones(3, ">f4"))}, "'>f4'.*, unlike"),
    "complex": ({"weight.npy": npy(np.ones(3, np.complex64))}, "'<c8'.*, unlike"),
    "structured": ({"weight.npy": npy(np.ones(3, [("a", "<f4")]))}, "unlike"),
    "text": ({"weight.npy": npy(np.array(["a"] * 3))}, "'<U1'.*, unlike"),
    "NaN": ({"running_mean.npy": npy(np.array([0, np.nan, 0], np.float32))}, "running_mean must be finite, got nan"),
    "infinite": ({"bias.npy": npy(np.array([0, np.inf, 0], np.float32))}, "bias must be finite, got inf"),
    "negative variance": (
        {"running_var.npy": npy(np.array([1, -1, 1], np.float32))},
        "running_var must not be negative, got -1.0",
    ),
    "counter full": (
        {"num_batches_tracked.npy": npy(2**63 - 1)},
        "one number, 0 to .*, got 9223372036854775807",
    ),
    "negative counter": (
        {"num_batches_tracked.npy": npy(-1)},
        "num_batches_tracked must be one number, 0 to .*, got -1",
    ),
    "counter a float": ({"num_batches_tracked.npy": npy(1.0)}, "num_batches_tracked must be an integer"),
    "eps negative": ({"eps.npy": npy(-1.0)}, "eps must be finite and at least 0, got -1.0"),
    "eps NaN": ({"eps.npy": npy(np.nan)}, "eps must be finite and at least 0, got nan"),
    "eps of three": ({"eps.npy": npy(np.ones(3))}, "eps must be one float64"),
    "eps an integer": ({"eps.npy": npy(1)}, "eps must be one float64"),
    "momentum 2": ({"momentum.npy": npy(2.0)}, "momentum, the weight of the new batch, must be between 0 and 1"),
    "features negative": ({"num_features.npy": npy(-3)}, "num_features is -3"),
    "features huge": ({"num_features.npy": npy(2**62)}, "num_features is 4611686018427387904"),
    "bits": ({"float_bits.npy": npy(16)}, "float_bits must be 32 or 64, got 16"),
    "header cut": ({"weight.npy": npy(np.ones(3, np.float32))[:40]}, "must be a file that BatchNorm.save wrote"),
    "data cut": ({"weight.npy": npy(np.ones(3, np.float32))[:-1]}, "12 bytes, but 11 follow"),
    "data too long": ({"weight.npy": npy(np.ones(3, np.float32)) + b"x"}, "12 bytes, but 13 follow"),
    "shape larger than data": (
        {"weight.npy": described(shape="(1000000000000,)")},
        "4000000000000 bytes, but 12 follow",
    ),
    "shape whose bytes overflow": ({"weight.npy": described(shape=f"({2**62 + 3},)")}, "bytes, but 12 follow"),
    "shape negative": ({"weight.npy": described(shape="(-3,)")}, "unlike"),
    "shape of text": ({"weight.npy": described(shape="('3',)")}, "unlike"),
    "shape true": ({"weight.npy": described(shape="(True,)", data=bytes(4))}, "unlike"),
    "header that is code": ({"weight.npy": described(descr="__import__('os').abort()")}, "must be a file"),
    "header that does not close": ({"weight.npy": header("{'descr': '<f4', (\n")}, "must be a file"),
    "header nested": ({"weight.npy": described(descr="(" * 9000)}, "must be a file"),
    "header of 10 kB": ({"weight.npy": described(shape="(3,)" + " " * 10_000)}, "a header of .* bytes, more than 256"),
    "header of Python 2": ({"weight.npy": described(shape="(3L,)")}, "unlike"),
    "header with more": ({"weight.npy": described(more="'x': 1, ")}, "must be a file"),
    "version 9": ({"weight.npy": b"\x93NUMPY\x09\x00" + bytes(100)}, "unlike version 1.0"),
    "version 2": ({"weight.npy": npy(np.ones(3, np.float32), version=(2, 0))}, "unlike version 1.0"),
}


def rewritten(members, changes, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in {**members, **changes}.items():
            if data is not None:
                archive.writestr(name, data)
    return file.getvalue().replace(b".npy/.exe", b".npy\0.exe")  # zipfile writes no such name


def refused(content, path, message, **how):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        bn.BatchNorm.load(path, **how)
    assert str(caught.value).startswith(f"{str(path)!r} must be ")


def test_the_parts_make_a_good_file(members, tmp_path):
    (tmp_path / "good").write_bytes(rewritten(members, {}))
    assert bn.BatchNorm.load(tmp_path / "good").gamma.tolist() == [1, 2, 3]


@pytest.mark.parametrize("changes", CHANGED)
def test_bad_files_are_refused(changes, members, tmp_path):
    new, message = CHANGED[changes]
    refused(rewritten(members, new), tmp_path / "bad", message)


def test_names_twice(members, tmp_path):
    with zipfile.ZipFile(tmp_path / "twice", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("weight.npy", members["weight.npy"])
    with pytest.raises(ValueError, match="a name appears twice"):
        bn.BatchNorm.load(tmp_path / "twice")


def test_size_is_limited_before_anything_is_read(members, tmp_path):
    bomb = rewritten(members, {"weight.npy": bytes(1 << 24)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 1 << 16
    refused(bomb, tmp_path / "bomb", "more than max_bytes allows", max_bytes=1 << 20)
    refused(bytes(1 << 20), tmp_path / "large", "it has 1048576 bytes, more than max_bytes allows", max_bytes=1000)


def directory(entries, zip64):
    """A zip file of this many empty entries, all in one place."""
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"x"
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"x"
    size, start = entries * len(entry), len(local)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, size, start, 0)
    if zip64:
        end = (
            struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, size, start)
            + struct.pack("<4sLQL", b"PK\6\7", 0, start + size, 1)
            + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        )
    return local + entry * entries + end


@pytest.mark.parametrize("zip64", [False, True])
def test_a_directory_is_limited_before_it_is_read(zip64, tmp_path):
    refused(directory(3, zip64), tmp_path / "short", "it holds 'x', which is none of")
    content = directory(50_000, zip64)
    tracemalloc.start()
    try:
        refused(content, tmp_path / "long", "its directory is longer than that of a layer")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA], ids=["bzip2", "lzma"])
def test_other_compressions_are_refused(compression, members, tmp_path):
    refused(rewritten(members, {}, compression), tmp_path / "bad", "is compressed by method")


def test_truncated_at_any_byte(members, tmp_path):
    content = rewritten(members, {})
    for length in range(len(content)):
        refused(content[:length], tmp_path / "cut", "must be a file that BatchNorm.save wrote")


@given(st.data())
def test_any_damage_is_an_error_or_changes_values_alone(members, tmp_path_factory, data):
    content = bytearray(rewritten(members, {}, data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        assert bn.BatchNorm.load(path).num_features == 3


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        bn.BatchNorm.load(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        bn.BatchNorm.load(tmp_path)
    with pytest.raises(ValueError, match="'/dev/null' must be a regular file"):
        bn.BatchNorm.load("/dev/null")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    run = python(f"import batchnorm as bn; bn.BatchNorm.load({str(tmp_path / 'pipe')!r})", timeout=20)
    assert run.stderr.endswith("pipe' must be a regular file\n")


def test_an_exception_of_a_signal_handler_is_not_the_file_s_fault(tmp_path, monkeypatch):
    class PreemptedError(Exception):
        pass

    def preempt(*_):
        raise PreemptedError

    bn.BatchNorm(3).save(tmp_path / "layer")
    monkeypatch.setattr(zipfile.ZipExtFile, "read", preempt)
    with pytest.raises(PreemptedError):
        bn.BatchNorm.load(tmp_path / "layer")


# Writing.

INTERRUPTED = """
import os, resource, sys
import batchnorm as bn
path = sys.argv[1]
old, new = bn.BatchNorm(3), bn.BatchNorm(3, eps=0.5)
old.save(path)
content = open(path, "rb").read()
for limit in range(0, len(content), 7):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        new.save(path)
    except OSError:
        pass
    else:
        sys.exit(f"nothing failed at {limit} bytes")
    if open(path, "rb").read() != content or os.listdir(os.path.dirname(path)) != [os.path.basename(path)]:
        sys.exit(f"damage at {limit} bytes")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
new.save(path)
assert bn.BatchNorm.load(path).eps == 0.5
"""


def test_a_full_disk_at_any_byte_leaves_the_old_file(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path / "layer")], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr


KILLED = """
import sys
import batchnorm as bn
layers = [bn.BatchNorm(5000), bn.BatchNorm(5000, eps=0.5)]
layers[0].save(sys.argv[1])
print("ready", flush=True)
while True:
    for layer in layers:
        layer.save(sys.argv[1])
"""


def test_a_killed_process_leaves_a_whole_file(tmp_path, rng):
    path = tmp_path / "layer"
    bn.BatchNorm(3).save(path)
    path.chmod(0o600)
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert bn.BatchNorm.load(path).eps in (1e-5, 0.5)
    rest = {file for file in tmp_path.iterdir() if file != path}
    assert {file.suffix for file in rest} <= {".part"}
    assert {file.stat().st_mode & 0o777 for file in rest} <= {0o600}


class RaiseAtLine:
    """A trace function that raises at that line, counted in everything that is called from here."""

    def __init__(self, count):
        self.count, self.raised = count, False

    def __call__(self, _frame, event, _argument):
        if event == "line":
            self.count -= 1
            if self.count < 0:
                self.raised = True
                raise KeyboardInterrupt
        return self


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of zipfile, which says it twice
def test_interrupted_at_any_line_it_is_the_old_or_the_new_file(tmp_path):
    path = tmp_path / "layer"
    old = bn.BatchNorm(3)
    old.save(path)
    tracing = sys.gettrace()
    found = set()
    for count in itertools.count(step=11):
        new, trace = bn.BatchNorm(3, eps=0.5), RaiseAtLine(count)
        # What is raised in the __del__ of an earlier zipfile is lost, and this save goes on to its end.
        with contextlib.suppress(KeyboardInterrupt):
            try:
                sys.settrace(trace)
                new.save(path)
            finally:
                sys.settrace(tracing)
        if not trace.raised:
            break
        assert os.listdir(tmp_path) == ["layer"], count
        eps = bn.BatchNorm.load(path).eps
        found.add(eps)
        if eps != old.eps:
            old.save(path)
    assert count > 1000
    assert found == {1e-5, 0.5}


def test_permissions_and_links_are_kept(tmp_path):
    layer, path, link = bn.BatchNorm(3), tmp_path / "layer", tmp_path / "link"
    layer.save(path)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()
    path.chmod(0o640)
    link.symlink_to(path)
    bn.BatchNorm(4).save(link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert bn.BatchNorm.load(path).num_features == 4


def test_nobody_reads_more_of_a_half_written_file_than_of_the_whole_one(tmp_path, monkeypatch):
    path, modes = tmp_path / "layer", []
    bn.BatchNorm(3).save(path)
    path.chmod(0o604)

    def watched(descriptor, mode, fchmod=os.fchmod):
        modes.append((os.fstat(descriptor).st_mode & 0o777, mode))
        fchmod(descriptor, mode)

    monkeypatch.setattr(os, "fchmod", watched)
    bn.BatchNorm(3).save(path)
    assert modes == [(0o600, 0o604)]


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def whats_there(folder):
    """What each name stands for; not when it was last read, which a look at a link changes."""
    found = {name: os.lstat(folder / name) for name in os.listdir(folder)}
    return {name: (info.st_mode, info.st_ino, info.st_size, info.st_mtime_ns) for name, info in found.items()}


def test_only_a_regular_file_is_replaced(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path)  # a socket's name has at most 107 bytes
        listener.bind("socket")
    ends = os.pipe()
    before = whats_there(tmp_path)
    for path in [*(str(tmp_path / name) for name in before), f"/dev/fd/{ends[1]}"]:
        with pytest.raises(ValueError, match=f"^'{path}' must be a regular file$"):
            bn.BatchNorm(3).save(path)
    assert whats_there(tmp_path) == before
    for end in ends:
        os.close(end)


@pytest.mark.parametrize(
    "name", ["x" * 255, "μ" * 127, b"layer", b"\xff"], ids=["long", "long in UTF-8", "bytes", "not UTF-8"]
)
def test_any_name_of_a_file_will_do(name, tmp_path):
    path = os.path.join(os.fsencode(tmp_path) if isinstance(name, bytes) else str(tmp_path), name)
    bn.BatchNorm(3).save(path)
    bn.BatchNorm(4).save(path)
    assert os.listdir(tmp_path) == [os.fsdecode(name)]
    assert bn.BatchNorm.load(path).num_features == 4
    with pytest.raises(ValueError, match="more than max_bytes allows") as caught:
        bn.BatchNorm.load(path, max_bytes=10)
    assert str(caught.value).startswith(repr(os.fsdecode(path)))


def test_an_error_names_the_path_that_was_given(tmp_path):
    path = tmp_path / "missing" / "layer"
    with pytest.raises(FileNotFoundError) as caught:
        bn.BatchNorm(3).save(path)
    assert str(caught.value) == f"[Errno 2] No such file or directory: {str(path)!r}"


def test_a_full_counter_is_refused():
    layer = bn.BatchNorm(3)
    for counter in (2**63 - 1, np.uint64(2**63)):
        with pytest.raises(ValueError, match=r"num_batches_tracked must be one number, 0 to 2\*\*62"):
            layer.load_state_dict({**layer.state_dict(), "num_batches_tracked": counter})
    layer.load_state_dict({**layer.state_dict(), "num_batches_tracked": 2**62})
    layer(np.ones((4, 3), np.float32))
    assert layer.state_dict()["num_batches_tracked"] == 2**62 + 1
