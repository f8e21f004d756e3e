"""How many threads, and why.

`num_threads=` of a call, else `set_num_threads`, else BATCHNORM_NUM_THREADS, else OMP_NUM_THREADS, else the smaller of
the processors this process may run on and its cgroup's quota. A limit set through threadpoolctl is obeyed by all but
the first. Results have the same bits for every number of threads, so each of these rules is about speed alone.

Small work runs serially, because waking a team costs more than it saves. A child forked after threads were used runs
serially, because the threads of its parent do not exist in it and OpenMP would wait for them for ever. Where
OMP_STACKSIZE gives OpenMP's threads less than the kernels need, calls run serially too.
"""

import contextlib
import math
import os
import re
import sys
import threading
import weakref
from collections.abc import Iterator

from . import _arrays
from ._kernels import runtime

SERIAL_VALUES = 65_536
"""Arrays with fewer values are worked on by the calling thread (measured: bench/README.md)."""

STACK = 96 << 10
"""Bytes of stack that are enough for a thread in the kernels at any level."""

_MOST = 4096
"""The most threads of a call: libgomp keeps a record of each on the stack of the caller."""


_locks: "weakref.WeakSet[threading.RLock]" = weakref.WeakSet()


def new_lock() -> "threading.RLock":
    """A reentrant lock. It is open in a forked child, even if another thread held it, which does not exist there."""
    lock = threading.RLock()
    _locks.add(lock)
    return lock


def _open_locks() -> None:
    for lock in _locks:
        if lock.acquire(blocking=False):
            lock.release()
        else:
            lock._at_fork_reinit()  # type: ignore[attr-defined]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_open_locks)


def _checked(num_threads: int) -> int:
    count = _arrays.as_index(num_threads, "num_threads")
    if not 1 <= count <= _MOST:
        raise ValueError(f"num_threads must be between 1 and {_MOST}, got {count}")
    return count


def _environment(name: str) -> int | None:
    """A whole positive number in a variable; OMP_NUM_THREADS may be a list, whose first number counts."""
    with contextlib.suppress(ValueError):  # also of more digits than Python reads
        count = int(os.environ.get(name, "").split(",")[0])
        return min(count, _MOST) if count > 0 else None
    return None


def _small_stacks() -> bool:
    """Whether OMP_STACKSIZE, in kilobytes where it names no unit, is less than the kernels need."""
    found = re.fullmatch(r"\s*(\d{1,18})\s*([bkmg]?)\s*", os.environ.get("OMP_STACKSIZE", "").lower(), re.ASCII)
    return found is not None and int(found[1]) << 10 * "bkmg".index(found[2] or "k") < STACK


def _read(*path: str) -> str | None:
    try:
        with open(os.path.join(*path), encoding="ascii") as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return None


def _quota(root: str = "/sys/fs/cgroup", membership: str = "/proc/self/cgroup") -> int | None:
    """Processors that the cgroup's quota pays for, rounded up: the smallest on the way up the hierarchy."""
    found = []
    for line in (_read(membership) or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = os.path.join(root, "cpu") if controllers else root
        parts = [part for part in group.split("/") if part]
        found += [_folder_quota(os.path.join(base, *parts[:depth])) for depth in range(len(parts) + 1)]
    return min((math.ceil(quota) for quota in found if quota), default=None)


def _folder_quota(folder: str) -> float | None:
    """The quota in `cpu.max` (version 2) or `cpu.cfs_quota_us` and `cpu.cfs_period_us` (version 1), in processors."""
    words = (_read(folder, "cpu.max") or "").split() or [
        (_read(folder, "cpu.cfs_quota_us") or "").strip(),
        (_read(folder, "cpu.cfs_period_us") or "").strip(),
    ]
    if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal() and int(words[1]) > 0:
        return int(words[0]) / int(words[1]) or None
    return None


# Like OpenMP, the environment and the quota are read once; the rest is asked for on every call.
_asked: int | None = None
_named_at_import = _environment("BATCHNORM_NUM_THREADS")
_omp_named_at_import = _environment("OMP_NUM_THREADS") is not None
_openmp_at_import = runtime.max_threads()
_small_stacks_at_import = _small_stacks()
_quota_at_import = _quota() if sys.platform == "linux" else None


def decide() -> tuple[int, str]:
    """Threads of a call that does not name them, and what decided."""
    openmp = runtime.max_threads()
    if runtime.openmp() == 0:
        return 1, "serial build"
    if runtime.forked():
        return 1, "forked child"
    if _small_stacks_at_import:
        return 1, "OMP_STACKSIZE"
    if _asked is not None:
        count, reason = _asked, "set_num_threads"
    elif _named_at_import is not None:
        count, reason = _named_at_import, "BATCHNORM_NUM_THREADS"
    elif _omp_named_at_import:
        count, reason = min(openmp, _MOST), "OMP_NUM_THREADS"
    else:
        count, reason = min(runtime.processors(), _MOST), "processors of this process"
        if _quota_at_import is not None and _quota_at_import < count:
            count, reason = _quota_at_import, "cgroup quota"
    if openmp != _openmp_at_import and openmp < count:
        count, reason = openmp, "limit set on the OpenMP runtime"
    return count, reason


def considered() -> dict[str, int | None]:
    """What every rule of `decide` says, in their order; None where it says nothing."""
    return {
        "set_num_threads": _asked,
        "BATCHNORM_NUM_THREADS": _named_at_import,
        "OMP_NUM_THREADS": min(_openmp_at_import, _MOST) if _omp_named_at_import else None,
        "cgroup quota": _quota_at_import,
        "processors of this process": runtime.processors(),
    }


def threads_for(values: int, num_threads: int | None) -> int:
    """Threads of a call on an array with this many values."""
    if num_threads is not None:
        num_threads = _checked(num_threads)
    if values < SERIAL_VALUES or _small_stacks_at_import or runtime.forked():
        return 1
    return decide()[0] if num_threads is None else num_threads


def set_num_threads(num_threads: int | None) -> None:
    """Set the default number of threads, of calls without `num_threads=`, in the whole process.

    Parameters
    ----------
    num_threads : int or None
        1 to 4096. Results do not depend on it, only their speed does. None returns to the number that the environment
        or the processors decide.

    Raises
    ------
    TypeError, ValueError
        If it is not an integer, or outside that range.

    See Also
    --------
    num_threads : the same for a block of code.

    Examples
    --------
    >>> import batchnorm as bn
    >>> bn.set_num_threads(1)
    >>> bn.get_num_threads()
    1
    >>> bn.set_num_threads(None)
    """
    global _asked
    _asked = None if num_threads is None else _checked(num_threads)


@contextlib.contextmanager
def num_threads(count: int | None) -> Iterator[None]:
    """Set the default number of threads for a `with` block, or for a decorated function.

    It is `set_num_threads` with a way back: the number holds for all threads of the process, not for the one that
    enters the block. For one thread alone, use `num_threads=` of a call, or `threadpoolctl.threadpool_limits`.

    Parameters
    ----------
    count : int or None
        As in `set_num_threads`.

    Raises
    ------
    TypeError, ValueError
        As `set_num_threads`.

    Examples
    --------
    >>> import batchnorm as bn
    >>> with bn.num_threads(1):
    ...     bn.get_num_threads()
    1
    """
    before = _asked
    set_num_threads(count)
    try:
        yield
    finally:
        set_num_threads(before)


def get_num_threads() -> int:
    """Threads of a call that does not name a number and is large enough to use them.

    Examples
    --------
    >>> import batchnorm as bn
    >>> bn.get_num_threads() >= 1
    True
    """
    return decide()[0]
