# ---- Finish: merge the blocks of a tile, derive the statistics and the coefficients ---------------------------------
# float64 arithmetic on numbers per channel. s is a tile's part of the statistics, g of the gradients, p of the blocks'
# sums and k of the coefficients; rows of a table are C numbers apart. Loops are functions, because GCC trusts `restrict`
# for parameters alone, and without it they are not vector code.


cdef inline Py_ssize_t channels_of(const Work *work, Py_ssize_t tile) noexcept nogil:
    return min(work.tile_channels, work.C - tile * work.tile_channels)


cdef void merge_sums(double *restrict p, const double *restrict other, Py_ssize_t C, Py_ssize_t channels) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):
        p[SUM * C + c] += other[SUM * C + c]
        p[SUM_D * C + c] += other[SUM_D * C + c]


cdef void merge_moments(double *restrict p, const double *restrict other, Py_ssize_t C, Py_ssize_t channels, double n,
                        double other_n) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):
        chan(p + PIVOT * C + c, p + DELTA * C + c, p + SQUARES * C + c, n, other[PIVOT * C + c], other[DELTA * C + c],
             other[SQUARES * C + c], other_n)


cdef double *merge_blocks(const Work *work, Py_ssize_t tile, bint gradient) noexcept nogil:
    """Merge neighbours, then pairs of neighbours, and so on: a tree that depends only on the number of blocks."""
    cdef Py_ssize_t i, step = 1, C = work.C, size = PARTIAL_ROWS * C
    cdef double *p = work.partial + tile * work.tile_channels
    while step < work.blocks:
        for i from 0 <= i < work.blocks - step by 2 * step:
            if gradient:
                merge_sums(p + i * size, p + (i + step) * size, C, channels_of(work, tile))
            else:
                merge_moments(p + i * size, p + (i + step) * size, C, channels_of(work, tile),
                              values_in(work, i, i + step), values_in(work, i + step, i + 2 * step))
        step *= 2
    return p


cdef void set_means(double *restrict s, const double *restrict p, Py_ssize_t C, Py_ssize_t channels) noexcept nogil:
    """Set the mean, as a pair, and m2."""
    cdef Py_ssize_t c
    for c in range(channels):
        s[MEAN * C + c] = two_sum(p[PIVOT * C + c], p[DELTA * C + c], s + MEAN_LOW * C + c)
        s[M2 * C + c] = p[SQUARES * C + c]


cdef void finish_moments(const Work *work, Py_ssize_t tile) noexcept nogil:
    """Compute the statistics from the blocks."""
    cdef Py_ssize_t C = work.C
    cdef const double *p = merge_blocks(work, tile, False)
    cdef double *s = work.statistics + tile * work.tile_channels
    set_means(s, p, C, channels_of(work, tile))
    set_var(s, C, channels_of(work, tile), work.census[work.blocks].before)
    set_rstd(s, C, channels_of(work, tile), work.eps)


cdef void set_centres(const double *restrict s, double *restrict k, Py_ssize_t C, Py_ssize_t channels) noexcept nogil:
    """Set the centres, which are subtracted from x, and the rest of the mean."""
    cdef Py_ssize_t c
    for c in range(channels):
        k[CENTRE * C + c] = centre_of(s[MEAN * C + c], s[VAR * C + c])
        k[REST * C + c] = (s[MEAN * C + c] - k[CENTRE * C + c]) + s[MEAN_LOW * C + c]


cdef Py_ssize_t misfits(const double *coefficient, Py_ssize_t channels) noexcept nogil:
    """The number of coefficients that lose digits in the data's type, or whose products do; infinities and NaN fit."""
    cdef Py_ssize_t c, found = 0
    cdef double size
    for c in range(channels):
        size = fabs(coefficient[c])
        found += ((size < FINEST) & (size > 0)) | ((size > COARSEST) & (size < INFINITY))
    return found


cdef bint all_fit(const double *value, Py_ssize_t C, Py_ssize_t channels, bint gradient) noexcept nogil:
    """Whether these channels can be computed in the data's type; one that does not fit is computed in float64."""
    cdef Py_ssize_t row, rows = COEFFICIENTS if gradient else SHIFT + 1, found = 0
    if not IS_DOUBLE:
        for row in range(rows):
            found += misfits(value + row * C, channels)
    return found == 0


cdef inline real *own_row(const Work *work, Py_ssize_t row) noexcept nogil:
    """A row of the coefficients in the data's type."""
    return <real *> (work.coefficient + OWN * work.C) + row * work.C


cdef void set_own(const Work *work, Py_ssize_t tile, Py_ssize_t rows) noexcept nogil:
    """Copy the first rows of the coefficients in the data's type, once for all blocks of the tile."""
    cdef Py_ssize_t row, first = tile * work.tile_channels
    for row in range(rows):
        narrow(work.coefficient + row * work.C + first, own_row(work, row) + first, channels_of(work, tile))


