# ---- Reduce: the sums of one block -----------------------------------------------------------------------------------
# Sums about a pivot; and again, in float64, those that cannot be trusted.

cdef enum:
    PIVOT, SUM, SUM_D, PARTIAL_ROWS     # rows of a block's partial table: the pivot, Σa and Σa·d
    DELTA = SUM                         # for the moments, after `about_the_mean`: mean − pivot and Σ(x − mean)²
    SQUARES = SUM_D
    SAMPLED = 128           # channels whose pivots are chosen together


cdef void sample(const stored *x, Py_ssize_t channels, Py_ssize_t run, real *value) noexcept nogil:
    """Copy one value of each channel."""
    cdef Py_ssize_t c
    if run == 1:
        for c from 0 <= c < channels by VEC:
            store_column(value + c, load(x + c, min(VEC, channels - c), same_vec(0)))
    else:
        for c in range(channels):
            value[c] = value_at(x + c * run)


cdef void set_pivots(double *restrict pivot, const real *restrict value, Py_ssize_t channels) noexcept nogil:
    """A value near the mean of each channel: the mean of eight, to about 1/16 of their spread.

    If they are equal, it is exactly their value.
    """
    cdef double v0, v1, v2, v3, v4, v5, v6, v7, mean, spread
    cdef Py_ssize_t c
    for c in range(channels):
        v0, v1, v2, v3 = value[c], value[SAMPLED + c], value[2 * SAMPLED + c], value[3 * SAMPLED + c]
        v4, v5, v6, v7 = value[4 * SAMPLED + c], value[5 * SAMPLED + c], value[6 * SAMPLED + c], value[7 * SAMPLED + c]
        mean = (((0.125 * v0 + 0.125 * v4) + (0.125 * v2 + 0.125 * v6))
                + ((0.125 * v1 + 0.125 * v5) + (0.125 * v3 + 0.125 * v7)))
        spread = fabs(v0 - v4) + fabs(v1 - v5) + fabs(v2 - v6) + fabs(v3 - v7)
        pivot[c] = <real> few_bits(mean, 7e13 * spread)


cdef void choose_pivots(const Block *block, const Py_ssize_t *place, const stored *x, double *pivot) noexcept nogil:
    """Set the pivots from values all over the block, copied side by side so that they are chosen by vector code."""
    cdef real value[PIVOTED * SAMPLED]
    cdef Py_ssize_t k, first, channels
    for first from 0 <= first < block.channels by SAMPLED:
        channels = min(SAMPLED, block.channels - first)
        for k in range(PIVOTED):
            sample(x + place[k] + first * block.run, channels, block.run, value + k * SAMPLED)
        set_pivots(pivot + first, value, channels)


cdef inline bint trusted(double sum1, double sum2, double n, bint gradient) noexcept nogil:
    """Whether nothing overflowed or underflowed, and the pivot was within 1.25 standard deviations of the mean."""
    cdef double size = fabs(sum2), far = 0 if gradient else 41
    return (size >= SMALLEST * n) & (size < LARGEST) & (fabs(sum1) < LARGEST) & (far * sum1 * sum1 <= 25 * n * size)


cdef Py_ssize_t doubtful(const double *sum1, const double *sum2, Py_ssize_t channels, double n,
                         bint gradient) noexcept nogil:
    """The number of channels whose sums cannot be trusted."""
    cdef Py_ssize_t c, found = 0
    for c in range(channels):
        found += not trusted(sum1[c], sum2[c], n, gradient)
    return found


cdef bint all_equal(const Work *work, const Block *block, const stored *x, real value) noexcept nogil:
    """Whether all values of a channel that count equal this one."""
    cdef Py_ssize_t r, i
    for r in range(block.rows):
        for i in range(block.run):
            if value_at(x + r * block.stride + i) != value and counts(work, block.place + r * block.run + i):
                return False
    return True


