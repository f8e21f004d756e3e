"""What is measured, and how.

- The yardstick is the copy limit: a pass cannot be faster than reading its inputs and writing its output, which
  `np.copyto` and `np.add` do in pieces on as many threads, or on one thread if that is faster. Time divided by the
  limit can be compared between machines and hours; times cannot.
- Contestants take turns, because other programs share the cache and memory and a busy second must affect all of them.
  A turn is many calls, so that a small array is in the cache. It starts after a rest, because threads of an OpenMP
  runtime may spin for milliseconds after their last call and would occupy the processors of the next contestant.
- The best time counts: any disturbance makes a call longer.
- 16-bit floats: parameters are float32. NumPy's own 16-bit arithmetic is slow and loses digits in sums, so NumPy
  computes in float32 and rounds, as its users do.
- batchnorm writes to an `out=` allocated in advance; NumPy and torch allocate their results, as their users do.
- If a team of threads is slower than one thread, it stalled: it was waiting for a processor that did other work. Such
  a row is measured again, and marked if that does not help.
- Exact results are the textbook's in the next wider dtype, for the first channels only, because channels do not depend
  on each other.
"""

import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import fixed, functional, reference
from .._config import show_config
from .._extras import require
from ..reference import Array
from .networks import Shape

Calls = dict[str, Callable[[], Any]]

PASSES: dict[str, tuple[str, ...]] = {"forward": ("x",), "backward": ("x", "dy"), "inference": ("x",)}
"""The arrays that each pass must read; it writes one more."""

EPS = 1e-5
TURN, REST, ROUNDS = 0.02, 0.01, 3
TRIES, STALLED = 3, 1.5
EXACT_VALUES = 1 << 20
ARRAYS = 10
"""Arrays of the size of x that exist at once: x, dy, out, and the textbook's cache and intermediate results."""


class Problem(NamedTuple):
    """The arrays of one layer, and an array for a result."""

    x: Array
    dy: Array
    gamma: Array
    beta: Array
    mean: Array
    var: Array
    out: Array
    axis: int

    def first_channels(self, array: Array) -> Array:
        """The first channels, few enough for an exact computation."""
        channels = max(1, EXACT_VALUES * self.gamma.size // self.x.size)
        return array[(slice(None),) * (self.axis if array.ndim > 1 else 0) + (slice(channels),)]

    def widened(self) -> "Problem":
        """The first channels in a wider dtype."""
        dtype: Any = np.float64 if self.x.itemsize < 8 else np.longdouble
        x, dy, gamma, beta, mean, var = (self.first_channels(array).astype(dtype) for array in self[:6])
        return Problem(x, dy, gamma, beta, mean, var, self.out, self.axis)

    def error(self, result: Any, exact: Array) -> float:
        """The largest difference divided by the largest exact value."""
        array = result if isinstance(result, np.ndarray) else np.moveaxis(result.double().numpy(), 1, self.axis)
        return float(abs(self.first_channels(array) - exact).max() / (abs(exact).max() or 1))

    def activated(self) -> Array:
        """ReLU of y, with the signs as in the data's own type."""
        full = (array.astype(self.gamma.dtype, copy=False) for array in self[:4])
        x, _, gamma, beta = full
        y: Array = np.maximum(reference.forward(x, gamma, beta, self.axis, EPS)[0], 0).astype(self.x.dtype)
        return y

    def moved(self, which: str) -> int:
        """The bytes that a pass must read and write."""
        return (len(PASSES[which]) + 1) * self.x.nbytes


def activations(shape: Shape, axis: int, dtype: str) -> Problem:
    """Random numbers like the activations of a network: each channel has its own offset and spread."""
    rng = np.random.default_rng(0)
    channels, column = shape[axis], (shape[axis],) + (1,) * (len(shape) - axis - 1)
    stored = data_type(dtype)
    full: Any = stored if stored.itemsize > 2 else np.dtype(np.float32)
    x, dy = (rng.standard_normal(shape, full) for _ in range(2))
    x *= rng.uniform(0.5, 2, column).astype(full)
    x += rng.uniform(-1, 3, column).astype(full)
    gamma, beta = rng.uniform(0.5, 1.5, channels).astype(full), rng.uniform(-0.5, 0.5, channels).astype(full)
    x, dy = (array.astype(stored, copy=False) for array in (x, dy))
    _, saved = functional.forward(x, axis=axis)
    return Problem(x, dy, gamma, beta, saved.mean.astype(full), saved.var.astype(full), np.empty_like(x), axis)


def data_type(name: str) -> np.dtype[Any]:
    """The type with this name: one of NumPy's own, or bfloat16."""
    return np.dtype(require("ml_dtypes", "profile").bfloat16 if name == "bfloat16" else name)


def numpy_calls(problem: Problem, _threads: int = 1) -> Calls:
    x, dy, gamma, beta, mean, var, _, axis = problem

    def full(array: Array) -> Array:
        return array.astype(gamma.dtype, copy=False)

    def stored(array: Array) -> Array:
        return array.astype(x.dtype, copy=False)

    _, cache = reference.forward(full(x), gamma, beta, axis, EPS)
    return {
        "forward": lambda: stored(reference.forward(full(x), gamma, beta, axis, EPS)[0]),
        "backward": lambda: stored(reference.backward(full(dy), cache)[0]),
        "inference": lambda: stored(reference.inference(full(x), mean, var, gamma, beta, axis, EPS)),
    }


def as_tensor(array: Array) -> Any:
    """The array as a tensor; torch does not accept bfloat16 from NumPy directly."""
    torch = require("torch", "profile")
    if array.itemsize > 2:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.uint16)).view(getattr(torch, array.dtype.name))


