"""The ways in which a layer normalizes a batch in training: by its own statistics, or otherwise.

Decisions:

- No way has a kernel of its own. Each is a few calls of `forward` and `backward`; docs/variants.md shows them.
- A way is one object, checked as a whole. A layer replaces it in one assignment, so it is never half changed.
- Renorm compares a batch with the running statistics before they follow it, as the paper, Keras and Chainer do.
  Its σ is √(running_var + eps), which is also the divisor in evaluation.
- renorm = (1, 0) corrects nothing, so it is treated as no renorm and gives the bits of plain batch norm.
- The running statistics follow the merged statistics of all ghost batches, in one step. So momentum means the same
  with and without ghost batches.
- gamma and beta are passed to `forward` and their gradients returned in float64, so results are rounded once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from . import _arrays, _kernels, functional
from ._activation import Activation
from ._arrays import Array, Layout
from ._kernels.runtime import M2, MEAN, MEAN_LOW, STATISTICS_ROWS, VAR
from ._selection import Tally, by_sample, selection_of
from ._state import State
from .fixed import table_of
from .functional import Need
from .moments import Moments, Numbers
from .saved import Gradients, Saved

Statistics = Literal["batch", "running"]
"""The statistics that training normalizes with."""


class Way(NamedTuple):
    """How a layer trains; the defaults are plain batch normalization."""

    statistics: Statistics = "batch"
    update: bool = True
    renorm: tuple[float, float] | None = None
    ghost: int | None = None

    def checked(self, tracked: bool) -> Way:
        """The same way with checked values, for a layer with or without running statistics."""
        statistics, update, renorm, ghost = self
        if statistics not in ("batch", "running"):
            raise ValueError(f"statistics must be 'batch' or 'running', got {statistics!r}")
        if renorm is not None:
            renorm = _as_bounds(renorm)
        if ghost is not None:
            ghost = _arrays.as_index(ghost, "ghost")
            if ghost < 2:
                raise ValueError(f"ghost must be None or at least 2 samples, got {ghost}")
        if not tracked and (statistics == "running" or renorm is not None):
            asked = "statistics='running'" if statistics == "running" else f"renorm={renorm}"
            raise ValueError(f"{asked} needs a layer with running statistics, made with track_running_stats=True")
        if statistics == "running" and (renorm is not None or ghost is not None):
            asked = f"ghost={ghost}" if renorm is None else f"renorm={renorm}"
            raise ValueError(f"{asked} needs statistics='batch': 'running' does not normalize with those of the batch")
        if renorm is not None and ghost is not None:
            raise ValueError(
                f"at most one of renorm and ghost can be given, got {renorm} and {ghost}: "
                "renorm removes the noise of small batches, which is the purpose of ghost batches"
            )
        return Way(statistics, bool(update), renorm, ghost)

    def __str__(self) -> str:
        """The arguments that differ from the defaults, each after a comma."""
        return "".join(f", {name}={value!r}" for name, value in self._asdict().items() if value != getattr(PLAIN, name))

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The bounds of renorm, or None if they cannot change anything."""
        return None if self.renorm == (1.0, 0.0) else self.renorm


PLAIN = Way()


def _as_bounds(renorm: Any) -> tuple[float, float]:
    if not isinstance(renorm, (tuple, list, np.ndarray)) or len(renorm) != 2:
        raise ValueError(f"renorm must be None or (rmax, dmax), got {renorm!r}")
    rmax, dmax = (_arrays.as_number(bound, name) for bound, name in zip(renorm, ("rmax", "dmax"), strict=True))
    if not (rmax >= 1 and dmax >= 0):
        raise ValueError(f"renorm must be (rmax, dmax) with rmax >= 1 and dmax >= 0, got {(rmax, dmax)}")
    return rmax, dmax


def statistics_of(moments: Moments, eps: float) -> Numbers:
    """The table of merged moments, as `forward` leaves it."""
    table = np.empty((STATISTICS_ROWS, moments.mean.size))
    _kernels.float64.fix_statistics(
        table, moments.mean.size, moments.mean, moments.m2, None, None, eps, moments.mean_low, moments.weight or 1
    )
    return table


def _wide(array: Array | None) -> Array | None:
    return None if array is None else array.astype(np.float64)


def _rounded(gradient: Array | None, dtype: np.dtype[Any]) -> Array | None:
    with np.errstate(over="ignore"):
        return None if gradient is None else gradient.astype(dtype)


