"""A batch norm with fixed statistics, folded into the weights of the layer before or after it.

Decisions:

- Everything is computed in float64 and rounded once, to the dtype of weight or bias. (torch rounds s first.)
- Letters name the axes of weight, as in einsum. They give the input and output channel of every weight, as integers
  that broadcast to weight's shape. So one formula serves all layers, layouts and groups.
- Subnormal numbers become 0 and are counted, because processors are slow with them. Those of float16 stay: they are
  normal numbers in float32, in which float16 is computed.
- NaN and infinities in the arguments pass through. A finite number that the dtype cannot hold is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _arrays
from ._arrays import Array, Float
from ._kernels.runtime import RSTD
from .fixed import table_of

if TYPE_CHECKING:
    from . import _keywords

BFLOAT16_BITS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Folded(Generic[Float]):
    """The result of `fold` and `fold_next`; `weight, bias = folded` unpacks the first two attributes.

    Attributes
    ----------
    weight : ndarray
        With the shape, dtype and memory order of the given weight.
    bias : ndarray, shape (output channels,)
        With the dtype of the given bias, or of weight if there was none.
    flushed : ndarray of int, shape (output channels,)
        Number of weights per channel that became 0 because they were too small for the dtype; usually 0.
    pad : ndarray, shape (input channels,), or None
        The values to pad x with, in weight's dtype; None without `padded`.
    """

    weight: NDArray[Float]
    bias: Array
    flushed: NDArray[np.intp]
    pad: NDArray[Float] | None = None

    def __iter__(self) -> Iterator[Array]:
        return iter((self.weight, self.bias))


class _Channels(NamedTuple):
    """The channels on one side of a layer."""

    of_weight: NDArray[np.intp]
    """The channel of every weight; broadcasts to its shape."""
    total: int
    shape: tuple[int, ...]
    """The shape of weight."""
    source: str
    """Where the total comes from, for error messages."""

    def numbers(self, value: ArrayLike | None, name: str, default: float = 0.0) -> NDArray[np.float64]:
        """The argument with one number per channel, in float64."""
        if value is None:
            return np.full(self.total, default)
        array = _arrays.as_float(value, name, True)
        if array.shape != (self.total,):
            hint = ""
            if array.ndim == 1 and array.size in self.shape:
                hint = f"; axis {self.shape.index(array.size)} of weight has {array.size}: is layout right?"
            raise ValueError(f"{name} must have shape ({self.total},) for {self.source}, got {array.shape}{hint}")
        return array.astype(np.float64)

    def sums(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Sums over the weights of each channel, in the order of the axes, whatever their memory order."""
        channel = np.broadcast_to(self.of_weight, values.shape)
        return np.bincount(channel.ravel(), values.ravel(), self.total).astype(np.float64)


def _axes_of(layout: Any, shape: tuple[int, ...]) -> dict[str, int]:
    """The axis that each letter names."""
    head, dots, tail = layout.partition("...") if isinstance(layout, str) else ("", "", "")
    letters = head + tail
    differ = letters.isascii() and letters.isalpha() and letters.isupper() and len(set(letters)) == len(letters)
    if not differ or "I" not in letters or ("O" in letters) == ("M" in letters):
        raise ValueError(
            "layout must name axes by different capital letters, I and either O or M among them, and may have '...' "
            f"once for further axes, as 'OI...' or 'HWIO'; got {layout!r}"
        )
    unnamed = len(shape) - len(letters)
    if unnamed < 0 or (unnamed and not dots):
        raise ValueError(f"layout must name the {len(shape)} axes of weight, of shape {shape}, got {layout!r}")
    return {letter: i if i < len(head) else i + unnamed for i, letter in enumerate(letters)}


