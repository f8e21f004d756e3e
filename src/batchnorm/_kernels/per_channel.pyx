"""Numbers per channel, from NumPy arrays to the float64 tables of the kernels and back, and numbers per place.

Compiled only once, because its loops are short: they run over channels, not over values.
"""
from cpython.buffer cimport PyBUF_CONTIG, PyBUF_CONTIG_RO, PyBUF_STRIDED_RO, PyBuffer_Release, PyObject_GetBuffer
from libc.math cimport sqrt
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from batchnorm._kernels.runtime cimport (
    BETA, DGAMMA, DMEAN, DVAR, GAMMA, GRADIENT_ROWS, HEAD, M2, MEAN, MEAN_LOW, RSTD, STATISTICS_ROWS, STATUS, SUM_DY,
    SUM_DY_XMU, THROUGH_MEAN, THROUGH_VARIANCE, VALUES, VAR, WEIGHT)

import numpy

include "channel_formula.pxi"

cdef object ndarray = numpy.ndarray
cdef object FLOAT32 = numpy.dtype("f4")
cdef object FLOAT64 = numpy.dtype("f8")


cdef double *borrow(str name, table, Py_ssize_t rows, Py_ssize_t channels) except NULL:
    """The address of a table that the caller keeps alive; this takes 14 ns, a typed memoryview 150 ns."""
    cdef Py_buffer buffer
    cdef bint fits
    PyObject_GetBuffer(table, &buffer, PyBUF_CONTIG_RO)
    fits = buffer.ndim == 2 and buffer.shape[0] == rows and buffer.shape[1] == channels and buffer.itemsize == 8
    PyBuffer_Release(&buffer)
    if not fits:
        raise ValueError(f"{name} must be a table of {rows} × {channels} float64 numbers")
    return <double *> buffer.buf


cdef void *borrow_values(str name, values, Py_ssize_t least, Py_ssize_t itemsize, bint written) except NULL:
    """The address of contiguous values, which the caller keeps alive."""
    cdef Py_buffer buffer
    cdef bint fits
    PyObject_GetBuffer(values, &buffer, PyBUF_CONTIG if written else PyBUF_CONTIG_RO)
    fits = buffer.itemsize == itemsize and buffer.len >= least * itemsize
    PyBuffer_Release(&buffer)
    if not fits:
        raise ValueError(f"{name} must have {least} values of {itemsize} bytes or more")
    return buffer.buf


cdef int set_selection(Selection *chosen, selection, Py_ssize_t places, Py_ssize_t S, Py_ssize_t itemsize,
                       Py_ssize_t room) except -1:
    """Set the selection from (mask, lengths, period, weights, fill); None means that all values count alike."""
    memset(chosen, 0, sizeof(Selection))
    if selection is None:
        return 0
    mask, lengths, chosen.period, weights, chosen.fill = selection
    if mask is not None:
        chosen.mask = <const unsigned char *> borrow_values("mask", mask, places + room, 1, False)
    if lengths is not None:
        if chosen.period < 1 or places % chosen.period or S not in (1, chosen.period):
            raise ValueError(f"sequences of {chosen.period} places must fill rows of {S}, {places} in all")
        chosen.lengths = <const Py_ssize_t *> borrow_values("lengths", lengths, places // chosen.period,
                                                            sizeof(Py_ssize_t), False)
    if weights is not None:
        chosen.weights = borrow_values("weights", weights, places + room, itemsize, False)
    chosen.on, chosen.copied = True, weights is not None or (mask is not None and S == 1)
    return 0


cdef int refuse(Py_ssize_t channels) except -1:
    raise ValueError(f"there must be {channels} floating-point numbers, one per channel")


cdef plain(values, Py_ssize_t channels):
    """An array of native floats, or a copy in float32 if they have 16 bits; anything else is refused."""
    if type(values) is not ndarray:
        refuse(channels)
    dtype = values.dtype
    if dtype is FLOAT32 or dtype is FLOAT64 or dtype == FLOAT32 or dtype == FLOAT64:
        return values
    if dtype.itemsize != 2 or dtype.kind not in "fV" or not dtype.isnative:
        refuse(channels)
    return values.astype(FLOAT32)


cdef int get_buffer(values, Py_buffer *buffer, int flags, Py_ssize_t channels) except -1:
    PyObject_GetBuffer(values, buffer, flags)
    if buffer.ndim != 1 or buffer.shape[0] != channels:
        PyBuffer_Release(buffer)
        refuse(channels)
    return 0


cdef void widen(double *row, const char *values, Py_ssize_t itemsize, Py_ssize_t channels) noexcept nogil:
    """Fill a row from contiguous floats of 4 or 8 bytes."""
    cdef Py_ssize_t c
    cdef float two[2]
    if itemsize == sizeof(double):
        memcpy(row, values, channels * sizeof(double))
        return
    for c from 0 <= c < channels - 1 by 2:      # GCC 12's own vectors of four go through memory
        memcpy(two, values + c * sizeof(float), sizeof(two))
        row[c], row[c + 1] = two[0], two[1]
    if channels % 2:
        memcpy(two, values + (channels - 1) * sizeof(float), sizeof(float))
        row[channels - 1] = two[0]