# Renorm.


def corrections(moments: Moments, mean: Array, var: Array, eps: float, bounds: tuple[float, float]) -> tuple[Any, Any]:
    """ρ = clip(σ_B/σ, 1/rmax, rmax) and d = clip((μ_B − μ)/σ, −dmax, dmax), where σ = √(var + eps); 0/0 is 1 and 0."""
    rmax, dmax = bounds
    running, _ = table_of(mean, var, None, None, eps, mean.size)
    sigma, sigma_batch = np.sqrt(running[VAR] + eps), np.sqrt(moments.var() + eps)
    with np.errstate(all="ignore"):
        apart = (moments.mean - running[MEAN]) + moments.mean_low
        rho = np.divide(sigma_batch, sigma, out=np.ones_like(sigma), where=sigma_batch != sigma)
        d = np.divide(apart, sigma, out=np.zeros_like(sigma), where=apart != 0)
    return np.clip(rho, 1 / rmax, rmax), np.clip(d, -dmax, dmax)


@dataclass(frozen=True, slots=True)
class Renormed:
    """What is saved of a batch that was normalized with γρ and β + γd."""

    saved: Saved
    rho: Numbers
    d: Numbers
    dtype: np.dtype[Any]

    def needs(self, need: Need) -> Need:
        """The names that `backward` must compute."""
        names: Any = (need,) if isinstance(need, str) else need  # unchecked: `backward` refuses bad names
        if need is functional.NEED or not isinstance(names, Collection) or "dgamma" not in names:
            return need
        return (*names, "dbeta")

    def corrected(self, found: Gradients, need: Need) -> Gradients:
        """dγ = ρ·dγ′ + d·dβ′ and dβ = dβ′, from the gradients of γ′ = γρ and β′ = β + γd; dx is dx′."""
        dgamma, dbeta = found.dgamma, found.dbeta
        if dgamma is not None and dbeta is not None:
            with np.errstate(all="ignore"):
                dgamma = self.rho * dgamma + self.d * dbeta
        dbeta = dbeta if "dbeta" in need else None
        return found._replace(dgamma=_rounded(dgamma, self.dtype), dbeta=_rounded(dbeta, self.dtype))


def renormed(
    x: Array, moments: Moments, state: State, bounds: tuple[float, float], *, eps: float, **how: Any
) -> tuple[Array, Renormed]:
    """y = γ·(xhat·ρ + d) + β, computed by `forward` with γρ and β + γd."""
    mean, var, *parameters = state.snapshot()
    gamma, beta = map(_wide, parameters)
    rho, d = corrections(moments, mean, var, eps, bounds)
    with np.errstate(all="ignore"):
        scale = rho if gamma is None else gamma * rho
        shift = d if gamma is None else gamma * d
        shift = shift if beta is None else beta + shift
    y, saved = functional.forward(x, scale, shift, moments=moments, eps=eps, **how)
    return y, Renormed(saved, rho, d, state.dtype)


# Ghost batches.


def check_spread(
    shape: tuple[int, ...], dtype: np.dtype[Any], axis: int, selects: Mapping[str, Any], ghost: str = ""
) -> None:
    """Check that a batch or a ghost batch has more than one value per channel, or none."""
    layout = _arrays.layout_of(shape, axis)
    if not selects and layout.values > 1:
        return
    selection = selection_of(layout, dtype, **selects) if selects else None
    tally = Tally.of_all(layout.values) if selection is None else selection.tally
    values = tally.values if selection is None or not ghost else selection.normalized(layout)
    if values and not tally.has_spread:
        counted = f"{tally.values} of " if selection is not None else ""
        raise ValueError(
            f"training needs more than one value per channel, got {counted}x of shape {shape} with axis={axis}{ghost}; "
            "use a larger batch, or eval() for the running statistics"
        )