cdef void sum_again(const Work *work, const Block *block, Py_ssize_t place, const stored *x, const stored *dy,
                    bint gradient, double *pivot, double *sum1, double *sum2, double n) noexcept nogil:
    """Repeat sums that cannot be trusted in float64; for the moments, about the mean that the first sums give.

    This takes a few neighbouring channels at a time, or all of a grouped row: usually only one sum is untrusted.
    """
    cdef double again1[GROUPED]
    cdef double again2[GROUPED]
    cdef const stored *a = dy if gradient else x
    cdef const stored *values
    cdef Block some = block[0]
    cdef bint lost
    cdef double mean
    cdef Py_ssize_t c, first, at, together = block.channels if work.group > 1 else NEIGHBOURS
    for first from 0 <= first < block.channels by together:
        some.channels = min(together, block.channels - first)
        at = first * block.run
        lost = False
        for c in range(first, first + some.channels):
            if not trusted(sum1[c], sum2[c], n, gradient):
                values = a + c * block.run
                lost |= sum2[c] != 0 or not all_equal(work, block, values, 0 if gradient else value_at(values + place))
                mean = pivot[c] + sum1[c] / n
                if not gradient and mean - mean == 0:
                    pivot[c] = <real> mean
        if lost:
            sum_block_in_float64(work, &some, x + at, dy + at, gradient, &work.activation, pivot + first, again1,
                                 again2)
            for c in range(first, first + some.channels):
                if not trusted(sum1[c], sum2[c], n, gradient):
                    sum1[c], sum2[c] = again1[c - first], again2[c - first]


cdef void sum_misfits(const Work *work, const Block *block, const stored *x, const stored *dy, const double *pivot,
                      double *sum1, double *sum2) noexcept nogil:
    """Repeat the sums of channels whose y was computed in float64, which decides where their activation is closed."""
    cdef Activation act = work.activation
    cdef Block one = block[0]
    cdef Py_ssize_t c
    one.columns, one.channels = False, 1
    act.in_steps = False
    for c in range(block.channels):
        if not all_fit(pivot + c, work.C, 1, False):
            sum_block_in_float64(work, &one, x + c * block.run, dy + c * block.run, True, &act, pivot + c, sum1 + c,
                                 sum2 + c)


cdef void about_the_mean(double *restrict sum1, double *restrict sum2, Py_ssize_t channels, double n) noexcept nogil:
    """Turn Σd into mean − pivot, and Σd² into Σ(x − mean)²."""
    cdef Py_ssize_t c
    for c in range(channels):
        sum2[c] = m2_of(sum1[c], sum2[c], n) if n else sum2[c]
        sum1[c] = sum1[c] / n if n else sum1[c]


cdef void reduce_block(const Work *work, Py_ssize_t tile, Py_ssize_t b, const stored *x, const stored *dy,
                       bint gradient) noexcept nogil:
    """Compute the sums of a block into its partial table."""
    cdef Block block = block_of(work, tile, b)
    cdef double *pivot = work.partial + (b * PARTIAL_ROWS + PIVOT) * work.C + block.channel
    cdef double *sum1 = pivot + (SUM - PIVOT) * work.C
    cdef double *sum2 = pivot + (SUM_D - PIVOT) * work.C
    cdef double n = values_in(work, b, b + 1)
    cdef const Py_ssize_t *place = work.census[b].place
    x += block.first
    dy += block.first
    if n == 0 and work.selection.weights == NULL:
        memset(pivot, 0, block.channels * sizeof(double))
        memset(sum1, 0, block.channels * sizeof(double))
        memset(sum2, 0, block.channels * sizeof(double))
        return
    if gradient:
        pivot = work.coefficient + CENTRE * work.C + block.channel
    else:
        choose_pivots(&block, place, x, pivot)
    if work.census[work.blocks].before < FEW:
        sum_block_in_float64(work, &block, x, dy, gradient, &work.activation, pivot, sum1, sum2)
    else:
        sum_block(work, &block, x, dy, gradient, &work.activation, pivot, sum1, sum2, same_vec(0))
    if doubtful(sum1, sum2, block.channels, n, gradient):
        sum_again(work, &block, place[0], x, dy, gradient, pivot, sum1, sum2, n)
    if gradient and work.activation.on and not all_fit(pivot, work.C, block.channels, False):
        sum_misfits(work, &block, x, dy, pivot, sum1, sum2)
    if not gradient:
        about_the_mean(sum1, sum2, block.channels, n)
