# ---- Apply: write one block -----------------------------------------------------------------------------------------
# One loop writes y and dx, for both layouts. A value is read before its place is written, so that out may be an input.

cdef enum:                          # what follows the formula of y or precedes that of dx; each has its own loops
    NOTHING, ACTIVATION, ANYTHING

cdef struct Operands:               # whole arrays, and the operations on their values
    const stored *x
    const stored *dy
    const stored *add
    stored *out
    unsigned char *closed
    const unsigned char *mask       # only if a row may have holes
    const real *weights
    Py_ssize_t places               # of a row
    real fill
    Activation act
    bint sloped                     # dx depends on x


cdef void put(stored *out, Py_ssize_t places, real fill, bint stream) noexcept nogil:
    cdef vec v = everywhere_vec(fill)
    cdef stored value = stored_of(fill)
    cdef Py_ssize_t i, start, stop
    if stream:
        start = min(to_line(out), places)
        stop = places - (places - start) % LINE
        for i from start <= i < stop by VEC:
            stream_vec(out + i, v)
        for i in range(start):
            out[i] = value
        for i in range(stop, places):
            out[i] = value
    elif places >= VEC:
        for i from 0 <= i < places - VEC by VEC:
            store_vec(out + i, v)
        store_vec(out + places - VEC, v)
    elif places > 0:
        store_first(out, v, places)


cdef void blank_rows(const Work *work, const Block *block, real fill, stored *out, bint stream) noexcept nogil:
    """Fill the rows that do not count, if a row is one place per channel."""
    cdef Py_ssize_t r = 0, end = block.place + block.rows
    cdef Run run = Run(0, block.place)
    if work.selection.mask != NULL:
        for r in range(block.rows):
            if not work.selection.mask[block.place + r]:
                put(out + r * block.stride, block.channels, fill, stream)
    elif work.selection.lengths != NULL:
        while r < block.rows:
            next_run(work, &run, end)
            for r in range(r, run.start - block.place):
                put(out + r * block.stride, block.channels, fill, stream)
            r = run.stop - block.place


cdef inline void note_closed(Notes *notes, const Activation *act, number pre, Py_ssize_t count) noexcept nogil:
    cdef unsigned found = at_most_bits(pre, everywhere(act.low, pre))
    if act.bounded:
        found |= at_most_bits(everywhere(act.high, pre), pre)
    note(notes, found & ((1u << count) - 1), count)


cdef inline number calculated(const Operands *o, bint gradient, int kind, Py_ssize_t i, Py_ssize_t j,
                              Py_ssize_t count, Notes *notes, Py_ssize_t place, const number *k) noexcept nogil:
    """y or dx at `count` places, from j on in the row at offset i, whose first place is `place`."""
    cdef number pre, dy, weight, x = load(o.x + i + j, count, k[CENTRE])
    if gradient:
        dy = load(o.dy + i + j, count, k[CENTRE])
        if kind != NOTHING and o.act.on:
            dy = passed(dy, written(x, k, &o.act), &o.act)
        if kind != NOTHING and not o.sloped:
            x = k[CENTRE]
        if kind == ANYTHING and o.weights != NULL:
            weight = everywhere(o.weights[place], x) if o.places == 1 else column_at(o.weights + place + j, x)
            return dx_of(dy, weighted_through_of(x, weight, k), k)
        return dx_of(dy, through_of(x, k), k)
    pre = y_of(x, k)
    if kind == ANYTHING and o.add != NULL:
        pre += load(o.add + i + j, count, k[CENTRE])
    if kind == NOTHING or not o.act.on:
        return pre
    pre = rounded(pre)
    if kind == ANYTHING and o.closed != NULL:
        note_closed(notes, &o.act, pre, count)
    return activated(pre, &o.act)


cdef inline number applied(const Operands *o, bint gradient, int kind, Py_ssize_t i, Py_ssize_t j, Py_ssize_t count,
                           Notes *notes, Py_ssize_t place, const number *k, const Row *column) noexcept nogil:
    """The same, but each column may have its own coefficients."""
    cdef number v
    cdef number own[COEFFICIENTS]
    if column == NULL:
        v = calculated(o, gradient, kind, i, j, count, notes, place, k)
        if kind == ANYTHING and o.mask != NULL:
            v = counted(o.mask + place + j, v, everywhere(o.fill, v))
        return v
    own[CENTRE] = column_at(column[CENTRE].at + j, k[CENTRE])
    own[SCALE] = column_at(column[SCALE].at + j, k[CENTRE])
    own[SHIFT] = column_at(column[SHIFT].at + j, k[CENTRE])
    own[SLOPE] = column_at(column[SLOPE].at + j, k[CENTRE])
    own[OFFSET] = column_at(column[OFFSET].at + j, k[CENTRE])
    return calculated(o, gradient, kind, i, j, count, notes, place, own)


