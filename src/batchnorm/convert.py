"""`python -m batchnorm convert`: convert the batch norm layers of a file to another system's conventions.

Decisions:

- A layer is found by its names alone. All other arrays keep their values, names and layouts: whatever else a network
  needs, such as other convolution weights, is beyond this command.
- Everything is converted before anything is written, and the file is written in one step (`state_file`), so OUT may be
  IN. If a layer cannot be converted, the command ends and names its path.
- Files are npz without pickle, or safetensors, whose metadata is kept. Converted arrays are float32 or float64:
  16-bit statistics do not stay 16-bit.
- A file contains neither eps nor momentum. The command prints what it assumed, and the arguments for the new layers.
"""

import argparse
import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from . import state_file
from ._extras import require
from .conventions import CONVENTIONS, Convention, arrays, from_state, names, to_state
from .conventions.systems import ROLES
from .layer import BatchNorm

SUFFIXES = (".npz", ".safetensors")
TINY = 1e-4
"""A layer is remarked on if no |gamma| is larger than this."""

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Converted:
    """A converted layer, and the remarks on it."""

    path: str
    layer: BatchNorm
    change: float
    remarks: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("source", metavar="IN", type=_file, help="an .npz or .safetensors file")
    parser.add_argument("target", metavar="OUT", type=_file, nargs="?", help="the file to write; it may be IN")
    for side in ("from", "to"):
        parser.add_argument(
            f"--{side}",
            dest=f"{side}_",
            choices=CONVENTIONS,
            required=True,
            metavar="SYSTEM",
            help="; ".join(CONVENTIONS),
        )
    parser.add_argument("--from-eps", type=_eps, metavar="EPS", help="eps of IN's layers (default: their system's)")
    parser.add_argument("--eps", type=_eps, help="eps of the layers that will load OUT (default: their system's)")
    parser.add_argument("--prefix", default="", metavar="PATH", help="convert the layers at or below this path only")
    parser.add_argument("--dry-run", action="store_true", help="print the table and write nothing")


def run(arguments: argparse.Namespace, error: Callable[[str], NoReturn]) -> int:
    """Convert, write, and print what was done."""
    source, target = CONVENTIONS[arguments.from_], CONVENTIONS[arguments.to_]
    if arguments.target is None and not arguments.dry_run:
        error("argument OUT: must be given unless there is --dry-run")
    try:
        found, metadata = read(arguments.source)
        result, layers = converted(
            found, source, target, from_eps=arguments.from_eps, eps=arguments.eps, prefix=arguments.prefix
        )
        if not arguments.dry_run:
            write(arguments.target, result, metadata)
    except (TypeError, ValueError) as problem:
        error(str(problem))
    except OSError as problem:
        file = problem.filename or arguments.target  # the error of a full disk names no file
        raise SystemExit(f"python -m batchnorm convert: {file}: {problem.strerror}") from None
    _print_table(layers)
    others = sum(result.get(name) is array for name, array in found.items())
    done = "nothing was written" if arguments.dry_run else f"written to {arguments.target}"
    print(f"\n{_number(len(layers), 'layer')}, {_number(others, 'other array')} unchanged; {done}.")
    _print_conventions(source, target, arguments, layers[0].layer)
    if str(arguments.target).endswith(".npz") and any(array.dtype.kind == "V" for array in result.values()):
        print("npz has no bfloat16: such arrays are written as two bytes without a type.")
    return 0