cdef bint finish_normalize(const Work *work, Py_ssize_t tile) noexcept nogil:
    """Compute the coefficients of y from the statistics; return whether all of them fit the data's type."""
    cdef Py_ssize_t c, C = work.C
    cdef const double *restrict s = work.statistics + tile * work.tile_channels
    cdef double *restrict k = work.coefficient + tile * work.tile_channels
    set_centres(s, k, C, channels_of(work, tile))
    for c in range(channels_of(work, tile)):
        k[SCALE * C + c] = scale_of(s[GAMMA * C + c], s[RSTD * C + c])
        k[SHIFT * C + c] = s[BETA * C + c] - k[REST * C + c] * k[SCALE * C + c]
    set_own(work, tile, SHIFT + 1)
    return all_fit(k, C, channels_of(work, tile), False)


cdef void start_gradient(const Work *work, Py_ssize_t tile) noexcept nogil:
    """Set the centres, and the coefficients of y if an activation needs them."""
    cdef Py_ssize_t first = tile * work.tile_channels
    if work.activation.on:
        finish_normalize(work, tile)
    else:
        set_centres(work.statistics + first, work.coefficient + first, work.C, channels_of(work, tile))


cdef void set_sums(double *restrict g, const double *restrict p, const double *restrict s, const double *restrict k,
                   Py_ssize_t C, Py_ssize_t channels) noexcept nogil:
    """Set the sums about the mean, and dgamma, from those about the centre."""
    cdef Py_ssize_t c
    for c in range(channels):
        g[SUM_DY * C + c] = p[SUM * C + c]
        g[SUM_DY_XMU * C + c] = p[SUM_D * C + c] - k[REST * C + c] * p[SUM * C + c]
        g[DGAMMA * C + c] = dgamma_of(g[SUM_DY_XMU * C + c], s[RSTD * C + c])


cdef void finish_grad_sums(const Work *work, Py_ssize_t tile) noexcept nogil:
    """Compute the sums about the mean, and dgamma, from the blocks."""
    cdef Py_ssize_t first = tile * work.tile_channels
    set_sums(work.gradients + first, merge_blocks(work, tile, True), work.statistics + first, work.coefficient + first,
             work.C, channels_of(work, tile))


cdef inline bint is_sloped(int through) noexcept nogil:
    """Whether dx has a term that is proportional to x − mean."""
    return through & (THROUGH_VARIANCE | UPSTREAM)


cdef void set_paths(double *restrict k, const double *restrict s, const double *restrict g, Py_ssize_t C,
                    Py_ssize_t channels) noexcept nogil:
    """Set the scale, and dmean and dvar in the rows of the terms of dx."""
    cdef Py_ssize_t c
    for c in range(channels):
        k[SCALE * C + c] = scale_of(s[GAMMA * C + c], s[RSTD * C + c])
        k[OFFSET * C + c] = dmean_of(k[SCALE * C + c], g[SUM_DY * C + c])
        k[SLOPE * C + c] = dvar_of(k[SCALE * C + c], s[RSTD * C + c], g[DGAMMA * C + c])


cdef void set_terms(double *restrict slope, double *restrict offset, const double *restrict rest, Py_ssize_t channels,
                    double n) noexcept nogil:
    """Turn dvar and dmean, in the rows of the terms of dx, into these terms."""
    cdef double dmean, dvar
    cdef Py_ssize_t c
    for c in range(channels):
        dmean, dvar = offset[c], slope[c]
        slope[c] = slope_of(dvar, n)
        offset[c] = dmean / n - rest[c] * slope[c]


cdef bint finish_grad_apply(const Work *work, Py_ssize_t tile) noexcept nogil:
    """Compute the coefficients of dx, the paper's terms by their factor; return whether all fit the data's type."""
    cdef bint sloped = is_sloped(work.through), activated = work.activation.on
    cdef Py_ssize_t c, C = work.C, channels = channels_of(work, tile), first = tile * work.tile_channels
    cdef const double *s = work.statistics + first
    cdef const double *g = work.gradients + first
    cdef double *k = work.coefficient + first
    set_paths(k, s, g, C, channels)
    if not work.through & THROUGH_MEAN:
        memset(k + OFFSET * C, 0, channels * sizeof(double))
    if not work.through & THROUGH_VARIANCE:
        memset(k + SLOPE * C, 0, channels * sizeof(double))
    if work.through & UPSTREAM:
        for c in range(channels):
            k[OFFSET * C + c] += g[UPSTREAM_DMEAN * C + c]
            k[SLOPE * C + c] += g[UPSTREAM_DVAR * C + c]
    if not sloped:          # then the rest of the mean does not matter
        memset(k + REST * C, 0, channels * sizeof(double))
    set_terms(k + SLOPE * C, k + OFFSET * C, k + REST * C, channels, work.count)
    if not activated:
        memcpy(k + SHIFT * C, k + OFFSET * C, channels * sizeof(double))
    if not (sloped or activated):
        memset(k + CENTRE * C, 0, channels * sizeof(double))
    set_own(work, tile, COEFFICIENTS)
    return all_fit(k, C, channels, sloped or activated)
