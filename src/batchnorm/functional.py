"""Batch normalization as functions: they check, allocate and call a kernel; the arithmetic is in the kernels.

Frameworks differ in their conventions. Here:

- `axis=1` is the channel axis, as in PyTorch and ONNX; channels-last arrays take `axis=-1`.
- The batch is normalized with the biased variance Σ(x−μ)²/n, and `eps` is added to the variance, under the root.
- `momentum` is the weight of the *new* batch in the running statistics (PyTorch's direction, not that of Keras, Flax
  and ONNX). The running variance is unbiased, Σ(x−μ)²/(n−1), by default.
- Statistics have dtype float64 for any x. y and dx have the dtype of x; dgamma and dbeta have those of gamma and beta.
  float16 and bfloat16 are computed in float32 and rounded once more when they are stored.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _activation, _arrays, _kernels, _threads
from ._activation import Activation
from ._arrays import Array, Float, Layout
from ._kernels import Bits, Chosen, Limits, per_channel
from ._kernels.runtime import (
    GRADIENT_ROWS,
    STATISTICS_ROWS,
    SUM_DY,
    SUM_DY_XMU,
    THROUGH_MEAN,
    THROUGH_VARIANCE,
    UPSTREAM,
    UPSTREAM_DMEAN,
    UPSTREAM_DVAR,
)
from ._selection import Selection, Tally, chosen_by, normalized_in, selection_of
from .moments import GradientSums, Moments, moments_of
from .saved import Gradients, Saved

if TYPE_CHECKING:
    from . import _keywords

After = tuple[Limits | None, Array | None, Bits | None]
"""What follows the normalization: an activation, what is added before it, and bits for where it is closed."""

# One name or several. A tuple is a collection, but mypy accepts ("dx",) only where the type names tuples.
_ThroughName = Literal["mean", "variance"]
NeedName = Literal["dx", "dgamma", "dbeta", "dadd"]
Through = _ThroughName | tuple[_ThroughName, ...] | Collection[_ThroughName]
Need = NeedName | tuple[NeedName, ...] | Collection[NeedName]

NEED: tuple[NeedName, ...] = ("dx", "dgamma", "dbeta")
THROUGH: tuple[_ThroughName, ...] = ("mean", "variance")
NOTHING: After = None, None, None
"""After the normalization: no activation, no residual."""


def as_names(names: Any, argument: str, known: tuple[str, ...]) -> Collection[Any]:
    """The names; a single name may come as a string."""
    if isinstance(names, str):
        names = (names,)
    if not isinstance(names, Collection) or any(name not in known for name in names):
        raise ValueError(f"{argument} must be one or more of the names {known}, got {names!r}")
    return names


def paths_through(through: Through) -> int:
    """The statistics through which a derivative passes, as the kernels' bits."""
    if through is THROUGH:
        return THROUGH_MEAN | THROUGH_VARIANCE
    if type(through) is not tuple or len(through) != through.count("mean") + through.count("variance"):
        through = as_names(through, "through", THROUGH)
    return THROUGH_MEAN * ("mean" in through) | THROUGH_VARIANCE * ("variance" in through)


def like_x(dy: ArrayLike, saved: Saved, name: str = "dy") -> Array:
    """dy as an array; it must have x's shape and dtype."""
    return _arrays.as_like(dy, name, saved._layout.shape, saved._dtypes[0])


