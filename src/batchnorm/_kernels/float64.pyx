"""The kernels for float64, compiled once for each level of instructions."""
cdef extern from *:
    "#define BATCHNORM_SINGLE 0"

ctypedef double real
ctypedef real stored

include "kernels.pxi"

from batchnorm._kernels.per_channel cimport fill_row


def fix_statistics(statistics, Py_ssize_t channels, mean, m2, gamma, beta, double eps, mean_low=None, double count=1):
    """Fill the table with given statistics, with var = m2/count; return the first channel with negative m2, or -1.

    All but plain arrays of floats raise ValueError or TypeError. The table is float64 for data of any type. This stands
    here because roots take half the time at a higher level.
    """
    cdef Py_ssize_t c, negative = 0, C = channels
    cdef double *s = borrow("statistics", statistics, STATISTICS_ROWS, C)
    if mean is None or m2 is None:
        raise TypeError("mean and m2 must be arrays, got None")
    fill_row(s + MEAN * C, mean, C, 0)
    fill_row(s + MEAN_LOW * C, mean_low, C, 0)
    fill_row(s + M2 * C, m2, C, 0)
    set_parameters(s, gamma, beta, C)
    for c in range(C):
        negative += s[M2 * C + c] < 0
    if negative:
        for c in range(C):
            if s[M2 * C + c] < 0:
                return c
    if count == 1:      # var itself is given, and divisions are slow
        memcpy(s + VAR * C, s + M2 * C, C * sizeof(double))
    else:
        set_var(s + VAR * C, s + M2 * C, C, count)
    set_rstd(s + RSTD * C, s + VAR * C, C, eps)
    return -1