cdef inline void stream_rows(const Operands *o, bint gradient, int kind, Py_ssize_t i, Py_ssize_t place,
                             Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t length, const vec *k, const Row *column,
                             bint begun, bint follows, const vec *after) noexcept nogil:
    """Write the rows around the cache, line by line.

    A line that begins in one row and ends in the next is written whole, because two halves take as long as many lines:
    `after` has the coefficients of the channel that follows, and `begun` says that the row's first line is written.
    """
    cdef Py_ssize_t r, j, start, stop, count
    cdef bint joined = kind != ANYTHING and column != NULL and stride == length and length % LINE == 0
    cdef vec first, second
    cdef stored *out = o.out + i
    cdef Notes notes
    for r in range(rows):
        start = min(to_line(out), length)
        stop = length + start if joined and r + 1 < rows else length - (length - start) % LINE
        if not (joined or follows):     # stores through the cache delay those after them
            prefetch(out + stop)
            if column != NULL:
                prefetch(out + stride)
        if LINE == VEC:             # otherwise a line is an even number of vectors
            for j from start <= j < stop by VEC:
                stream_vec(out + j, applied(o, gradient, kind, i, j, VEC, &notes, place, k, column))
        else:
            for j from start <= j < stop by 2 * VEC:
                first = applied(o, gradient, kind, i, j, VEC, &notes, place, k, column)
                second = applied(o, gradient, kind, i, j + VEC, VEC, &notes, place, k, column)
                stream_two(out + j, first, second)
        if stop < length and follows:
            for j from stop <= j < stop + LINE by VEC:
                first = applied(o, gradient, kind, i, j, VEC, &notes, place, k, column)
                second = applied(o, gradient, kind, i, j, VEC, &notes, place, after, column)
                stream_vec(out + j, first_lanes(first, second, max(0, min(length - j, VEC))))
            stop = length
        j = 0 if start and not begun else stop
        while j < length:           # before the first whole line and after the last
            count = min(VEC, (start if j < start else length) - j)
            store_each(out + j, applied(o, gradient, kind, i, j, count, &notes, place, k, column), count)
            j = stop if j + count == start else j + count
        begun = joined
        i += stride
        out += stride
        place += o.places


cdef inline void apply_rows(const Operands *o, bint gradient, int kind, Py_ssize_t i, Py_ssize_t place,
                            Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t length, const number *k,
                            const Row *column) noexcept nogil:
    """Write the rows."""
    cdef Py_ssize_t r, j, start, count, size = size_of(k[CENTRE])
    cdef Py_ssize_t last = length - size
    cdef number first, second, head = k[CENTRE]
    cdef stored *out = o.out + i
    cdef Notes here
    cdef Notes *notes = &here
    for r in range(rows):
        if kind == ANYTHING and o.closed != NULL:
            here = notes_from(o.closed, i)
            for j from 0 <= j < length by size:
                count = min(size, length - j)
                write(out + j, applied(o, gradient, kind, i, j, count, notes, place, k, column), count)
            finish_notes(notes)
        elif length < size:
            if length > 0:
                write(out, applied(o, gradient, kind, i, 0, length, notes, place, k, column), length)
        else:
            # Stores that cross lines of the cache are slow, so vectors lie in one line each, except for the first and
            # the last; columns have coefficients that begin with the row. A vector is read before the one before it is
            # written: the two may overlap, and processors make a load wait for a store just before it that lies at the
            # same place of another page.
            start = to_line(out) % size if column == NULL else 0
            if start > last:
                start = 0
            if start:
                head = applied(o, gradient, kind, i, 0, size, notes, place, k, column)
            j = start
            if number is vec and PACKS_TWO and kind != ANYTHING:
                while length - j >= 3 * size:
                    first = applied(o, gradient, kind, i, j, size, notes, place, k, column)
                    second = applied(o, gradient, kind, i, j + size, size, notes, place, k, column)
                    store_two(out + j, first, second)
                    j += 2 * size
            first = applied(o, gradient, kind, i, j, size, notes, place, k, column)
            for j from j + size <= j < length by size:
                second = applied(o, gradient, kind, i, min(j, last), size, notes, place, k, column)
                write(out + j - size, first, size)
                first = second
            write(out + last, first, size)
            if start:
                write(out, head, size)
        i += stride
        out += stride
        place += o.places


