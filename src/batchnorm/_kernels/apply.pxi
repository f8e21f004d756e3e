# ---- Apply: write one block -----------------------------------------------------------------------------------------
# One loop writes y and dx, for both layouts. A value is read before its place is written, so that out may be an input.

cdef struct Coefficients:
    Row centre, scale, slope, shift


cdef inline void write(stored *p, number v, Py_ssize_t count) noexcept nogil:
    if number is wide:
        store_wide(p, v, count)
    elif count == VEC:
        store_vec(p, v)
    else:
        store_first(p, v, count)


cdef inline number applied(const stored *x, const stored *dy, bint gradient, Py_ssize_t j, Py_ssize_t count,
                           number centre, number scale, number slope, number shift,
                           const Coefficients *column) noexcept nogil:
    """y, or dx, at `count` places from j on; each column has coefficients of its own where they are given."""
    cdef number value = load(x + j, count, centre)
    if column != NULL:
        centre, scale = column_at(column.centre.at + j, centre), column_at(column.scale.at + j, centre)
        slope, shift = column_at(column.slope.at + j, centre), column_at(column.shift.at + j, centre)
    if gradient:
        return dx_of(load(dy + j, count, centre), value, centre, scale, slope, shift)
    return y_of(value, centre, scale, shift)


cdef inline void apply_rows(const stored *x, const stored *dy, bint gradient, stored *out, Py_ssize_t rows,
                            Py_ssize_t stride, Py_ssize_t length, number centre, number scale, number slope,
                            number shift, const Coefficients *column, bint stream) noexcept nogil:
    cdef Py_ssize_t r, j, start, stop, count, size = size_of(centre)
    cdef Py_ssize_t whole = length - length % size
    cdef bint overlaps = length > size and length % size
    cdef Py_ssize_t pairs = length - length % (2 * size)
    cdef number first, second, last = centre
    for r in range(rows):
        if number is vec and stream:
            start = min(to_line(out), length)
            stop = length - (length - start) % LINE
            prefetch(out + stop)        # what is written through the cache holds up the stores after it
            prefetch(out + stride)
            for j from start <= j < stop by size:
                stream_vec(out + j, applied(x, dy, gradient, j, size, centre, scale, slope, shift, column))
            j = 0 if start else stop
            while j < length:       # before the first whole line and after the last
                count = min(size, (start if j < start else length) - j)
                write(out + j, applied(x, dy, gradient, j, count, centre, scale, slope, shift, column), count)
                j = stop if j + count == start else j + count
        else:
            if overlaps:        # the last vector ends with the row: it is read before its first places are written
                last = applied(x, dy, gradient, length - size, size, centre, scale, slope, shift, column)
            for j from 0 <= j < pairs by 2 * size:
                first = applied(x, dy, gradient, j, size, centre, scale, slope, shift, column)
                second = applied(x, dy, gradient, j + size, size, centre, scale, slope, shift, column)
                write(out + j, first, size)
                write(out + j + size, second, size)
            if pairs < whole:
                write(out + pairs, applied(x, dy, gradient, pairs, size, centre, scale, slope, shift, column), size)
            if overlaps:
                write(out + length - size, last, size)
            elif whole < length:
                write(out + whole, applied(x, dy, gradient, whole, length - whole, centre, scale, slope, shift, column),
                      length - whole)
        x += stride
        dy += stride
        out += stride


cdef inline void apply_columns(const Work *work, const Block *block, const stored *x, const stored *dy, bint gradient,
                               stored *out, const double *value, bint stream) noexcept nogil:
    """All rows of the block, or `group` of them side by side as one, with the coefficients spread over the columns."""
    cdef Coefficients column
    cdef vec none = same_vec(0)
    cdef Py_ssize_t length = block.channels * block.run, width = length * work.group, C = work.C
    cdef Py_ssize_t rows = block.rows // work.group, rest = block.rows % work.group, after, rests
    spread(value + CENTRE * C, block.channels, block.run, work.group, column.centre.at)
    spread(value + SCALE * C, block.channels, block.run, work.group, column.scale.at)
    spread(value + SHIFT * C, block.channels, block.run, work.group, column.shift.at)
    if gradient:
        spread(value + SLOPE * C, block.channels, block.run, work.group, column.slope.at)
    for rests in range(2):
        if rests:       # rows that do not fill a group, as one shorter row
            after = rows * work.group * block.stride
            x, dy, out = x + after, dy + after, out + after
            rows, width = rest > 0, rest * length
        apply_rows(x, dy, gradient, out, rows, block.stride * work.group, width, none, none, none, none, &column,
                   stream)


cdef inline void apply_channel(const Block *block, const stored *x, const stored *dy, bint gradient, stored *out,
                               Py_ssize_t rows, const double *value, Py_ssize_t C, bint stream,
                               number zero) noexcept nogil:
    """Some rows of one channel."""
    apply_rows(x, dy, gradient, out, rows, block.stride, block.run, same(value[CENTRE * C], zero),
               same(value[SCALE * C], zero), same(value[SLOPE * C] if gradient else 0, zero),
               same(value[SHIFT * C], zero), NULL, stream)


cdef inline void write_block(const Work *work, Py_ssize_t tile, Py_ssize_t b, const stored *x, const stored *dy,
                             bint gradient, stored *out, bint fit) noexcept nogil:
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
                if IS_DOUBLE or fit or all_fit(value + c, C, 1, gradient):
                    apply_channel(&block, x + at, dy + at, gradient, out + at, rows, value + c, C, stream, same_vec(0))
                else:
                    apply_channel(&block, x + at, dy + at, gradient, out + at, rows, value + c, C, False, same_wide(0))
    if stream:
        finish_streaming()


cdef void normalize_block(const Work *work, Py_ssize_t tile, Py_ssize_t b, const stored *x, stored *y,
                          bint fit) noexcept nogil:
    write_block(work, tile, b, x, x, False, y, fit)


cdef void gradient_block(const Work *work, Py_ssize_t tile, Py_ssize_t b, const stored *x, const stored *dy, stored *dx,
                         bint fit) noexcept nogil:
    """dx = dy·scale + shift where no path depends on x: the same formula as y's, with centre 0."""
    if is_sloped(work.through):
        write_block(work, tile, b, x, dy, True, dx, fit)
    else:
        write_block(work, tile, b, dy, dy, False, dx, fit)
