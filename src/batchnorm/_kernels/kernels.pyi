"""The functions of every compiled kernel module, for one dtype each.

x, y, dy and dx are views of shape (N, C, S), or contiguous memory beside a `view`, which is that shape.

`statistics` and `gradients` are float64 tables with the rows that `runtime` names and one column per channel.
`activation` is (low, high, slope), and `closed` has one bit per value that says where it is closed. `selection` is
(mask, lengths, places of a sequence, weights, fill): which of the N·S places count, how many at the start of each
sequence, or how much each counts.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from . import Bits, Chosen, Limits, Three

View = NDArray[np.floating[Any]]
Memory = NDArray[np.floating[Any]]
PerChannel = NDArray[np.floating[Any]]
Table = NDArray[np.float64]

class Kernels(Protocol):
    def moments(
        self, x: View, statistics: Table, eps: float, num_threads: int, selection: Chosen | None = None
    ) -> None: ...
    def forward(
        self,
        x: Memory,
        y: Memory,
        view: Three,
        statistics: Table,
        gamma: PerChannel | None,
        beta: PerChannel | None,
        eps: float,
        num_threads: int,
        activation: Limits | None = None,
        add: Memory | None = None,
        closed: Bits | None = None,
        selection: Chosen | None = None,
    ) -> None: ...
    def normalize(
        self,
        x: Memory,
        y: Memory,
        view: Three,
        statistics: Table,
        num_threads: int,
        activation: Limits | None = None,
        add: Memory | None = None,
        closed: Bits | None = None,
        selection: Chosen | None = None,
    ) -> None: ...
    def coefficients(self, statistics: Table, table: Table) -> bool: ...
    def normalize_prepared(
        self,
        x: Memory,
        y: Memory,
        view: Three,
        table: Table,
        fit: bool,
        num_threads: int,
        activation: Limits | None = None,
        add: Memory | None = None,
    ) -> None: ...
    def grad_sums(
        self,
        dy: View,
        x: View,
        statistics: Table,
        gradients: Table,
        dgamma: PerChannel | None,
        dbeta: PerChannel | None,
        num_threads: int,
        activation: Limits | None = None,
        selection: Chosen | None = None,
    ) -> None: ...
    def grad_apply(
        self,
        dy: View,
        x: View,
        dx: View,
        statistics: Table,
        gradients: Table,
        through: int,
        count: float,
        num_threads: int,
        activation: Limits | None = None,
        selection: Chosen | None = None,
    ) -> None: ...
    def backward(
        self,
        dy: Memory,
        x: Memory,
        dx: Memory,
        view: Three,
        statistics: Table,
        gradients: Table,
        dgamma: PerChannel | None,
        dbeta: PerChannel | None,
        through: int,
        count: float,
        num_threads: int,
        activation: Limits | None = None,
        selection: Chosen | None = None,
    ) -> None: ...
    def pass_back(self, dy: View, closed: Bits, out: View, activation: Limits, num_threads: int) -> None: ...
    def partition(
        self, view: Three, arrays: int, ordered: bool, selected: bool = False, copied: bool = False
    ) -> list[tuple[int, int, int, int, int, int]]: ...

class Float64Kernels(Kernels, Protocol):
    def fix_statistics(
        self,
        statistics: Table,
        channels: int,
        mean: PerChannel,
        m2: PerChannel,
        gamma: PerChannel | None,
        beta: PerChannel | None,
        eps: float,
        mean_low: PerChannel | None = None,
        count: float = 1,
    ) -> int: ...
