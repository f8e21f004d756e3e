"""What `forward` leaves for `backward`, and the gradients that `backward` returns.

Decisions:

- `Saved` refers to x and copies nothing: computing xhat again from x takes less time than reading it would.
- The gradients are named tuples of dx, dgamma and dbeta, so that they can be unpacked; what only some calls ask for is
  an attribute beside them.
"""

from typing import Any, Generic, NamedTuple, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from . import _activation
from ._activation import Activation
from ._arrays import Array, Float_co, Gradient_co, Layout, MaybeNone
from ._kernels import Bits, Limits
from ._kernels.runtime import GAMMA, MEAN, MEAN_LOW, RSTD, VAR
from ._selection import Selection, Tally


def _shape_and_dtype(array: Array | None) -> str:
    return "None" if array is None else f"<{array.dtype} {array.shape}>"


class _Gradients(NamedTuple, Generic[Gradient_co]):
    dx: Gradient_co
    dgamma: Array | MaybeNone
    dbeta: Array | MaybeNone


class Gradients(_Gradients[Gradient_co]):
    """Gradients with respect to x, gamma and beta; None if not requested or if there is no such parameter.

    The attribute `dadd` is the gradient with respect to `add`.
    """

    dadd: Array | MaybeNone = None

    def _replace(self, /, **changes: Any) -> Self:
        gradients = super()._replace(**changes)
        gradients.__dict__.update(self.__dict__)
        return gradients

    def _shown(self, *more: str) -> str:
        names = *self._fields, *more, *(("dadd",) if self.dadd is not None else ())
        return (
            f"{type(self).__name__}({', '.join(f'{name}={_shape_and_dtype(getattr(self, name))}' for name in names)})"
        )

    def __repr__(self) -> str:
        return self._shown()


class InferenceGradients(Gradients[Gradient_co]):
    """`Gradients` and those with respect to the fixed mean and var, `dmean` and `dvar`; None if not requested."""

    dmean: Array | MaybeNone = None
    dvar: Array | MaybeNone = None

    def __repr__(self) -> str:
        return self._shown("dmean", "dvar")


class Saved(Generic[Float_co]):
    """What `forward` leaves for `backward`: a reference to x (not a copy) and a few float64 numbers per channel.

    With both `add` and `activation` it also holds one bit per value. x must not change until `backward` has run. Its
    shape, strides and dtype are checked whenever it is used; its values are not. The object is read-only.

    Attributes
    ----------
    x : ndarray
        The input. Raises ValueError if it no longer has the shape, strides and dtype that `forward` saw.
    axis : int
        The channel axis, at least 0.
    eps : float
    count : int
        n, the number of values per channel in the statistics; with weights, only those whose weight is not 0.
    mean, var, rstd : ndarray of float64, shape (C,)
        Batch mean μ, biased variance σ² and 1/√(σ² + eps). Read-only.
    gamma : ndarray of float64, shape (C,)
        The scale that `forward` was given; 1 where it was None. Read-only.
    mean_low : ndarray of float64, shape (C,)
        Low-order part of μ: x − mean − mean_low keeps the digits of float64 data far from 0. Read-only.
    activation : str or tuple, or None
        As it was given.
    """

    __slots__ = (
        "_added",
        "_closed",
        "_counted",
        "_dtypes",
        "_eps",
        "_layout",
        "_limits",
        "_selection",
        "_statistics",
        "_x",
    )

    def __init__(
        self,
        x: NDArray[Float_co],
        eps: float,
        layout: Layout,
        statistics: NDArray[np.float64],
        dtypes: tuple[np.dtype[Any], np.dtype[Any] | None, np.dtype[Any] | None],
        counted: Tally | None = None,
        selection: Selection | None = None,
        limits: Limits | None = None,
        added: bool = False,
        closed: Bits | None = None,
    ) -> None:
        self._x = x
        self._eps = eps
        self._layout = layout
        self._statistics = statistics
        self._dtypes = dtypes
        self._counted = counted
        self._selection = selection
        self._limits = limits
        self._added = added
        self._closed = closed

    def __reduce__(self) -> tuple[Any, ...]:
        after = self._selection, self._limits, self._added, self._closed
        return _restored, (self.x, self._eps, self._layout, self._statistics, self._dtypes, self._counted, *after)

    @property
    def x(self) -> NDArray[Float_co]:
        return self._unchanged_x()

    def _unchanged_x(self) -> NDArray[Float_co]:
        x, layout, dtype = self._x, self._layout, self._dtypes[0]
        if x.dtype != dtype or x.shape != layout.shape or not layout.fits(x):
            raise ValueError(
                f"x must stay what forward saw, <{dtype} {layout.shape}>, until backward has run; "
                f"it is now {_shape_and_dtype(x)}"
            )
        return x

    @property
    def axis(self) -> int:
        return self._layout.axis

    @property
    def eps(self) -> float:
        return self._eps

    @property
    def count(self) -> int:
        return self._tally.values

    @property
    def _tally(self) -> Tally:
        """The values in the statistics: by default all values of x."""
        return Tally.of_all(self._layout.values) if self._counted is None else self._counted

    @property
    def activation(self) -> Activation | None:
        return _activation.activation_of(self._limits)

    def _row(self, row: int) -> NDArray[np.float64]:
        self._statistics.flags.writeable = False  # otherwise a view could be made writeable again
        array: NDArray[np.float64] = self._statistics[row]
        return array

    @property
    def mean(self) -> NDArray[np.float64]:
        return self._row(MEAN)

    @property
    def var(self) -> NDArray[np.float64]:
        return self._row(VAR)

    @property
    def rstd(self) -> NDArray[np.float64]:
        return self._row(RSTD)

    @property
    def gamma(self) -> NDArray[np.float64]:
        return self._row(GAMMA)

    @property
    def mean_low(self) -> NDArray[np.float64]:
        return self._row(MEAN_LOW)

    def __getitem__(self, item: object) -> NoReturn:
        """Refuse to be unpacked, which a hand-written backward pass would try."""
        raise TypeError(
            "what forward left is for batchnorm's own backward and has no items: read its attributes x, mean, var, "
            "rstd and gamma, or pair your own backward pass with your own forward pass"
        )

    def __repr__(self) -> str:
        after = "" if self._limits is None else f", activation={self.activation!r}"
        return f"Saved(x={_shape_and_dtype(self._x)}, axis={self.axis}, eps={self._eps}, count={self.count}{after})"


def _restored(x: Array, eps: float, layout: Layout, *rest: Any) -> Saved:
    """A copy of what `forward` left; pickle may have changed the memory order of x."""
    return Saved(layout.bring(x), eps, layout, *rest)
