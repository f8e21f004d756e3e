# ---- Finish: merge the blocks of a tile, derive the statistics and the coefficients ---------------------------------
# float64 arithmetic on numbers per channel. s is a tile's part of the statistics, g of the gradients, p of the blocks'
# sums and k of the coefficients; rows of a table are C numbers apart. Loops are functions of these rows, because GCC
# trusts `restrict` for parameters alone, and without it they are not vector code.


cdef inline Py_ssize_t channels_of(const Work *work, Py_ssize_t tile) noexcept nogil:
    return min(work.tile_channels, work.C - tile * work.tile_channels)


cdef void merge_sums(double *restrict sum_a, double *restrict sum_d, const double *restrict other_a,
                     const double *restrict other_d, Py_ssize_t channels) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):
        sum_a[c] += other_a[c]
        sum_d[c] += other_d[c]


cdef void merge_moments(double *restrict pivot, double *restrict delta, double *restrict m2,
                        const double *restrict other_pivot, const double *restrict other_delta,
                        const double *restrict other_m2, Py_ssize_t channels, double n, double other_n) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):
        chan(pivot + c, delta + c, m2 + c, n, other_pivot[c], other_delta[c], other_m2[c], other_n)


cdef double *merge_blocks(const Work *work, Py_ssize_t tile, bint gradient) noexcept nogil:
    """Merge neighbours, then pairs of neighbours, and so on: a tree that depends only on the number of blocks."""
    cdef Py_ssize_t i, step = 1, C = work.C, size = PARTIAL_ROWS * C
    cdef double *first = work.partial + tile * work.tile_channels
    cdef double *p
    cdef double *other
    while step < work.blocks:
        for i from 0 <= i < work.blocks - step by 2 * step:
            p, other = first + i * size, first + (i + step) * size
            if gradient:
                merge_sums(p + SUM * C, p + SUM_D * C, other + SUM * C, other + SUM_D * C, channels_of(work, tile))
            else:
                merge_moments(p + PIVOT * C, p + DELTA * C, p + SQUARES * C, other + PIVOT * C, other + DELTA * C,
                              other + SQUARES * C, channels_of(work, tile), values_in(work, i, i + step),
                              values_in(work, i + step, i + 2 * step))
        step *= 2
    return first


cdef void set_means(double *restrict mean, double *restrict mean_low, const double *restrict pivot,
                    const double *restrict delta, Py_ssize_t channels) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):
        mean[c] = two_sum(pivot[c], delta[c], mean_low + c)


cdef void finish_moments(const Work *work, Py_ssize_t tile) noexcept nogil:
    """Compute the statistics from the blocks."""
    cdef Py_ssize_t C = work.C, channels = channels_of(work, tile)
    cdef const double *p = merge_blocks(work, tile, False)
    cdef double *s = work.statistics + tile * work.tile_channels
    set_means(s + MEAN * C, s + MEAN_LOW * C, p + PIVOT * C, p + DELTA * C, channels)
    memcpy(s + M2 * C, p + SQUARES * C, channels * sizeof(double))
    set_var(s + VAR * C, s + M2 * C, channels, work.census[work.blocks].before)
    set_rstd(s + RSTD * C, s + VAR * C, channels, work.eps)


cdef void set_centres(double *restrict centre, double *restrict rest, const double *restrict mean,
                      const double *restrict mean_low, const double *restrict var, Py_ssize_t channels) noexcept nogil:
    """Set the centres, which are subtracted from x, and the rest of the mean."""
    cdef Py_ssize_t c
    for c in range(channels):
        centre[c] = centre_of(mean[c], var[c])
        rest[c] = (mean[c] - centre[c]) + mean_low[c]


cdef void finish_centres(const Work *work, Py_ssize_t tile) noexcept nogil:
    """Compute the centres of a tile."""
    cdef Py_ssize_t C = work.C, first = tile * work.tile_channels
    cdef const double *s = work.statistics + first
    cdef double *k = work.coefficient + first
    set_centres(k + CENTRE * C, k + REST * C, s + MEAN * C, s + MEAN_LOW * C, s + VAR * C, channels_of(work, tile))


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


cdef void set_y(double *restrict scale, double *restrict shift, const double *restrict gamma,
                const double *restrict beta, const double *restrict rstd, const double *restrict rest,
                Py_ssize_t channels) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):
        scale[c] = scale_of(gamma[c], rstd[c])
        shift[c] = beta[c] - rest[c] * scale[c]


cdef bint finish_normalize(const Work *work, Py_ssize_t tile) noexcept nogil:
    """Compute the coefficients of y from the statistics; return whether all of them fit the data's type."""
    cdef Py_ssize_t C = work.C, first = tile * work.tile_channels, channels = channels_of(work, tile)
    cdef const double *s = work.statistics + first
    cdef double *k = work.coefficient + first
    finish_centres(work, tile)
    set_y(k + SCALE * C, k + SHIFT * C, s + GAMMA * C, s + BETA * C, s + RSTD * C, k + REST * C, channels)
    set_own(work, tile, SHIFT + 1)
    return all_fit(k, C, channels, False)


cdef void start_gradient(const Work *work, Py_ssize_t tile) noexcept nogil:
    """Set the centres, and the coefficients of y if an activation needs them."""
    if work.activation.on:
        finish_normalize(work, tile)
    else:
        finish_centres(work, tile)


cdef void set_sums(double *restrict sum_dy, double *restrict sum_dy_xmu, double *restrict dgamma,
                   const double *restrict sum_a, const double *restrict sum_d, const double *restrict rest,
                   const double *restrict rstd, Py_ssize_t channels) noexcept nogil:
    """Set the sums about the mean, and dgamma, from those about the centre."""
    cdef Py_ssize_t c
    for c in range(channels):
        sum_dy[c] = sum_a[c]
        sum_dy_xmu[c] = sum_d[c] - rest[c] * sum_a[c]
        dgamma[c] = dgamma_of(sum_dy_xmu[c], rstd[c])


cdef void finish_grad_sums(const Work *work, Py_ssize_t tile) noexcept nogil:
    """Compute the sums about the mean, and dgamma, from the blocks."""
    cdef Py_ssize_t C = work.C, first = tile * work.tile_channels
    cdef const double *p = merge_blocks(work, tile, True)
    cdef double *g = work.gradients + first
    set_sums(g + SUM_DY * C, g + SUM_DY_XMU * C, g + DGAMMA * C, p + SUM * C, p + SUM_D * C,
             work.coefficient + first + REST * C, work.statistics + first + RSTD * C, channels_of(work, tile))


cdef inline bint is_sloped(int through) noexcept nogil:
    """Whether dx has a term that is proportional to x − mean."""
    return through & (THROUGH_VARIANCE | UPSTREAM)


cdef void set_paths(double *restrict scale, double *restrict dmean, double *restrict dvar,
                    const double *restrict gamma, const double *restrict rstd, const double *restrict sum_dy,
                    const double *restrict dgamma, Py_ssize_t channels) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):
        scale[c] = scale_of(gamma[c], rstd[c])
        dmean[c] = dmean_of(scale[c], sum_dy[c])
        dvar[c] = dvar_of(scale[c], rstd[c], dgamma[c])


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
    # dmean and dvar stand in the rows of their terms, until they become these.
    set_paths(k + SCALE * C, k + OFFSET * C, k + SLOPE * C, s + GAMMA * C, s + RSTD * C, g + SUM_DY * C,
              g + DGAMMA * C, channels)
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
