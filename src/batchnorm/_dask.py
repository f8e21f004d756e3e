"""A dask array, processed piece by piece on the workers that hold its chunks.

Decisions:

- Dask is imported only if a dask array is passed.
- Samples are cut anew, so that each piece begins at a block of the stream and the result does not depend on the chunks.
  Only the rest of a block moves from one worker to another, and only results come back.
- Chunks along other axes are refused: joining them could move all of the data.
"""

from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


def array_in(value: Any) -> Any:
    """The dask array that the object is, or that an xarray object holds; None if there is none."""
    if hasattr(value, "to_dask_array"):
        raise TypeError("a data frame of Dask must come as an array: pass x.to_dask_array(lengths=True)")
    for array in (value, getattr(value, "data", None)):
        if hasattr(array, "__dask_graph__") and hasattr(array, "rechunk"):
            return array
    return None


def check_chunks(array: Any, sample: int) -> None:
    """Check that the array is cut along its samples alone, into chunks of known sizes."""
    if any(length != length for length in array.shape):
        raise ValueError("a dask array must have chunks of known sizes: pass x.compute_chunk_sizes()")
    others = {axis: -1 for axis, pieces in enumerate(array.numblocks) if pieces > 1 and axis != sample}
    if others:
        raise ValueError(
            f"a dask array must be cut along axis {sample} alone, the samples, got {array.numblocks} chunks; "
            f"pass x.rechunk({others})"
        )


def of_pieces(array: Any, sample: int, rows: int, function: Callable[..., Result], *arguments: Any) -> list[Result]:
    """function(piece, *arguments) for all pieces in order; each begins at a multiple of `rows` samples."""
    import dask

    whole_blocks = max(1, array.chunksize[sample] // rows)
    pieces = array.rechunk({sample: whole_blocks * rows}).to_delayed().ravel()
    work = dask.delayed(function, pure=True)
    return list(dask.compute(*(work(piece, *arguments) for piece in pieces)))