cdef void narrow(char *values, const double *row, Py_ssize_t itemsize, Py_ssize_t channels) noexcept nogil:
    """Round a row to contiguous floats of 4 or 8 bytes."""
    cdef Py_ssize_t c
    cdef float single
    if itemsize == sizeof(double):
        memcpy(values, row, channels * sizeof(double))
    else:
        for c in range(channels):
            single = <float> row[c]
            memcpy(values + c * sizeof(float), &single, sizeof(float))


cdef int fill_row(double *row, values, Py_ssize_t channels, double otherwise) except -1:
    """Fill a row of a table from one number per channel, of any float type and stride, or None."""
    cdef Py_buffer buffer
    cdef Py_ssize_t c
    if values is None:
        for c in range(channels):
            row[c] = otherwise
        return 0
    values = plain(values, channels)
    get_buffer(values, &buffer, PyBUF_STRIDED_RO, channels)
    if buffer.strides[0] != buffer.itemsize:
        PyBuffer_Release(&buffer)
        return fill_row(row, values.copy(), channels, otherwise)
    widen(row, <const char *> buffer.buf, buffer.itemsize, channels)
    PyBuffer_Release(&buffer)
    return 0


cdef int take_row(const double *row, values, Py_ssize_t channels) except -1:
    """Copy a row of a table to one number per channel, of any float type; None is ignored."""
    cdef Py_buffer buffer
    if values is None:
        return 0
    numbers = plain(values, channels)
    get_buffer(numbers, &buffer, PyBUF_CONTIG, channels)
    narrow(<char *> buffer.buf, row, buffer.itemsize, channels)
    PyBuffer_Release(&buffer)
    if numbers is not values:
        values[...] = numbers
    return 0


cdef int take_parameters(const double *g, dgamma, dbeta, Py_ssize_t C) except -1:
    take_row(g + DGAMMA * C, dgamma, C)
    return take_row(g + SUM_DY * C, dbeta, C)


cdef int set_parameters(double *s, gamma, beta, Py_ssize_t C) except -1:
    fill_row(s + GAMMA * C, gamma, C, 1)
    return fill_row(s + BETA * C, beta, C, 0)


def channel_gradients(statistics, gradients, dgamma=None, dbeta=None):
    """Compute dgamma, dmean and dvar from the sums in `gradients`, and write dgamma and dbeta if given."""
    cdef Py_ssize_t c, C = gradients.shape[1]
    cdef const double *s = borrow("statistics", statistics, STATISTICS_ROWS, C)
    cdef double *g = borrow("gradients", gradients, GRADIENT_ROWS, C)
    cdef double scale
    for c in range(C):
        scale = scale_of(s[GAMMA * C + c], s[RSTD * C + c])
        g[DGAMMA * C + c] = dgamma_of(g[SUM_DY_XMU * C + c], s[RSTD * C + c])
        g[DMEAN * C + c] = dmean_of(scale, g[SUM_DY * C + c])
        g[DVAR * C + c] = dvar_of(scale, s[RSTD * C + c], g[DGAMMA * C + c])
    take_parameters(g, dgamma, dbeta, C)


def moment_tangents(sums, double n, int through):
    """Turn the sums of dx and of dx·(x − mean), in place, into the tangents of mean and var; 0 without a path."""
    cdef Py_ssize_t c, C = sums.shape[1]
    cdef double *t = borrow("sums", sums, 2, C)
    for c in range(C):
        t[c] = tangent_mean_of(t[c], n) if through & THROUGH_MEAN else 0
        t[C + c] = tangent_var_of(t[C + c], n) if through & THROUGH_VARIANCE else 0


def y_tangent(statistics, tangents, along, dgamma=None, dbeta=None):
    """Write slope and offset of the tangent of y, gamma·rstd·dx + slope·(x − mean) + offset."""
    cdef Py_ssize_t c, C = tangents.shape[1]
    cdef const double *s = borrow("statistics", statistics, STATISTICS_ROWS, C)
    cdef const double *t = borrow("tangents", tangents, 2, C)
    cdef double *slope = borrow("along", along, 2, C)
    cdef double *offset = slope + C
    fill_row(slope, dgamma, C, 0)
    fill_row(offset, dbeta, C, 0)
    for c in range(C):
        slope[c] = tangent_slope_of(s[GAMMA * C + c], s[RSTD * C + c], slope[c], t[C + c])
        offset[c] = tangent_offset_of(scale_of(s[GAMMA * C + c], s[RSTD * C + c]), offset[c], t[c])


cdef void merge_rows(double *s, double count, const double *o, double other_count, Py_ssize_t C) noexcept nogil:
    """Merge rows mean, mean_low and m2 of o into those of s, both of at least one value; μ is mean + mean_low."""
    cdef Py_ssize_t c
    for c in range(C):
        chan(s + MEAN * C + c, s + MEAN_LOW * C + c, s + M2 * C + c, count, o[MEAN * C + c], o[MEAN_LOW * C + c],
             o[M2 * C + c], other_count)
        s[MEAN * C + c] = two_sum(s[MEAN * C + c], s[MEAN_LOW * C + c], s + MEAN_LOW * C + c)


