"""A few small arrays in an npz file: files are data, and a file is either the old or the new one.

Decisions:

- Nothing in a file is executed: no pickle, and numpy's header parser gets no more than the short header of such an
  array.
- Everything is checked before data is read: the size of the file and of all that it says it holds, the names, the
  dtypes, the shapes against the sizes. Products are Python integers, so none overflows.
- A file is written beside its place and put there in one step, after its bytes have reached the disk. Interrupted
  anywhere, the old file is as it was; of a process that was killed, a file that ends in `.part` remains.
- What the numbers mean is the layer's to check.
"""

import contextlib
import math
import os
import shutil
import stat
import zipfile
from collections.abc import Collection, Mapping
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

_DTYPES = ("<f4", "<f8", "<i8")
_LONGEST_HEADER = 256
_BESIDE_DATA = 4096
"""Bytes of an entry that are not data: headers and names, more than enough."""


def write(path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Put arrays into a file, or leave the file as it was."""
    target = os.path.realpath(path)
    partial = f"{target}.{os.urandom(8).hex()}.part"
    try:
        with open(partial, "xb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(target):
            shutil.copymode(target, partial)
        os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
    _settle(os.path.dirname(target))


def _settle(folder: str) -> None:
    """Let the new name reach the disk too, where a folder can be asked for that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path: str | os.PathLike[str], names: Collection[str], max_bytes: int) -> dict[str, NDArray[Any]]:
    """The arrays in a file, which may have these names and at most one dimension.

    Raises
    ------
    ValueError
        If the file is anything else.
    OSError
        If it cannot be read.
    """
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{os.fspath(path)!r} must be a regular file")
        try:
            _check_size(status.st_size, max_bytes + _BESIDE_DATA * len(names))
            with zipfile.ZipFile(file) as archive:
                entries = {entry: _checked_name(entry, names) for entry in archive.infolist()}
                if len(set(entries.values())) < len(entries):
                    raise ValueError("a name is there twice")
                _check_size(sum(entry.file_size for entry in entries), max_bytes)
                return {name: _read_entry(archive, entry, name) for entry, name in entries.items()}
        except MemoryError:
            raise
        except Exception as error:  # of damaged bytes, zip and header parsers raise a dozen kinds
            raise ValueError(f"{os.fspath(path)!r} must be a file that BatchNorm.save wrote: {error}") from None


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ValueError(f"it has {size} bytes, more than max_bytes allows ({max_bytes})")


def _checked_name(entry: zipfile.ZipInfo, names: Collection[str]) -> str:
    name = entry.filename.removesuffix(".npy")
    if name not in names or name == entry.filename:
        raise ValueError(f"it holds {entry.filename!r}, which is none of {', '.join(sorted(names))}")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed by method {entry.compress_type}, not as NumPy does")
    return name


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> NDArray[Any]:
    with archive.open(entry) as file:
        shape, dtype = _read_header(file, name)
        expected = math.prod(shape) * dtype.itemsize
        rest = entry.file_size - file.tell()
        if rest != expected:
            raise ValueError(f"{name} has shape {shape} and dtype {dtype}, {expected} bytes, but {rest} follow")
        data = file.read(expected)
        if len(data) != expected or file.read(1):
            raise ValueError(f"{name} ends early")
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _read_header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = npy.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"{name} has version {version} of the npy format, other than (1, 0)")
    shape, _, dtype = npy.read_array_header_1_0(file, max_header_size=_LONGEST_HEADER)
    if dtype.str not in _DTYPES:
        raise ValueError(f"{name} has dtype {dtype}, which is none of float32, float64, int64")
    if len(shape) > 1 or any(type(length) is not int or length < 0 for length in shape):
        raise ValueError(f"{name} has shape {shape}, other than one number a channel or one in all")
    return shape, dtype
