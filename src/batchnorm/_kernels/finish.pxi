# ---- Finish: merge the blocks of a tile, derive the statistics and the coefficients ------------------------------------
# float64 arithmetic on numbers per channel. Each row to be written is a pointer of its own, or the compiler does not see
# that the loop can become vector code.

cdef enum:
    CENTRE, SCALE, SLOPE, SHIFT, COEFFICIENT_ROWS       # rows of the coefficients of y and dx


cdef void merge_moments(double *restrict pivot, double *restrict delta, double *restrict m2, double n,
                        const double *restrict other, Py_ssize_t C, double other_n, Py_ssize_t channels) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):
        chan(pivot + c, delta + c, m2 + c, n, other[PIVOT * C + c], other[DELTA * C + c], other[SQUARES * C + c],
             other_n)


cdef void merge_sums(double *restrict sum1, double *restrict sum2, const double *restrict other, Py_ssize_t C,
                     Py_ssize_t channels) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):
        sum1[c] += other[SUM * C + c]
        sum2[c] += other[SUM_D * C + c]


cdef void merge_blocks(const Work *work, Py_ssize_t first, Py_ssize_t channels, bint moments) noexcept nogil:
    """Merge neighbours, then pairs of neighbours, and so on: a tree that depends on the number of blocks alone."""
    cdef Py_ssize_t i, step = 1, C = work.C, size = PARTIAL_ROWS * C
    cdef Py_ssize_t start, middle, stop
    cdef double *left
    while step < work.blocks:
        for i from 0 <= i < work.blocks - step by 2 * step:
            left = work.partial + i * size + first
            if moments:
                start = values_before(work, i)
                middle = values_before(work, i + step)
                stop = values_before(work, min(i + 2 * step, work.blocks))
                merge_moments(left + PIVOT * C, left + DELTA * C, left + SQUARES * C, middle - start,
                              left + step * size, C, stop - middle, channels)
            else:
                merge_sums(left + SUM * C, left + SUM_D * C, left + step * size, C, channels)
        step *= 2


cdef void set_statistics(const double *restrict merged, double *restrict mean, double *restrict mean_low,
                         double *restrict m2, Py_ssize_t C, Py_ssize_t channels) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):
        mean[c] = two_sum(merged[PIVOT * C + c], merged[DELTA * C + c], mean_low + c)
        m2[c] = merged[SQUARES * C + c]


cdef void set_rstd(const double *restrict m2, double *restrict var, double *restrict rstd, Py_ssize_t channels,
                   double n, double eps) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):
        var[c] = m2[c] / n
        rstd[c] = rstd_of(var[c] + eps)


cdef void set_centres(const double *restrict s, double *restrict centre, Py_ssize_t C,
                      Py_ssize_t channels) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):
        centre[c] = centre_of(s[MEAN * C + c], s[VAR * C + c])


cdef void set_scale_and_shift(const double *restrict s, const double *restrict centre, double *restrict scale,
                              double *restrict shift, Py_ssize_t C, Py_ssize_t channels) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):
        scale[c] = s[GAMMA * C + c] * s[RSTD * C + c]
        shift[c] = s[BETA * C + c] - ((s[MEAN * C + c] - centre[c]) + s[MEAN_LOW * C + c]) * scale[c]


cdef inline Py_ssize_t channels_of(const Work *work, Py_ssize_t tile) noexcept nogil:
    return min(work.tile_channels, work.C - tile * work.tile_channels)


cdef void finish_normalize(const Work *work, Py_ssize_t tile) noexcept nogil:
    """The coefficients of y from the statistics."""
    cdef Py_ssize_t C = work.C, first = tile * work.tile_channels, channels = channels_of(work, tile)
    cdef double *to = work.coefficient + first
    set_centres(work.statistics + first, to + CENTRE * C, C, channels)
    set_scale_and_shift(work.statistics + first, to + CENTRE * C, to + SCALE * C, to + SHIFT * C, C, channels)


