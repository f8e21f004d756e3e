"""Tensors viewed as arrays and arrays as tensors, without a copy, in any memory order.

NumPy has no bfloat16: only for that, the package ml_dtypes is needed.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._arrays import Array

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _bfloat16() -> Any:
    try:
        from ml_dtypes import bfloat16
    except ImportError as error:
        raise ImportError(
            "batchnorm.torch needs the package ml_dtypes for bfloat16: python -m pip install ml_dtypes"
        ) from error
    return bfloat16


def as_array(tensor: Tensor) -> Array:
    """The tensor's memory as an array."""
    if tensor.dtype is torch.bfloat16:
        bits: Array = tensor.detach().view(torch.uint16).numpy().view(_bfloat16())
        return bits
    array: Array = tensor.detach().numpy()
    return array


def as_tensor(array: Array | None) -> Tensor:
    """The array's memory as a tensor."""
    assert array is not None
    if array.dtype.kind == "V":  # bfloat16
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_tensor_like(x: Tensor, array: Array | None) -> Tensor:
    """The same for an array with the layout of x, with exactly x's strides, even along axes of length 1."""
    tensor = as_tensor(array)
    return tensor if tensor.stride() == x.stride() else tensor.as_strided(x.shape, x.stride())


def dense(x: Tensor) -> Tensor:
    """x itself if its memory has no gaps, in any order of the axes; else a contiguous copy."""
    if x.is_contiguous():
        return x
    expected = 1
    for stride, length in sorted((stride, length) for stride, length in zip(x.stride(), x.shape, strict=True)):
        if length != 1:
            if stride != expected:
                return x.contiguous()
            expected *= length
    return x
