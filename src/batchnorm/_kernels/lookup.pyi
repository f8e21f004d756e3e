"""y of 8-bit integers, from a table."""

from typing import Any

from numpy.typing import NDArray

from . import Three

def look_up(
    x: NDArray[Any], y: NDArray[Any], table: NDArray[Any], view: Three, of_x: Three, of_y: Three, num_threads: int
) -> None: ...
