"""The kernels for float32, compiled once for each level of instructions."""
cdef extern from *:
    "#define BATCHNORM_SINGLE 1"

ctypedef float real
ctypedef real stored

include "kernels.pxi"
