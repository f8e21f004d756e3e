"""The kernels for float64, compiled once for each level of instructions."""
cdef extern from *:
    "#define BATCHNORM_SINGLE 0"

ctypedef double real
ctypedef real stored

include "kernels.pxi"
