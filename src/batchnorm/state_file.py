"""A few small arrays in an npz file: a file is only data, and always the old or the new one.

Decisions:

- Nothing in a file is executed or evaluated: there is no pickle, and the header of an array must be exactly what NumPy
  writes for such an array.
- Everything is checked before data is read: that it is a regular file, the sizes of the file, of its directory and of
  its stated contents, the names, the dtypes, and the shapes against the sizes. Products are Python integers, so none
  overflows.
- A new file is written next to the old one and replaces it in one step, after its bytes have reached the disk. If
  writing is interrupted, the old file is unchanged. A killed process leaves a file that ends in `.part`, which only
  those can read who can read the file itself. Only a regular file is replaced: no device, pipe or folder.
- The layer checks what the numbers mean.
"""

import contextlib
import io
import math
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Collection, Mapping
from functools import partial
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

_HEADER = re.compile(rb"\{'descr': '(<f4|<f8|<i8)', 'fortran_order': False, 'shape': \((?:(0|[1-9]\d*),)?\), \} *\n")
_LONGEST_HEADER = 256
_BESIDE_DATA = 4096
"""A generous bound on the bytes of an entry that are not data: headers and names."""
_LONGEST_COMMENT = 65_557
"""Bytes at the end of a zip file to search for the record that locates its directory."""

DAMAGED = (ValueError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, OverflowError)
"""What zipfile raises for damaged bytes, and nothing else: an exception of a signal handler is not the file's fault."""


def write(path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays to an npz file, or leave the file unchanged.

    Raises
    ------
    ValueError
        If the path exists and is not a regular file.
    OSError
        If the file cannot be written.
    """
    replace(path, _archive(arrays))


def replace(path: str | os.PathLike[str], data: bytes) -> None:
    """Write bytes to a file, or leave the file unchanged, with the errors of `write`."""
    path = os.fsdecode(path)
    mode = _mode(path)
    content = memoryview(data)
    target = os.path.realpath(path)
    beside = os.path.join(os.path.dirname(target), f"batchnorm-{os.urandom(8).hex()}.part")
    try:
        # Unbuffered, so that a child forked meanwhile has nothing to flush at its exit.
        with open(beside, "xb", 0, opener=partial(os.open, mode=0o666 if mode is None else 0o600)) as file:
            while content:
                content = content[file.write(content) :]
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        if isinstance(error, OSError) and error.filename == beside:
            raise OSError(error.errno, error.strerror, path) from None
        raise
    _settle(os.path.dirname(target))


def _mode(path: str) -> int | None:
    """Permissions of the file to replace; None if it does not exist."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path!r} must be a regular file")
    return stat.S_IMODE(status.st_mode)


def _archive(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    file = io.BytesIO()
    try:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    except ValueError as error:
        # If interrupted within an entry, zipfile refuses to close the archive and hides the interrupt.
        raise error.__context__ or error from None
    return file.getvalue()


def _settle(folder: str) -> None:
    """Let the new name reach the disk too, on systems that can sync a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _Rationed(io.BufferedReader):
    """A file that returns at most `left` bytes, if that is a number.

    ZipFile reads the whole directory and makes an object per entry before one can ask how many there are.
    """

    left: int | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if offset < 0 and whence == os.SEEK_SET:  # a damaged file, not an OSError
            raise ValueError("an entry begins before the file does")
        return super().seek(offset, whence)

    def read(self, size: int | None = -1, /) -> bytes:
        if self.left is None:
            return super().read(size)
        size = self.left + 1 if size is None or size < 0 else size
        data = super().read(min(size, self.left + 1))
        self.left -= len(data)
        if self.left < 0:
            raise ValueError("its directory is longer than that of a layer")
        return data


def read(path: str | os.PathLike[str], names: Collection[str], max_bytes: int) -> dict[str, NDArray[Any]]:
    """The arrays in a file, which may have these names and at most one dimension.

    Raises
    ------
    ValueError
        If the file is anything else.
    OSError
        If it cannot be read.
    """
    path = os.fsdecode(path)
    with _Rationed(io.FileIO(path, opener=_open_without_waiting)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path!r} must be a regular file")
        try:
            _check_size(status.st_size, max_bytes + _BESIDE_DATA * len(names))
            file.left = _LONGEST_COMMENT + _BESIDE_DATA * len(names)
            with zipfile.ZipFile(file) as archive:
                file.left = None
                entries = {entry: _checked_name(entry, names) for entry in archive.infolist()}
                if len(set(entries.values())) < len(entries):
                    raise ValueError("a name appears twice")
                _check_size(sum(entry.file_size for entry in entries), max_bytes)
                return {name: _read_entry(archive, entry, name) for entry, name in entries.items()}
        except DAMAGED as error:
            raise ValueError(f"{path!r} must be a file that BatchNorm.save wrote: {error}") from None


def _open_without_waiting(path: str, flags: int) -> int:
    """Open without blocking, even on a pipe without a writer, and never acquire a controlling terminal."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ValueError(f"it has {size} bytes, more than max_bytes allows ({max_bytes})")


def _checked_name(entry: zipfile.ZipInfo, names: Collection[str]) -> str:
    # `orig_filename` is what the file says; `filename` ends at a zero byte.
    name = entry.orig_filename.removesuffix(".npy")
    if name not in names or entry.filename != f"{name}.npy":
        raise ValueError(f"it holds {entry.orig_filename!r}, which is none of {', '.join(sorted(names))}")
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
    magic = file.read(8)
    if magic != b"\x93NUMPY\x01\x00":
        raise ValueError(f"{name} begins with {magic!r}, unlike version 1.0 of the npy format")
    length = int.from_bytes(file.read(2), "little")
    if length > _LONGEST_HEADER:
        raise ValueError(f"{name} has a header of {length} bytes, more than {_LONGEST_HEADER}")
    header = file.read(length)
    match = _HEADER.fullmatch(header)
    if match is None:
        raise ValueError(
            f"{name} has the header {header.decode('latin1').rstrip()!r}, unlike the one that NumPy writes "
            "for one number per channel or a single number, of float32, float64 or int64"
        )
    return () if match[2] is None else (int(match[2]),), np.dtype(match[1].decode())
