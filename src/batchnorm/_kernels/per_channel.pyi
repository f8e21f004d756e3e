"""Numbers per channel: the functions that fill, change and merge the float64 tables of the kernels."""

import numpy as np
from numpy.typing import NDArray

from .kernels import PerChannel, Table

Packet = NDArray[np.float64]

def channel_gradients(
    statistics: Table, gradients: Table, dgamma: PerChannel | None = None, dbeta: PerChannel | None = None
) -> None: ...
def moment_tangents(sums: Table, n: float, through: int) -> None: ...
def y_tangent(
    statistics: Table,
    tangents: Table,
    along: Table,
    dgamma: PerChannel | None = None,
    dbeta: PerChannel | None = None,
) -> None: ...
def merge(moments: Table, count: float, other: Table, other_count: float) -> None: ...
def merge_moments(lower: Packet, upper: Packet) -> None: ...
def merge_sums(lower: Packet, upper: Packet) -> None: ...
def weigh(weights: Table, places: int) -> tuple[float, float]: ...
def follow(block: PerChannel, statistics: Table, momentum: float | None, correction: float) -> None: ...
def update_running(
    running_mean: PerChannel,
    running_var: PerChannel,
    statistics: Table,
    momentum: float,
    correction: float,
) -> None: ...