def torch_calls(problem: Problem, threads: int) -> Calls:
    torch = require("torch", "profile")
    torch.set_num_threads(threads)
    # A view with the channel axis where torch expects it: channels-last memory stays channels-last.
    x, dy = (as_tensor(array).movedim(problem.axis, 1) for array in (problem.x, problem.dy))
    gamma, beta, mean, var = map(as_tensor, problem[2:6])
    norm, grad = torch.native_batch_norm, torch.ops.aten.native_batch_norm_backward
    _, *saved = norm(x, gamma, beta, None, None, True, 0.1, EPS)
    return {
        "forward": lambda: norm(x, gamma, beta, None, None, True, 0.1, EPS)[0],
        "backward": lambda: grad(dy, x, gamma, None, None, *saved, True, EPS, [True, True, True])[0],
        "inference": lambda: torch.nn.functional.batch_norm(x, mean, var, gamma, beta, training=False, eps=EPS),
    }


def batchnorm_calls(problem: Problem, threads: int, allocate: bool = False, **after: Any) -> Calls:
    """The calls of batchnorm; `after` is an activation that follows the normalization."""
    x, dy, gamma, beta, mean, var, out, axis = problem
    given: dict[str, Any] = {"axis": axis, "eps": EPS, **after}
    _, saved = functional.forward(x, gamma, beta, **given)
    where: dict[str, Any] = {"num_threads": threads} | ({} if allocate else {"out": out})
    return {
        "forward": lambda: functional.forward(x, gamma, beta, **given, **where)[0],
        "backward": lambda: functional.backward(dy, saved, **where).dx,
        "inference": lambda: fixed.inference(x, mean, var, gamma, beta, **given, **where),
    }


class Contestant(NamedTuple):
    label: str
    colour: str
    prepare: Callable[[Problem, int], Calls]


OURS = "batchnorm"
CONTESTANTS = {
    "numpy": Contestant("NumPy", "#999999", numpy_calls),
    "torch": Contestant("torch", "#d55e00", torch_calls),
    OURS: Contestant("batchnorm", "#0072b2", batchnorm_calls),
}


def limit(problem: Problem, threads: int) -> Calls:
    """Each pass without its arithmetic, cut into pieces for this many threads."""
    others = ThreadPoolExecutor(max(1, threads - 1))
    whole: Any = np.uint16 if problem.x.itemsize == 2 else problem.x.dtype  # NumPy adds 16-bit floats slowly
    x, dy, out = (
        np.array_split(array.view(whole).reshape(-1), threads) for array in (problem.x, problem.dy, problem.out)
    )

    def split(work: Callable[[int], object]) -> None:
        running = [others.submit(work, part) for part in range(1, threads)]
        work(0)
        for part in running:
            part.result()

    def copy() -> None:
        split(lambda part: np.copyto(out[part], x[part]))

    def add() -> None:
        split(lambda part: np.add(x[part], dy[part], out=out[part]))

    return {"forward": copy, "backward": add, "inference": copy}


def limit_alone(problem: Problem, _threads: int) -> Calls:
    """The limit on one thread, which is faster for small arrays."""
    return limit(problem, 1)


LIMITS: dict[str, Callable[[Problem, int], Calls]] = {"limit": limit, "limit alone": limit_alone}


class Timing(NamedTuple):
    """The timings of a call, in seconds."""

    best: float
    median: float
    calls: int


def turn(call: Callable[[], Any], seconds: float = TURN, pause: float = 0.0) -> list[float]:
    """The seconds of each call, repeated after a rest until `seconds` have passed, with pauses between them."""
    time.sleep(REST)
    taken = []
    stop, end = 0.0, time.perf_counter() + seconds
    while stop < end:
        start = time.perf_counter()
        call()
        stop = time.perf_counter()
        taken.append(stop - start)
        if pause:
            time.sleep(pause)
    return taken