@overload
def forward(
    x: NDArray[Float],
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    out: NDArray[Float] | None = None,
    **how: Unpack[_keywords.Forward],
) -> tuple[NDArray[Float], Saved[Float]]: ...
@overload
def forward(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    out: Array | None = None,
    **how: Unpack[_keywords.Forward],
) -> tuple[Array, Saved]: ...
def forward(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    moments: Moments | None = None,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    fill: float = 0.0,
    activation: Activation | None = None,
    add: ArrayLike | None = None,
    out: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, Saved]:
    """Normalize with the statistics of this batch: y = gamma·(x − μ)/√(σ² + eps) + beta.

    μ = Σx/n and σ² = Σ(x − μ)²/n over all axes but the channel axis, with n values per channel. σ² is the
    biased variance. With `add` and `activation`, the same pass over x computes
    y = act(gamma·(x − μ)/√(σ² + eps) + beta + add).

    Parameters
    ----------
    x : array_like of float64, float32, float16 or bfloat16, at least 2-D
        Channels along `axis`. Channels-last, Fortran order and other dense layouts are used without a copy.
    gamma, beta : array_like, shape (C,), optional
        Scale and shift; 1 and 0 where None. Integers become float64.
    axis : int, default 1
        The channel axis.
    eps : float, default 1e-5
        Added to the variance, under the root; finite, at least 0. With eps = 0, a constant channel gives beta.
    moments : Moments, optional
        Statistics to normalize with instead of x's own: those of a larger batch that contains x (`Moments.of` each
        part, added up), or of any other set of values. With the moments of x itself and no weights, y is the same, bit
        for bit.
    mask : array_like of bool, optional
        True where x counts. Its shape is that of x with length 1 along the channel axis, or without that axis; other
        axes may have length 1 too. Where it is False, x and dy have no effect, y is `fill` and dx is 0.
    lengths : array_like of int, shape (N,), optional
        A mask for sequences, for x with three dimensions: the first lengths[i] positions of sequence i count. Of the
        two axes besides the channel axis, sequences lie along the first and positions along the second.
    weights : array_like, optional
        How much each value counts in the statistics, at least 0; shapes as for `mask`. With W = Σw, μ = Σwx/W and
        σ² = Σw(x − μ)²/W. A weight of 0 is not a mask: the value is still normalized, and its dy counts. Give at most
        one of `mask`, `lengths` and `weights`.
    fill : float, default 0
        The value of y where x does not count.
    activation : "relu", ("leaky_relu", slope) or ("clip", low, high), optional
        act(v) is max(v, 0), v where v > 0 else slope·v, or v between the bounds low < high. NaN stays NaN.
    add : array_like, optional
        A residual, of x's shape and dtype, added before the activation.
    out : ndarray, optional
        Where to write y: an array of x's shape and dtype. `out=add` is allowed, other overlaps with inputs are not.
    num_threads : int, optional
        Threads for this call. The result does not depend on it.

    Returns
    -------
    y : ndarray
        With x's shape, dtype and memory order.
    saved : Saved
        For `backward` and `update_running`; holds x itself.

    Raises
    ------
    TypeError
        If x has an unsupported dtype, or another argument is not numeric.
    ValueError
        If a shape, `axis`, `eps`, `moments`, `mask`, `lengths`, `weights` or `activation` is invalid, all weights are
        0, or `out` is read-only or overlaps an input. Nothing is written then.

    Notes
    -----
    float64 is computed in float64, everything else in float32. 16-bit results are rounded once more; those that are
    too large become infinity, as in NumPy. Sums are taken of x minus a value near the mean, accumulated in float64 and
    merged in a fixed order: the same input gives the same bits for any number of threads on any processor. Equal
    values in a channel give var = 0 and y = beta exactly. A channel that contains NaN or infinity becomes NaN; the
    others are not affected. An empty batch gives an empty y and statistics of 0. A batch whose values are all masked
    has statistics of 0 too.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, algorithm 1.

    Examples
    --------
    >>> import numpy as np, batchnorm as bn
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, saved = bn.forward(x, eps=0.0)
    >>> y
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> saved.mean, saved.var
    (array([ 2., 20.]), array([  1., 100.]))
    >>> bn.forward(x, eps=0.0, activation="relu", add=np.full((2, 2), 0.5))[0]
    array([[0. , 0. ],
           [1.5, 1.5]])
    >>> padded = np.array([[[1.0, 3.0, np.nan], [2.0, np.nan, np.nan]]]).reshape(2, 1, 3)
    >>> bn.forward(padded, lengths=[2, 1], eps=0.0)[1].mean
    array([2.])
    """
    given = _arrays.as_float(x, "x")
    x, layout = _arrays.lay_out(given, axis)
    dtype, size, channels = x.dtype, x.size, layout.view[1]
    if gamma is not None:
        gamma = _arrays.as_channels(gamma, "gamma", channels, layout)
    if beta is not None:
        beta = _arrays.as_channels(beta, "beta", channels, layout)
    eps = _arrays.as_eps(eps)
    selection = None
    if mask is not None or lengths is not None or weights is not None:
        selection = selection_of(layout, dtype, mask, lengths, weights)
    if moments is not None:
        _check_moments(moments, layout, selection)
    elif weights is not None and selection is not None and size and not selection.tally.weight:
        raise ValueError("weights must not all be 0")
    residual, after = None, NOTHING
    if activation is not None or add is not None:
        residual, after = after_of(activation, add, x, layout)
    limits, added, closed = after
    threads = _threads.threads_for(size, num_threads)
    if out is None:
        y = layout.empty(dtype)
    else:
        _arrays.check_out(out, x.shape, dtype)
        _arrays.check_overlap(out, {"x": given, "gamma": gamma, "beta": beta, "add": residual}, ("add",))
        y = layout.room(out, dtype)
    statistics = np.empty((STATISTICS_ROWS, channels))
    kernels = _kernels.of_type[dtype.char]
    counted = chosen = None
    if selection is not None:
        counted = selection.tally
        if moments is None and weights is not None and x.itemsize == 2:
            moments = moments_of(x, layout, selection, threads)  # from a float32 copy
        elif moments is None or weights is None:
            chosen = selection.chosen(_arrays.as_number(fill, "fill"))
    if moments is not None:
        counted = moments._tally
        _kernels.float64.fix_statistics(
            statistics, channels, moments.mean, moments.m2, gamma, beta, eps, moments.mean_low, moments.weight or 1
        )
        if size:
            normalize(x, y, layout, statistics, threads, after, chosen)
    elif size if counted is None else counted.values:
        x_memory, y_memory = layout.memory(x, y)
        kernels.forward(
            x_memory, y_memory, layout.view, statistics, gamma, beta, eps, threads, limits, added, closed, chosen
        )
    else:
        statistics[...] = 0
        if size:
            normalize(x, y, layout, statistics, threads, after, chosen)
    if out is not None:
        y = _arrays.deliver(y, out)
    dtypes = (dtype, None if gamma is None else gamma.dtype, None if beta is None else beta.dtype)
    return y, Saved(x, eps, layout, statistics, dtypes, counted, selection, limits, added is not None, closed)


