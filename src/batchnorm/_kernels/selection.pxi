# ---- Selection: which values count, and how much --------------------------------------------------------------------
# A mask, lengths or weights are the same for all channels: they belong to the places of a channel, in memory order.
# Lengths need no mask. In rows of one channel the summing loops skip places by the mask. Otherwise they see copies: of
# the rows that count, or, with weights, of weighted deviations instead of dy.

cdef struct Run:                    # places that count side by side
    Py_ssize_t start, stop

cdef struct Copies:                 # made by `take` for the summing loops
    stored x[COPIED + LANES]
    stored a[COPIED + LANES]


cdef inline const unsigned char *from_place(const unsigned char *mask, Py_ssize_t place) noexcept nogil:
    """The mask from a place on, or NULL if there is none."""
    return mask + place if mask != NULL else NULL


cdef inline const real *weights_at(const Work *work, Py_ssize_t place) noexcept nogil:
    return <const real *> work.selection.weights + place


cdef inline bint is_copied(const Work *work, bint gradient) noexcept nogil:
    """Whether the summing loops see copies; weights do not apply to gradients."""
    return work.selection.copied and (work.selection.mask != NULL or not gradient)


cdef inline bint counts(const Work *work, Py_ssize_t place) noexcept nogil:
    cdef const Selection *selection = &work.selection
    if selection.mask != NULL:
        return selection.mask[place]
    if selection.lengths != NULL:
        return place % selection.period < selection.lengths[place // selection.period]
    return True


cdef bint next_run(const Work *work, Run *run, Py_ssize_t end) noexcept nogil:
    """Find the next places within lengths from run.stop to the end, if there are any; without lengths, all."""
    cdef const Selection *selection = &work.selection
    cdef Py_ssize_t start = run.stop, first
    run.stop = end
    if selection.lengths != NULL:
        while start < end:
            first = start - start % selection.period
            run.stop = min(end, first + selection.lengths[start // selection.period])
            if start < run.stop:
                break
            start = min(end, first + selection.period)
    run.start, run.stop = start, run.stop if start < end else end
    return start < end


cdef bint next_rows(const Work *work, const Block *block, Block *rows) noexcept nogil:
    """Find the next rows of the block within lengths, if a row is one place per channel; otherwise all rows, once."""
    cdef Run run = Run(0, rows.place + rows.rows)
    cdef Py_ssize_t end = block.place + block.rows
    if work.S > 1 or work.selection.lengths == NULL:
        if rows.rows:
            return False
        rows[0] = block[0]
        return True
    if not next_run(work, &run, end):
        return False
    rows.place, rows.rows = run.start, run.stop - run.start
    rows.first = block.first + (run.start - block.place) * block.stride
    rows.left = block.left - (run.start - block.place)
    return True


cdef Block no_rows(const Block *block) noexcept nogil:
    """The initial rows of a loop over `next_rows`."""
    cdef Block rows = block[0]
    rows.rows = 0
    return rows


cdef inline const Py_ssize_t *lengths_at(const Work *work, Py_ssize_t place) noexcept nogil:
    """The lengths of the rows of one channel from a place on; NULL if rows count entirely."""
    if work.selection.lengths == NULL or work.S == 1:
        return NULL
    return work.selection.lengths + place // work.S


cdef inline Py_ssize_t length_in(const Py_ssize_t *length, Py_ssize_t start, Py_ssize_t run) noexcept nogil:
    """The number of places that count in a piece of a row."""
    return run if length == NULL else max(0, min(run, length[0] - start))


cdef double weight_of(const real *weights, Py_ssize_t places) noexcept nogil:
    """The sum of the weights, exact to the last digit because it divides every sum."""
    cdef double total = 0, rest = 0, low
    cdef Py_ssize_t i
    for i in range(places):
        total = two_sum(total, weights[i], &low)
        rest += low
    return total + rest


cdef inline Py_ssize_t has_part(const unsigned char *mask, const real *weights, Py_ssize_t place) noexcept nogil:
    """Whether a place counts in the statistics."""
    return mask[place] if mask != NULL else weights[place] > 0


cdef double census_of(const Work *work, const Block *block, Py_ssize_t *place) noexcept nogil:
    """The number of values of a channel that count in the block, or their weight; and the places of some."""
    cdef const unsigned char *mask = from_place(work.selection.mask, block.place)
    cdef const real *weights = <const real *> work.selection.weights
    cdef Py_ssize_t i, k = 0, n = 0, seen = 0, places = block.rows * block.run
    cdef Run run = Run(0, block.place)
    memset(place, 0, PIVOTED * sizeof(Py_ssize_t))
    weights = weights + block.place if weights != NULL else NULL
    if mask != NULL or weights != NULL:
        if mask != NULL:
            for i in range(places):
                n += mask[i]
        else:
            for i in range(places):
                n += weights[i] > 0
        if n:
            for k in range(PIVOTED):
                i = (2 * k + 1) * places // (2 * PIVOTED)
                while not has_part(mask, weights, i):
                    i = i + 1 if i + 1 < places else 0
                place[k] = i
    else:
        while next_run(work, &run, block.place + places):
            n += run.stop - run.start
        run.stop = block.place
        while next_run(work, &run, block.place + places):
            while k < PIVOTED and (2 * k + 1) * n // (2 * PIVOTED) < seen + (run.stop - run.start):
                place[k] = run.start - block.place + (2 * k + 1) * n // (2 * PIVOTED) - seen
                k += 1
            seen += run.stop - run.start
    for k in range(PIVOTED):
        i = place[k]
        place[k] = i * block.stride if block.run == 1 else i // block.run * block.stride + i % block.run
    return n if weights == NULL else weight_of(weights, places)


cdef void take_census(Work *work) noexcept nogil:
    cdef Block block
    cdef Py_ssize_t b
    cdef double n
    work.census[0].before = work.census[0].rest = 0
    for b in range(work.blocks):
        block = block_of(work, 0, b)
        n = census_of(work, &block, work.census[b].place)
        work.census[b + 1].before = two_sum(work.census[b].before, n, &work.census[b + 1].rest)
        work.census[b + 1].rest += work.census[b].rest


cdef inline double values_in(const Work *work, Py_ssize_t first, Py_ssize_t stop) noexcept nogil:
    """The number of values of one channel that count in these blocks, or their weight."""
    cdef const Census *start = work.census + first
    cdef const Census *end = work.census + min(stop, work.blocks)
    return (end.before - start.before) + (end.rest - start.rest)


cdef void weigh(const stored *x, const double *pivot, const real *weights, Py_ssize_t channels, Py_ssize_t places,
                stored *copy, stored *a) noexcept nogil:
    """w·(x − pivot) for neighbouring channels, or for the places of one channel."""
    cdef Py_ssize_t i
    memcpy(copy, x, channels * places * sizeof(stored))
    if channels > 1:
        for i in range(channels):
            a[i] = <stored> weighted(x[i], <real> pivot[i], weights[0])
    else:
        for i in range(places):
            a[i] = <stored> weighted(x[i], <real> pivot[0], weights[i])


cdef Py_ssize_t take(const Work *work, const Block *rows, Py_ssize_t channels, const stored *x, const stored *dy,
                     bint gradient, const double *pivot, Copies *copies) noexcept nogil:
    """Copy rows of one channel, or of several if a row is one place per channel; return how many were copied."""
    cdef const Selection *selection = &work.selection
    cdef Py_ssize_t r, at, taken = 0, place = rows.place, places = rows.run, size = channels * places
    cdef Py_ssize_t later = max(1, AHEAD // size) * rows.stride
    for r in range(rows.rows):
        at = taken * size
        taken += 1
        if work.S == 1:
            fetch(x + later, dy + later, gradient, size)
        if selection.weights != NULL:
            weigh(x, pivot, weights_at(work, place), channels, places, copies.x + at, copies.a + at)
        elif not selection.mask[place]:
            taken -= 1
        else:
            memcpy(copies.x + at, x, size * sizeof(stored))
            if gradient:
                memcpy(copies.a + at, dy, size * sizeof(stored))
        x, dy, place = x + rows.stride, dy + rows.stride, place + places
    return taken
