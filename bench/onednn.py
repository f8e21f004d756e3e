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
FORWARD, INFERENCE, BACKWARD = 64, 96, 128
FIXED_STATISTICS, SCALE_AND_SHIFT = 1, 2 | 4
ARGUMENTS = {
    "x": 1,
    "y": 17,
    "mean": 49,
    "var": 50,
    "gamma": 51,
    "beta": 52,
    "dx": 129,
    "dy": 145,
    "dgamma": 255,
    "dbeta": 256,
}


class Argument(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_int), ("memory", ctypes.c_void_p))


@cache
def library():
    (path,) = (file.locate() for file in metadata.files(PACKAGE) if file.name == "libdnnl.so.3")
    return ctypes.CDLL(str(path))


def made(what, *arguments):
    """A handle to what the C function `dnnl_{what}_create` makes."""
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


def calls(problem, threads):
    if problem.x.dtype.name not in DATA_TYPES:
        return {}
    library().omp_set_num_threads(threads)
    engine = made("engine_create", CPU, ctypes.c_size_t(0))
    stream = made("stream_create", engine, IN_ORDER)
    x, dy, out = (np.moveaxis(array, problem.axis, 1) for array in (problem.x, problem.dy, problem.out))
    _, _, gamma, beta, mean, var, _, _ = problem
    eps, layout = ctypes.c_float(EPS), described(x)

    def executed(description, **arrays):
        primitive = made("primitive_create", description)
        arguments = (Argument * len(arrays))()
        for argument, (name, array) in zip(arguments, arrays.items(), strict=True):
            pointer = ctypes.c_void_p(array.ctypes.data)
            argument.arg, argument.memory = ARGUMENTS[name], made("memory_create", described(array), engine, pointer).value

        def call(execute=library().dnnl_primitive_execute, kept_alive=arrays):
            execute(primitive, stream, len(arguments), arguments)
            return problem.out

        return call

    def forward(kind, flags):
        return made(
            "batch_normalization_forward_primitive_desc_create", engine, kind, layout, layout, eps, flags, None
        )

    training = forward(FORWARD, SCALE_AND_SHIFT)
    inference = forward(INFERENCE, SCALE_AND_SHIFT | FIXED_STATISTICS)
    backward = made(
        "batch_normalization_backward_primitive_desc_create",
        engine, BACKWARD, layout, layout, layout, eps, SCALE_AND_SHIFT, training, None,
    )
    batch_mean, batch_var, dgamma, dbeta = map(np.empty_like, (mean, var, gamma, beta))
    parameters = {"gamma": gamma, "beta": beta}
    return {
        "forward": executed(training, x=x, y=out, mean=batch_mean, var=batch_var, **parameters),
        "inference": executed(inference, x=x, y=out, mean=mean, var=var, **parameters),
        "backward": executed(
            backward, x=x, dy=dy, mean=mean, var=var, gamma=gamma, dx=out, dgamma=dgamma, dbeta=dbeta
        ),
    }