def converted(
    found: Mapping[str, NDArray[Any]],
    source: Convention,
    target: Convention,
    *,
    from_eps: float | None = None,
    eps: float | None = None,
    prefix: str = "",
) -> tuple[Arrays, list[Converted]]:
    """All arrays of a network, with its layers in the target's convention, and what was done to each layer.

    Raises
    ------
    TypeError, ValueError
        If there is no layer, one cannot be converted, or a new name already exists.
    """
    names.by_canonical(found)
    below = names.canonical(prefix.strip("/."))
    forms = {path: names.canonical(path) for path in names.layers_in(found, source)}
    paths = [path for path, form in forms.items() if not below or f"{form}/".startswith(f"{below}/")]
    if not paths:
        looked_for = " and ".join(source.names(below or "…")[role] for role in ("running_mean", "running_var"))
        raise ValueError(
            f"IN must have layers of {source.name}, {looked_for}: {names.what_is_there(found, source, below)}"
        )
    layers: list[Converted] = []
    replaced: dict[str, Arrays] = {}
    gone: set[str] = set()
    for path in paths:
        of_layer = {name: found[name] for name in _names_of(path, source, found)}
        new_path = _joined_for(target, source, path)
        try:
            layer = from_state(of_layer, source, prefix=path, eps=from_eps)
            state = to_state(layer, target, prefix=new_path, eps=eps)
        except (TypeError, ValueError) as problem:
            raise type(problem)(f"layer {path!r}: {problem}") from None
        replaced[next(iter(of_layer))] = state
        gone |= of_layer.keys()
        before, after = _gamma(of_layer, source, path), _gamma(state, target, new_path)
        layers.append(Converted(path, layer, _change(before, after), _remarks(layer, of_layer, source)))
    result: Arrays = {}
    for name, array in found.items():
        for new_name, new in (replaced.get(name, {}) if name in gone else {name: array}).items():
            if new_name in result:
                raise ValueError(f"{new_name!r} must be a new name, but IN has an array of that name")
            result[new_name] = new
    return result, layers


def read(path: Path) -> tuple[Arrays, dict[str, str] | None]:
    """The arrays of a file by name, and its metadata if its format has any."""
    if path.exists() and not path.is_file():
        raise ValueError(f"IN must be a regular file, got {str(path)!r}")
    with open(path, "rb"):  # for the error that names the file
        pass
    if path.suffix == ".safetensors":
        safetensors = require("safetensors", "convert")
        require("ml_dtypes", "convert")  # which lets NumPy know bfloat16
        try:
            with safetensors.safe_open(path, "numpy") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        except (safetensors.SafetensorError, TypeError, AttributeError) as problem:
            raise ValueError(f"IN must be a safetensors file with types that NumPy has: {problem}") from None
    if not zipfile.is_zipfile(path):
        raise ValueError("IN must be an npz file, got one that is no zip file")
    try:
        with np.load(path, allow_pickle=False) as file:
            found: Arrays = dict(file)
    except state_file.DAMAGED as problem:
        raise ValueError(f"IN must be an npz file without pickled objects: {problem}") from None
    if not all(isinstance(array, np.ndarray) for array in found.values()):
        raise ValueError("IN must be an npz file that holds arrays and nothing else")
    return found, None


def write(path: Path, result: Arrays, metadata: dict[str, str] | None) -> None:
    """Put the arrays into a file in one step."""
    if path.suffix == ".npz":
        if taken := {"file", "allow_pickle"} & result.keys():
            raise ValueError(f"OUT must be a safetensors file for an array named {taken.pop()!r}")
        state_file.write(path, result)
        return
    safetensors, ml_dtypes = require("safetensors.numpy", "convert"), require("ml_dtypes", "convert")
    dense = {name: np.asarray(array, order="C") for name, array in result.items()}
    dense = {name: array.view(ml_dtypes.bfloat16) if array.dtype == "V2" else array for name, array in dense.items()}
    for name, array in dense.items():
        if array.dtype.kind not in "fiubc" and not hasattr(ml_dtypes, array.dtype.name):
            raise ValueError(f"OUT must be an npz file for {name!r} of dtype {array.dtype}")
    state_file.replace(path, safetensors.save(dense, metadata))


def _names_of(path: str, system: Convention, there: Mapping[str, Any]) -> list[str]:
    """The names in a network that belong to a layer."""
    called = system.names(path)
    of_layer = set(called.values())
    if system.debiased:
        averages = [called[role].removesuffix("average") for role in ("running_mean", "running_var")]
        of_layer |= {average + part for average in averages for part in ("hidden", "counter")}
    forms = {names.canonical(name) for name in of_layer}
    return [name for name in there if names.canonical(name) in forms]


