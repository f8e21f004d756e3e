# ---- Apply: write one block -------------------------------------------------------------------------------------------
# One loop writes y and dx, for both layouts. A value is read before its place is written, so that out may be an input.

cdef struct Coefficients:
    Row centre, scale, slope, shift


cdef inline void write(real *p, number v, Py_ssize_t count, bint stream) noexcept nogil:
    cdef vec rounded
    if number is vec:
        rounded = v
    else:
        rounded = narrowed(v)
    if stream:
        stream_first(p, rounded, count)
    elif count == VEC:
        store_vec(p, rounded)
    else:
        store_first(p, rounded, count)


cdef inline void apply_vector(const real *x, const real *dy, real *out, Py_ssize_t j, Py_ssize_t count,
                              number centre, number scale, number slope, number shift, const Coefficients *column,
                              bint stream) noexcept nogil:
    """y, or dx where dy is given, at `count` places from j on; each column has coefficients of its own where given."""
    cdef number value = load(x + j, count, centre)
    if column != NULL:
        centre = load(column.centre.at + j, VEC, centre)
        scale = load(column.scale.at + j, VEC, centre)
        shift = load(column.shift.at + j, VEC, centre)
        if dy != NULL:
            slope = load(column.slope.at + j, VEC, centre)
    if dy == NULL:
        value = normalized(value, centre, scale, shift)
    else:
        value = gradient(load(dy + j, count, centre), value, centre, scale, slope, shift)
    write(out + j, value, count, stream)


cdef inline void apply_row(const real *x, const real *dy, real *out, Py_ssize_t length, number centre, number scale,
                           number slope, number shift, const Coefficients *column, bint stream) noexcept nogil:
    cdef Py_ssize_t j, first = min(to_piece(out), length) if stream else 0
    cdef Py_ssize_t whole = length - (length - first) % VEC
    if first:
        apply_vector(x, dy, out, 0, first, centre, scale, slope, shift, column, False)
    for j from first <= j < whole by VEC:
        apply_vector(x, dy, out, j, VEC, centre, scale, slope, shift, column, stream)
    if whole < length:
        apply_vector(x, dy, out, whole, length - whole, centre, scale, slope, shift, column, stream)


cdef inline void apply_rows(const real *x, const real *dy, real *out, Py_ssize_t rows, Py_ssize_t stride,
                            Py_ssize_t length, number centre, number scale, number slope, number shift,
                            const Coefficients *column, bint stream) noexcept nogil:
    cdef Py_ssize_t r
    for r in range(rows):
        if stream:
            apply_row(x, dy, out, length, centre, scale, slope, shift, column, True)
        else:
            apply_row(x, dy, out, length, centre, scale, slope, shift, column, False)
        x += stride
        dy = shifted(dy, stride)
        out += stride


cdef inline void apply_columns(const Work *work, const Block *block, const real *x, const real *dy, real *out,
                               const double *value, bint stream) noexcept nogil:
    """All rows of the block, or `group` of them side by side as one, with the coefficients spread over the columns."""
    cdef Coefficients column
    cdef vec none = same_vec(0)
    cdef Py_ssize_t length = block.channels * block.run, width = length * work.group
    cdef Py_ssize_t wide_rows = block.rows // work.group, rest = block.rows % work.group
    cdef Py_ssize_t wide_stride = block.stride * work.group, after = wide_rows * wide_stride
    spread(value + CENTRE * work.C, block.channels, block.run, work.group, column.centre.at)
    spread(value + SCALE * work.C, block.channels, block.run, work.group, column.scale.at)
    spread(value + SHIFT * work.C, block.channels, block.run, work.group, column.shift.at)
    if dy != NULL:
        spread(value + SLOPE * work.C, block.channels, block.run, work.group, column.slope.at)
    apply_rows(x, dy, out, wide_rows, wide_stride, width, none, none, none, none, &column, stream)
    if rest:
        apply_rows(x + after, shifted(dy, after), out + after, 1, 0, rest * length, none, none, none, none, &column,
                   stream)


cdef inline void apply_channel(const real *x, const real *dy, real *out, Py_ssize_t rows, Py_ssize_t stride,
                               Py_ssize_t length, const double *value, Py_ssize_t C, bint stream,
                               number zero) noexcept nogil:
    """The rows of one channel."""
    apply_rows(x, dy, out, rows, stride, length, same(value[CENTRE * C], zero), same(value[SCALE * C], zero),
               same(0 if dy == NULL else value[SLOPE * C], zero), same(value[SHIFT * C], zero), NULL, stream)


cdef inline Py_ssize_t misfits(const double *coefficient, Py_ssize_t channels) noexcept nogil:
    """How many coefficients lose digits in the data's type, or products with them; infinities and NaN have none."""
    cdef Py_ssize_t c, found = 0
    cdef double size
    for c in range(channels):
        size = fabs(coefficient[c])
        found += ((size < FINEST) & (size > 0)) | ((size > COARSEST) & (size < INFINITY))
    return found


cdef inline bint all_fit(const double *value, Py_ssize_t C, Py_ssize_t channels, bint sloped) noexcept nogil:
    """Whether these channels can be written in the data's type; one that does not fit is written in float64."""
    return IS_DOUBLE or not (misfits(value + CENTRE * C, channels) + misfits(value + SCALE * C, channels)
                             + misfits(value + SHIFT * C, channels)
                             + (misfits(value + SLOPE * C, channels) if sloped else 0))


cdef bint tile_fits(const Work *work, Py_ssize_t tile, bint sloped) noexcept nogil:
    return all_fit(work.coefficient + tile * work.tile_channels, work.C, channels_of(work, tile), sloped)


cdef inline void write_block(const Work *work, Py_ssize_t tile, Py_ssize_t b, const real *x, const real *dy, real *out,
                             bint fit) noexcept nogil:
    """A block of y, or of dx where dy is given."""
    cdef Block block = block_of(work, tile, b)
    cdef const double *value = work.coefficient + block.channel
    cdef bint stream = work.stream and out != x and out != dy
    cdef Py_ssize_t r, c, at, rows, C = work.C
    x += block.first
    dy = shifted(dy, block.first)
    out += block.first
    if work.columns and fit:
        apply_columns(work, &block, x, dy, out, value, stream)
    else:
        for r from 0 <= r < block.rows by block.visit:
            rows = min(block.visit, block.rows - r)
            for c in range(block.channels):
                at = r * block.stride + c * block.run
                if fit or all_fit(value + c, C, 1, dy != NULL):
                    apply_channel(x + at, shifted(dy, at), out + at, rows, block.stride, block.run, value + c, C,
                                  stream, same_vec(0))
                else:
                    apply_channel(x + at, shifted(dy, at), out + at, rows, block.stride, block.run, value + c, C,
                                  False, same_wide(0))
    if stream:
        finish_streaming()


cdef void normalize_block(const Work *work, Py_ssize_t tile, Py_ssize_t b, const real *x, real *y,
                          bint fit) noexcept nogil:
    write_block(work, tile, b, x, NULL, y, fit)


cdef void gradient_block(const Work *work, Py_ssize_t tile, Py_ssize_t b, const real *x, const real *dy, real *dx,
                         bint fit) noexcept nogil:
    """dx = dy·scale + shift where no path depends on x: the same formula as y's, with centre 0."""
    if is_sloped(work.through):
        write_block(work, tile, b, x, dy, dx, fit)
    else:
        write_block(work, tile, b, dy, NULL, dx, fit)