def normalize(
    x: Array,
    y: Array,
    layout: Layout,
    statistics: NDArray[np.float64],
    threads: int,
    after: After,
    chosen: Chosen | None = None,
) -> None:
    """Write y, computed with known statistics."""
    kernels = _kernels.of_type[x.dtype.char]
    x, y = layout.memory(x, y)
    limits, added, closed = after
    kernels.normalize(x, y, layout.view, statistics, threads, limits, added, closed, chosen)


def after_of(
    activation: Activation | None, add: ArrayLike | None, x: Array, layout: Layout, noted: bool = True
) -> tuple[Array | None, After]:
    """The residual, and the kernels' arguments: limits, residual and the bits for where the activation is closed."""
    limits = _activation.as_limits(activation)
    if add is None:
        return None, (limits, None, None)
    residual = _arrays.as_like(add, "add", x.shape, x.dtype)
    closed = _activation.empty_bits(x.size) if noted and limits is not None else None
    return residual, (limits, layout.seen(layout.bring(residual)), closed)


def _check_moments(moments: Moments, layout: Layout, selection: Selection | None) -> None:
    if not isinstance(moments, Moments):
        raise TypeError(f"moments must be Moments, got {type(moments).__name__}")
    if moments.mean.size != layout.view[1]:
        raise ValueError(f"moments must have {layout.view[1]} channels, got {moments.mean.size}")
    if moments.count == 0 and normalized_in(layout, selection):
        raise ValueError("moments must cover at least one value, got count = 0")


