"""How many threads, and why.

`num_threads=` of a call, else `set_num_threads`, else BATCHNORM_NUM_THREADS, else OMP_NUM_THREADS, else the smaller of
the processors this process may run on and its cgroup's quota. A limit set through threadpoolctl is obeyed by all but
the first. Results have the same bits for every number of threads, so each of these rules is about speed alone.

Small work runs serially, because waking a team costs more than it saves. A child forked after threads were used runs
serially, because the threads of its parent do not exist in it and OpenMP would wait for them for ever.
"""

import math
import os
import sys
import threading
import weakref

from . import _arrays, _dispatch

SERIAL_VALUES = 65_536
"""Arrays with fewer values are worked on by the calling thread (measured: bench/README.md)."""


_locks: "weakref.WeakSet[threading.RLock]" = weakref.WeakSet()


def new_lock() -> "threading.RLock":
    """A reentrant lock that is open in a forked child if another thread held it, because that thread is not there."""
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
    if not 1 <= count <= 4096:
        raise ValueError(f"num_threads must be between 1 and 4096, got {count}")
    return count


def _environment(name: str) -> int | None:
    """A whole positive number in a variable; OMP_NUM_THREADS may be a list, whose first number counts."""
    text = os.environ.get(name, "").split(",")[0].strip()
    return int(text) if text.isdecimal() and int(text) > 0 else None


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


# Like OpenMP, the environment and the quota are read once; affinity and OpenMP's own limit are asked for on every call.
_asked: int | None = None
_named_at_import = _environment("BATCHNORM_NUM_THREADS")
_omp_named_at_import = _environment("OMP_NUM_THREADS") is not None
_openmp_at_import = _dispatch.kernels.max_threads()
_quota_at_import = _quota() if sys.platform == "linux" else None


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def decide() -> tuple[int, str]:
    """Threads of a call that does not name them, and what decided."""
    openmp = _dispatch.kernels.max_threads()
    if _dispatch.kernels.openmp() == 0:
        return 1, "serial build"
    if _dispatch.kernels.forked():
        return 1, "forked child"
    if _asked is not None:
        count, reason = _asked, "set_num_threads"
    elif _named_at_import is not None:
        count, reason = _named_at_import, "BATCHNORM_NUM_THREADS"
    elif _omp_named_at_import:
        count, reason = openmp, "OMP_NUM_THREADS"
    else:
        count, reason = _processors(), "processors of this process"
        if _quota_at_import is not None and _quota_at_import < count:
            count, reason = _quota_at_import, "cgroup quota"
    if openmp != _openmp_at_import and openmp < count:
        count, reason = openmp, "limit set on the OpenMP runtime"
    return count, reason


def considered() -> dict[str, int | None]:
    """What every rule of `decide` has to say, in their order; None where it says nothing."""
    return {
        "set_num_threads": _asked,
        "BATCHNORM_NUM_THREADS": _named_at_import,
        "OMP_NUM_THREADS": _openmp_at_import if _omp_named_at_import else None,
        "cgroup quota": _quota_at_import,
        "processors of this process": _processors(),
    }


def threads_for(values: int, num_threads: int | None) -> int:
    """Threads of a call on an array with so many values."""
    if num_threads is not None:
        num_threads = _checked(num_threads)
    if values < SERIAL_VALUES or _dispatch.kernels.forked():
        return 1
    return decide()[0] if num_threads is None else num_threads


def set_num_threads(num_threads: int) -> None:
    """Use so many threads in calls that do not name a number.

    Parameters
    ----------
    num_threads : int
        At least 1. Results do not depend on it, only their speed does.

    Raises
    ------
    TypeError, ValueError
        If it is not an integer, or less than 1.

    Examples
    --------
    >>> import batchnorm as bn
    >>> before = bn.get_num_threads()
    >>> bn.set_num_threads(1)
    >>> bn.get_num_threads()
    1
    >>> bn.set_num_threads(before)
    """
    global _asked
    _asked = _checked(num_threads)


def get_num_threads() -> int:
    """Threads of a call that does not name a number and is large enough to use them.

    Examples
    --------
    >>> import batchnorm as bn
    >>> bn.get_num_threads() >= 1
    True
    """
    return decide()[0]
