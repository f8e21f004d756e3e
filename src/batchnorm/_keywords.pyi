"""Keyword arguments that do not affect the type of a result, for the overloads of the functions named here.

An overload names x, `need` and `out`. It takes the rest as `**how: Unpack[…]`, so that overloads need not repeat them.
"""

from typing import TypedDict

from numpy.typing import ArrayLike

from ._activation import Activation
from .moments import GradientSums, Moments, Numbers

class _Pass(TypedDict, total=False):
    mask: ArrayLike | None
    lengths: ArrayLike | None
    add: ArrayLike | None
    num_threads: int | None

class Layer(_Pass, total=False):
    weights: ArrayLike | None
    fill: float

class Inference(_Pass, total=False):
    axis: int
    eps: float
    fill: float
    activation: Activation | None

class Forward(Inference, total=False):
    moments: Moments | None
    weights: ArrayLike | None

class InferenceBackward(_Pass, total=False):
    beta: ArrayLike | None
    axis: int
    eps: float
    activation: Activation | None

class Backward(TypedDict, total=False):
    dmean: ArrayLike | None
    dvar: ArrayLike | None
    sums: GradientSums | None
    num_threads: int | None

class LayerJvp(TypedDict, total=False):
    dgamma: ArrayLike | None
    dbeta: ArrayLike | None
    dadd: ArrayLike | None
    num_threads: int | None

class LayerDoubleBackward(TypedDict, total=False):
    ddgamma: ArrayLike | None
    ddbeta: ArrayLike | None
    ddadd: ArrayLike | None
    num_threads: int | None

class DoubleBackward(LayerDoubleBackward, total=False):
    sums: Numbers | None

class _Fold(TypedDict, total=False):
    groups: int
    eps: float

class Fold(_Fold, total=False):
    layout: str | None
    transposed: bool

class FoldNext(_Fold, total=False):
    layout: str
    padded: bool