def _joined_for(target: Convention, source: Convention, path: str) -> str:
    """The path, joined with the target's separator."""
    if target.running_mean.startswith("{}."):
        return path.replace("/", ".")
    return path.replace(".", "/") if source.running_mean.startswith("{}.") else path


def _gamma(state: Mapping[str, NDArray[Any]], system: Convention, path: str) -> NDArray[Any]:
    gamma = arrays.found(state, system, path)[0].get("gamma", np.ones(1))
    return gamma.reshape(-1).astype(np.float64)


def _change(before: NDArray[Any], after: NDArray[Any]) -> float:
    """The largest relative change of gamma."""
    before, after = np.broadcast_arrays(before, after)
    return max((abs(new / old - 1) for old, new in zip(before.tolist(), after.tolist(), strict=True) if old), default=0)


def _remarks(layer: BatchNorm, of_layer: Arrays, system: Convention) -> tuple[str, ...]:
    """Remarks on a layer for the user."""
    mean, var, gamma = layer.running_mean, layer.running_var, layer.gamma
    assert mean is not None
    assert var is not None
    told = {
        "never trained": (mean == 0).all() and ((var == 1).all() or (var == system.initial_var).all()),
        f"|gamma| ≤ {TINY:g} everywhere": gamma is not None and (np.abs(gamma) <= TINY).all(),
        "16-bit statistics": any(
            array.dtype.itemsize == 2 and names.path_in(name, pattern) is not None
            for name, array in of_layer.items()
            for pattern in (system.running_mean, system.running_var)
        ),
    }
    return tuple(remark for remark, is_so in told.items() if is_so and layer.num_features)


def _print_table(layers: list[Converted]) -> None:
    rows = [("layer", "channels", "gamma", "remarks")]
    for done in layers:
        change = f"changed by up to {100 * done.change:.2g} %" if done.change else "as it was"
        rows.append((done.path or "(root)", str(done.layer.num_features), change, ", ".join(done.remarks)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for path, channels, gamma, remarks in rows:
        print(f"{path:<{widths[0]}}  {channels:>{widths[1]}}  {gamma:<{widths[2]}}  {remarks}".rstrip())


def _print_conventions(source: Convention, target: Convention, arguments: Any, layer: BatchNorm) -> None:
    """Print what was assumed, and what the new layers need."""
    from_eps = source.eps if arguments.from_eps is None else arguments.from_eps
    eps = target.eps if arguments.eps is None else arguments.eps
    was = f"{source.eps_argument or 'eps'}={from_eps:g}, {source.momentum_argument or 'momentum'}={source.momentum:g}"
    needs = {target.eps_argument: f"{eps:g}", target.momentum_argument: f"{target.momentum_of(layer):g}"}
    words = ", ".join(f"{name}={value}" for name, value in needs.items() if name)
    there = source.names("{}").keys() & target.names("{}").keys()
    renamed = [f"{source.names()[role]} → {target.names()[role]}" for role in ROLES if role in there]
    print(f"\nNames: {', '.join(renamed)}.")
    print(f"{source.name}, as read: {was} (weight of the {source.momentum_weighs}).")
    if words:
        print(f"{target.name} needs: {words} (weight of the {target.momentum_weighs}).")
    if source.unbiased != target.unbiased:
        kept = [f"{'unbiased' if system.unbiased else 'biased'} in {system.name}" for system in (source, target)]
        print(
            f"Running variances are {', '.join(kept)}: they were kept. "
            "For batches of n values the two differ by n/(n − 1)."
        )


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _file(text: str) -> Path:
    if Path(text).suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"must end in {' or '.join(SUFFIXES)}, got {text!r}")
    return Path(text)


def _eps(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number, at least 0, got {text!r}")
    return value
