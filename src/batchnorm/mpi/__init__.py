"""Batch normalization over several processes, on mpi4py.

`SyncBatchNorm` is the layer with the statistics of all ranks; `mpiexec -n 4 python -m batchnorm.mpi` compares it to a
single process.
"""

from .exchange import Communicator, world
from .sync import SyncBatchNorm

__all__ = ["Communicator", "SyncBatchNorm", "world"]