@overload
def backward(
    dy: ArrayLike,
    saved: Saved[Float],
    *,
    through: Through = ...,
    need: Literal["dx"] = ...,
    out: NDArray[Float] | None = None,
    **how: Unpack[_keywords.Backward],
) -> Gradients[NDArray[Float]]: ...
@overload
def backward(
    dy: ArrayLike,
    saved: Saved[Float],
    *,
    through: Through = ...,
    need: Need,
    out: NDArray[Float] | None = None,
    **how: Unpack[_keywords.Backward],
) -> Gradients[NDArray[Float] | None]: ...
def backward(
    dy: ArrayLike,
    saved: Saved,
    *,
    through: Through = THROUGH,
    dmean: ArrayLike | None = None,
    dvar: ArrayLike | None = None,
    sums: GradientSums | None = None,
    need: Need = NEED,
    out: Array | None = None,
    num_threads: int | None = None,
) -> Gradients:
    """Gradients of `forward`: dx = gamma·rstd·(dy − dbeta/n − xhat·dgamma/n), where dy stands for dy·act′.

    dbeta = Σdy and dgamma = Σdy·xhat over all axes but the channel axis, with xhat = (x − μ)·rstd and
    rstd = 1/√(σ² + eps). The gradient also passes through the batch's mean and variance: it is the sum of a direct
    path, dy·gamma·rstd, a path through the mean, −gamma·rstd·dbeta/n, and a path through the variance,
    −gamma·rstd·xhat·dgamma/n.

    With an activation, dy·act′ replaces dy everywhere. Where its argument is at most 0, act′ is 0 for ReLU and the
    slope for leaky ReLU; for clip it is 0 at and beyond both bounds; elsewhere it is 1. The gradient with respect to
    `add` is dadd = dy·act′.

    Parameters
    ----------
    dy : array_like
        Upstream gradient, of x's shape and dtype.
    saved : Saved
        From `forward`.
    through : {"mean", "variance"} or collection of them, optional
        The statistics through which the gradient passes, both by default. `through="mean"` treats the variance as a
        constant. `through=()` treats both as constants, which leaves the direct path.
    dmean, dvar : array_like, shape (C,), optional
        Upstream gradients of `saved.mean` and `saved.var`, for a loss that depends on them directly. They add
        dmean/n + dvar·2(x − μ)/n to dx, whatever `through` is.
    sums : GradientSums, optional
        Sums over all values that were normalized with the `moments` given to `forward`, instead of those of dy alone:
        `grad_sums` of each part, added up. dgamma and dbeta are then those of all parts.
    need : {"dx", "dgamma", "dbeta", "dadd"} or collection of them, optional
        The gradients to compute, all by default; the others are None.
    out : ndarray, optional
        Where to write dx: an array of x's shape and dtype. `out=dy` is allowed, other overlaps are not.
    num_threads : int, optional
        Threads for this call. The result does not depend on it.

    Returns
    -------
    Gradients
        A named tuple (dx, dgamma, dbeta) with the attribute dadd. dx and dadd have x's dtype and memory order;
        dgamma and dbeta have the dtypes of gamma and beta. The gradient of an argument that was None is None.

    Raises
    ------
    TypeError
        If `saved` is not from `forward`, or the dtype of dy differs from x's.
    ValueError
        If the shape of dy, dmean or dvar is wrong, `through` or `need` contains an unknown name, `sums` covers fewer
        values than the statistics, or `out` is invalid. Nothing is written then.

    Notes
    -----
    Every value of x is treated as one of the n values in the statistics, so its dx includes the paths through them.
    If `forward` was given the `moments` of other values, those paths do not exist: use `through=()`, the direct path.
    dgamma and dbeta are right in both cases.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, section 3, the gradients after algorithm 1.

    Examples
    --------
    >>> import numpy as np, batchnorm as bn
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, saved = bn.forward(x, gamma=[1.0], beta=[0.0])
    >>> dy = np.array([[1.0], [0.0], [0.0]])
    >>> dx, dgamma, dbeta = bn.backward(dy, saved)
    >>> bool(abs(dx.sum()) < 1e-12)
    True
    >>> bn.backward(dy, saved, need="dbeta").dbeta
    array([1.])

    Where only some samples are in the statistics, the others have the direct path alone:

    >>> mask = np.array([True, True, False])
    >>> y, saved = bn.forward(x, moments=bn.Moments.of(x[mask]))
    >>> dx = np.where(mask[:, None], bn.backward(dy, saved).dx, bn.backward(dy, saved, through=()).dx)

    If the loss is μ itself, the gradient of every value of x is 1/n:

    >>> y, saved = bn.forward(x)
    >>> bn.backward(np.zeros((3, 1)), saved, dmean=[1.0]).dx.ravel().round(3)
    array([0.333, 0.333, 0.333])
    """
    if not isinstance(saved, Saved):
        raise TypeError(f"saved must be what forward returned, got {type(saved).__name__}")
    channels = saved._layout.view[1]
    table = np.empty((GRADIENT_ROWS, channels))
    paths = paths_through(through)
    if dmean is not None or dvar is not None:
        paths |= UPSTREAM
        table[UPSTREAM_DMEAN] = 0 if dmean is None else _arrays.as_channels(dmean, "dmean", channels)
        table[UPSTREAM_DVAR] = 0 if dvar is None else _arrays.as_channels(dvar, "dvar", channels)
    if sums is not None:
        _check_sums(sums, saved)
        table[SUM_DY : SUM_DY_XMU + 1] = sums._table
    if need is not NEED:
        need = as_names(need, "need", (*NEED, "dadd"))
    return gradients_of(dy, saved, paths, need, table, out, num_threads, sums is not None)


