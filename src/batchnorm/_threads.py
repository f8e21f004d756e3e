"""How many threads a call uses, and why.

The number is `num_threads=` of the call, else `set_num_threads`, else BATCHNORM_NUM_THREADS, else OMP_NUM_THREADS, else
the smaller of the processors this process may run on and its cgroup's quota. All but the first obey a limit set through
threadpoolctl. Results have the same bits for any number of threads, so these rules only affect speed.

Small work runs serially, because waking a team costs more than it saves. If calls follow each other closely, the team
is still awake, and smaller work is worth it. A child forked after threads were used runs
serially, because its parent's threads do not exist in it and OpenMP would wait for them forever. Calls also run
serially if OMP_STACKSIZE gives OpenMP's threads a smaller stack than the kernels need.
"""

import contextlib
import math
import os
import re
import sys
import threading
import time
import weakref
from collections.abc import Iterator

from . import _arrays
from ._kernels import runtime

SERIAL_VALUES = 16_384
"""The calling thread alone processes arrays with fewer values. More than two threads need twice as many, and arrays
that are visited only once three and a half times as many (measured: bench/README.md)."""

ASLEEP = 16
"""How many times as many it takes if the other threads may be asleep: waking them takes as long as much work."""

AWAKE = 200_000
"""Nanoseconds after a call in which idle threads spin (`_kernels.SPINS`)."""

STACK = 96 << 10
"""Bytes of stack that suffice for a thread in the kernels at any level."""

_MOST = 4096
"""The most threads of a call: libgomp keeps a record of each on the stack of the caller."""


_locks: "weakref.WeakSet[threading.RLock]" = weakref.WeakSet()


def new_lock() -> "threading.RLock":
    """A reentrant lock, which is open in a forked child even if a thread of the parent held it."""
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
    """A positive integer in a variable; OMP_NUM_THREADS may be a list, whose first number counts."""
    with contextlib.suppress(ValueError):  # also for more digits than Python converts
        count = int(os.environ.get(name, "").split(",")[0])
        return min(count, _MOST) if count > 0 else None
    return None


def _small_stacks() -> bool:
    """Whether OMP_STACKSIZE, in kilobytes if it names no unit, is less than the kernels need."""
    found = re.fullmatch(r"\s*(\d{1,18})\s*([bkmg]?)\s*", os.environ.get("OMP_STACKSIZE", "").lower(), re.ASCII)
    return found is not None and int(found[1]) << 10 * "bkmg".index(found[2] or "k") < STACK


def _read(*path: str) -> str | None:
    try:
        with open(os.path.join(*path), encoding="ascii") as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return None


def _quota(root: str = "/sys/fs/cgroup", membership: str = "/proc/self/cgroup") -> int | None:
    """Processors that the cgroup's quota allows, rounded up: the smallest quota on the way up the hierarchy."""
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


# The environment and the quota are read once, as in OpenMP; everything else is read on every call.
_asked: int | None = None
_named_at_import = _environment("BATCHNORM_NUM_THREADS")
_omp_named_at_import = _environment("OMP_NUM_THREADS") is not None
_openmp_at_import = runtime.max_threads()
_small_stacks_at_import = _small_stacks()
_quota_at_import = _quota() if sys.platform == "linux" else None


def decide() -> tuple[int, str]:
    """The threads of a call that does not name a number, and the rule that decided."""
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
    """The number that each rule of `decide` gives, in their order; None if it gives none."""
    return {
        "set_num_threads": _asked,
        "BATCHNORM_NUM_THREADS": _named_at_import,
        "OMP_NUM_THREADS": min(_openmp_at_import, _MOST) if _omp_named_at_import else None,
        "cgroup quota": _quota_at_import,
        "processors of this process": runtime.processors(),
    }


_last_end = 0


def _awake(values: int) -> bool:
    """Whether the call before this one ended a moment ago; each call of enough values has to ask.

    A call is taken to last a nanosecond per value. If it were taken to end when it starts, one that is serial because
    the other threads sleep would keep them asleep, however closely such calls follow each other.
    """
    global _last_end
    now = time.perf_counter_ns()
    before, _last_end = _last_end, now + values
    return now - before < AWAKE


def threads_for(values: int, num_threads: int | None, once: bool = False) -> int:
    """The threads of a call on an array with this many values; `once` if it visits them once, like inference."""
    if num_threads is not None:
        num_threads = _checked(num_threads)
    if once:
        values //= 2
    if values < SERIAL_VALUES * (1.75 if once else 1) or _small_stacks_at_import or runtime.forked():
        return 1
    count = decide()[0] if num_threads is None else num_threads
    if values < 2 * SERIAL_VALUES and count > 2:
        return 1
    return count if _awake(values) or values >= ASLEEP * SERIAL_VALUES else 1


def set_num_threads(num_threads: int | None) -> None:
    """Set the default number of threads in the whole process, for calls without `num_threads=`.

    Parameters
    ----------
    num_threads : int or None
        1 to 4096. It affects speed, not results. None restores the number given by the environment or the processors.

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

    It is `set_num_threads` and restores the old number at the end. The number applies to all threads of the process,
    not only to the one that enters the block. For one thread alone, use `num_threads=` of a call, or
    `threadpoolctl.threadpool_limits`.

    Parameters
    ----------
    count : int or None
        As in `set_num_threads`.

    Raises
    ------
    TypeError, ValueError
        As for `set_num_threads`.

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
    """The number of threads of a call that does not name a number and is large enough to use them.

    Examples
    --------
    >>> import batchnorm as bn
    >>> bn.get_num_threads() >= 1
    True
    """
    return decide()[0]