cdef inline void apply_columns(const Work *work, const Block *block, const Operands *o, bint gradient, int kind,
                               bint stream) noexcept nogil:
    """Write the rows of the block, `group` of them side by side as one, with coefficients spread over the columns."""
    cdef Row column[COEFFICIENTS]
    cdef vec k[COEFFICIENTS]
    cdef Block part = no_rows(block)
    cdef Py_ssize_t length = block.channels * block.run, first, width, rows, rest, row, rests
    for row in range(COEFFICIENTS):
        k[row] = same_vec(0)
        if (row != SHIFT or o.act.on) if gradient else row <= SHIFT:
            spread(own_row(work, row) + block.channel, block.channels, block.run, work.group, column[row].at)
    while next_rows(work, block, &part):
        first, width = part.first, length * work.group
        rows, rest = part.rows // work.group, part.rows % work.group
        for rests in range(2):
            if rests:       # rows that do not fill a group, as one shorter row
                first += rows * work.group * block.stride
                rows, width = rest > 0, rest * length
            if stream:
                stream_rows(o, gradient, kind, first, part.place, rows, block.stride * work.group, width, k, column,
                            False, False, NULL)
            else:
                apply_rows(o, gradient, kind, first, part.place, rows, block.stride * work.group, width, k, column)
    blank_rows(work, block, o.fill, o.out + block.first, stream)


cdef void apply_channel_in_float64(const Operands *o, bint gradient, Py_ssize_t at, Py_ssize_t place,
                                   Py_ssize_t stride, Py_ssize_t length, const double *value,
                                   Py_ssize_t C) noexcept nogil:
    """Write a row of one channel in float64; not inline, because it is rare."""
    cdef wide k[COEFFICIENTS]
    cdef Py_ssize_t row
    for row in range(COEFFICIENTS):
        k[row] = same_wide(value[row * C] if gradient or row <= SHIFT else 0)
    apply_rows(o, gradient, ANYTHING, at, place, 1, stride, length, k, NULL)


cdef inline void set_vectors(const real *own, Py_ssize_t C, bint gradient, vec *k) noexcept nogil:
    """Set the coefficients of a channel."""
    k[CENTRE] = everywhere_vec(own[CENTRE * C])
    k[SCALE] = everywhere_vec(own[SCALE * C])
    k[SHIFT] = everywhere_vec(own[SHIFT * C])
    if gradient:
        k[SLOPE] = everywhere_vec(own[SLOPE * C])
        k[OFFSET] = everywhere_vec(own[OFFSET * C])


cdef inline void apply_channels(const Work *work, const Block *block, Operands *o, bint gradient, int kind,
                                bint stream, const double *value, bint fit) noexcept nogil:
    """Write a row of each channel, then their next rows: in memory order."""
    cdef const real *own = own_row(work, 0) + block.channel
    cdef vec k[COEFFICIENTS]
    cdef vec after[COEFFICIENTS]
    cdef bint begun, follows
    cdef const Py_ssize_t *lengths
    cdef Py_ssize_t r, c, at, place, length, row, ahead, fetched, C = work.C
    for row in range(COEFFICIENTS):
        k[row] = after[row] = same_vec(0)
    for r in range(block.rows):
        place = block.place + r * block.run
        at = block.first + r * block.stride
        lengths = lengths_at(work, place)
        fetched = length = length_in(lengths, block.start, block.run)
        ahead = work.next_tile
        if lengths != NULL:     # the processor predicts the next values, but not those of the next channel
            ahead, fetched = block.run, min(length, FETCHED)
            for c in range(block.channels):
                put(o.out + at + c * block.run + length, block.run - length, o.fill, stream)
        begun = False
        if stream:
            prefetch(o.out + at + block.stride)
        for c in range(block.channels):
            if ahead:
                fetch(o.x + at + ahead, o.dy + at + ahead, gradient, fetched)
            set_vectors(own + c, C, gradient, k)
            follows = stream and kind != ANYTHING and lengths == NULL and length >= 2 * LINE and c + 1 < block.channels
            if follows:
                set_vectors(own + c + 1, C, gradient, after)
            if not (kind != ANYTHING or fit or all_fit(value + c, C, 1, gradient)):
                o.act.in_steps = gradient and all_fit(value + c, C, 1, False)
                apply_channel_in_float64(o, gradient, at, place, block.stride, length, value + c, C)
            elif stream:
                stream_rows(o, gradient, kind, at, place, 1, block.stride, length, k, NULL, begun, follows,
                            after)
                begun = follows
            else:
                apply_rows(o, gradient, kind, at, place, 1, block.stride, length, k, NULL)
            at += block.run
    if work.S == 1:
        blank_rows(work, block, o.fill, o.out + block.first, stream)


