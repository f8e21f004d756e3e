"""The options of `python -m batchnorm profile`, and the program that runs them.

Bad arguments are refused before anything is measured, and layers that do not fit in memory before any allocation.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .. import _output
from .._extras import require
from .._threads import get_num_threads
from . import measure, report
from .measure import CONTESTANTS, OURS, PASSES, Result
from .networks import LAYERS, LAYERS_QUICK, NETWORKS, Shape, layers_of

SECONDS, SECONDS_QUICK, SECONDS_IN_ALL = 2.0, 0.1, 36.0


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    shape = _numbers("two or more positive whole numbers joined by x, such as 32x64x56x56", 2, "x", 1 << 40)
    threads = _numbers("whole numbers from 1 to 4096 joined by commas, such as 1,2", 1, ",", 4096)
    batch = _numbers("a positive whole number", 1, None, 1 << 40)
    layers = parser.add_mutually_exclusive_group()
    layers.add_argument("--shape", type=shape, action="append", help="shape of x, such as 32x64x56x56; may be repeated")
    layers.add_argument("--network", choices=NETWORKS, help="all layers of a network instead of a few of ResNet-50")
    parser.add_argument("--batch", type=batch, help="images in a batch of --network (default 8)")
    parser.add_argument("--axis", type=int, default=1, help="channel axis (default 1); networks are arranged for it")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float64", "float16", "bfloat16"),
        default="float32",
        help="dtype of x (default float32)",
    )
    parser.add_argument("--threads", type=threads, default=(get_num_threads(),), help="one or more, such as 1,2")
    parser.add_argument("--against", type=_rivals, default=["numpy"], help="numpy, torch or both (default numpy)")
    parser.add_argument("--quick", action="store_true", help="small shapes and little time, as a test")
    parser.add_argument("--json", type=_output.file, metavar="FILE", help="write all figures, in seconds and bytes")
    parser.add_argument(
        "--plot", type=_output.picture, metavar="FILE", help="draw time over the copy limit (png, pdf, svg)"
    )


def _layers(arguments: argparse.Namespace) -> dict[Shape, int]:
    """The shapes to measure and how many layers have each; shapes from --shape are exactly as given."""
    if arguments.shape:
        return dict.fromkeys(arguments.shape, 1)
    layers: dict[Shape, int] = dict.fromkeys(LAYERS_QUICK if arguments.quick else LAYERS, 1)
    if arguments.network:
        layers = layers_of(arguments.network, *(arguments.batch or (8,)))
    order = [0, 2, 3]
    order.insert(arguments.axis % 4, 1)
    return {tuple(shape[i] for i in order): count for shape, count in layers.items()}


def _free_memory() -> int:
    """Bytes of memory that are free without swapping."""
    meminfo = Path("/proc/meminfo")
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines()) if meminfo.exists() else {}
    if "MemAvailable" in fields:
        return 1024 * int(fields["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check(arguments: argparse.Namespace, layers: dict[Shape, int], error: Callable[[str], NoReturn]) -> None:
    """Refuse what argparse cannot check."""
    axis, free = arguments.axis, _free_memory()
    for shape in layers:
        label = "x".join(map(str, shape))
        if not -len(shape) <= axis < len(shape):
            error(f"argument --axis: must be from {-len(shape)} to {len(shape) - 1} for shape {label}, got {axis}")
        needed = measure.ARRAYS * math.prod(shape) * measure.data_type(arguments.dtype).itemsize
        if needed > free:
            error(
                f"argument --{'batch' if arguments.network else 'shape'}: must fit in memory; {label} needs "
                f"{needed / 2**30:.1f} GiB for {measure.ARRAYS} arrays, {free / 2**30:.1f} GiB are free"
            )
    if arguments.batch and not arguments.network:
        error(f"argument --batch: must come with --network, got {arguments.batch[0]} alone")


def run(arguments: argparse.Namespace, error: Callable[[str], NoReturn]) -> int:
    """Measure, print, and write the requested files."""
    names, layers = [*arguments.against, OURS], _layers(arguments)
    _check(arguments, layers, error)
    console, progress = require("rich.console", "profile"), require("rich.progress", "profile")
    about = measure.machine_facts()
    if "torch" in names:
        about["versions"]["torch"] = str(require("torch", "profile").__version__)
    if arguments.plot:
        require("matplotlib", "profile").use("Agg")
    if warning := measure.busy(about["load"]):
        print(f"python -m batchnorm profile: {warning}", file=sys.stderr)
    cells = len(layers) * len(arguments.threads) * len(PASSES)
    seconds = SECONDS_QUICK if arguments.quick else min(SECONDS, SECONDS_IN_ALL / cells)
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in dict.fromkeys(["numpy", *names]))
    threads = report.threads_text(arguments.threads)
    settings = f"{threads}, load {about['load']:.1f}, {arguments.dtype}, axis {arguments.axis}"
    facts = f"{about['processor']}, {about['kernels']['level']} kernels, {settings}, {versions}"
    results: list[Result] = []
    totals: list[Result] = []
    measured = measure.every_pass(layers, arguments.axis, arguments.dtype, arguments.threads, names, seconds)
    bars = console.Console(stderr=True)
    try:
        with progress.Progress(console=bars, transient=True, auto_refresh=False, disable=not bars.is_terminal) as bar:
            results.extend(bar.track(measured, total=cells, description="measuring"))
        totals = measure.totals(results) if arguments.network else []
    finally:
        if results:
            screen = console.Console()
            screen = console.Console(width=max(100, screen.width) if screen.is_terminal else 120)
            exact = "long double" if arguments.dtype == "float64" else "float64"
            report.print_table(screen, [*results, *totals], names, exact, facts)
    if arguments.json:
        command = {name: value for name, value in vars(arguments).items() if not isinstance(value, Path)}
        found = {"results": [row.as_json() for row in results], "totals": [row.as_json() for row in totals]}
        text = json.dumps({"machine": about, "command": command, **found}, indent=2) + "\n"
        _write(arguments.json, lambda path: path.write_text(text))
    if arguments.plot:
        _write(arguments.plot, lambda path: report.draw(path, [*results, *totals], names, facts))
    return 0


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    try:
        write(path)
    except OSError as problem:
        raise SystemExit(f"python -m batchnorm profile: cannot write {path}: {problem.strerror}") from None