def _check_sums(sums: GradientSums, saved: Saved) -> None:
    if not isinstance(sums, GradientSums):
        raise TypeError(f"sums must be GradientSums, got {type(sums).__name__}")
    if sums.sum_dy.size != saved._layout.view[1]:
        raise ValueError(f"sums must have {saved._layout.view[1]} channels, got {sums.sum_dy.size}")
    wanted = max(saved.count, normalized_in(saved._layout, saved._selection))
    if sums.count < wanted:
        raise ValueError(f"sums must cover all values that were normalized, at least {wanted}, got {sums.count}")


def _check_out(out: Array, need: Collection[str], x: Array, dy: Array, named: str = "dy") -> None:
    if "dx" not in need:
        raise ValueError(f"out is for dx, so need must contain 'dx', got {need!r}")
    _arrays.check_out(out, x.shape, x.dtype)
    _arrays.check_overlap(out, {"x": x, named: dy}, (named,))


def check_backward(dy: ArrayLike, saved: Saved, need: Collection[str], out: Array | None) -> None:
    """Raise the errors that `backward` would raise for these arguments."""
    need, dy = as_names(need, "need", (*NEED, "dadd")), like_x(dy, saved)
    if out is not None:
        _check_out(out, need, saved.x, dy)


def gradients_of(
    dy: ArrayLike,
    saved: Saved,
    paths: int,
    need: Collection[str],
    table: NDArray[np.float64],
    out: Array | None,
    num_threads: int | None,
    summed: bool = False,
    named: str = "dy",
) -> Gradients:
    """The requested gradients; the table, which may already hold the sums, gets every gradient per channel."""
    x, layout, statistics, selection = saved._unchanged_x(), saved._layout, saved._statistics, saved._selection
    dtype, gamma_dtype, beta_dtype = saved._dtypes
    dy, size = like_x(dy, saved, named), x.size
    threads = _threads.threads_for(size, num_threads)
    if out is not None:
        _check_out(out, need, x, dy, named)
    limits, dadd, chosen = saved._limits, None, None
    n: float = layout.values
    if saved._counted is not None:
        n = saved._counted.weight
    if selection is not None:
        chosen, n = selection.chosen(), selection.scaled(n)
    wanted = saved._added and (need is NEED or "dadd" in need)
    if wanted or saved._closed is not None:
        dadd, _ = before_addition(dy, saved, threads)
        dy, limits = dadd, None
    dx = dgamma = dbeta = None
    if "dx" in need:
        dx = layout.empty(dtype) if out is None else layout.room(out, dtype)
    if "dgamma" in need and gamma_dtype is not None:
        dgamma = np.empty(layout.view[1], gamma_dtype)
    if "dbeta" in need and beta_dtype is not None:
        dbeta = np.empty(layout.view[1], beta_dtype)
    kernels = _kernels.of_type[x.dtype.char]
    dy = layout.bring(dy)
    if not size and not summed:
        table[...] = 0  # sums over no values
        summed = True
    if summed:
        per_channel.channel_gradients(statistics, table, dgamma, dbeta)
        if dx is not None and size:
            dy, x, seen = layout.seen(dy), layout.seen(x), layout.seen(dx)
            kernels.grad_apply(dy, x, seen, statistics, table, paths, n, threads, limits, chosen)
    elif dx is None:
        dy, x = layout.seen(dy), layout.seen(x)
        kernels.grad_sums(dy, x, statistics, table, dgamma, dbeta, threads, limits, chosen)
    else:
        dy, x, memory = layout.memory(dy, x, dx)
        kernels.backward(
            dy, x, memory, layout.view, statistics, table, dgamma, dbeta, paths, n, threads, limits, chosen
        )
    if dx is not None and out is not None:
        dx = _arrays.deliver(dx, out)
    gradients = tuple.__new__(Gradients, (dx, dgamma, dbeta))  # takes half as long as Gradients(…)
    if wanted:
        gradients.dadd = dadd
    return gradients