def in_turns(calls: Calls, seconds: float) -> dict[str, Timing]:
    """Time the calls in turns until `seconds` have passed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    each = min(TURN, seconds / ROUNDS / len(calls))
    end = time.perf_counter() + seconds
    for done in itertools.count():
        if done >= ROUNDS and time.perf_counter() >= end:
            break
        for name, call in calls.items():
            times[name] += turn(call, each)
    return {name: Timing(min(taken), statistics.median(taken), len(taken)) for name, taken in times.items()}


def pooled(first: dict[str, Timing], again: dict[str, Timing]) -> dict[str, Timing]:
    """The best timings of both."""
    return {
        name: Timing(min(one.best, two.best), min(one.median, two.median), one.calls + two.calls)
        for (name, one), two in zip(first.items(), again.values(), strict=True)
    }


class Result(NamedTuple):
    """One pass over one layer: a row of the table."""

    shape: Shape
    layers: int
    threads: int
    name: str
    bytes: int
    limit: Timing
    timings: dict[str, Timing]
    errors: dict[str, float]
    stalled: tuple[str, ...] = ()

    def figures(self, contestant: str) -> dict[str, float]:
        """All figures about one contestant."""
        timing = self.timings[contestant]
        return {
            **timing._asdict(),
            "bytes_per_second": self.bytes / timing.best,
            "over_limit": timing.best / self.limit.best,
            "over_batchnorm": timing.best / self.timings[OURS].best,
            "error": self.errors[contestant],
        }

    def as_json(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "layers": self.layers,
            "pass": self.name,
            "threads": self.threads,
            "bytes": self.bytes,
            "limit": self.limit._asdict(),
            "contestants": {name: self.figures(name) for name in self.timings},
            "stalled": self.stalled,
        }


def total(rows: Sequence[Result]) -> Result:
    """The same pass over all layers of a network, one after the other."""

    def added(timings: Iterable[tuple[int, Timing]]) -> Timing:
        each = [(layers * timing.best, layers * timing.median, timing.calls) for layers, timing in timings]
        best, median, calls = zip(*each, strict=True)
        return Timing(sum(best), sum(median), min(calls))

    names = rows[0].timings
    return rows[0]._replace(
        shape=(),
        layers=sum(row.layers for row in rows),
        bytes=sum(row.layers * row.bytes for row in rows),
        limit=added((row.layers, row.limit) for row in rows),
        timings={name: added((row.layers, row.timings[name]) for row in rows) for name in names},
        errors={name: max(row.errors[name] for row in rows) for name in names},
        stalled=tuple(name for name in names if any(name in row.stalled for row in rows)),
    )


def totals(results: Sequence[Result]) -> list[Result]:
    """One row for each pass and number of threads."""
    kinds = dict.fromkeys((row.name, row.threads) for row in results)
    return [total([row for row in results if (row.name, row.threads) == kind]) for kind in kinds]


def _stalled(problem: Problem, name: str, timings: Mapping[str, Timing]) -> tuple[str, ...]:
    """The contestants that were slower than on a single thread."""
    alone = {rival: min(turn(CONTESTANTS[rival].prepare(problem, 1)[name])) for rival in timings}
    return tuple(rival for rival, timing in timings.items() if timing.best > STALLED * alone[rival])


def measured(problem: Problem, name: str, team: int, names: Sequence[str], seconds: float) -> dict[str, Any]:
    """The timings of a pass and of the limit, and the contestants that stalled."""
    timings: dict[str, Timing] = {}
    stalled: tuple[str, ...] = ()
    for _ in range(TRIES):
        calls = {rival: CONTESTANTS[rival].prepare(problem, team)[name] for rival in names}
        limits = {which: prepare(problem, team)[name] for which, prepare in LIMITS.items()}
        found = in_turns(calls | limits, seconds)
        timings = pooled(timings, found) if timings else found
        stalled = _stalled(problem, name, {rival: timings[rival] for rival in names}) if team > 1 else ()
        if not stalled:
            break
    quickest = min(timings.pop(which) for which in LIMITS)
    return {"limit": quickest, "timings": timings, "stalled": stalled}


def every_pass(
    layers: Mapping[Shape, int], axis: int, dtype: str, threads: Sequence[int], names: Sequence[str], seconds: float
) -> Iterator[Result]:
    """Measure every pass over every layer, each with every number of threads."""
    for shape, count in layers.items():
        problem = activations(shape, axis % len(shape), dtype)
        exact = {name: call() for name, call in numpy_calls(problem.widened()).items()}
        for team, name in itertools.product(threads, PASSES):
            calls = {rival: CONTESTANTS[rival].prepare(problem, team)[name] for rival in names}
            errors = {rival: problem.error(call(), exact[name]) for rival, call in calls.items()}
            found = measured(problem, name, team, names, seconds)
            yield Result(shape, count, team, name, problem.moved(name), errors=errors, **found)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def machine_facts() -> dict[str, Any]:
    """The processor, its load, and the configuration."""
    return {"processor": _processor(), "load": os.getloadavg()[0], **show_config(mode="dicts")}


def busy(load: float) -> str | None:
    """A warning, if there is as much other work as there are processors."""
    processors = os.cpu_count() or 1
    if load < processors:
        return None
    return f"the machine is busy, load {load:.1f} on {processors} processors: times will be too long"