cdef void finish_moments(const Work *work, Py_ssize_t tile) noexcept nogil:
    """The statistics from the blocks."""
    cdef Py_ssize_t C = work.C, first = tile * work.tile_channels, channels = channels_of(work, tile)
    cdef double *s = work.statistics + first
    merge_blocks(work, first, channels, True)
    set_statistics(work.partial + first, s + MEAN * C, s + MEAN_LOW * C, s + M2 * C, C, channels)
    set_rstd(s + M2 * C, s + VAR * C, s + RSTD * C, channels, work.N * work.S, work.eps)


cdef void start_grad_sums(const Work *work, Py_ssize_t tile) noexcept nogil:
    """What x is shifted by in Σdy·(x − centre)."""
    cdef Py_ssize_t first = tile * work.tile_channels
    set_centres(work.statistics + first, work.coefficient + CENTRE * work.C + first, work.C, channels_of(work, tile))


cdef void set_sums(const double *restrict merged, const double *restrict s, const double *restrict centre,
                   double *restrict sum_dy, double *restrict sum_dy_xmu, double *restrict dgamma, Py_ssize_t C,
                   Py_ssize_t channels) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):
        sum_dy[c] = merged[SUM * C + c]
        sum_dy_xmu[c] = (merged[SUM_D * C + c]
                         - ((s[MEAN * C + c] - centre[c]) + s[MEAN_LOW * C + c]) * merged[SUM * C + c])
        dgamma[c] = dgamma_of(sum_dy_xmu[c], s[RSTD * C + c])


cdef void finish_grad_sums(const Work *work, Py_ssize_t tile) noexcept nogil:
    """The sums and dgamma from the blocks."""
    cdef Py_ssize_t C = work.C, first = tile * work.tile_channels, channels = channels_of(work, tile)
    cdef double *g = work.gradients + first
    merge_blocks(work, first, channels, False)
    set_sums(work.partial + first, work.statistics + first, work.coefficient + CENTRE * C + first, g + SUM_DY * C,
             g + SUM_DY_XMU * C, g + DGAMMA * C, C, channels)


cdef inline bint is_sloped(int through) noexcept nogil:
    """Whether dx has a part that is proportional to x − mean."""
    return through & (THROUGH_VARIANCE | UPSTREAM)


cdef void set_gradient(const double *restrict s, const double *restrict g, double *restrict centre,
                       double *restrict scale, double *restrict slope, double *restrict shift, Py_ssize_t C,
                       Py_ssize_t channels, double n, int through) noexcept nogil:
    """Coefficients of dx: the paper's three terms by what they multiply."""
    cdef bint mean = through & THROUGH_MEAN, variance = through & THROUGH_VARIANCE, upstream = through & UPSTREAM
    cdef bint sloped = is_sloped(through)
    cdef double dmean, dvar, upstream_dmean, upstream_dvar, from_centre
    cdef Py_ssize_t c
    for c in range(channels):
        # Everything is read, so that choosing needs no branch.
        upstream_dmean, upstream_dvar = g[UPSTREAM_DMEAN * C + c], g[UPSTREAM_DVAR * C + c]
        scale[c] = s[GAMMA * C + c] * s[RSTD * C + c]
        dmean = dmean_of(scale[c], g[SUM_DY * C + c])
        dvar = dvar_of(scale[c], s[RSTD * C + c], g[DGAMMA * C + c])
        dmean = (dmean if mean else 0) + (upstream_dmean if upstream else 0)
        dvar = (dvar if variance else 0) + (upstream_dvar if upstream else 0)
        centre[c] = centre_of(s[MEAN * C + c], s[VAR * C + c]) if sloped else 0
        from_centre = (s[MEAN * C + c] - centre[c]) + s[MEAN_LOW * C + c]
        slope[c] = 2 * dvar / n
        shift[c] = dmean / n - (from_centre * slope[c] if sloped else 0)


cdef void finish_grad_apply(const Work *work, Py_ssize_t tile) noexcept nogil:
    """The coefficients of dx from the sums."""
    cdef Py_ssize_t C = work.C, first = tile * work.tile_channels
    cdef double *to = work.coefficient + first
    set_gradient(work.statistics + first, work.gradients + first, to + CENTRE * C, to + SCALE * C, to + SLOPE * C,
                 to + SHIFT * C, C, channels_of(work, tile), work.count, work.through)