def _cuts(samples: int, size: int) -> Iterator[slice]:
    """⌈samples/size⌉ nearly equal parts, larger ones first; no part has one sample, unless it is the only one."""
    parts = max(1, min(-(-samples // size), samples // 2))
    length, longer = divmod(samples, parts)
    for start, stop in pairwise(accumulate((length + (i < longer) for i in range(parts)), initial=0)):
        yield slice(start, stop)


def _parts(
    shape: tuple[int, ...], layout: Layout, size: int, selects: Mapping[str, Any]
) -> Iterator[tuple[tuple[slice, ...], dict[str, Any]]]:
    """The slice of each ghost batch along the first axis that is not the channel axis, and its mask or weights."""
    first = int(layout.axis == 0)
    given = {name: by_sample(name, value, layout) for name, value in selects.items() if value is not None}
    for cut in _cuts(shape[first], size):
        yield (slice(None),) * first + (cut,), {name: entries[cut] for name, entries in given.items()}


@dataclass(frozen=True, slots=True)
class Ghosts:
    """What is saved of a batch that was normalized in parts: for all of it, with merged statistics, and per part."""

    saved: Saved
    parts: list[tuple[tuple[slice, ...], Saved]]
    dtype: np.dtype[Any]

    def backward(self, dy: ArrayLike, need: Need, out: Array | None, num_threads: int | None) -> Gradients:
        """dx part by part; dgamma and dbeta are the sums of all parts."""
        functional.check_backward(dy, self.saved, need, out)
        given, x, layout = functional.like_x(dy, self.saved), self.saved.x, self.saved._layout
        dx = None
        if "dx" in need:
            dx = layout.empty(x.dtype) if out is None else out
        found = [
            functional.backward(
                given[where], saved, need=need, out=None if dx is None else dx[where], num_threads=num_threads
            )
            for where, saved in self.parts
        ]
        dgamma, dbeta = (
            _rounded(_sum([getattr(part, name) for part in found]), self.dtype) for name in ("dgamma", "dbeta")
        )
        gradients = Gradients(dx, dgamma, dbeta)
        if found[0].dadd is not None:
            gradients.dadd = layout.empty(x.dtype)
            for (where, _), part in zip(self.parts, found, strict=True):
                gradients.dadd[where] = part.dadd
        return gradients


def _moments_of(saved: Saved) -> Moments:
    """The moments that `forward` found; with weights, its m2 is in another unit."""
    found, weighted = saved._statistics, saved._selection is not None and saved._selection.weights is not None
    m2 = found[VAR] * saved._tally.weight if weighted else found[M2]
    return Moments._made(saved._tally, np.stack([found[MEAN], found[MEAN_LOW], m2]))


def _sum(gradients: list[Array | None]) -> Array | None:
    """The sum in the order of the parts; NumPy's own sums may use another order."""
    total, *others = gradients
    for other in others:
        with np.errstate(all="ignore"):
            total = None if total is None or other is None else total + other
    return total


def in_ghosts(
    x: Array,
    state: State,
    size: int,
    *,
    axis: int,
    eps: float,
    fill: float,
    activation: Activation | None,
    add: ArrayLike | None,
    out: Array | None,
    num_threads: int | None,
    **selects: ArrayLike | None,
) -> tuple[Array, Ghosts]:
    """Normalize each of nearly equal parts of x by itself."""
    given = x
    x, layout = _arrays.lay_out(given, axis)
    parts = list(_parts(x.shape, layout, size, selects))
    for where, chosen in parts if any(chosen for _, chosen in parts) else ():
        cut = where[-1]
        ghost = f" in the ghost batch of samples {cut.start} to {cut.stop - 1}"
        check_spread(x[where].shape, x.dtype, axis, chosen, ghost)
    fill = _arrays.as_number(fill, "fill")
    residual = None if add is None else _arrays.as_like(add, "add", x.shape, x.dtype)
    if out is None:
        y = layout.empty(x.dtype)
    else:
        _arrays.check_out(out, x.shape, x.dtype)
        inputs = {"x": given, "gamma": state.gamma, "beta": state.beta, "add": residual}
        _arrays.check_overlap(out, inputs, ("add",))
        y = out
    with state.lock:
        gamma, beta = _wide(state.gamma), _wide(state.beta)
    saved = []
    for where, chosen in parts:
        _, kept = functional.forward(
            x[where],
            gamma,
            beta,
            axis=axis,
            eps=eps,
            fill=fill,
            activation=activation,
            add=None if residual is None else residual[where],
            out=y[where],
            num_threads=num_threads,
            **chosen,
        )
        saved.append((where, kept))
    total = Moments.merge_all(_moments_of(kept) for _, kept in saved)
    dtypes = x.dtype, state.dtype, state.dtype
    whole = Saved(x, eps, layout, statistics_of(total, eps), dtypes, total._tally)
    return y, Ghosts(whole, saved, state.dtype)