def merge(moments, double count, other, double other_count):
    """Merge other moments, of at least one value, into `moments`: rows mean, mean_low and m2; μ is mean + mean_low."""
    cdef Py_ssize_t C = moments.shape[1]
    cdef double *s = borrow("moments", moments, M2 + 1, C)
    merge_rows(s, count, borrow("other", other, M2 + 1, C), other_count, C)


cdef inline double status_of_both(double lower, double upper) noexcept nogil:
    """The status of two packets: the bits of either, or −1 − the first rank that refused its arguments."""
    if lower < 0 or upper < 0:
        return lower if lower < 0 else upper
    return <long> lower | <long> upper


cdef int borrow_packets(lower, upper, Py_ssize_t least, double **own, const double **other) except -1:
    """The addresses of two packets of the length of the lower one; merges their status, which all packets have."""
    least = max(least, len(lower))
    own[0] = <double *> borrow_values("lower", lower, least, sizeof(double), True)
    other[0] = <const double *> borrow_values("upper", upper, least, sizeof(double), False)
    own[0][STATUS] = status_of_both(own[0][STATUS], other[0][STATUS])
    return 0


def merge_moments(lower, upper):
    """Merge a packet of moments into that of the ranks before it; an empty one leaves the other unchanged."""
    cdef Py_ssize_t i, numbers = len(lower)
    cdef double *a
    cdef const double *b
    borrow_packets(lower, upper, HEAD, &a, &b)
    if a[WEIGHT] == 0:
        memcpy(a + VALUES, b + VALUES, (numbers - VALUES) * sizeof(double))
    elif b[WEIGHT] != 0:
        merge_rows(a + HEAD, a[WEIGHT], b + HEAD, b[WEIGHT], (numbers - HEAD) // (M2 + 1))
        for i in range(VALUES, HEAD):
            a[i] += b[i]


def merge_sums(lower, upper):
    """Add a packet of sums to that of the ranks before it."""
    cdef Py_ssize_t i, numbers = len(lower)
    cdef double *a
    cdef const double *b
    borrow_packets(lower, upper, 1, &a, &b)
    for i in range(STATUS + 1, numbers):
        a[i] += b[i]


def weigh(weights, Py_ssize_t places):
    """Σw and Σw², correct to the last digit or two."""
    cdef const double *w = <const double *> borrow_values("weights", weights, places, sizeof(double), False)
    cdef double weight = 0, weight_low = 0, squares = 0, squares_low = 0, low
    cdef Py_ssize_t i
    for i in range(places):
        weight = two_sum(weight, w[i], &low)
        weight_low += low
        squares = two_sum(squares, w[i] * w[i], &low)
        squares_low += low
    return weight + weight_low, squares + squares_low


cdef double *room_to_follow(Py_ssize_t C) except NULL:
    cdef double *running = <double *> malloc(2 * C * sizeof(double) + 1)
    if running == NULL:
        raise MemoryError(f"no memory for the running statistics of {C} channels")
    return running


cdef void move(double *running, const double *s, double momentum, double correction, Py_ssize_t C) noexcept nogil:
    """r ← (1 − momentum)·r + momentum·batch, for the rows mean and var; the batch's var is times `correction`."""
    cdef Py_ssize_t c
    for c in range(C):
        running[c] = followed(running[c], s[MEAN * C + c], momentum)
        running[C + c] = followed(running[C + c], correction * s[VAR * C + c], momentum)


def update_running(running_mean, running_var, statistics, double momentum, double correction):
    """Move the running statistics towards a batch."""
    cdef Py_ssize_t C = len(running_mean)
    cdef const double *s = borrow("statistics", statistics, STATISTICS_ROWS, C)
    cdef double *running = room_to_follow(C)
    try:
        fill_row(running, running_mean, C, 0)
        fill_row(running + C, running_var, C, 0)
        move(running, s, momentum, correction, C)
        take_row(running, running_mean, C)
        take_row(running + C, running_var, C)
    finally:
        free(running)


def follow(block, statistics, momentum, double correction):
    """The same for a block of memory with a counter, the mean and the variance, of which all or nothing changes.

    If `momentum` is None, it is 1 over the number of batches, so that the statistics are the average of all of them.
    """
    cdef Py_ssize_t C = statistics.shape[1]
    cdef Py_ssize_t itemsize = sizeof(float) if block.itemsize == sizeof(float) else sizeof(double)
    cdef const double *s = borrow("statistics", statistics, STATISTICS_ROWS, C)
    cdef char *counter = <char *> borrow_values("block", block, sizeof(long long) // itemsize + 2 * C, itemsize, True)
    cdef char *values = counter + sizeof(long long)
    cdef long long batches
    cdef double *running = room_to_follow(C)
    memcpy(&batches, counter, sizeof(long long))
    batches += 1
    try:
        widen(running, values, itemsize, 2 * C)
        move(running, s, 1.0 / batches if momentum is None else momentum, correction, C)
        narrow(values, running, itemsize, 2 * C)
        memcpy(counter, &batches, sizeof(long long))
    finally:
        free(running)
