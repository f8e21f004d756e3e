"""`mpiexec -n 4 python -m batchnorm.mpi`: compare the synchronised layer to a single process.

Every rank makes the same batch, passes its own part through `SyncBatchNorm` and all of it through `BatchNorm`, and
compares. Differences are in ulps of the largest term of a channel. Rank 0 prints them, and every rank exits with 1 if
one is too large, or if ranks or two runs differ in their bits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .. import functional
from .._arrays import Array
from ..gradient import pathways
from ..layer import BatchNorm
from .exchange import world
from .sync import SyncBatchNorm

CHANNELS = 6
LIMIT = 8.0
"""Allowed difference in ulps: parts of a batch round differently from the whole."""

SPLITS: dict[str, Callable[[int], list[int]]] = {
    "even": lambda ranks: [8] * ranks,
    "uneven": lambda ranks: [2 + 7 * rank for rank in range(ranks)],
    "one sample each": lambda ranks: [1] * ranks,
    "empty ranks": lambda ranks: ([0, 9] * ranks)[:ranks] if ranks > 1 else [9],
    "all on the last": lambda ranks: [0] * (ranks - 1) + [20],
}
"""The number of samples on each rank."""


class Case(NamedTuple):
    """One line of the table."""

    split: str
    dtype: str
    axis: int
    offset: float


CASES = [Case(split, dtype, 1, 0.0) for split in SPLITS for dtype in ("float32", "float64")] + [
    Case("uneven", "float32", -1, 1e6),
    Case("uneven", "float64", 1, 1e6),
    Case("empty ranks", "float64", -1, 1e6),
]


def _ulps(got: Any, expected: Any, largest: Any, axis: int | None = None) -> float:
    """The largest difference, in ulps of the largest term of each channel, in the dtype of `got`."""
    if axis is not None:
        largest = np.expand_dims(largest, [i for i in range(got.ndim) if i != axis % got.ndim])
    difference = abs(got.astype(np.longdouble) - expected.astype(np.longdouble))
    return float((difference / np.spacing(np.asarray(largest, got.dtype))).max(initial=0))


def _terms(x: Array, dy: Array, gamma: Array, axis: int) -> dict[str, Array]:
    """The largest terms of each channel; for sums, the sum of absolute terms."""
    _, saved = functional.forward(x, gamma, axis=axis)
    cache, paths = pathways.textbook(saved), pathways.pathways(dy, saved)
    return {
        "y": abs(cache.gamma * cache.xhat).max(axis=cache.axes),
        "dx": np.maximum.reduce([abs(path).max(axis=cache.axes) for path in paths]),
        "dgamma": abs(dy * cache.xhat).sum(axis=cache.axes),
        "dbeta": abs(dy).sum(axis=cache.axes),
        "mean": 0.1 * (abs(saved.mean) + np.sqrt(saved.var)),
        "var": 1 + saved.var,
    }


def check(case: Case, comm: Any) -> tuple[dict[str, float], bytes]:
    """The difference of each result, and the bytes that must be the same on all ranks."""
    rng = np.random.default_rng(7)
    sizes = SPLITS[case.split](comm.Get_size())
    stop = sum(sizes[: comm.Get_rank() + 1])
    mine = slice(stop - sizes[comm.Get_rank()], stop)
    shape = (sum(sizes), CHANNELS, 5) if case.axis == 1 else (sum(sizes), 5, CHANNELS)
    x, dy = ((rng.standard_normal(shape) + offset).astype(case.dtype) for offset in (case.offset, 0))
    gamma = np.linspace(1, 2, CHANNELS).astype(case.dtype)
    settings: dict[str, Any] = {"axis": case.axis, "dtype": case.dtype}
    whole, summed = BatchNorm(CHANNELS, **settings), SyncBatchNorm(CHANNELS, comm, reduce="sum", **settings)
    local = SyncBatchNorm(CHANNELS, comm, **settings)
    for layer in (whole, summed, local):
        layer.gamma = gamma
    y, dx = whole(x), whole.backward(dy)
    parts = {"y": summed(x[mine]), "dx": summed.backward(dy[mine])}
    local(x[mine])
    local.backward(dy[mine])
    exact, terms = {"y": y, "dx": np.asarray(dx)}, _terms(x, dy, gamma, case.axis)
    errors = {name: _ulps(parts[name], exact[name][mine], terms[name], case.axis) for name in exact}
    for name in ("dgamma", "dbeta"):
        added = np.sum(comm.allgather(getattr(local, name)), axis=0, dtype=np.float64).astype(case.dtype)
        expected = getattr(whole, name)
        errors[name] = max(_ulps(got, expected, terms[name]) for got in (getattr(summed, name), added))
    for name in ("mean", "var"):
        errors[name] = _ulps(getattr(summed, f"running_{name}"), getattr(whole, f"running_{name}"), terms[name])
    held = (summed.dgamma, summed.dbeta, summed.running_mean, summed.running_var)
    return errors, b"".join(np.asarray(array).tobytes() for array in held)


def main(comm: Any = None) -> int:
    """Check every case twice, print the table on rank 0, return the exit status."""
    comm = world() if comm is None else comm
    show = print if comm.Get_rank() == 0 else lambda *_: None
    show(
        f"SyncBatchNorm on {comm.Get_size()} ranks against BatchNorm on one: differences in ulps of the largest term\n"
    )
    columns = ("y", "dx", "dgamma", "dbeta", "mean", "var")
    show(f"{'samples':17}{'dtype':9}{'axis':>4}{'offset':>8}{''.join(f'{name:>8}' for name in columns)}  bits")
    wrong = 0
    for case in CASES:
        (errors, held), (_, again) = check(case, comm), check(case, comm)
        everywhere = comm.allgather((errors, held, again))
        worst = {name: max(errors[name] for errors, _, _ in everywhere) for name in errors}
        same = len({bits for _, *both in everywhere for bits in both}) == 1
        failed = not same or max(worst.values()) > LIMIT
        wrong += failed
        figures = "".join(f"{worst[name]:8.2f}" for name in columns)
        verdict = f"{'same' if same else 'DIFFER'}{'  WRONG' if failed else ''}"
        show(f"{case.split:17}{case.dtype:9}{case.axis:4}{case.offset:8.0e}{figures}  {verdict}")
    show(f"\n{wrong or 'no'} line{'s' * (wrong != 1)} over {LIMIT:g} ulps, or with other bits on another rank or run")
    return int(wrong > 0)