def _pass_back(dy: Array, closed: Bits, limits: Limits, layout: Layout, threads: int) -> Array:
    """dy·act′, from the bits that say where the activation is closed."""
    passed = layout.empty(dy.dtype)
    if dy.size:
        kernels = _kernels.of_type[dy.dtype.char]
        kernels.pass_back(layout.seen(layout.bring(dy)), closed, layout.seen(passed), limits, threads)
    return passed


def closed_at(
    x: Array, layout: Layout, statistics: NDArray[np.float64], limits: Limits, add: Array | None, threads: int
) -> Bits:
    """Where the activation is closed, from a forward pass with known statistics."""
    closed = _activation.empty_bits(x.size)
    if x.size:
        normalize(x, layout.empty(x.dtype), layout, statistics, threads, (limits, add, closed))
    return closed


def before_addition(dy: Array, saved: Saved, threads: int | None = None) -> tuple[Array, Saved]:
    """dadd = dy·act′, and `saved` for the normalization alone; both unchanged if nothing was added."""
    if not saved._added:
        return dy, saved
    layout, limits, closed = saved._layout, saved._limits, saved._closed
    if limits is None or closed is None:
        dadd = layout.copy(dy)  # because dx may be written over dy
    else:
        dadd = _pass_back(dy, closed, limits, layout, threads or _threads.threads_for(dy.size, None))
    if saved._selection is not None:
        saved._selection.blank(dadd, layout)
    return dadd, normalization_of(saved)


def normalization_of(saved: Saved) -> Saved:
    """The same without what follows the normalization."""
    if saved._limits is None and not saved._added:
        return saved
    statistics, dtypes, counted = saved._statistics, saved._dtypes, saved._counted
    return Saved(saved.x, saved.eps, saved._layout, statistics, dtypes, counted, saved._selection)


def upstream(dy: ArrayLike, saved: Saved) -> Array:
    """The gradient with respect to the normalized values: dy·act′."""
    dy, layout, limits, closed = like_x(dy, saved), saved._layout, saved._limits, saved._closed
    if limits is None:
        return dy
    threads = _threads.threads_for(dy.size, None)
    if closed is None:
        closed = closed_at(saved.x, layout, saved._statistics, limits, None, threads)
    return _pass_back(dy, closed, limits, layout, threads)


def grad_sums(dy: ArrayLike, saved: Saved, *, num_threads: int | None = None) -> GradientSums:
    """The sums that `backward` needs, Σdy and Σdy·(x − μ) over all axes but the channel axis.

    Add up the sums of all parts of a batch and pass them to `backward(dy, saved, sums=...)`. With the sums of dy alone,
    `backward` gives the same bits as without them.

    Parameters
    ----------
    dy : array_like
        Upstream gradient, of x's shape and dtype.
    saved : Saved
        From `forward`.
    num_threads : int, optional
        Threads for this call. The result does not depend on it.

    Returns
    -------
    GradientSums

    Raises
    ------
    TypeError, ValueError
        As for `backward`.

    Examples
    --------
    >>> import numpy as np, batchnorm as bn
    >>> x, dy = np.array([[1.0], [2.0], [6.0]]), np.array([[1.0], [0.0], [5.0]])
    >>> moments = bn.Moments.of(x[:1]) + bn.Moments.of(x[1:])
    >>> saved = [bn.forward(part, moments=moments)[1] for part in (x[:1], x[1:])]
    >>> sums = bn.grad_sums(dy[:1], saved[0]) + bn.grad_sums(dy[1:], saved[1])
    >>> sums
    GradientSums(count=3, sum_dy=[6.], sum_dy_xmu=[13.])
    >>> dx = bn.backward(dy[1:], saved[1], sums=sums).dx
    """
    if not isinstance(saved, Saved):
        raise TypeError(f"saved must be what forward returned, got {type(saved).__name__}")
    x, layout, limits, chosen = saved.x, saved._layout, saved._limits, chosen_by(saved._selection)
    dy = like_x(dy, saved)
    table = np.zeros((GRADIENT_ROWS, layout.view[1]))
    if x.size:
        threads = _threads.threads_for(x.size, num_threads)
        if saved._closed is not None:
            (dy, _), limits = before_addition(dy, saved, threads), None
        kernels = _kernels.of_type[x.dtype.char]
        views = layout.seen(layout.bring(dy)), layout.seen(x)
        kernels.grad_sums(*views, saved._statistics, table, None, None, threads, limits, chosen)
    normalized = Tally.of_all(normalized_in(layout, saved._selection))
    return GradientSums._made(normalized, table[SUM_DY : SUM_DY_XMU + 1])