def _channels_of(weight: Array, layout: str, groups: int, transposed: bool) -> tuple[_Channels, _Channels]:
    """Input and output channels."""
    axes, groups = _axes_of(layout, weight.shape), _arrays.as_index(groups, "groups")
    index: tuple[NDArray[np.intp], ...] = np.indices(weight.shape, sparse=True)
    outer, divided = "M" if "M" in axes else "O", "I" if transposed else "O"
    source = f"weight of shape {weight.shape} with layout={layout!r}, groups={groups}"
    if outer == "M" and (groups != 1 or transposed):
        raise ValueError(
            "groups must be 1 and transposed False if layout has M, which makes every input channel a group; "
            f"got groups={groups}, transposed={transposed}"
        )
    if groups < 1 or (outer == "O" and weight.shape[axes[divided]] % groups):
        raise ValueError(f"groups must be at least 1 and divide the length of axis {divided}, got {source}")
    i, o, inputs, outputs = index[axes["I"]], index[axes[outer]], weight.shape[axes["I"]], weight.shape[axes[outer]]
    if outer == "M":
        channels = (i, inputs), (i * outputs + o, inputs * outputs)
    elif transposed:
        channels = (i, inputs), (i // (inputs // groups) * outputs + o, groups * outputs)
    else:
        channels = (o // (outputs // groups) * inputs + i, groups * inputs), (o, outputs)
    return _Channels(*channels[0], weight.shape, source), _Channels(*channels[1], weight.shape, source)


class _BatchNorm(NamedTuple):
    scale: NDArray[np.float64]
    mean: NDArray[np.float64]
    beta: NDArray[np.float64]
    finite: NDArray[np.bool_]
    """Whether all of the channel's numbers are."""

    def of(self, x: NDArray[np.float64] | float) -> NDArray[np.float64]:
        return (x - self.mean) * self.scale + self.beta


def _batch_norm(
    channels: _Channels,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    eps: float,
) -> _BatchNorm:
    mean, var = channels.numbers(mean, "mean"), channels.numbers(var, "var")
    gamma, beta = channels.numbers(gamma, "gamma", 1.0), channels.numbers(beta, "beta")
    statistics, _ = table_of(mean, var, gamma, beta, eps, channels.total)
    finite = np.isfinite(mean) & np.isfinite(var) & np.isfinite(gamma) & np.isfinite(beta)
    return _BatchNorm(gamma * statistics[RSTD], mean, beta, finite)


def _least(dtype: np.dtype[Any]) -> float:
    """The smallest positive number that is not flushed to 0."""
    if dtype == np.float16:
        return 2.0**-24
    return float(np.finfo(dtype if dtype.kind == "f" else np.float32).tiny)  # bfloat16 has the exponents of float32


def _stored(
    values: NDArray[np.float64], dtype: np.dtype[Any], name: str, finite: NDArray[np.bool_], channel: NDArray[np.intp]
) -> Array:
    """The values rounded once, subnormals as 0; an error if one overflows although the arguments are finite."""
    rounded = values
    if dtype != np.float16:
        rounded = np.where(abs(values) < _least(dtype), 0.0, values)
    if dtype.kind != "f":  # bfloat16, which ml_dtypes would round to float32 first
        fraction, exponent = np.frexp(rounded)
        rounded = np.ldexp(np.rint(np.ldexp(fraction, BFLOAT16_BITS)), exponent - BFLOAT16_BITS)
    stored = rounded.astype(dtype)
    too_large = finite & ~np.isfinite(stored)
    if too_large.any():
        value, where = values[too_large][0], np.broadcast_to(channel, values.shape)[too_large][0]
        raise ValueError(f"{name} must fit {dtype} when folded, got {value:.7g} in channel {where}; give a wider dtype")
    return stored


def _folded(
    weight: Array,
    bias: ArrayLike | None,
    shifted: NDArray[np.float64],
    norm: _BatchNorm,
    normalized: _Channels,
    outputs: _Channels,
    pad: Array | None = None,
) -> Folded[Any]:
    """W' = W·s, with s of the normalized channel, and b' as given."""
    channel = normalized.of_weight
    scale = norm.scale[channel]
    finite = np.isfinite(weight) & norm.finite[channel]
    result = np.empty_like(weight)
    result[...] = _stored(weight.astype(np.float64) * scale, weight.dtype, "weight", finite, channel)
    flushed = outputs.sums((result == 0) & (weight != 0) & (scale != 0)).astype(np.intp)
    finite = (outputs.sums(~finite) == 0) & np.isfinite(outputs.numbers(bias, "bias"))
    dtype = weight.dtype if bias is None else _arrays.as_float(bias, "bias", True).dtype
    return Folded(result, _stored(shifted, dtype, "bias", finite, np.arange(outputs.total)), flushed, pad)


def _padding(dtype: np.dtype[Any], norm: _BatchNorm) -> Array:
    """p = −t/s, which the batch norm turns into 0."""
    shift = norm.of(0.0)
    # Below this limit p is so large that p times the rounding error of W·s is not small beside W·t.
    least = _least(dtype) / _arrays.precision_of(np.empty(0, dtype))
    lost = np.flatnonzero((abs(norm.scale) < least) & (shift != 0))
    if lost.size:
        raise ValueError(
            f"padded must be False if gamma/√(var + eps) is 0 or close to it, got {norm.scale[lost[0]]:.7g} in channel "
            f"{lost[0]}: no value of x becomes 0 there"
        )
    pad = np.divide(-shift, norm.scale, out=np.zeros_like(shift), where=shift != 0)
    return _stored(pad, dtype, "pad", norm.finite, np.arange(pad.size))


@overload
def fold(
    weight: NDArray[Float],
    bias: ArrayLike | None,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    **how: Unpack[_keywords.Fold],
) -> Folded[Float]: ...
@overload
def fold(
    weight: ArrayLike,
    bias: ArrayLike | None,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    **how: Unpack[_keywords.Fold],
) -> Folded[Any]: ...
def fold(
    weight: ArrayLike,
    bias: ArrayLike | None,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    layout: str | None = None,
    groups: int = 1,
    transposed: bool = False,
    eps: float = 1e-5,
) -> Folded[Any]:
    """Fold a batch norm into the layer before it: W' = W·s along the output channels, b' = (b − mean)·s + beta.

    s = gamma/√(var + eps). The layer with W' and b' computes the same as the layer with W and b followed by batch norm,
    for any stride, dilation and padding. The layer must be linear: a convolution, transposed or not, or a dense layer.

    Parameters
    ----------
    weight : array_like of float64, float32, float16 or bfloat16
        Axes as named by `layout`.
    bias : array_like, shape (output channels,), or None
        0 where None. Integers become float64.
    mean, var : array_like, shape (output channels,)
        Usually the running statistics; var is not negative. Integers become float64.
    gamma, beta : array_like, shape (output channels,), optional
        Scale and shift; 1 and 0 where None. Integers become float64.
    layout : str, optional
        A letter for each axis of weight: O for output channels and I for input channels. For a depthwise convolution, M
        instead of O stands for the outputs of each input channel (output i·M + m). Other capital letters name other
        axes, and "..." any number of them. The default is PyTorch's: "OI...", and "IO..." with `transposed`. Keras and
        Flax use "HWIO" and "IO"; Keras also uses "HWIM" (depthwise) and "HWOI" (transposed).
    groups : int, default 1
        Groups of channels. I then counts the input channels of one group; with `transposed`, O the output channels.
    transposed : bool, default False
        Whether it is a transposed convolution; matters only for the default layout and with groups.
    eps : float, default 1e-5
        Added to the variance, under the root; finite, at least 0. A channel with var + eps = 0 gets W' = 0 and
        b' = beta.

    Returns
    -------
    Folded
        `weight, bias = fold(...)` unpacks it. Nothing is changed in place.

    Raises
    ------
    TypeError
        If a dtype is not supported.
    ValueError
        If `layout`, `groups`, a shape, `eps` or a variance is invalid, or a finite result overflows its dtype.

    Notes
    -----
    Computed in float64 and rounded once. Subnormal results become 0, except in float16, where they are normal numbers
    for float32 arithmetic; `Folded.flushed` counts the weights that became 0.

    References
    ----------
    Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018,
    arXiv:1712.05877, section 3.2.

    Examples
    --------
    >>> import numpy as np, batchnorm as bn
    >>> x, W = np.array([[1.0, 2.0]]), np.array([[1.0, 0.0], [3.0, -1.0]])  # a dense layer, (out, in)
    >>> weight, bias = bn.fold(W, [1.0, 1.0], mean=[2.0, 0.0], var=[4.0, 1.0], gamma=[1.0, 3.0], eps=0.0)
    >>> weight, bias
    (array([[ 0.5,  0. ],
           [ 9. , -3. ]]), array([-0.5,  3. ]))
    >>> x @ weight.T + bias
    array([[0., 6.]])
    >>> bn.inference(x @ W.T + 1, mean=[2.0, 0.0], var=[4.0, 1.0], gamma=[1.0, 3.0], eps=0.0)
    array([[0., 6.]])
    """
    array = _arrays.as_float(weight, "weight")
    layout = layout if layout is not None else "IO..." if transposed else "OI..."
    _, outputs = _channels_of(array, layout, groups, transposed)
    with np.errstate(all="ignore"):
        norm = _batch_norm(outputs, mean, var, gamma, beta, eps)
        return _folded(array, bias, norm.of(outputs.numbers(bias, "bias")), norm, outputs, outputs)


@overload
def fold_next(
    weight: NDArray[Float],
    bias: ArrayLike | None,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    **how: Unpack[_keywords.FoldNext],
) -> Folded[Float]: ...
@overload
def fold_next(
    weight: ArrayLike,
    bias: ArrayLike | None,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    **how: Unpack[_keywords.FoldNext],
) -> Folded[Any]: ...
def fold_next(
    weight: ArrayLike,
    bias: ArrayLike | None,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    layout: str = "OI...",
    groups: int = 1,
    padded: bool = False,
    eps: float = 1e-5,
) -> Folded[Any]:
    """Fold a batch norm into the layer after it: W'[o, i] = W[o, i]·s_i, b'[o] = b[o] + ΣW[o, i, k]·t_i over i and k.

    s = gamma/√(var + eps) and t = beta − mean·s. The layer with W' and b' on x computes the same as batch norm on x
    followed by the layer with W and b. This is exact without padding, and with padding that repeats values of x
    (reflect, replicate, circular). If the layer pads with 0, x must be padded with p = −t/s, the value that batch norm
    turns into 0. `padded` returns p as `Folded.pad`: pad channel i of x with p_i instead of 0, or the border is wrong.

    There is no `transposed`: the outputs of a transposed convolution see different taps of its kernel at different
    positions, so t adds different sums to them, which no bias can do.

    Parameters
    ----------
    weight, layout, eps
        As in `fold`; "OI..." by default.
    bias : array_like, shape (output channels,), or None
        0 where None. Integers become float64.
    mean, var : array_like, shape (input channels,)
        Usually the running statistics; var is not negative. Integers become float64.
    gamma, beta : array_like, shape (input channels,), optional
        Scale and shift; 1 and 0 where None. Integers become float64.
    groups : int, default 1
        Groups of channels; I then counts the input channels of one group.
    padded : bool, default False
        Whether the layer pads its input with 0.

    Returns
    -------
    Folded
        With `pad`, rounded to weight's dtype, if `padded`.

    Raises
    ------
    TypeError
        If a dtype is not supported.
    ValueError
        As for `fold`. With `padded` also if s is 0, or too close to 0 for the dtype, in a channel whose t is not 0:
        then p does not exist.

    Notes
    -----
    As for `fold`.

    References
    ----------
    Yvinec, Dapogny and Bailly, "To Fold or Not to Fold: a Necessary and Sufficient Condition on Batch-Normalization
    Layers Folding", 2022, arXiv:2203.14646.

    Examples
    --------
    >>> import numpy as np, batchnorm as bn
    >>> W = np.array([[[1.0, 2.0, 1.0]]])  # a convolution of one channel, along a line
    >>> folded = bn.fold_next(W, None, mean=[3.0], var=[4.0], beta=[1.0], eps=0.0, padded=True)
    >>> folded.weight, folded.bias, folded.pad
    (array([[[0.5, 1. , 0.5]]]), array([-2.]), array([1.]))
    >>> x = np.array([5.0, 3.0, 1.0])
    >>> y = bn.inference(x.reshape(1, 1, 3), mean=[3.0], var=[4.0], beta=[1.0], eps=0.0).ravel()
    >>> np.convolve(np.pad(y, 1), W.ravel(), "valid")
    array([5., 4., 1.])
    >>> np.convolve(np.pad(x, 1, constant_values=folded.pad[0]), folded.weight.ravel(), "valid") + folded.bias
    array([5., 4., 1.])
    >>> np.convolve(np.pad(x, 1), folded.weight.ravel(), "valid") + folded.bias  # the border is wrong
    array([4.5, 4. , 0.5])
    """
    array = _arrays.as_float(weight, "weight")
    inputs, outputs = _channels_of(array, layout, groups, transposed=False)
    with np.errstate(all="ignore"):
        norm = _batch_norm(inputs, mean, var, gamma, beta, eps)
        pad = _padding(array.dtype, norm) if padded else None
        shift = norm.of(0.0)[inputs.of_weight]
        shifted = outputs.numbers(bias, "bias") + outputs.sums(array.astype(np.float64) * shift)
        return _folded(array, bias, shifted, norm, inputs, outputs, pad)
