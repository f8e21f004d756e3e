"""A dask array, worked on piece by piece where its chunks are.

Decisions:

- Dask is imported only where a dask array came.
- Samples are cut anew, so that each piece begins with a block of the stream: what comes out does not depend on the
  chunks. Only the rest of such a block goes from one worker to another, and only results come back.
- Chunks along other axes are refused: putting them together could move all of the data.
"""

from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


def array_in(value: Any) -> Any:
    """The dask array that the object is, or holds as one of xarray does; None where there is none."""
    if hasattr(value, "to_dask_array"):
        raise TypeError("a data frame of Dask must come as an array: pass x.to_dask_array(lengths=True)")
    for array in (value, getattr(value, "data", None)):
        if hasattr(array, "__dask_graph__") and hasattr(array, "rechunk"):
            return array
    return None


def check_chunks(array: Any, sample: int) -> None:
    """The array must be cut along its samples alone, at places that are known."""
    if any(length != length for length in array.shape):
        raise ValueError("a dask array must have chunks of known sizes: pass x.compute_chunk_sizes()")
    others = {axis: -1 for axis, pieces in enumerate(array.numblocks) if pieces > 1 and axis != sample}
    if others:
        raise ValueError(
            f"a dask array must be cut along axis {sample} alone, the samples, got {array.numblocks} chunks; "
            f"pass x.rechunk({others})"
        )


def of_pieces(array: Any, sample: int, rows: int, function: Callable[..., Result], *arguments: Any) -> list[Result]:
    """function(piece, *arguments) of all pieces in their order; each piece begins at a multiple of `rows` samples."""
    import dask

    whole_blocks = max(1, array.chunksize[sample] // rows)
    pieces = array.rechunk({sample: whole_blocks * rows}).to_delayed().ravel()
    work = dask.delayed(function, pure=True)
    return list(dask.compute(*(work(piece, *arguments) for piece in pieces)))