cdef inline void apply_kind(const Work *work, const Block *block, Operands *o, bint gradient, int kind, bint stream,
                            const double *value, bint fit) noexcept nogil:
    """Write the block; `kind` is a literal, so that each has loops of its own."""
    if fit and written_in_columns(work):
        apply_columns(work, block, o, gradient, kind, stream)
    elif kind == ANYTHING:
        apply_channels(work, block, o, gradient, kind, stream, value, fit)
    elif stream:        # as a literal: loops with both kinds of stores are slower
        apply_channels(work, block, o, gradient, kind, True, value, fit)
    else:
        apply_channels(work, block, o, gradient, kind, False, value, fit)


cdef inline void write_block(const Work *work, Py_ssize_t tile, Py_ssize_t b, const stored *x, const stored *dy,
                             bint gradient, stored *out, bint fit, real fill) noexcept nogil:
    cdef Block block = block_of(work, tile, b)
    cdef const double *value = work.coefficient + block.channel
    cdef bint stream = CAN_STREAM and work.stream and out != x and out != dy and out != work.add and work.closed == NULL
    cdef bint rare = gradient and work.activation.on and not TRAINS
    cdef Operands o
    o.x, o.dy, o.out, o.act = x, dy, out, work.activation
    o.add, o.closed, o.sloped = work.add, work.closed, is_sloped(work.through)
    o.mask = work.selection.mask if work.S > 1 else NULL
    o.weights = <const real *> work.selection.weights if gradient else NULL
    o.places, o.fill = work.S, fill
    # Unrolled loops for y and dx, alone or with an activation, and short ones for what is rare.
    if not fit or rare or o.add != NULL or o.closed != NULL or o.mask != NULL or o.weights != NULL:
        apply_kind(work, &block, &o, gradient, ANYTHING, stream, value, fit)
    elif not o.act.on:
        apply_kind(work, &block, &o, gradient, NOTHING, stream, value, fit)
    elif is_relu(&o.act):
        o.act = as_relu(o.act)
        apply_kind(work, &block, &o, gradient, ACTIVATION, stream, value, fit)
    else:
        apply_kind(work, &block, &o, gradient, ACTIVATION, stream, value, fit)
    if stream:
        finish_streaming()


cdef void normalize_block(const Work *work, Py_ssize_t tile, Py_ssize_t b, const stored *x, stored *y, bint fit,
                          real fill) noexcept nogil:
    write_block(work, tile, b, x, x, False, y, fit, fill)


cdef void gradient_block(const Work *work, Py_ssize_t tile, Py_ssize_t b, const stored *x, const stored *dy, stored *dx,
                         bint fit) noexcept nogil:
    """Write dx; if it does not depend on x, dx = dy·scale + shift is the formula of y with centre 0."""
    if is_sloped(work.through) or work.activation.on or work.selection.weights != NULL:
        write_block(work, tile, b, x, dy, True, dx, fit, 0)
    else:
        normalize_block(work, tile, b, dy, dx, fit, 0)


cdef void pass_run(const stored *dy, const unsigned char *closed, stored *out, Py_ssize_t start, Py_ssize_t stop,
                   const Activation *act) noexcept nogil:
    """Write dy·act′ at the places from start to stop."""
    cdef Py_ssize_t i
    cdef vec g
    for i from start <= i < stop by VEC:
        g = load(dy + i, min(VEC, stop - i), same_vec(0))
        g = closed_vec(closed, i, everywhere_vec(act.slope) * g if act.leaky else same_vec(0), g)
        write(out + i, g, min(VEC, stop - i))
