# ---- Apply: write one block -----------------------------------------------------------------------------------------
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


cdef inline number applied(const real *x, const real *dy, bint gradient, Py_ssize_t j, Py_ssize_t count,
                           number centre, number scale, number slope, number shift,
                           const Coefficients *column) noexcept nogil:
    """y, or dx, at `count` places from j on; each column has coefficients of its own where they are given."""
    cdef number value = load(x + j, count, centre)
    if column != NULL:
        centre, scale = load(column.centre.at + j, VEC, centre), load(column.scale.at + j, VEC, centre)
        slope, shift = load(column.slope.at + j, VEC, centre), load(column.shift.at + j, VEC, centre)
    if gradient:
        return dx_of(load(dy + j, count, centre), value, centre, scale, slope, shift)
    return y_of(value, centre, scale, shift)


cdef inline void apply_rows(const real *x, const real *dy, bint gradient, real *out, Py_ssize_t rows,
                            Py_ssize_t stride, Py_ssize_t length, number centre, number scale, number slope,
                            number shift, const Coefficients *column, bint stream) noexcept nogil:
    cdef Py_ssize_t r, j, first, whole
    cdef bint overlaps = not stream and length > VEC and length % VEC
    cdef number last = centre
    for r in range(rows):
        first = min(to_piece(out), length) if stream else 0
        whole = length - (length - first) % VEC
        if overlaps:        # the last vector ends with the row: it is read before its first places are written
            last = applied(x, dy, gradient, length - VEC, VEC, centre, scale, slope, shift, column)
        if first:
            write(out, applied(x, dy, gradient, 0, first, centre, scale, slope, shift, column), first, False)
        if stream:
            for j from first <= j < whole by VEC:
                write(out + j, applied(x, dy, gradient, j, VEC, centre, scale, slope, shift, column), VEC, True)
        else:
            for j from 0 <= j < whole by VEC:
                write(out + j, applied(x, dy, gradient, j, VEC, centre, scale, slope, shift, column), VEC, False)
        if overlaps:
            write(out + length - VEC, last, VEC, False)
        elif whole < length:
            write(out + whole, applied(x, dy, gradient, whole, length - whole, centre, scale, slope, shift, column),
                  length - whole, stream)
        x += stride
        dy += stride
        out += stride


cdef inline void apply_columns(const Work *work, const Block *block, const real *x, const real *dy, bint gradient,
                               real *out, const double *value, bint stream) noexcept nogil:
    """All rows of the block, or `group` of them side by side as one, with the coefficients spread over the columns."""
    cdef Coefficients column
    cdef vec none = same_vec(0)
    cdef Py_ssize_t length = block.channels * block.run, C = work.C, group = work.group
    cdef Py_ssize_t rest = block.rows % group, after = (block.rows - rest) * block.stride
    spread(value + CENTRE * C, block.channels, block.run, group, column.centre.at)
    spread(value + SCALE * C, block.channels, block.run, group, column.scale.at)
    spread(value + SHIFT * C, block.channels, block.run, group, column.shift.at)
    if gradient:
        spread(value + SLOPE * C, block.channels, block.run, group, column.slope.at)
    apply_rows(x, dy, gradient, out, block.rows // group, block.stride * group, length * group, none, none, none, none,
               &column, stream)
    if rest:
        apply_rows(x + after, dy + after, gradient, out + after, 1, 0, rest * length, none, none, none, none, &column,
                   stream)


cdef inline void apply_channel(const Block *block, const real *x, const real *dy, bint gradient, real *out,
                               Py_ssize_t rows, const double *value, Py_ssize_t C, bint stream,
                               number zero) noexcept nogil:
    """Some rows of one channel."""
    apply_rows(x, dy, gradient, out, rows, block.stride, block.run, same(value[CENTRE * C], zero),
               same(value[SCALE * C], zero), same(value[SLOPE * C] if gradient else 0, zero),
               same(value[SHIFT * C], zero), NULL, stream)


cdef inline void write_block(const Work *work, Py_ssize_t tile, Py_ssize_t b, const real *x, const real *dy,
                             bint gradient, real *out, bint fit) noexcept nogil:
    cdef Block block = block_of(work, tile, b)
    cdef const double *value = work.coefficient + block.channel
    cdef bint stream = work.stream and out != x and out != dy
    cdef Py_ssize_t r, c, at, rows, C = work.C
    x += block.first
    dy += block.first
    out += block.first
    if work.columns and fit:
        apply_columns(work, &block, x, dy, gradient, out, value, stream)
    else:
        for r from 0 <= r < block.rows by block.visit:
            rows = min(block.visit, block.rows - r)
            for c in range(block.channels):
                at = r * block.stride + c * block.run
                if fit or all_fit(value + c, C, 1, gradient):
                    apply_channel(&block, x + at, dy + at, gradient, out + at, rows, value + c, C, stream, same_vec(0))
                else:
                    apply_channel(&block, x + at, dy + at, gradient, out + at, rows, value + c, C, False, same_wide(0))
    if stream:
        finish_streaming()


cdef void normalize_block(const Work *work, Py_ssize_t tile, Py_ssize_t b, const real *x, real *y,
                          bint fit) noexcept nogil:
    write_block(work, tile, b, x, x, False, y, fit)


cdef void gradient_block(const Work *work, Py_ssize_t tile, Py_ssize_t b, const real *x, const real *dy, real *dx,
                         bint fit) noexcept nogil:
    """dx = dy·scale + shift where no path depends on x: the same formula as y's, with centre 0."""
    if is_sloped(work.through):
        write_block(work, tile, b, x, dy, True, dx, fit)
    else:
        write_block(work, tile, b, dy, dy, False, dx, fit)
