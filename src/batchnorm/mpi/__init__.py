"""Batch normalization over several processes, on mpi4py.

`SyncBatchNorm` is the layer with the statistics of all ranks; `mpiexec -n 4 python -m batchnorm.mpi` compares it with
one process.
"""

from .sync import SyncBatchNorm, world

__all__ = ["SyncBatchNorm", "world"]
