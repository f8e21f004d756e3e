"""The kernels for bfloat16 in memory, computed in float32, compiled once for each level of instructions."""
cdef extern from *:
    """
    #define BATCHNORM_SINGLE 1
    #define BATCHNORM_BFLOAT16 1
    """

ctypedef float real
ctypedef unsigned short stored

include "kernels.pxi"
