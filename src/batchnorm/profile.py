"""`python -m batchnorm profile`: how long the three passes take, how long they must take, and what they get wrong.

- The yardstick is the copy limit: a pass cannot be quicker than reading its inputs and writing its output, which
  `np.copyto` and `np.add` do in pieces on as many threads, or on one where that is quicker. Time over limit survives
  a change of machine or of hour; times do not.
- Contestants take turns, because cache and memory are shared with strangers and a busy second must hit all of them.
  A turn is many calls, so that a small array is warm, and it starts after a rest, because the threads of an OpenMP
  runtime spin for milliseconds after their last call and would sit on the processors of the next contestant.
- The best time is reported: whatever disturbs a call makes it longer. The median is in the JSON file.
- batchnorm writes to `out=`, allocated before; NumPy and torch allocate their results, as their users do.
- Exact results are the textbook's in the next wider dtype, for the first channels only: channels do not depend on
  each other.
- Arguments are refused before anything is measured, and rich, matplotlib and torch are imported only here.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from . import functional, reference
from ._config import show_config
from ._extras import require
from ._threads import get_num_threads
from .reference import Array

Shape = tuple[int, ...]
Calls = dict[str, Callable[[], Any]]

PASSES = {"forward": ("x",), "backward": ("x", "dy"), "inference": ("x",)}
"""The arrays that a pass cannot avoid reading; it writes one more."""

EPS = 1e-5
TURN, REST, ROUNDS = 0.02, 0.01, 3
SECONDS, SECONDS_QUICK, SECONDS_IN_ALL = 2.0, 0.1, 36.0
EXACT_VALUES = 1 << 20

LAYERS = ((32, 64, 56, 56), (32, 128, 28, 28), (32, 256, 14, 14), (32, 2048, 7, 7), (1, 64, 112, 112))
LAYERS_QUICK = ((2, 64, 56, 56), (2, 256, 14, 14), (2, 512, 7, 7))


def _densenet121() -> Mapping[tuple[int, int], int]:
    layers, channels = Counter({(64, 112): 1}), 64
    for depth, size in ((6, 56), (12, 28), (24, 14), (16, 7)):
        for _ in range(depth):
            layers.update([(channels, size), (128, size)])
            channels += 32
        layers[channels, size] += 1
        channels //= 2
    return layers


# Channels, height and width: how many layers, for images of 224 × 224. ResNet-50 is the paper's, with the stride in
# the first convolution of a block.
# fmt: off
NETWORKS: dict[str, Mapping[tuple[int, int], int]] = {
    "resnet50": {
        (64, 112): 1, (64, 56): 6, (256, 56): 4, (128, 28): 8, (512, 28): 5, (256, 14): 12, (1024, 14): 7,
        (512, 7): 6, (2048, 7): 4,
    },
    "densenet121": _densenet121(),
    "mobilenet_v2": {
        (32, 112): 2, (16, 112): 1, (96, 112): 1, (96, 56): 1, (24, 56): 2, (144, 56): 3, (144, 28): 1, (32, 28): 3,
        (192, 28): 5, (192, 14): 1, (64, 14): 4, (384, 14): 8, (96, 14): 3, (576, 14): 5, (576, 7): 1, (160, 7): 3,
        (960, 7): 6, (320, 7): 1, (1280, 7): 1,
    },
}
# fmt: on


def _import(module: str, requirement: str = "batchnorm[profile]") -> Any:
    return require(module, "profile", requirement)


class Problem(NamedTuple):
    """The arrays of one layer, and room for a result."""

    x: Array
    dy: Array
    gamma: Array
    beta: Array
    mean: Array
    var: Array
    out: Array
    axis: int

    def first_channels(self, array: Array) -> Array:
        """Few enough channels to be exact about."""
        channels = max(1, EXACT_VALUES * self.gamma.size // self.x.size)
        return array[(slice(None),) * (self.axis if array.ndim > 1 else 0) + (slice(channels),)]

    def widened(self) -> "Problem":
        """The first channels in a dtype that has digits to spare."""
        dtype: Any = np.float64 if self.x.dtype == np.float32 else np.longdouble
        x, dy, gamma, beta, mean, var = (self.first_channels(array).astype(dtype) for array in self[:6])
        return Problem(x, dy, gamma, beta, mean, var, self.out, self.axis)

    def error(self, result: Any, exact: Array) -> float:
        """The largest difference over the largest exact value."""
        array = result if isinstance(result, np.ndarray) else np.moveaxis(np.asarray(result), 1, self.axis)
        return float(abs(self.first_channels(array) - exact).max() / (abs(exact).max() or 1))


def activations(shape: Shape, axis: int, dtype: str) -> Problem:
    """Random numbers that look like the inside of a network: each channel has an offset and a spread of its own."""
    rng = np.random.default_rng(0)
    channels, column = shape[axis], (shape[axis],) + (1,) * (len(shape) - axis - 1)
    x, dy = (rng.standard_normal(shape, np.dtype(dtype)) for _ in range(2))
    x *= rng.uniform(0.5, 2, column).astype(dtype)
    x += rng.uniform(-1, 3, column).astype(dtype)
    gamma, beta = rng.uniform(0.5, 1.5, channels).astype(dtype), rng.uniform(-0.5, 0.5, channels).astype(dtype)
    _, saved = functional.forward(x, axis=axis)
    return Problem(x, dy, gamma, beta, saved.mean.astype(dtype), saved.var.astype(dtype), np.empty_like(x), axis)


def _numpy(problem: Problem, _threads: int = 1) -> Calls:
    x, dy, gamma, beta, mean, var, _, axis = problem
    _, cache = reference.forward(x, gamma, beta, axis, EPS)
    return {
        "forward": lambda: reference.forward(x, gamma, beta, axis, EPS)[0],
        "backward": lambda: reference.backward(dy, cache)[0],
        "inference": lambda: reference.inference(x, mean, var, gamma, beta, axis, EPS),
    }


def _torch(problem: Problem, threads: int) -> Calls:
    torch = _import("torch", "torch")
    torch.set_num_threads(threads)
    # A view with the channels where torch wants them: channels-last memory stays channels-last.
    x, dy = (torch.from_numpy(array).movedim(problem.axis, 1) for array in (problem.x, problem.dy))
    gamma, beta, mean, var = (torch.from_numpy(array) for array in problem[2:6])
    norm, grad = torch.native_batch_norm, torch.ops.aten.native_batch_norm_backward
    _, *saved = norm(x, gamma, beta, None, None, True, 0.1, EPS)
    return {
        "forward": lambda: norm(x, gamma, beta, None, None, True, 0.1, EPS)[0],
        "backward": lambda: grad(dy, x, gamma, None, None, *saved, True, EPS, [True, True, True])[0],
        "inference": lambda: torch.nn.functional.batch_norm(x, mean, var, gamma, beta, training=False, eps=EPS),
    }


def _batchnorm(problem: Problem, threads: int) -> Calls:
    x, dy, gamma, beta, mean, var, out, axis = problem
    _, saved = functional.forward(x, gamma, beta, axis=axis, eps=EPS)
    given: dict[str, Any] = {"axis": axis, "eps": EPS}
    where: dict[str, Any] = {"out": out, "num_threads": threads}
    return {
        "forward": lambda: functional.forward(x, gamma, beta, **given, **where)[0],
        "backward": lambda: functional.backward(dy, saved, **where).dx,
        "inference": lambda: functional.inference(x, mean, var, gamma, beta, **given, **where),
    }


def _threads(teams: Sequence[int]) -> str:
    return f"{' and '.join(map(str, teams))} thread{'s' if teams[-1] > 1 else ''}"


class Contestant(NamedTuple):
    label: str
    colour: str
    prepare: Callable[[Problem, int], Calls]


OURS = "batchnorm"
CONTESTANTS = {
    "numpy": Contestant("NumPy", "#999999", _numpy),
    "torch": Contestant("torch", "#d55e00", _torch),
    OURS: Contestant("batchnorm", "#0072b2", _batchnorm),
}


def _stream(out: Array, first: Array, second: Array | None = None) -> None:
    if second is None:
        np.copyto(out, first)
    else:
        np.add(first, second, out=out)


def _limits(arrays: Sequence[Array], threads: int, pool: ThreadPoolExecutor) -> Calls:
    flat = [array.reshape(-1) for array in arrays]
    mine, *others = zip(*(np.array_split(array, threads) for array in flat), strict=True)

    def split() -> None:
        running = [pool.submit(_stream, *part) for part in others]
        _stream(*mine)
        for part in running:
            part.result()

    whole: Calls = {"limit on one thread": partial(_stream, *flat)}
    return whole | {"limit on all": split} if others else whole


class Timing(NamedTuple):
    """Seconds."""

    best: float
    median: float
    calls: int


def _measure(calls: Calls, seconds: float) -> dict[str, Timing]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    turn = min(TURN, seconds / ROUNDS / len(calls))
    end = time.perf_counter() + seconds
    for done in itertools.count():
        if done >= ROUNDS and time.perf_counter() >= end:
            break
        for name, call in calls.items():
            time.sleep(REST)
            stop, turn_end = 0.0, time.perf_counter() + turn
            while stop < turn_end:
                start = time.perf_counter()
                call()
                stop = time.perf_counter()
                times[name].append(stop - start)
    return {name: Timing(min(taken), statistics.median(taken), len(taken)) for name, taken in times.items()}


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

    def figures(self, contestant: str) -> dict[str, float]:
        """All that is said about one contestant."""
        timing = self.timings[contestant]
        return {
            **timing._asdict(),
            "bytes_per_second": self.bytes / timing.best,
            "over_limit": timing.best / self.limit.best,
            "over_batchnorm": timing.best / self.timings[OURS].best,
            "error": self.errors[contestant],
        }

    def as_json(self) -> dict[str, Any]:
        contestants = {name: self.figures(name) for name in self.timings}
        about = {"shape": self.shape, "layers": self.layers, "pass": self.name, "threads": self.threads}
        return {**about, "bytes": self.bytes, "limit": self.limit._asdict(), "contestants": contestants}


def profile(
    layers: Mapping[Shape, int], axis: int, dtype: str, threads: Sequence[int], names: Sequence[str], seconds: float
) -> Iterator[Result]:
    """Measure every pass over every layer, each with every number of threads."""
    with ThreadPoolExecutor(max(threads)) as pool:
        for shape, count in layers.items():
            problem = activations(shape, axis % len(shape), dtype)
            exact = {name: call() for name, call in _numpy(problem.widened()).items()}
            for team, (name, reads) in itertools.product(threads, PASSES.items()):
                calls = {rival: CONTESTANTS[rival].prepare(problem, team)[name] for rival in names}
                errors = {rival: problem.error(call(), exact[name]) for rival, call in calls.items()}
                arrays = [problem.out, *(getattr(problem, read) for read in reads)]
                timings = _measure(calls | _limits(arrays, team, pool), seconds)
                limit = min(timings.pop(limit) for limit in timings.keys() - calls.keys())
                traffic = len(arrays) * problem.x.nbytes
                yield Result(shape, count, team, name, traffic, limit, timings, errors)


def _groups(results: Iterable[Result]) -> Iterator[tuple[str, list[Result]]]:
    """The results of each shape under its name, those of one pass next to each other."""
    for (shape, layers), rows in itertools.groupby(results, lambda row: (row.shape, row.layers)):
        label = "x".join(map(str, shape)) + (f" ×{layers}" if layers > 1 else "")
        yield label, sorted(rows, key=lambda row: list(PASSES).index(row.name))


NOTES = """
µs: best time. vs: time over that of batchnorm. GB/s: traffic no pass can avoid (read x, write y;
backward: read x and dy, write dx) over the time of batchnorm. limit: time of batchnorm over that of
np.copyto (backward: np.add) on as many threads. error: largest difference from {exact} over the
largest value, in the first channels. batchnorm writes to out=, allocated before; the others allocate
their results. load: other work when it began; a processor that is taken stalls every team of threads."""


def _print(console: Any, results: Sequence[Result], names: Sequence[str], notes: Sequence[str]) -> None:
    box, table = _import("rich.box"), _import("rich.table")
    rivals, labels = [name for name in names if name != OURS], [CONTESTANTS[name].label for name in names]
    # With torch only one space between columns leaves everything within 100.
    grid = table.Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, int("torch" not in names), 0, 0))
    grid.add_column("shape\n  pass", min_width=16)
    headers = ["threads", *(f"{label}\nµs" for label in labels), *(f"vs\n{CONTESTANTS[name].label}" for name in rivals)]
    for header in [*headers, "GB/s", "limit", *(f"{label}\nerror" for label in labels)]:
        grid.add_column(header, justify="right", no_wrap=True)
    for label, rows in _groups(results):
        grid.add_row(label, style="bold")
        for row in rows:
            figures = {name: row.figures(name) for name in names}
            grid.add_row(
                f"  {row.name}",
                str(row.threads),
                *(f"{(best := 1e6 * figures[name]['best']):.{0 if best >= 100 else 1}f}" for name in names),
                *(f"{figures[name]['over_batchnorm']:.1f}" for name in rivals),
                f"{figures[OURS]['bytes_per_second'] / 1e9:.1f}",
                f"{figures[OURS]['over_limit']:.2f}",
                *(f"{figures[name]['error']:.1e}" for name in names),
            )
    console.print(grid)
    console.print(*notes, sep="\n", highlight=False, soft_wrap=True)


def _draw(path: Path, results: Sequence[Result], names: Sequence[str], subtitle: str) -> None:
    pyplot, ticker = _import("matplotlib.pyplot"), _import("matplotlib.ticker")
    lines: list[tuple[str, Result | None]] = []
    for label, rows in _groups(results):
        lines += [(label, None), *((f"{row.name}, {_threads([row.threads])}", row) for row in rows)]
    height = 1.7 + 0.23 * len(lines)
    figure, axes = pyplot.subplots(figsize=(9, height), layout="constrained")
    rows_at = {y: row for y, (_, row) in enumerate(lines) if row is not None}
    ratios = {name: [row.figures(name)["over_limit"] for row in rows_at.values()] for name in names}
    axes.hlines(list(rows_at), *(list(map(end, *ratios.values())) for end in (min, max)), color="0.85", linewidth=2)
    for name in names:
        axes.plot(ratios[name], list(rows_at), "o", color=CONTESTANTS[name].colour, label=CONTESTANTS[name].label)
    axes.axvline(1, color="0.3", linewidth=1, linestyle="--", label="copy limit")
    axes.set_yticks(range(len(lines)), [label for label, _ in lines])
    for tick, (_, row) in zip(axes.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("bold" if row is None else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set(xscale="log", ylim=(len(lines) - 0.5, -0.5), xlabel="time over the copy limit", axisbelow=True)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if max(map(max, ratios.values())) < 200 else (1,)))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g×"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(axis="x", color="0.93")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(subtitle, fontsize="small", color="0.35")
    figure.suptitle("Batch normalization: time over the copy limit", fontweight="bold")
    figure.legend(loc="outside lower center", ncols=len(names) + 1, frameon=False)
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def machine_facts(names: Sequence[str]) -> dict[str, Any]:
    machine = {"processor": _processor(), "load": os.getloadavg()[0], **show_config(mode="dicts")}
    if "torch" in names:
        machine["versions"]["torch"] = str(_import("torch", "torch").__version__)
    return machine


def _numbers(wanted: str, least: int, separator: str | None, most: int) -> Callable[[str], tuple[int, ...]]:
    def parse(text: str) -> tuple[int, ...]:
        parts = text.split(separator) if separator else [text]
        if len(parts) < least or not all(part.isdecimal() and 1 <= int(part) <= most for part in parts):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return tuple(map(int, parts))

    return parse


def _rivals(text: str) -> list[str]:
    rivals, known = list(dict.fromkeys(text.split(","))), [name for name in CONTESTANTS if name != OURS]
    if not set(rivals) <= set(known):
        raise argparse.ArgumentTypeError(f"must be names out of {', '.join(known)} joined by commas, got {text!r}")
    return rivals


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"must be a file that can be written, in a directory that exists, got {text!r}"
        )
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    shape = _numbers("two or more positive whole numbers joined by x, such as 32x64x56x56", 2, "x", 1 << 40)
    threads = _numbers("whole numbers from 1 to 4096 joined by commas, such as 1,2", 1, ",", 4096)
    batch = _numbers("a positive whole number", 1, None, 1 << 40)
    layers = parser.add_mutually_exclusive_group()
    layers.add_argument("--shape", type=shape, action="append", help="of x, such as 32x64x56x56; may be repeated")
    layers.add_argument("--network", choices=NETWORKS, help="all layers of a network instead of a few of ResNet-50")
    parser.add_argument("--batch", type=batch, help="images in a batch of --network (default 8)")
    parser.add_argument("--axis", type=int, default=1, help="of the channels (default 1); networks are arranged for it")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="(default float32)")
    parser.add_argument("--threads", type=threads, default=(get_num_threads(),), help="one or more, such as 1,2")
    parser.add_argument("--against", type=_rivals, default=["numpy"], help="numpy, torch or both (default numpy)")
    parser.add_argument("--quick", action="store_true", help="small shapes and little time, to see that it works")
    parser.add_argument("--json", type=_file, metavar="FILE", help="write all figures, in seconds and bytes")
    parser.add_argument("--plot", type=_file, metavar="FILE.png", help="draw time over the copy limit")


def _layers(arguments: argparse.Namespace) -> dict[Shape, int]:
    """The shapes to measure and how many layers have each; only those of --shape are as the user wrote them."""
    if arguments.shape:
        return dict.fromkeys(arguments.shape, 1)
    layers = dict.fromkeys(LAYERS_QUICK if arguments.quick else LAYERS, 1)
    if arguments.network:
        batch = arguments.batch or (8,)
        layers = {(*batch, channels, size, size): n for (channels, size), n in NETWORKS[arguments.network].items()}
    order = [0, 2, 3]
    order.insert(arguments.axis % 4, 1)
    return {tuple(shape[i] for i in order): count for shape, count in layers.items()}


def run(arguments: argparse.Namespace, error: Callable[[str], NoReturn]) -> int:
    """Measure, print, and write what was asked for."""
    axis, names, layers = arguments.axis, [*arguments.against, OURS], _layers(arguments)
    for shape in layers:
        if not -len(shape) <= axis < len(shape):
            label = "x".join(map(str, shape))
            error(f"argument --axis: must be from {-len(shape)} to {len(shape) - 1} for shape {label}, got {axis}")
    if arguments.batch and not arguments.network:
        error(f"argument --batch: must come with --network, got {arguments.batch[0]} alone")
    console, progress, about = _import("rich.console"), _import("rich.progress"), machine_facts(names)
    if arguments.plot:
        _import("matplotlib").use("Agg")
    cells = len(layers) * len(arguments.threads) * len(PASSES)
    seconds = SECONDS_QUICK if arguments.quick else min(SECONDS, SECONDS_IN_ALL / cells)
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in dict.fromkeys(["numpy", *names]))
    settings = f"{_threads(arguments.threads)}, load {about['load']:.1f}, {arguments.dtype}, axis {axis}"
    facts = f"{about['processor']}, {about['kernels']['level']} kernels, {settings}, {versions}"
    results: list[Result] = []
    measured = profile(layers, axis, arguments.dtype, arguments.threads, names, seconds)
    bars = console.Console(stderr=True)
    try:
        with progress.Progress(console=bars, transient=True, auto_refresh=False, disable=not bars.is_terminal) as bar:
            results.extend(bar.track(measured, total=cells, description="measuring"))
    finally:
        if results:
            screen = console.Console()
            screen = console.Console(width=max(100, screen.width) if screen.is_terminal else 120)
            exact = "float64" if arguments.dtype == "float32" else "long double"
            _print(screen, results, names, [NOTES.format(exact=exact), facts])
    if arguments.json:
        command = {name: value for name, value in vars(arguments).items() if not isinstance(value, Path)}
        report = {"machine": about, "command": command, "results": [row.as_json() for row in results]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.plot:
        _draw(arguments.plot, results, names, facts)
    return 0
