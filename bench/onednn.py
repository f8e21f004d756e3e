"""oneDNN's batch normalization, called through its C interface on NumPy's arrays.

- Frameworks call only some of its kernels. With the channels last these are the quickest that we know.
- Names and numbers are those of `dnnl.h` and `dnnl_types.h`, version 3.
- What a graph prepares once is prepared once: a call executes a primitive on memory that is known to it.
- Statistics, sums and results are written to arrays that exist.
"""

import ctypes
from functools import cache
from importlib import metadata

import numpy as np

from batchnorm.profile.measure import EPS

PACKAGE = "onednn-cpu-gomp"
CPU, IN_ORDER = 1, 1
DATA_TYPES = {"float16": 1, "bfloat16": 2, "float32": 3}
TRAINING, INFERENCE, BACKWARD = 64, 96, 128
FIXED_STATISTICS, SCALE_AND_SHIFT = 1, 2 | 4
ARGUMENTS = {"x": 1, "y": 17, "mean": 49, "var": 50, "gamma": 51, "beta": 52}
ARGUMENTS |= {"dx": 129, "dy": 145, "dgamma": 255, "dbeta": 256}


class Argument(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_int), ("memory", ctypes.c_void_p))


@cache
def library():
    (path,) = (file.locate() for file in metadata.files(PACKAGE) if file.name == "libdnnl.so.3")
    return ctypes.CDLL(str(path))


def made(what, *arguments):
    """The handle that the C function `dnnl_{what}` makes."""
    handle = ctypes.c_void_p()
    status = getattr(library(), f"dnnl_{what}")(ctypes.byref(handle), *arguments)
    if status:
        raise RuntimeError(f"dnnl_{what} returns status {status}")
    return handle


def described(array):
    """The description of an array whose channels are second, wherever they are in memory."""
    dims = (ctypes.c_int64 * 12)(*array.shape)
    strides = (ctypes.c_int64 * 12)(*(stride // array.itemsize for stride in array.strides))
    return made("memory_desc_create_with_strides", array.ndim, dims, DATA_TYPES[array.dtype.name], strides)


class Call:
    """A primitive with its memory: the arrays live as long as it does."""

    def __init__(self, description, engine, arrays, result):
        self.arrays, self.result = arrays, result
        self.primitive, self.stream = made("primitive_create", description), made("stream_create", engine, IN_ORDER)
        self.arguments = (Argument * len(arrays))()
        for argument, (name, array) in zip(self.arguments, arrays.items(), strict=True):
            argument.arg = ARGUMENTS[name]
            argument.memory = made("memory_create", described(array), engine, ctypes.c_void_p(array.ctypes.data)).value
        self.execute = library().dnnl_primitive_execute

    def __call__(self):
        self.execute(self.primitive, self.stream, len(self.arguments), self.arguments)
        return self.result


def calls(problem, threads):
    if problem.x.dtype.name not in DATA_TYPES:
        return {}
    library().omp_set_num_threads(threads)
    engine = made("engine_create", CPU, ctypes.c_size_t(0))
    x, dy, out = (np.moveaxis(array, problem.axis, 1) for array in (problem.x, problem.dy, problem.out))
    _, _, gamma, beta, mean, var, _, _ = problem
    layout, eps = described(x), ctypes.c_float(EPS)

    def forward(kind, flags):
        about = engine, kind, layout, layout, eps, flags | SCALE_AND_SHIFT, None
        return made("batch_normalization_forward_primitive_desc_create", *about)

    training = forward(TRAINING, 0)
    about = engine, BACKWARD, layout, layout, layout, eps, SCALE_AND_SHIFT, training, None
    backward = made("batch_normalization_backward_primitive_desc_create", *about)
    batch_mean, batch_var, dgamma, dbeta = map(np.empty_like, (mean, var, gamma, beta))
    fixed = {"x": x, "y": out, "mean": mean, "var": var, "gamma": gamma, "beta": beta}
    sums = {"x": x, "dy": dy, "mean": mean, "var": var, "gamma": gamma, "dx": out, "dgamma": dgamma, "dbeta": dbeta}
    return {
        "forward": Call(training, engine, fixed | {"mean": batch_mean, "var": batch_var}, problem.out),
        "backward": Call(backward, engine, sums, problem.out),
        "inference": Call(forward(INFERENCE, FIXED_STATISTICS), engine, fixed, problem.out),
    }
