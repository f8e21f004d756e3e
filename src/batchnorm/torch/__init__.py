"""Batch normalization for PyTorch on the CPU with this package's kernels: `from batchnorm.torch import BatchNorm2d`.

Decisions:

- The modules are subclasses of PyTorch's and override only `forward`, so constructor, state dict and checks are
  PyTorch's own. `convert` changes the class of a module in place, so references to it and its parameters stay valid.
- Operators in the namespace `batchnorm` of `torch.ops` do the work. They have fake kernels for `torch.compile` and
  first and second derivatives. There is no third derivative and no forward mode.
- Tensors are viewed as NumPy arrays and results as tensors, without a copy, in any memory order. NumPy has no bfloat16:
  only for that, the package ml_dtypes is needed.
- PyTorch's number of threads applies, `torch.get_num_threads()`, and none of this package's settings. A forked child
  and small tensors are serial.
- PyTorch is not a dependency and in no extra, because it comes in several builds: install the one you want.
"""

try:
    import torch
    from torch import library
except ImportError as _error:
    raise ImportError(
        "batchnorm.torch needs PyTorch, see https://pytorch.org or python -m pip install torch"
    ) from _error

if not hasattr(library, "custom_op"):
    raise ImportError(f"batchnorm.torch needs PyTorch 2.4 or newer, found {torch.__version__}")

from .conversion import convert, revert
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, batch_norm
from .sync import SyncBatchNorm

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "batch_norm", "convert", "revert"]