def own_parameters(sums: GradientSums, saved: Saved) -> tuple[Array | None, Array | None]:
    """dgamma and dbeta over the summed values, which may be only some of those in the statistics."""
    channels = saved._layout.view[1]
    table = np.empty((GRADIENT_ROWS, channels))
    table[SUM_DY : SUM_DY_XMU + 1] = sums._table
    _, *dtypes = saved._dtypes
    dgamma, dbeta = (None if dtype is None else np.empty(channels, dtype) for dtype in dtypes)
    per_channel.channel_gradients(saved._statistics, table, dgamma, dbeta)
    return dgamma, dbeta


def update_running(
    running_mean: Array,
    running_var: Array,
    saved: Saved,
    *,
    momentum: float = 0.1,
    unbiased: bool = True,
) -> None:
    """Move the running statistics towards this batch, in place: r ← (1 − momentum)·r + momentum·batch.

    `momentum` is the weight of the NEW batch, as in PyTorch; in Keras, Flax and ONNX it is that of the old value.
    The batch contributes its unbiased variance σ²·n/(n − 1), as in PyTorch and the paper, unless `unbiased` is false.
    With weights the factor is W/(W − Σw²/W), as in `np.cov(aweights=)`. An empty batch changes nothing.

    Parameters
    ----------
    running_mean, running_var : ndarray of float32 or float64, shape (C,)
        Changed in place; both must have the same dtype. The update is computed in float64 and rounded once.
    saved : Saved
        From `forward`.
    momentum : float, default 0.1
        Between 0 and 1.
    unbiased : bool, default True
        Multiply the batch variance by n/(n − 1); needs n > 1.

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If a shape or `momentum` is invalid, an array is read-only, the two share memory, or n = 1 with `unbiased`.
        Nothing is written then.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, algorithm 2, step 10 (unbiased variance).

    Examples
    --------
    >>> import numpy as np, batchnorm as bn
    >>> y, saved = bn.forward(np.array([[1.0], [3.0]]))
    >>> mean, var = np.zeros(1), np.ones(1)
    >>> bn.update_running(mean, var, saved, momentum=0.5)
    >>> mean, var
    (array([1.]), array([1.5]))
    """
    if not isinstance(saved, Saved):
        raise TypeError(f"saved must be what forward returned, got {type(saved).__name__}")
    channels = saved._layout.view[1]
    for name, array in (("running_mean", running_mean), ("running_var", running_var)):
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{name} must be a numpy array, because it is changed in place, got {type(array).__name__}")
        if _arrays.as_float(array, name) is not array or not array.flags.aligned:
            raise TypeError(f"{name} must be an aligned array in native byte order, because it is changed in place")
        if array.itemsize == 2:
            raise TypeError(
                f"{name} must have dtype float32 or float64, because it moves by small steps, got {array.dtype}"
            )
        if array.shape != (channels,):
            raise ValueError(f"{name} must have shape ({channels},), got {array.shape}")
        if not array.flags.writeable:
            raise ValueError(f"{name} must be writeable, got a read-only array")
    if running_mean.dtype != running_var.dtype:
        raise TypeError(
            f"running_var must have the dtype of running_mean, {running_mean.dtype}, got {running_var.dtype}"
        )
    if np.shares_memory(running_mean, running_var):
        raise ValueError("running_mean and running_var must not overlap")
    momentum = _arrays.as_momentum(momentum)
    tally = saved._tally
    if tally.values and unbiased and not tally.has_spread:
        raise ValueError(
            f"the unbiased variance needs more than one value per channel, got x of shape {saved._layout.shape} with "
            f"axis={saved.axis}; pass unbiased=False or a larger batch"
        )
    if tally.values:
        correction = tally.correction() if unbiased else 1.0
        per_channel.update_running(running_mean, running_var, saved._statistics, momentum, correction)
