"""Find the arrays of a layer among the names of a network.

Decisions:

- A name is a path. Its parts may be joined by "/" or ".", nested mappings are joined by "/", and the ":0" at the end of
  TensorFlow's names is ignored: names are compared in their `canonical` form.
- A layer is a path with a running mean and a running variance. Nothing is guessed from shapes.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from .systems import CONVENTIONS, Convention

SHOWN = 8
"""The most names of a network that an error lists."""


def canonical(name: str) -> str:
    """The form in which names are compared."""
    return name.removesuffix(":0").replace(".", "/")


def flat(state: Mapping[Any, Any], path: str = "") -> dict[str, Any]:
    """The leaves of nested mappings; their names are the keys joined by "/"."""
    leaves: dict[str, Any] = {}
    for key, value in state.items():
        name = f"{path}{key}"
        leaves |= flat(value, f"{name}/") if isinstance(value, Mapping) else {name: value}
    return leaves


def path_in(name: str, pattern: str) -> str | None:
    """The path of the layer in the name of one of its arrays; None if the name does not match."""
    before, _, after = canonical(pattern).partition("{}")
    form = canonical(name)
    if form == before + after[1:]:
        return ""
    fits = form.startswith(before) and form.endswith(after) and len(form) > len(before) + len(after)
    return name[len(before) : len(form) - len(after)] if fits else None


def layers_in(names: Iterable[str], system: Convention) -> list[str]:
    """The paths of the layers of one system, in the order of their means."""
    names = list(names)
    with_var = {canonical(path) for name in names if (path := path_in(name, system.running_var)) is not None}
    with_mean = [path for name in names if (path := path_in(name, system.running_mean)) is not None]
    return [path for path in dict.fromkeys(with_mean) if canonical(path) in with_var]


def by_canonical(names: Iterable[str]) -> dict[str, str]:
    """The names by their canonical form, which no two of them may share."""
    found: dict[str, str] = {}
    for name in names:
        other = found.setdefault(canonical(name), name)
        if other != name:
            raise ValueError(f"state must name each array once, got both {other!r} and {name!r}")
    return found


def what_is_there(names: Iterable[str], system: Convention, prefix: str = "") -> str:
    """The end of an error: layers of this system or another, with those like the prefix first, or just names."""
    names = list(names)
    layers = layers_in(names, system)
    if layers:
        close = difflib.get_close_matches(prefix, layers, SHOWN, cutoff=0.0)
        return f"there are layers of {system.name} at {_some([*dict.fromkeys([*close, *layers])])}"
    for other in CONVENTIONS.values():
        layers = layers_in(names, other)
        if layers:
            return f"there are layers of {other.name} at {_some(layers)}"
    return f"there are {_some(names)}" if names else "there is nothing"


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:SHOWN]))
    return shown + f" and {len(names) - SHOWN} more" * (len(names) > SHOWN)
