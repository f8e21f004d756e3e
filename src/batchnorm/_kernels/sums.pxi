# ---- Sums: the two loops that sum a block ----------------------------------------------------------------------------
# Lanes run along the rows of one channel; columns run down the rows, one sum per column.

cdef struct Summed:                 # the arrays to sum
    const stored *x
    const stored *dy
    bint gradient
    const unsigned char *mask       # of the places of x, if the loops skip those that do not count
    Copies *copies                  # room for copies, if they are needed


cdef void fold_all(const double *total, Py_ssize_t channels, double *folded) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):
        folded[c] = fold(total + c * TOTALS)


cdef inline void add_lanes(double *total, const number *lanes) noexcept nogil:
    if number is vec:
        add_lanes_vec(total, lanes)
    else:
        add_lanes_wide(total, lanes)


cdef inline void add_columns(double *total, number v) noexcept nogil:
    if number is vec:
        add_vec(total, v)
    else:
        add_wide(total, v)


cdef inline Values values_from(Values at, Py_ssize_t offset) noexcept nogil:
    """Those from a place on, in the same row."""
    return Values(at.x + offset, at.dy + offset, from_place(at.mask, offset))


cdef inline void add_tree(Values at, bint gradient, const Activation *act, Py_ssize_t rows, Py_ssize_t stride,
                          Py_ssize_t count, const number *k, number *sum1, number *sum2) noexcept nogil:
    """Add Σa and Σa·d of 8, 4, 2 or 1 rows, one vector wide."""
    cdef number a[UNROLLED]
    cdef number a_d[UNROLLED]
    cdef Py_ssize_t r
    for r in range(rows):
        summands(values_from(at, r * stride), gradient, act, count, k, a + r, a_d + r)
    sum1[0] += tree(a, rows)
    sum2[0] += tree(a_d, rows)


cdef inline void add_vectors(Values at, bint gradient, const Activation *act, Py_ssize_t rows, Py_ssize_t stride,
                             Py_ssize_t vectors, Py_ssize_t count, const number *k, number *sum1,
                             number *sum2) noexcept nogil:
    """The same, several vectors wide."""
    cdef Py_ssize_t i, size = size_of(k[CENTRE])
    for i in range(vectors):
        if number is vec:
            add_tree(values_from(at, i * size), gradient, act, rows, stride, count, k, sum1 + i, sum2 + i)
        else:
            add_tree_in_float64(values_from(at, i * size), gradient, act, rows, stride, count, k, sum1 + i, sum2 + i)


cdef void add_tree_in_float64(Values at, bint gradient, const Activation *act, Py_ssize_t rows, Py_ssize_t stride,
                              Py_ssize_t count, const wide *k, wide *sum1, wide *sum2) noexcept nogil:
    """The same in float64; not inline, because it is rare."""
    add_tree(at, gradient, act, rows, stride, count, k, sum1, sum2)


cdef inline void add_rows(Values at, bint gradient, const Activation *act, Py_ssize_t rows, Py_ssize_t stride,
                          Py_ssize_t vectors, Py_ssize_t count, const number *k, number *sum1,
                          number *sum2) noexcept nogil:
    """The same for at most 8 rows, the largest tree first."""
    if rows == 8:
        add_vectors(at, gradient, act, 8, stride, vectors, count, k, sum1, sum2)
    if rows & 4:
        add_vectors(at, gradient, act, 4, stride, vectors, count, k, sum1, sum2)
    at = values_from(at, (rows & 4) * stride)
    if rows & 2:
        add_vectors(at, gradient, act, 2, stride, vectors, count, k, sum1, sum2)
    at = values_from(at, (rows & 2) * stride)
    if rows & 1:
        add_vectors(at, gradient, act, 1, stride, vectors, count, k, sum1, sum2)


cdef inline void sum_lanes(Values at, bint gradient, const Activation *act, const Block *rows,
                           const Py_ssize_t *lengths, const number *k, double *total1, double *total2) noexcept nogil:
    """Add the sums of the rows of one channel to TOTALS totals each, after CARRIED values per lane or a few more."""
    cdef number sum1[VECTORS]
    cdef number sum2[VECTORS]
    cdef Py_ssize_t r, i, j, v, stop, whole, ahead, added = 0, size = size_of(k[CENTRE]), vectors = LANES // size
    cdef Py_ssize_t length, start = rows.start, run = rows.run, stride = rows.stride, count = rows.rows
    cdef Py_ssize_t left = rows.left
    for r in range(count):
        length = length_in(lengths + r if lengths != NULL else NULL, start, run)
        # Prefetch within a long row, or else in a later one, if there is one; in cache the processor is quick enough.
        ahead = AHEAD if length > 2 * AHEAD else rows.later * stride if r + rows.later < left else 0
        if lengths != NULL or not rows.far:
            ahead = 0
        if lengths != NULL and r + FEW_ROWS < left:
            fetch(at.x + FEW_ROWS * stride, at.dy + FEW_ROWS * stride, gradient,
                  length_in(lengths + r + FEW_ROWS, start, run))
        for i from 0 <= i < length by UNROLLED * LANES:
            stop = min(length, i + UNROLLED * LANES)
            whole = stop - stop % LANES
            if ahead:
                fetch(at.x + i + ahead, at.dy + i + ahead, gradient, stop - i)
            if added == 0:
                for v in range(vectors):
                    sum1[v] = sum2[v] = same(0, k[CENTRE])
            add_rows(values_from(at, i), gradient, act, (whole - i) // LANES, LANES, vectors, size, k, sum1, sum2)
            for v in range(vectors):
                j = whole + v * size
                if j < stop:
                    add_tree(values_from(at, j), gradient, act, 1, 0, min(size, stop - j), k, sum1 + v, sum2 + v)
            added += ceil_div(stop - i, LANES)
            if added >= CARRIED:
                added = 0
                add_lanes(total1, sum1)
                add_lanes(total2, sum2)
        at = Values(at.x + stride, at.dy + stride, from_place(at.mask, run))
    if added:
        add_lanes(total1, sum1)
        add_lanes(total2, sum2)


cdef inline void sum_columns(const stored *x, const stored *dy, bint gradient, const Activation *act, Py_ssize_t rows,
                             Py_ssize_t stride, Py_ssize_t width, bint far, const Row *column, double *total1,
                             double *total2, number zero) noexcept nogil:
    """Add the sums of the columns to one total each; the totals have room for a whole vector at the end."""
    cdef number sum1, sum2
    cdef number k[COEFFICIENTS]
    cdef Py_ssize_t r, j, taken, count, size = size_of(zero)
    # Where rows begin alike, vectors after a short first one lie in one line of the cache each.
    cdef Py_ssize_t first = to_line(x) % size if stride % LINE == 0 else 0
    cdef bint follows = far and stride == width     # what is summed next is next in memory
    for r from 0 <= r < rows by UNROLLED:
        taken = min(rows - r, UNROLLED)
        j = 0
        while j < width:
            count = min(size, width - j) if j or not first else min(first, width)
            if follows:     # fetch a share of it beside each vector
                fetch(x + UNROLLED * (width + j), dy + UNROLLED * (width + j), gradient, UNROLLED * count)
            sum1 = sum2 = zero
            k[CENTRE] = column_at(column[CENTRE].at + j, zero)
            if act != NULL:
                k[SCALE] = column_at(column[SCALE].at + j, zero)
                k[SHIFT] = column_at(column[SHIFT].at + j, zero)
            if count == size:
                add_rows(Values(x + j, dy + j, NULL), gradient, act, taken, stride, 1, size, k, &sum1, &sum2)
            else:
                add_rows(Values(x + j, dy + j, NULL), gradient, act, taken, stride, 1, count, k, &sum1, &sum2)
            add_columns(total1 + j, sum1)
            add_columns(total2 + j, sum2)
            j += count
        x += taken * stride
        dy += taken * stride


cdef void spread(const real *restrict own, Py_ssize_t channels, Py_ssize_t run, Py_ssize_t group,
                 real *restrict column) noexcept nogil:
    """Copy the value of each channel to all columns of a (grouped) row, and to the first ones of the next row."""
    cdef Py_ssize_t c, j, length = channels * run
    if run == 1:
        memcpy(column, own, channels * sizeof(real))
    else:
        for c in range(channels):
            for j from 0 <= j < run by VEC:         # beyond the channel too, where the next one follows
                store_column(column + c * run + j, everywhere_vec(own[c]))
    for j in range(length, length * group + BEYOND):
        column[j] = column[j - length]


cdef inline void spread_wide(const double *value, Py_ssize_t channels, Py_ssize_t run, Py_ssize_t group,
                             real *column) noexcept nogil:
    """The same from float64."""
    cdef real own[WIDEST]
    narrow(value, own, channels)
    spread(own, channels, run, group, column)


cdef void gather(double *column, Py_ssize_t channels, Py_ssize_t run, Py_ssize_t group, double *value) noexcept nogil:
    """Add up the columns of each channel, always in the same order."""
    cdef Py_ssize_t c, half, j
    while group > 1:
        half = group // 2
        group -= half
        for j in range(half * channels * run):
            column[j] += column[group * channels * run + j]
    if run == 1:
        memcpy(value, column, channels * sizeof(double))
        return
    for c in range(channels):
        value[c] = sum_of(column + c * run, run)


cdef void sum_block(const Work *work, const Block *block, const stored *x, const stored *dy, bint gradient,
                    const Activation *activation, const double *pivot, double *sum1, double *sum2,
                    number zero) noexcept nogil:
    """Σa and Σa·d of each channel of the block; with an activation, `pivot` points to a row of the coefficients."""
    cdef Activation act
    cdef Copies copied
    cdef Copies *copies = &copied if is_copied(work, gradient) else NULL
    cdef bint masked = copies == NULL and work.selection.mask != NULL
    cdef const unsigned char *mask = work.selection.mask + block.place if masked else NULL
    cdef Summed summed = Summed(x, dy, gradient, mask, copies)
    cdef bint two = gradient or work.selection.weights != NULL
    # Only these loops call functions or look at a mask: in the others, what they need stays in registers.
    cdef bint rare = not block.columns and (masked or copies != NULL)
    if number is wide:
        sum_block_of(work, block, &summed, two, activation if gradient and activation.on else NULL, pivot, sum1, sum2,
                     zero)
    elif rare and two:
        act = activation[0]
        sum_block_of_lanes(work, block, &summed, True, True, &act if gradient and act.on else NULL, pivot, sum1, sum2,
                           zero)
    elif rare:
        sum_block_of_lanes(work, block, &summed, True, False, NULL, pivot, sum1, sum2, zero)
    elif not two:
        sum_block_of(work, block, &summed, False, NULL, pivot, sum1, sum2, zero)
    elif not (gradient and activation.on):
        sum_block_of(work, block, &summed, True, NULL, pivot, sum1, sum2, zero)
    elif is_relu(activation):
        act = as_relu(activation[0])
        sum_block_of(work, block, &summed, True, &act, pivot, sum1, sum2, zero)
    else:
        act = activation[0]
        sum_block_of(work, block, &summed, True, &act, pivot, sum1, sum2, zero)


cdef inline void sum_block_of(const Work *work, const Block *block, const Summed *summed, bint two,
                              const Activation *act, const double *pivot, double *sum1, double *sum2,
                              number zero) noexcept nogil:
    if block.columns:
        sum_block_of_columns(work, block, summed, two, act, pivot, sum1, sum2, zero)
    else:
        sum_block_of_lanes(work, block, summed, number is wide, two, act, pivot, sum1, sum2, zero)


cdef void sum_block_in_float64(const Work *work, const Block *block, const stored *x, const stored *dy, bint gradient,
                               const Activation *act, const double *pivot, double *sum1, double *sum2) noexcept nogil:
    if IS_DOUBLE:
        sum_block(work, block, x, dy, gradient, act, pivot, sum1, sum2, same_vec(0))
    else:
        sum_block(work, block, x, dy, gradient, act, pivot, sum1, sum2, same_wide(0))


cdef inline void sum_block_of_lanes(const Work *work, const Block *block, const Summed *summed, bint masked, bint two,
                                    const Activation *act, const double *pivot, double *sum1, double *sum2,
                                    number zero) noexcept nogil:
    cdef number k[COEFFICIENTS]
    cdef double total1[TOGETHER * TOTALS]
    cdef double total2[TOGETHER * TOTALS]
    cdef const stored *x
    cdef const stored *dy
    cdef const unsigned char *mask
    cdef const Py_ssize_t *lengths
    cdef Block part = no_rows(block), rows, copy
    cdef Py_ssize_t c, r, at
    memset(total1, 0, block.channels * TOTALS * sizeof(double))
    memset(total2, 0, block.channels * TOTALS * sizeof(double))
    while next_rows(work, block, &part):
        for r from 0 <= r < part.rows by part.visit:
            rows = part
            rows.rows = min(part.visit, part.rows - r)
            rows.left -= r
            rows.place += r * part.run
            lengths = lengths_at(work, rows.place)
            for c in range(block.channels):
                at = part.first - block.first + r * part.stride + c * part.run
                x, dy = summed.x + at, summed.dy + at
                if masked and summed.copies != NULL:
                    copy = rows
                    copy.run *= take(work, &rows, 1, x, dy, summed.gradient, pivot + c, summed.copies)
                    copy.rows, copy.left = 1, 1
                    x, dy = summed.copies.x, summed.copies.a
                k[CENTRE] = same(pivot[c], zero)
                if act != NULL:
                    k[SCALE] = same(pivot[SCALE * work.C + c], zero)
                    k[SHIFT] = same(pivot[SHIFT * work.C + c], zero)
                mask = from_place(summed.mask, r * part.run) if masked else NULL
                sum_lanes(Values(x, dy, mask), two, act, &copy if masked and summed.copies != NULL else &rows,
                          lengths, k, total1 + c * TOTALS, total2 + c * TOTALS)
    fold_all(total1, block.channels, sum1)
    fold_all(total2, block.channels, sum2)


cdef inline void sum_block_of_columns(const Work *work, const Block *block, const Summed *summed, bint two,
                                      const Activation *act, const double *pivot, double *sum1, double *sum2,
                                      number zero) noexcept nogil:
    cdef Row column[SHIFT + 1]
    cdef WideRow total1, total2
    cdef const stored *x
    cdef const stored *dy
    cdef Block part = no_rows(block), some
    cdef Py_ssize_t length = block.channels * block.run, r, rows, rest, width, stride, rests
    spread_wide(pivot, block.channels, block.run, work.group, column[CENTRE].at)
    if act != NULL:
        spread_wide(pivot + SCALE * work.C, block.channels, block.run, work.group, column[SCALE].at)
        spread_wide(pivot + SHIFT * work.C, block.channels, block.run, work.group, column[SHIFT].at)
    memset(total1.at, 0, (length * work.group + VEC) * sizeof(double))
    memset(total2.at, 0, (length * work.group + VEC) * sizeof(double))
    while next_rows(work, block, &part):
        r = 0
        while r < part.rows:
            x = summed.x + (part.first - block.first) + r * part.stride
            dy = summed.dy + (part.first - block.first) + r * part.stride
            rows, stride = part.rows - r, part.stride
            if summed.copies != NULL:
                some = part
                some.place += r
                some.rows = min(rows, COPIED // length)
                r += some.rows
                rows = take(work, &some, block.channels, x, dy, summed.gradient, pivot, summed.copies)
                x, dy, stride = summed.copies.x, summed.copies.a, length
            else:
                r = part.rows
            rest = rows % work.group
            rows, width = rows // work.group, length * work.group
            for rests in range(2):
                if rests:       # rows that do not fill a group, as one shorter row
                    x, dy = x + rows * work.group * stride, dy + rows * work.group * stride
                    rows, width = rest > 0, rest * length
                sum_columns(x, dy, two, act, rows, stride * work.group, width, block.far, column, total1.at,
                            total2.at, zero)
    gather(total1.at, block.channels, block.run, work.group, sum1)
    gather(total2.at, block.channels, block.run, work.group, sum2)
